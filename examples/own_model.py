"""A model of your own under any planner: dynamics as a function, with the reward that you know."""

import worldmpc
from worldmpc.agents.mpc import MPC
from worldmpc.envs.toy import PointMass
from worldmpc.models.composed import FunctionDynamics


def move(z, action):  # any function of tensors with any leading dimensions, a network of yours as well
    return z + 0.1 * action.clamp(-1, 1)


def reward(z, action, next_z):
    return 1.0 - next_z.abs().mean(-1)


def main(episodes=4):
    envs = worldmpc.make_envs("toy/pointmass", worldmpc.EnvConfig(num_envs=episodes))
    config = worldmpc.make_config(agent="mpc", planner="icem", **{"planner.horizon": 8})
    agent = MPC(config, envs.spec, dynamics=FunctionDynamics(move, reward))  # environments of your own do as well
    result = worldmpc.evaluate(agent, envs, episodes)
    print(f"icem: mean return {result.mean_return:.2f}; the best possible average is {PointMass.OPTIMAL_RETURN}")
    return result.mean_return


if __name__ == "__main__":
    main()
