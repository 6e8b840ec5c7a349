"""Add a term to the world model's objective: one function, one entry, one weight."""

import torch

import worldmpc


def latent_smoothness(model, rollout, batch, noise):
    """Penalise large latent steps -> loss [T, B], metrics."""
    steps = (rollout.zs[1:] - rollout.zs[:-1]).square().sum(-1)
    return steps * rollout.time_weight, {"latent_step": steps.detach().mean()}


def main(steps=600):
    envs = worldmpc.make_envs("toy/pointmass")
    agent = worldmpc.make_agent(envs, preset="debug")
    agent.objectives.terms["smoothness"] = latent_smoothness
    agent.objectives.weights["smoothness"] = 0.01

    seen = []

    def watch(state, metrics):
        if "smoothness_loss" in metrics:
            seen.append(metrics["smoothness_loss"])

    worldmpc.train(agent, envs, steps=steps, hooks=[watch])
    print(f"smoothness loss: first {float(seen[0]):.4f}, last {float(torch.stack(seen[-50:]).mean()):.4f}")
    return seen


if __name__ == "__main__":
    main()
