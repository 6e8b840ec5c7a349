"""Train TD-MPC2 on an environment of your own: any Gymnasium environment with vector observations and bounded actions."""

import gymnasium
import numpy as np

import worldmpc


class Thermostat(gymnasium.Env):
    """Keep a room at 20 degrees with a heater; the observation is the error, the action the heating power."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 2.0, (1,), np.float32)  # any bounds: agents always act in [-1, 1]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.temperature, self.time = self.np_random.uniform(15, 25), 0
        return self._observe(), {}

    def step(self, action):
        self.temperature += float(action[0]) - 1.0
        self.time += 1
        return self._observe(), -abs(self.temperature - 20), False, self.time == 50, {}

    def _observe(self):
        return np.array([self.temperature - 20], np.float32)


def main(steps=1500):
    # A function that makes the environment allows several side by side. `episode_length` sets the discount.
    envs = worldmpc.make_envs(Thermostat, worldmpc.EnvConfig(num_envs=2, episode_length=50))
    agent = worldmpc.make_agent(envs, preset="cpu", **{"train.seed_decisions": 300})
    worldmpc.train(agent, envs, steps=steps)
    result = worldmpc.evaluate(agent, Thermostat, episodes=5)
    print(f"mean return {result.mean_return:.1f}; always heating half: about -124, the best possible: about -3")
    return result


if __name__ == "__main__":
    main()
