"""What a run changes against its preset: runs of one name that differ in it are runs of different things."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worldmpc.config import AGENTS, PRESETS, RunConfig, merge, preset_values

_NAMED = ("task", "agent", "preset", "label", "planner.name")
"""What results have columns for."""
_NOT_SCIENCE = (
    *("seed", "seeds", "run_dir", "resume", "device", "threads", "log", "checkpoint", "eval.video", "eval.prior", "replay.storage_device"),
    *("env.workers", "env.num_workers", "train.until_return", "multi_gamma.debug_logging", "multi_gamma.log_num_examples"),
)
"""Keys and sections in which runs of one name may differ, as they change no result at a given step."""


def overrides_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values in which a whole configuration differs from its preset, of those that decide about results.

    Of an agent or preset that is not known here: from the defaults of the sections.
    """
    agent, preset, task = config.get("agent"), config.get("preset"), config.get("task")
    known = agent in AGENTS and (preset in PRESETS or preset == "tuned")
    usual = _flatten(merge(RunConfig().to_dict(), preset_values(str(preset), str(agent), task) if known else {}))
    own = _flatten(config)
    free = {*_NAMED, *_NOT_SCIENCE} | (set() if _depends_on_length(own) else {"steps"})
    return {
        name: value
        for name, value in own.items()
        if name not in free and name.split(".")[0] not in free and (name not in usual or json.dumps(value) != json.dumps(usual[name]))
    }


def _depends_on_length(config: Mapping[str, Any]) -> bool:
    """Return whether a run of another length is another one at the same step: a schedule or exploration ends with the run."""
    return config.get("optim.schedule") in ("cosine", "linear") or config.get("agent") == "dqn" or bool(config.get("ppo.anneal_clip"))


def different(overrides: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return the keys in which runs differ; ``None`` for a run of which this is not known."""
    known = [own for own in overrides if own is not None]
    names = sorted({name for own in known for name in own})
    return [name for name in names if len({json.dumps(own.get(name, _PRESET)) for own in known}) > 1]


_PRESET = {"worldmpc": "the preset's value"}
"""Stands for it where only some of the runs override a key, whatever it is: ``null`` is a value."""


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
