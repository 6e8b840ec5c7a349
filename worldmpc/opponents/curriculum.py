"""Curricula of opponents from a JSON or YAML file: phases with their games, opponents, modes and rewards.

The form is that of the hockey course project (``curriculum.phases[]``); a file that has ``phases`` alone is read as well::

    phases:
      - name: bots
        episodes: 3000
        environment: {mode: NORMAL, keep_mode: true}        # or mixture: [{mode: NORMAL, weight: 0.5}, ...]
        opponent:
          type: weighted_mixture
          opponents:
            - {type: basic_weak, weight: 0.3}
            - {type: basic_strong, weight: 0.7}
        reward_shaping: null                                # or N, K, CLOSENESS_START, CLOSENESS_FINAL, TOUCH_..., DIRECTION_...
        reward_bonus: {N: 0, K: 2000, WIN_BONUS_START: 10, WIN_BONUS_FINAL: 1, WIN_DISCOUNT_START: 0.92, WIN_DISCOUNT_FINAL: 0.92}
        clear_buffer: false

What such a file says about hyperparameters, training and the agent is this project's own configuration's business, and is not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from worldmpc.config import ConfigError
from worldmpc.opponents.pool import SELF_PLAY, Entry, Phase, Schedule

SUFFIXES = (".json", ".yaml", ".yml")
TYPES = {"basic_weak": "weak", "basic_strong": "strong", "none": "still", **{name: name for name in ("weak", "strong", "random", "still")}}
"""``type`` -> the name of an opponent; the others say more."""
_PHASE = ("name", "episodes", "environment", "opponent", "reward_shaping", "reward_bonus", "clear_buffer")
_OPPONENT = ("type", "weight", "checkpoint", "deterministic", "opponents", "skill_range", "distribution", "agent_type")
_SHAPING = {"CLOSENESS": ("closeness", 20.0, 1.5), "TOUCH": ("touch", 15.0, 1.0), "DIRECTION": ("direction", 0.0, 2.0)}
"""Prefix of the keys -> hint, and the weights it begins and ends with where they are left out."""
_BONUS = {"WIN_BONUS": (10.0, 1.0), "WIN_DISCOUNT": (0.92, 0.92)}
_ELSEWHERE = ("hyperparameters", "training", "agent")


def read_curriculum(path: Path) -> tuple[tuple[Phase, ...], bool | None]:
    """Return the phases of a file, and the keep mode that they agree on, None where they do not say.

    Raises:
        ConfigError: the file is missing or no JSON or YAML, has an unknown key, weights that do not sum to 1, a number out of range, or
            phases with different keep modes.
    """
    where = f"opponents: {path}"
    try:
        text = path.read_text()
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: is no {path.suffix[1:].upper()} ({' '.join(str(error).split())})") from error
    data = _mapping(data, where, ("curriculum", "phases", *_ELSEWHERE))
    inner = _mapping(data["curriculum"], f"{where}: curriculum", ("phases",)) if "curriculum" in data else data
    phases = inner.get("phases")
    if not isinstance(phases, Sequence) or isinstance(phases, str) or not phases:
        raise ConfigError(f"{where}: expected curriculum.phases, a list with at least one phase")
    read = [_phase(phase, f"{where}: phases[{number}]", path.parent) for number, phase in enumerate(phases)]
    keeps = {keep for _, keep in read if keep is not None}
    if len(keeps) > 1:
        raise ConfigError(f"{where}: phases have different keep_mode, and with it other observations and actions; use the same in all")
    return tuple(phase for phase, _ in read), keeps.pop() if keeps else None


def _phase(data: Any, where: str, folder: Path) -> tuple[Phase, bool | None]:
    data = _mapping(data, where, _PHASE)
    for key in ("episodes", "opponent"):
        if key not in data:
            raise ConfigError(f"{where}: {key} is missing")
    games = _number(data["episodes"], f"{where}.episodes", low=1)
    if games != int(games):
        raise ConfigError(f"{where}.episodes: expected a whole number, got {games}")
    modes, keep = _environment(data.get("environment") or {}, f"{where}.environment")
    entries, choose = _opponents(data["opponent"], f"{where}.opponent", folder)
    bonus = data.get("reward_bonus")
    schedules: dict[str, Schedule] = {}
    if bonus is not None:
        schedules = _schedules(bonus, f"{where}.reward_bonus", {key: (key.lower(), *pair) for key, pair in _BONUS.items()}, 0, 2000)
    shaping = data.get("reward_shaping")
    hints = {} if shaping is None else _schedules(shaping, f"{where}.reward_shaping", _SHAPING, 600, 400)
    clear = data.get("clear_buffer", True)
    if not isinstance(clear, bool):
        raise ConfigError(f"{where}.clear_buffer: expected true or false, got {clear!r}")
    name = str(data.get("name", where.rpartition(": ")[2]))
    return Phase(name, entries, int(games), choose, modes, hints, **schedules, clear_replay=clear), keep  # type: ignore[arg-type]


def _environment(data: Any, where: str) -> tuple[tuple[tuple[Mapping[str, Any], float], ...], bool | None]:
    data = _mapping(data, where, ("mode", "mixture", "keep_mode"))
    keep = data.get("keep_mode")
    if keep is not None and not isinstance(keep, bool):
        raise ConfigError(f"{where}.keep_mode: expected true or false, got {keep!r}")
    if "mixture" not in data:
        return ((({"mode": str(data["mode"])} if data.get("mode") is not None else {}), 1.0),), keep
    if "mode" in data:
        raise ConfigError(f"{where}: expected mode or mixture, got both")
    parts = [_mapping(part, f"{where}.mixture", ("mode", "weight", "keep_mode")) for part in _list(data["mixture"], f"{where}.mixture")]
    weights = _weights([part.get("weight", 1.0) for part in parts], f"{where}.mixture")
    return tuple(({"mode": str(part.get("mode", "NORMAL"))}, weight) for part, weight in zip(parts, weights, strict=True)), keep


def _opponents(data: Any, where: str, folder: Path) -> tuple[tuple[Entry, ...], Any]:
    data = _mapping(data, where, _OPPONENT)
    kind = str(data.get("type", "")).lower()
    if kind == "weighted_mixture":
        parts = _list(data.get("opponents"), f"{where}.opponents")
        for number, part in enumerate(parts):
            _mapping(part, f"{where}.opponents[{number}]", _OPPONENT)
        weights = _weights([part.get("weight", 1.0) for part in parts], f"{where}.opponents")
        names = [_name(part, f"{where}.opponents[{number}]", folder) for number, part in enumerate(parts)]
        return tuple(Entry(name, weight) for name, weight in zip(names, weights, strict=True)), "weighted"
    if kind in ("archive", "run_checkpoints"):
        return _archive(data, where)
    return (Entry(_name(data, where, folder)),), "weighted"


def _archive(data: Mapping[str, Any], where: str) -> tuple[tuple[Entry, ...], str]:
    """Snapshots of the learner take the place of its archive; ``distribution`` weighs prioritised and uniform choice, and bots."""
    shares = _mapping(data.get("distribution") or {"pfsp": 0.5, "random": 0.3, "baseline": 0.2}, f"{where}.distribution", None)
    if unknown := sorted(set(shares) - {"pfsp", "random", "skill", "baseline"}):
        raise ConfigError(f"{where}.distribution: unknown key '{unknown[0]}'; use pfsp, random, skill and baseline")
    _weights(list(shares.values()), f"{where}.distribution")
    baseline = float(shares.get("baseline", 0.0))
    rest = sum(float(value) for value in shares.values()) - baseline
    bots = (Entry("weak", baseline / 2), Entry("strong", baseline / 2)) if baseline else ()
    choose = "pfsp" if float(shares.get("pfsp", 0.0)) + float(shares.get("skill", 0.0)) >= float(shares.get("random", 0.0)) else "weighted"
    return ((Entry(SELF_PLAY, rest),) if rest else ()) + bots, choose


def _name(data: Mapping[str, Any], where: str, folder: Path) -> str:
    """Return the name of one opponent, see :mod:`worldmpc.opponents.loaders`."""
    kind = str(data.get("type", ""))
    checkpoint = data.get("checkpoint")
    if kind.lower() == "self_play":
        kind = str(data.get("agent_type") or "")
        if checkpoint in (None, "latest"):
            return SELF_PLAY
    elif kind.lower() in TYPES:
        return TYPES[kind.lower()]
    if not kind and checkpoint is None:
        raise ConfigError(f"{where}: type is missing")
    if checkpoint is None:
        raise ConfigError(
            f"{where}: unknown type '{kind}', or its checkpoint is missing; types are {', '.join(TYPES)}, self_play, "
            "weighted_mixture, archive, run_checkpoints, or that of a checkpoint"
        )
    path = Path(str(checkpoint))
    path = path if path.is_absolute() or path.exists() else folder / path
    return f"{kind.upper()}:{path}" if kind else str(path)


def _schedules(data: Any, where: str, keys: Mapping[str, tuple[str, float, float]], hold: int, anneal: int) -> dict[str, Schedule]:
    known = ["N", "K", *(f"{key}_{end}" for key in keys for end in ("START", "FINAL"))]
    data = _mapping(data, where, known)
    hold, anneal = (int(_number(data.get(key, default), f"{where}.{key}", low=0)) for key, default in (("N", hold), ("K", anneal)))
    return {
        name: Schedule(
            _number(data.get(f"{key}_START", start), f"{where}.{key}_START"),
            _number(data.get(f"{key}_FINAL", final), f"{where}.{key}_FINAL"),
            hold,
            anneal,
        )
        for key, (name, start, final) in keys.items()
    }


def _weights(values: Sequence[Any], where: str) -> list[float]:
    """Return weights that sum to 1, or equal ones, which cannot be mistaken."""
    weights = [_number(value, f"{where}: weight", low=0) for value in values]
    total = sum(weights)
    if total <= 0 or (abs(total - 1) > 1e-3 and len(set(weights)) > 1):
        raise ConfigError(f"{where}: weights sum to {total:g}, not to 1 ({', '.join(f'{weight:g}' for weight in weights)})")
    return weights


def _number(value: Any, where: str, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
        bound = "a finite number" if low == -math.inf else f"a number of at least {low:g}"
        raise ConfigError(f"{where}: expected {bound}, got {value!r}")
    return float(value)


def _mapping(data: Any, where: str, known: Collection[str] | None) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected keys with values, got {data!r}")
    for key in data:
        if known is not None and key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'; known are {', '.join(known)}")
    return data


def _list(data: Any, where: str) -> Sequence[Any]:
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise ConfigError(f"{where}: expected a list that is not empty, got {data!r}")
    return data
