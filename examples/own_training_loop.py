"""Write the training loop yourself: environments, replay, agent and planner are ordinary objects."""

import torch

import worldmpc
from worldmpc.data.replay import Replay
from worldmpc.functional import tree_where
from worldmpc.types import Transition


def main(decisions=400):
    envs = worldmpc.make_envs("toy/balance", worldmpc.EnvConfig(num_envs=4))
    agent = worldmpc.make_agent(envs, preset="debug")
    horizon, batch_size = agent.config.planner.horizon, agent.config.loss.batch_size
    replay = Replay(10_000, envs.num_envs, envs.spec.obs_shape, envs.spec.action_dim, horizon, device=agent.device)
    generator = torch.Generator().manual_seed(0)

    obs, carry = envs.reset(), agent.init_carry(envs.num_envs)
    while len(replay) < decisions:
        output = agent.act(carry, obs, "explore")  # the carry holds the planner's warm start: nothing is hidden
        step = envs.step(output.action)
        replay.add(Transition(obs, output.action, step.reward, step.terminated, step.truncated, step.next_obs, step.valid))
        fresh = step.terminated | step.truncated | ~step.valid  # the last: a step of some vector environments that was only a reset
        carry = tree_where(fresh, agent.init_carry(envs.num_envs), output.carry)
        obs = step.obs
        if replay.num_windows():
            metrics = agent.update(replay.sample(torch.rand(batch_size, dtype=torch.float64, generator=generator)))
    print(f"{agent.updates} updates, value loss {float(metrics['value_loss']):.3f}")
    return agent


if __name__ == "__main__":
    main()
