"""What auxiliary values do to latents in the first updates, while hardly any reward has been seen: their spread, for several heads.

Run from the repository's root: ``python -m benchmarks.latent_spread results.json picture.png task seeds``, as in ``dmc/finger-spin 1,2,3``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import worldmpc
from worldmpc.report.curves import DPI, PALETTE
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, set_threads

UPDATES, EVERY = 1_500, 125
ENABLED = {"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.97, 0.995]}
HEADS: dict[str, dict[str, Any]] = {
    "no auxiliary values": {},
    "linear, loss_weight=0.5": {**ENABLED, "multi_gamma.loss_weight": 0.5},
    "linear, loss_weight=0.1": {**ENABLED, "multi_gamma.loss_weight": 0.1},
    "hidden_layers=2, loss_weight=0.5": {**ENABLED, "multi_gamma.loss_weight": 0.5, "multi_gamma.hidden_layers": 2},
}


def main() -> None:
    """Measure, write, and draw."""
    record, picture, task, seeds = sys.argv[1:]
    keep_freed_memory()
    set_threads(1)
    rows = [row(name, over, task, int(seed)) for seed in seeds.split(",") for name, over in HEADS.items()]
    data = {
        "schema": "worldmpc.latent_spread/1",
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "rows": rows,
    }
    Path(record).write_text(json.dumps(data, indent=2) + "\n")
    draw(rows, picture)


def row(name: str, over: dict[str, Any], task: str, seed: int) -> dict[str, Any]:
    """Return the spread of encoded observations over the updates that follow the random decisions."""
    envs = worldmpc.make_envs(task, seed=seed)
    agent = worldmpc.make_agent(envs, "cpu", seed=seed, **over)
    # Random decisions alone, as an agent would act differently with other heads.
    state = worldmpc.train(agent, envs, 2 * 2_499, progress=False)
    assert state.source.updates == 0 and state.env_steps == 2 * 2_499
    points = []
    for update in range(UPDATES + 1):
        batch = state.source.next()
        if update % EVERY == 0:
            with torch.no_grad():
                points.append((update, agent.model.encode(batch.obs.flatten(0, 1)).std(0).mean().item()))
        agent.update(batch)
    return {"heads": name, "task": task, "seed": seed, "updates": [update for update, _ in points], "spread": [std for _, std in points]}


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw one line per seed."""
    figure = Figure(figsize=(7.2, 4.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for color, name in zip(PALETTE, HEADS, strict=False):
        for index, own in enumerate(each for each in rows if each["heads"] == name):
            axes.plot(own["updates"], own["spread"], color=color, label=name if index == 0 else None)
    axes.set_yscale("log")
    axes.set_xlabel("updates on random decisions")
    axes.set_ylabel("standard deviation of latents over a batch,\nmean over dimensions")
    axes.set_title(f"{rows[0]['task']}, preset=cpu", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
