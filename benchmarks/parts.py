"""Where the time of one training decision goes: by part, and how much of each part is inside the C library.

Run from the repository's root: ``python -m benchmarks.parts results.json [word=value ...]``; the words as of ``worldmpc train``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import worldmpc
from worldmpc import losses
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.cli.words import override_values
from worldmpc.config import make_config, network_width
from worldmpc.models import native
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, set_threads, suggested_threads
from worldmpc.training.trainer import Solo, collect_together, learn_together, make_state

DECISIONS, WARM_UP = 400, 100


class Clock:
    """Seconds of functions, and of those inside the C library."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.calls: dict[str, list[tuple[float, float]]] = {}

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Measure a method from now on."""
        function = getattr(owner, name)

        def measured(*args: Any, **options: Any) -> Any:
            inside, begin = self.inside, time.perf_counter()
            result = function(*args, **options)
            self.calls.setdefault(part, []).append((time.perf_counter() - begin, self.inside - inside))
            return result

        setattr(owner, name, measured)

    def watch_library(self) -> None:
        """Count what is spent inside the C library from now on."""
        library = native.library()
        if isinstance(library, str):
            return

        def counted(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def call(argument: Any) -> Any:
                begin = time.perf_counter()
                result = function(argument)
                self.inside += time.perf_counter() - begin
                return result

            return call

        watched = library._replace(**{name: counted(part) for name, part in library._asdict().items() if callable(part)})
        native.library = lambda: watched  # type: ignore[assignment]


def main() -> None:
    """Train for a few hundred decisions, and write the median milliseconds of every part per decision."""
    fixed = {"preset": "cpu", "task": "dmc/cartpole-swingup", "replay.capacity": 10_000, "train.seed_decisions": 64}
    config = make_config(**{**fixed, **override_values(sys.argv[2:])})
    keep_freed_memory()
    set_threads(config.threads or suggested_threads(network_width(config)))
    clock = Clock()
    clock.watch_library()
    with worldmpc.make_envs(config.task, config.env, seed=config.seed) as envs:
        agent = TDMPC2(config, envs.spec)
        state = make_state(agent, envs)
        envs.reset()
        team = Solo(agent)
        for owner, name, part in (
            (agent, "act", "plan"),
            (agent, "update", "update"),
            (agent.streams["update"], "draw", "update: noise"),
            (agent.learner, "model_loss", "update: losses of the world model"),
            (agent.learner.model_optimizer, "gradients", "update: their gradients"),
            (agent.learner.model_optimizer, "step", "update: Adam of the world model"),
            (agent.learner, "policy_loss", "update: loss of the policy"),
            (agent.learner.policy_optimizer, "gradients", "update: its gradients"),
            (agent.learner.policy_optimizer, "step", "update: Adam of the policy"),
            (agent.learner, "update_target", "update: slow critics"),
            (losses, "roll", "losses of the world model: targets and imagined latents"),
            (state.source, "next", "replay: batch"),
            (state.source, "observe", "replay: storing a step"),
            (envs, "step_wait", "environment"),
        ):
            clock.watch(owner, name, part)
        while state.source.decisions < 64 or not state.source.ready():
            collect_together(team, [state])
        state.source.updates = max(int(state.decisions * config.train.utd) - 2, 0)
        decisions: list[float] = []
        for number in range(WARM_UP + DECISIONS):
            if number == WARM_UP:
                clock.calls.clear()
            begin = time.perf_counter()
            collect_together(team, [state])
            learn_together(team, [state])
            decisions.append(1e3 * (time.perf_counter() - begin))
    rows = [
        {"part": part, "ms": float(np.median(times[:, 0])), "in_c_ms": float(np.median(times[:, 1]))}
        for part, times in ((part, 1e3 * np.array(calls)) for part, calls in clock.calls.items())
    ]
    record = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "task": config.task,
        "preset": config.preset,
        "threads": torch.get_num_threads(),
        "decision_ms": float(np.median(decisions[WARM_UP:])),
        "rows": sorted(rows, key=lambda row: -row["ms"]),
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")
    print(f"one decision {record['decision_ms']:.2f} ms")
    for row in record["rows"]:
        print(f"{row['ms']:7.2f} ms, {row['in_c_ms']:6.2f} in C   {row['part']}")


if __name__ == "__main__":
    main()
