"""A planner of your own in the slot of ours: anything with `init`, `noise_specs` and `plan` works with every model."""

import torch

import worldmpc
from worldmpc.noise import NoiseSpec
from worldmpc.planners import rollout_return
from worldmpc.types import PlanResult, PlanState


class AntitheticShooting:
    """Random shooting with pairs of opposite sequences around the last plan."""

    def __init__(self, action_dim, discount, horizon=10, pairs=64, std=0.7):
        self.action_dim, self.discount, self.horizon, self.pairs, self.std = action_dim, discount, horizon, pairs, std

    def init(self, num_envs, device):
        mean = torch.zeros(num_envs, self.horizon, self.action_dim, device=device)
        return PlanState(mean, mean[:, None][:, :0])

    def noise_specs(self, num_envs):  # randomness is declared here and handed to `plan`, so that every plan can be repeated
        return {
            "samples": NoiseSpec("normal", (self.horizon, num_envs, self.pairs, self.action_dim)),
            "terminal": NoiseSpec("normal", (num_envs, 2 * self.pairs, self.action_dim)),
            "critics": NoiseSpec("subset", (2,), 2),
        }

    def plan(self, model, z, state, noise, explore):
        center = state.mean.transpose(0, 1)[:, :, None]  # [H, E, 1, A]
        step = self.std * noise["samples"]
        actions = torch.cat((center + step, center - step), 2).clamp(-1, 1)  # [H, E, S, A]
        starts = z[:, None].expand(-1, 2 * self.pairs, -1)
        returns = rollout_return(model, starts, actions, self.discount, noise["terminal"], noise["critics"])
        value, best = returns.max(1)
        plan = actions.gather(2, best[None, :, None, None].expand(self.horizon, -1, 1, self.action_dim))[:, :, 0].transpose(0, 1)
        warm = torch.cat((plan[:, 1:], torch.zeros_like(plan[:, :1])), 1)
        return PlanResult(plan[:, 0], plan[:, 0], plan, torch.full_like(plan, self.std), value, PlanState(warm, state.elites), {})


def main(episodes=4):
    envs = worldmpc.make_envs("gym/Pendulum-v1", worldmpc.EnvConfig(num_envs=episodes))
    agent = worldmpc.make_agent(envs, agent="mpc")  # knows the pendulum's equations
    agent.planner = AntitheticShooting(envs.spec.action_dim, agent.discount)  # as of tdmpc2, mbmpc and all others that plan
    result = worldmpc.evaluate(agent, envs, episodes)
    print(f"mean return {result.mean_return:.0f}; above -200 the pendulum swings up and stays there")
    return result.mean_return


if __name__ == "__main__":
    main()
