"""Memory of a long run: the process over 20,000 decisions with an update each, and a replay of a million steps, all of them written.

Run from the repository's root: ``python -m benchmarks.memory results.json [decisions]``. About ten minutes on two cores.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import worldmpc
from worldmpc.config import make_config
from worldmpc.data.replay import Replay
from worldmpc.planners.sampling import PLAN_RECORDS
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, set_threads
from worldmpc.training.trainer import TrainState
from worldmpc.types import Metrics, Transition

OBS, ACTIONS, STEPS, STREAMS = 24, 6, 1_000_000, 1000


def main() -> None:
    """Measure both and write them."""
    decisions = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    record = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "replay": replay(),
        "training": training(decisions),
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def resident_mib() -> float:
    """Return the memory of this process that is in RAM, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def replay() -> dict[str, float | int]:
    """Fill a replay of a million steps and say what it takes."""
    before = resident_mib()
    extras = {name: (ACTIONS,) * rank for name, rank in PLAN_RECORDS.items()}
    buffer = Replay(STEPS, STREAMS, (OBS,), ACTIONS, 3, extras=extras)
    no = torch.zeros(STREAMS, dtype=torch.bool)
    for step in range(STEPS // STREAMS):
        obs, action = torch.randn(STREAMS, OBS), torch.rand(STREAMS, ACTIONS)
        planned = {name: torch.randn(STREAMS, *shape) for name, shape in extras.items()}
        last = torch.full_like(no, step % 500 == 499)
        buffer.add(Transition(obs, action, torch.rand(STREAMS), no, last, obs, ~no, planned))
    one = Replay(STEPS, 1, (OBS,), ACTIONS, 3, extras=extras)
    return {
        "steps": len(buffer),
        "obs_dim": OBS,
        "action_dim": ACTIONS,
        "mb": buffer.num_bytes / 1e6,
        "mb_of_one_environment": one.num_bytes / 1e6,
        "resident_mb": (resident_mib() - before) * 2**20 / 1e6,
    }


def training(decisions: int) -> dict[str, object]:
    """Train with the `cpu` preset and follow the memory of the process."""
    keep_freed_memory()
    set_threads(1)
    config = make_config("cpu", **{"task": "dmc/cartpole-swingup"})
    rows: list[tuple[int, float]] = []

    def follow(state: TrainState, metrics: Metrics) -> None:
        if state.updates and state.decisions % 1000 == 0:
            rows.append((state.updates, resident_mib()))

    begin = time.perf_counter()
    with worldmpc.make_envs(config.task, config.env, seed=1) as envs:
        agent = worldmpc.make_agent(envs, "cpu", **{"train.seed_decisions": 1000})
        worldmpc.train(agent, envs, (decisions + 1000) * envs.spec.action_repeat, hooks=[follow], progress=False)
    return {
        "task": config.task,
        "preset": "cpu",
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": [{"updates": updates, "resident_mib": round(mib, 2)} for updates, mib in rows],
        "grown_mib_from_2000": rows[-1][1] - next(mib for updates, mib in rows if updates >= 2000),
    }


if __name__ == "__main__":
    main()
