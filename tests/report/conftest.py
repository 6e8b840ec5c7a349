"""Synthetic runs for the tests of the report package."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from worldmpc.report.runs import EVAL_COLUMNS, Evaluation, Run


def evaluation(env_steps: int, value: float, prior: float = float("nan")) -> Evaluation:
    """One evaluation with the given mean return."""
    return Evaluation(env_steps // 2, env_steps, env_steps // 2, value, value - 5, value + 5, 2.0, 500.0, float("nan"), prior, 10, 3.5)


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """Build a run in memory from (env_steps, return) pairs."""

    def build(
        points: Sequence[tuple[int, float]],
        task: str = "dmc/cartpole-swingup",
        seed: int = 1,
        preset: str = "cpu",
        planner: str = "mppi",
        label: str = "tdmpc2",
    ) -> Run:
        evals = tuple(evaluation(step, value, 0.8 * value) for step, value in points)
        source = Path(f"runs/{task}/{seed}")
        return Run(task, seed, "tdmpc2", preset, planner, label, evals, source, 2, "abc123", "worldmpc train", "test machine")

    return build


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder from (env_steps, return) pairs."""

    def build(points: Sequence[tuple[int, float]], seed: int = 1, task: str = "dmc/cartpole-swingup") -> Path:
        folder = tmp_path / "runs" / task / f"tdmpc2-cpu-seed{seed}"
        folder.mkdir(parents=True)
        config = {"task": task, "seed": seed, "agent": "tdmpc2", "preset": "cpu", "planner": {"name": "mppi", "horizon": 3}}
        machine = {"cpu": "Test CPU", "cores": 2, "ram_gib": 8.0, "gpu": None, "python": "3.11", "torch": "2.13"}
        spec = {"name": task, "action_repeat": 2}
        meta = {"command": f"worldmpc train seed={seed}", "commit": "abc123", "machine": machine, "spec": spec}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "meta.json").write_text(json.dumps(meta))
        lines = [",".join(EVAL_COLUMNS)]
        for step, value in points:
            lines.append(f"{step // 2},{step},{step // 2},{value},{value - 5},{value + 5},2.0,500,,{round(0.8 * value, 3)},10,3.5")
        (folder / "eval.csv").write_text("\n".join(lines) + "\n")
        return folder

    return build
