"""What a run changes against its preset: runs of one name that differ in it are runs of different things."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worldmpc.config import AGENTS, PRESETS, RunConfig, merge, preset_values

_NAMED = ("task", "agent", "preset", "label", "planner.name")
"""What results have columns for."""
_NOT_SCIENCE = ("seed", "run_dir", "resume", "steps", "device", "threads", "log.", "checkpoint.", "eval.video", "replay.storage_device")
"""What runs of one name may differ in."""


def overrides_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys and values in which a whole configuration differs from its preset, of those that decide about results.

    Of an agent or preset that is not known here: from the defaults of the sections.
    """
    agent, preset, task = config.get("agent"), config.get("preset"), config.get("task")
    known = agent in AGENTS and (preset in PRESETS or preset == "tuned")
    usual = _flatten(merge(RunConfig().to_dict(), preset_values(str(preset), str(agent), task) if known else {}))
    return {
        name: value
        for name, value in _flatten(config).items()
        if not name.startswith((*_NAMED, *_NOT_SCIENCE)) and (name not in usual or json.dumps(value) != json.dumps(usual[name]))
    }


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
