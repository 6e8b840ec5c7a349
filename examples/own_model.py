"""A model of your own under any planner: dynamics as a function, with the reward that you know."""

import worldmpc
from worldmpc.envs.toy import PointMass
from worldmpc.models.composed import ComposedModel, FunctionDynamics, check_model


def move(z, action):  # any function of tensors with any leading dimensions, a network of yours as well
    return z + 0.1 * action.clamp(-1, 1)


def reward(z, action, next_z):
    return 1.0 - next_z.abs().mean(-1)


def main(episodes=4):
    envs = worldmpc.make_envs("toy/pointmass", worldmpc.EnvConfig(num_envs=episodes))
    agent = worldmpc.make_agent(envs, agent="mpc", planner="icem", **{"planner.horizon": 8})
    agent.model = ComposedModel(FunctionDynamics(move), reward=reward)
    check_model(agent.model, envs.spec.obs_shape, envs.spec.action_dim)  # says which shape is wrong before an hour is lost
    result = worldmpc.evaluate(agent, envs, episodes)
    print(f"icem: mean return {result.mean_return:.2f}; the best possible average is {PointMass.OPTIMAL_RETURN}")
    return result.mean_return


if __name__ == "__main__":
    main()
