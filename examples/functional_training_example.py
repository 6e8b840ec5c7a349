"""The functional loop: losses and a step of your own, and stopping when it is good enough."""

import tempfile

import worldmpc
from worldmpc.training.components import (
    AgentConfig,
    Curriculum,
    CurriculumTask,
    PolicyEvaluator,
    PolicyStore,
    PPOConfig,
    TrainerConfig,
    default_training_step,
    functional_training_loop,
)


def curiosity_loss(policy, obs, actions, rewards, values, advantages):
    """Stay undecided where the outcome was a surprise."""
    _, _, entropy, _, _ = policy(obs, None, actions)
    surprise = advantages.abs() / (advantages.abs().mean() + 1e-8)
    return -0.005 * (surprise * entropy).mean()


def diversity_loss(policy, obs, actions, rewards, values, advantages):
    """Use all actions, seen over many observations."""
    share = policy.distribution(obs).log_probs.exp().mean(0)
    return 0.005 * (share * share.log()).sum()


def main(steps=40_000, good_enough=150.0):
    ppo_config = PPOConfig(rollout_steps=64, minibatch_size=128, update_epochs=8, gamma=0.98, gae_lambda=0.9)
    curriculum = Curriculum(CurriculumTask("balance", "gym/CartPole-v1", worldmpc.EnvConfig(num_envs=8)))

    def step_until_good_enough(state, components, config, experience, custom_losses=None):
        metrics = default_training_step(state, components, config, experience, custom_losses)
        state.should_stop = metrics.get("episode_return", 0.0) >= good_enough
        return metrics

    with tempfile.TemporaryDirectory() as folder:
        config = TrainerConfig(
            total_timesteps=steps, learning_rate=1e-3, run_dir=folder, checkpoint_interval=10, progress="none", device="cpu"
        )
        store = PolicyStore(f"{folder}/policies", AgentConfig(hidden_size=64))
        state = functional_training_loop(
            config,
            ppo_config,
            None,  # the store makes the policy
            curriculum,
            store,
            step_fn=step_until_good_enough,
            custom_losses=[curiosity_loss, diversity_loss],
        )
        names = store.names()
        score = PolicyEvaluator({"balance": ["gym/CartPole-v1"]}, store, episodes=8).evaluate(names[-1])["balance/score"]
    print(f"stopped after {state.agent_steps} decisions in {state.epoch} epochs, with {len(names)} policies saved")
    print(f"in the last epoch: {', '.join(f'{name} {value:.4f}' for name, value in state.metrics.items() if name.startswith('custom/'))}")
    print(f"the last policy's most likely actions return {score:.0f} of 500")
    return state, score


if __name__ == "__main__":
    main()
