"""What bfloat16 changes in the numbers of a trained agent: values of imagined sequences, elites, actions, losses and gradients.

Run from the repository's root: ``python -m benchmarks.precision <run folder or checkpoint> results.json``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import worldmpc
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import RunConfig, merge
from worldmpc.planners import propose, rollout_return
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.training.trainer import collect, make_state

DECISIONS = 1500
"""Decisions that the agent takes to meet states, three episodes of dm_control's cartpole."""
PLANS, UPDATES = 200, 50


def main() -> None:
    """Compare float32 with bfloat16 on the same states, noise and batches."""
    torch.manual_seed(0)
    agent = worldmpc.load(sys.argv[1], device="cpu")
    with worldmpc.make_envs(agent.config.task, dataclasses.replace(agent.config.env, num_envs=1), seed=12345) as envs:
        no_seed_phase = {"replay": {"capacity": DECISIONS}, "train": {"seed_decisions": 0}}
        agent.config = RunConfig.from_dict(merge(agent.config.to_dict(), no_seed_phase))
        state = make_state(agent, envs)
        envs.reset()
        observed: list[Tensor] = []
        for _ in range(DECISIONS):
            observed.append(envs.obs.clone())
            collect(state)
        state.source.updates = 0
        record = {
            "command": command_line(),
            "commit": git_commit(),
            "machine": machine_info(),
            "task": agent.config.task,
            "preset": agent.config.preset,
            "seed": agent.config.seed,
            "updates": agent.updates,
            "planning": planning(agent, observed[:: DECISIONS // PLANS][:PLANS]),
            "learning": learning(agent, [state.source.next() for _ in range(UPDATES)]),
        }
    Path(sys.argv[2]).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: record[name] for name in ("planning", "learning")}, indent=2))


@torch.no_grad()
def planning(agent: TDMPC2, states: list[Tensor]) -> dict[str, Any]:
    """Score the same candidates of a first iteration in both precisions, and plan with the same noise."""
    config, discount = agent.config.planner, agent.discount
    errors, relative, overlaps, spreads, moved, lost = [], [], [], [], [], []
    for obs in states:
        noise = agent.streams["eval"].draw(agent.planner.noise_specs(1))
        z = agent.model.encode(obs)
        fresh = (config.max_std * noise["samples"][0]).clamp(-1, 1)
        actions = torch.cat((propose(agent.model, z, noise["proposal"]), fresh), 2)
        starts = z[:, None].expand(-1, config.num_samples, -1)
        found = {}
        for precision in ("fp32", "bf16"):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                found[precision] = rollout_return(agent.model, starts, actions, discount, noise["terminal"][0], noise["critics"][0])[0]
        exact, rounded = found["fp32"], found["bf16"]
        errors.append(float((rounded - exact).abs().mean()))
        spreads.append(float(exact.std()))
        relative.append(float(((rounded - exact).abs() / exact.abs().clamp(min=1e-3)).mean()))
        best, chosen = exact.topk(config.num_elites).indices, rounded.topk(config.num_elites).indices
        overlaps.append(len(set(best.tolist()) & set(chosen.tolist())) / config.num_elites)
        # What the choice costs: mean value, in float32, of the elites that bfloat16 chooses, below that of the right ones.
        lost.append(float(exact[best].mean() - exact[chosen].mean()))
        plans = {}
        for precision in ("fp32", "bf16"):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                start = agent.init_carry(1).plan
                plans[precision] = agent.planner.plan(agent.model, agent.model.encode(obs), start, noise, False)
        moved.append(float((plans["bf16"].mean[:, 0] - plans["fp32"].mean[:, 0]).abs().mean()))
    return {
        "states": len(states),
        "candidates": config.num_samples,
        "elites": config.num_elites,
        "horizon": config.horizon,
        "action_dim": agent.spec.action_dim,
        "value_error": _summary(errors),
        "value_error_relative": _summary(relative),
        "spread_of_values": _summary(spreads),
        "elite_overlap": _summary(overlaps),
        "value_lost_by_elites": _summary(lost),
        "plan_mean_moved": _summary(moved),
    }


def learning(agent: TDMPC2, batches: list[Any]) -> dict[str, Any]:
    """Compute losses and gradients of the same batches with the same noise in both precisions, without applying them."""
    learner, losses, angles, norms = agent.learner, [], [], []
    terms: dict[str, list[float]] = {}
    for batch in batches:
        noise = agent.streams["update"].draw(agent.objectives.noise_specs(*batch.reward.shape))
        values, gradients = {}, {}
        for precision in ("fp32", "bf16"):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _, metrics = agent.objectives.model_loss(batch, noise)
            values[precision] = {name: float(metrics[name]) for name in metrics if name.endswith("_loss")}
            gradients[precision] = torch.cat(learner.model_optimizer.gradients(loss))
        for name, value in values["fp32"].items():
            terms.setdefault(name, []).append(abs(values["bf16"][name] - value) / max(abs(value), 1e-12))
        exact, rounded = gradients["fp32"].double(), gradients["bf16"].double()
        angles.append(float(torch.dot(exact, rounded) / exact.norm() / rounded.norm()))
        norms.append(float(rounded.norm() / exact.norm()))
        losses.append(values["fp32"]["total_loss"])
    return {
        "batches": len(batches),
        "total_loss": _summary(losses),
        "relative_error_of_losses": {name: _summary(values) for name, values in terms.items()},
        "cosine_of_gradients": _summary(angles),
        "ratio_of_gradient_norms": _summary(norms),
    }


def _summary(values: list[float]) -> dict[str, float]:
    p5, median, p95 = np.percentile(values, [5, 50, 95]).tolist()
    return {"mean": float(np.mean(values)), "p5": p5, "median": median, "p95": p95}


if __name__ == "__main__":
    main()
