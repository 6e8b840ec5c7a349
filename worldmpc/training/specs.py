"""What environments said about themselves, as plain data for ``meta.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worldmpc.types import EnvSpec, Mirror, Seat


def spec_dict(spec: EnvSpec) -> dict[str, Any]:
    """Return a spec as plain data, for ``meta.json``."""
    return {
        "name": spec.name,
        "obs_shape": list(spec.obs_shape),
        "action_dim": spec.action_dim,
        "episode_length": spec.episode_length,
        "action_repeat": spec.action_repeat,
        "can_terminate": spec.can_terminate,
        "discrete": spec.discrete,
        "other": None if spec.other is None else _plain(spec.other),
        "mirror": None if spec.mirror is None else _plain(spec.mirror),
    }


def spec_from(saved: Mapping[str, Any]) -> EnvSpec:
    """Return the spec that :func:`spec_dict` made plain data of; states of older versions say less."""
    other, mirror = saved.get("other"), saved.get("mirror")
    given = {name: value for name, value in saved.items() if name not in ("other", "mirror")}
    return EnvSpec(
        **{**given, "obs_shape": tuple(saved["obs_shape"])},
        other=None if other is None else Seat(**{**other, "obs_shape": tuple(other["obs_shape"])}),
        mirror=None if mirror is None else Mirror(**{name: tuple(value) for name, value in mirror.items()}),
    )


def _plain(record: Seat | Mirror) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in record._asdict().items()}
