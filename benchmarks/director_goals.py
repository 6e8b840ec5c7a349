"""Whether Director's codes say something, and its worker reaches held-out latents: ``python -m benchmarks.director_goals RECORD RUN...``.

Codes: what the goal autoencoder's metrics were after 5,000 updates, as the run logged them. ``recon_loss`` below ``marginal_entropy``,
what one constant distribution would lose, means that codes say something of the latent. How many classes are in use as most likely ones
is counted in a new episode of exploring.

Reaching: the newest agent plays an episode of its own that it has never learned from. At decisions that lie apart by goal intervals the
environment's state is kept, and the latent that the episode reaches one interval later. The environment is then brought back to each of
these states, and given that latent as its goal, and then one that a random action, held for the interval, leads to; plans for these
forget the task. How similar is what it reaches? Beside that stands what it reaches without a goal, how similar the latent is where it
began, and where random actions lead.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import worldmpc
from worldmpc.agents.director import Director
from worldmpc.envs import VecEnv, make_envs
from worldmpc.models.goal_autoencoder import classes_in_use
from worldmpc.report.goal_records import SCHEMA
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, set_threads
from worldmpc.training.checkpoint import CheckpointStore

PLACES = 20
"""Most states per run."""
AFTER = 5_000
"""Updates after which the codes are looked at."""


def main() -> None:
    """Measure and write."""
    record, *runs = sys.argv[1:]
    keep_freed_memory()
    set_threads(1)
    rows = [row(path) for path in runs]
    data = {
        "schema": SCHEMA,
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "threads": 1,
        "rows": rows,
    }
    Path(record).write_text(json.dumps(data, indent=2) + "\n")
    for found in rows:
        print(", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()))


def row(path: str) -> dict[str, Any]:
    """Return what one run's goals are like: its autoencoder's metrics, and means over the places."""
    newest = CheckpointStore(Path(path) / "checkpoints", keep=1).newest_valid()
    if newest is None:
        raise SystemExit(f"{path}: no usable checkpoint")
    agent = worldmpc.load(newest)
    assert isinstance(agent, Director)
    config = dataclasses.replace(agent.config.env, num_envs=1, workers="sync", num_workers=None)
    with make_envs(agent.config.task, config, seed=agent.config.seed + 10_000) as envs:
        places = held_out(agent, envs)
        if not places:
            raise SystemExit(f"{path}: episodes end before the first goal does, after {agent.setter.interval} decisions")
        found: dict[str, list[float]] = {}
        for number, (state, goal) in enumerate(places):
            for name, value in measure(agent, envs, state, goal, torch.Generator().manual_seed(number)).items():
                found.setdefault(name, []).append(value)
        in_use = perplexity(agent, envs)
    here = {"task": agent.config.task, "seed": agent.config.seed, "updates": agent.updates, "perplexity_held_out": in_use}
    return here | codes(Path(path)) | {"places": len(places)} | {name: sum(values) / len(values) for name, values in found.items()}


def codes(run: Path) -> dict[str, Any]:
    """Return the goal autoencoder's metrics of the first entry after as many updates as :data:`AFTER`."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    entry = next((entry for entry in entries if entry["updates"] >= AFTER and "goal_vae/recon_loss" in entry), None)
    if entry is None:
        raise SystemExit(f"{run}: no metrics after {AFTER:,} updates")
    names = ("recon_loss", "marginal_entropy", "latent_entropy", "perplexity", "kl")
    return {"codes_after": entry["updates"], **{name: entry[f"goal_vae/{name}"] for name in names}}


def perplexity(agent: Director, envs: VecEnv) -> float:
    """Return how many classes a code has in use, mean over codes, as most likely ones of a new episode of exploring."""
    carry, obs, latents = agent.init_carry(1), envs.reset(seed=agent.config.seed + 20_000), []
    for _ in range(envs.spec.episode_length or 1_000):
        latents.append(agent.flat.model.encode(obs))
        output = agent.act(carry, obs, "explore")
        step = envs.step(output.action)
        if bool(step.terminated | step.truncated):
            break
        obs, carry = step.obs, output.carry
    log_probs = agent.hierarchy.goals.log_probs(torch.cat(latents))
    return classes_in_use(log_probs, torch.full((len(latents),), 1 / len(latents))).item()


def held_out(agent: Director, envs: VecEnv) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return states of an episode of the agent's own, and the latents [1, Z] one goal interval behind them."""
    carry, obs, found, places = agent.init_carry(1), envs.reset(seed=agent.config.seed + 10_000), [], []
    length = envs.spec.episode_length or 1_000
    for decision in range(min(length, (PLACES + 1) * agent.setter.interval)):
        if decision % agent.setter.interval == 0:
            if places:
                found.append((places[-1], agent.flat.model.encode(obs)))
            places.append(envs.state_dict())
        output = agent.act(carry, obs, "eval")
        step = envs.step(output.action)
        if bool(step.terminated | step.truncated):
            break
        obs, carry = step.obs, output.carry
    return found[:PLACES]


def measure(agent: Director, envs: VecEnv, state: dict[str, Tensor], goal: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Return similarities to two goals, the agent's own future latent and one that a held random action leads to.

    Of each: reached with this goal, reached without any, and where it began; of the first also where random actions lead.
    """
    similarity, encode = agent.hierarchy.similarity, agent.flat.model.encode

    def after(act: Callable[[Tensor], Tensor]) -> Tensor:
        assert envs.load_state_dict(state), "the environment is not deterministic"
        for _ in range(agent.setter.interval):
            step = envs.step(act(envs.obs))
            if bool(step.terminated | step.truncated):
                break
        return encode(step.next_obs)

    def following(goal: Tensor | None) -> Tensor:
        carry = agent.init_carry(1)

        def act(obs: Tensor) -> Tensor:
            nonlocal carry
            output = agent.act(carry, obs, "eval", goal=goal)
            carry = output.carry
            return output.action

        return after(act)

    assert envs.load_state_dict(state)
    began, held, alone = encode(envs.obs), random_action(envs, generator), following(None)
    found = {"random_actions": similarity(after(lambda _: random_action(envs, generator)), goal).item()}
    for kind, wanted in (("", goal), ("_of_held_action", after(lambda _: held))):
        latents = {"reached": following(wanted), "without_goal": alone, "where_it_began": began}
        found |= {f"{name}{kind}": similarity(latent, wanted).item() for name, latent in latents.items()}
    return found


def random_action(envs: VecEnv, generator: torch.Generator) -> Tensor:
    """Return a uniformly random action, [1, A]."""
    size = envs.spec.action_dim
    if envs.spec.discrete:
        return torch.eye(size)[torch.randint(size, (1,), generator=generator)]
    return torch.rand(1, size, generator=generator) * 2 - 1


if __name__ == "__main__":
    with torch.no_grad():
        main()
