"""Use the training components directly: the whole loop is in your hands."""

import torch

import worldmpc
from worldmpc.training.components import (
    ActorCritic,
    PolicyEvaluator,
    PPOConfig,
    PPOOptimizer,
    RolloutCollector,
    make_experience,
)


def main(steps=25_000):
    config = PPOConfig(rollout_steps=64, minibatch_size=128, update_epochs=8, gamma=0.98, gae_lambda=0.9)
    with worldmpc.make_envs("gym/CartPole-v1", worldmpc.EnvConfig(num_envs=8)) as vecenv:
        policy = ActorCritic(vecenv.spec.obs_shape[0], vecenv.spec.action_dim, discrete=vecenv.spec.discrete)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
        experience = make_experience(config, vecenv)
        collector = RolloutCollector(vecenv, policy, experience)
        ppo = PPOOptimizer(policy, optimizer, config=config)
        evaluator = PolicyEvaluator({"balance": ["gym/CartPole-v1"]}, episodes=8)

        before = evaluator.evaluate(policy)["balance/score"]
        returns = []
        while collector.agent_steps < steps:
            stats, _ = collector.collect()  # fills the rollout; episodes go on from one to the next
            losses = ppo.update(experience)  # trains on it and clears it
            returns += stats["episode_return"]
            if ppo.updates % 256 == 0:
                mean = sum(returns[-10:]) / len(returns[-10:])
                print(f"{collector.agent_steps:6} decisions: return {mean:5.1f}, value loss {losses['value_loss']:.2f}")
        after = evaluator.evaluate(policy)["balance/score"]
    print(f"CartPole, mean return of the most likely actions (500 is perfect): {before:.0f} before, {after:.0f} after training")
    return before, after


if __name__ == "__main__":
    main()
