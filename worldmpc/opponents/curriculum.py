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

What such a file says about hyperparameters, training and the agent is this project's own configuration's business, and is not read; nor
are ``deterministic``, as agents always act as in evaluations, and ``skill_range``. Where one phase names a mode, those that name none are
NORMAL.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from worldmpc.config import ConfigError
from worldmpc.opponents.loaders import LOADERS
from worldmpc.opponents.pool import SELF_PLAY, Entry, Phase, Schedule

SUFFIXES = (".json", ".yaml", ".yml")
TYPES = {"basic_weak": "weak", "basic_strong": "strong", "none": "still", **{name: name for name in ("weak", "strong", "random", "still")}}
"""``type`` -> the name of an opponent; the others say more."""
_PHASE = ("name", "episodes", "environment", "opponent", "reward_shaping", "reward_bonus", "clear_buffer")
_OPPONENT = ("type", "weight", "checkpoint", "deterministic", "opponents", "skill_range", "distribution", "agent_type")
_SHAPING = {
    "CLOSENESS": ("reward_closeness_to_puck", 20.0, 1.5),
    "TOUCH": ("reward_touch_puck", 15.0, 1.0),
    "DIRECTION": ("reward_puck_direction", 0.0, 2.0),
}
"""Prefix of the keys -> entry of hockey's info, and the weights it begins and ends with where they are left out."""
_SHARES = ("pfsp", "random", "skill", "baseline")
_BONUS = {"WIN_BONUS": (10.0, 1.0), "WIN_DISCOUNT": (0.92, 0.92)}
_MODES = ("NORMAL", "TRAIN_SHOOTING", "TRAIN_DEFENSE")
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
    if "curriculum" in data and "phases" in data:
        raise ConfigError(f"{where}: expected curriculum.phases or phases, got both")
    inner = _mapping(data["curriculum"], f"{where}: curriculum", ("phases",)) if "curriculum" in data else data
    phases = inner.get("phases")
    if not isinstance(phases, Sequence) or isinstance(phases, str) or not phases:
        raise ConfigError(f"{where}: expected curriculum.phases, a list with at least one phase")
    read = [_phase(phase, f"{where}: phases[{number}]", path.parent) for number, phase in enumerate(phases)]
    found = [phase for phase, _ in read]
    if any("mode" in options for phase in found for options, _ in phase.modes):  # hockey stays in a mode until it is told another
        full = [tuple(({"mode": _MODES[0], **options}, weight) for options, weight in phase.modes) for phase in found]
        found = [replace(phase, modes=modes) for phase, modes in zip(found, full, strict=True)]
    return tuple(found), _agreed([keep for _, keep in read], where)


def _phase(data: Any, where: str, folder: Path) -> tuple[Phase, bool | None]:
    data = _mapping(data, where, _PHASE)
    for key in ("episodes", "opponent"):
        if key not in data:
            raise ConfigError(f"{where}: {key} is missing")
    games = _number(data["episodes"], f"{where}.episodes", low=1)
    if games != int(games):
        raise ConfigError(f"{where}.episodes: expected a whole number, got {games}")
    modes, keep = _environment({} if data.get("environment") is None else data["environment"], f"{where}.environment")
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
    keep = _keep(data, where)
    if "mixture" not in data:
        return ((_mode(data, where), 1.0),), keep
    if "mode" in data:
        raise ConfigError(f"{where}: expected mode or mixture, got both")
    parts = _parts(data["mixture"], f"{where}.mixture", ("mode", "weight", "keep_mode"))
    weights = _weights(parts, f"{where}.mixture")
    keep = _agreed([keep, *(_keep(part, f"{where}.mixture[{number}]") for number, part in enumerate(parts))], where)
    modes = [_mode(part, f"{where}.mixture[{number}]") for number, part in enumerate(parts)]
    return tuple(zip(modes, weights, strict=True)), keep


def _mode(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options of games in a mode, none where it is not said."""
    if (mode := data.get("mode")) is None:
        return {}
    if not isinstance(mode, str) or mode.upper() not in _MODES:
        raise ConfigError(f"{where}.mode: expected one of {', '.join(_MODES)}, got {mode!r}")
    return {"mode": mode.upper()}


def _keep(data: Mapping[str, Any], where: str) -> bool | None:
    keep = data.get("keep_mode")
    if keep is not None and not isinstance(keep, bool):
        raise ConfigError(f"{where}.keep_mode: expected true or false, got {keep!r}")
    return keep


def _agreed(keeps: Sequence[bool | None], where: str) -> bool | None:
    """Return the one keep mode that is said, None where there is none."""
    said = {keep for keep in keeps if keep is not None}
    if len(said) > 1:
        raise ConfigError(f"{where}: expected the same keep_mode everywhere, as observations and actions depend on it, got true and false")
    return said.pop() if said else None


def _opponents(data: Any, where: str, folder: Path) -> tuple[tuple[Entry, ...], Any]:
    data = _mapping(data, where, _OPPONENT)
    kind = _text(data, "type", where).lower()
    if kind == "weighted_mixture":
        parts = _parts(data.get("opponents"), f"{where}.opponents", _OPPONENT)
        weights = _weights(parts, f"{where}.opponents")
        names = [_name(part, f"{where}.opponents[{number}]", folder) for number, part in enumerate(parts)]
        return tuple(Entry(name, weight) for name, weight in zip(names, weights, strict=True)), "weighted"
    if kind in ("archive", "run_checkpoints"):
        return _archive(data, where)
    return (Entry(_name(data, where, folder)),), "weighted"


def _archive(data: Mapping[str, Any], where: str) -> tuple[tuple[Entry, ...], str]:
    """Snapshots of the learner take the place of its archive; ``distribution`` weighs prioritised and uniform choice, and bots."""
    shares = data.get("distribution")
    place = f"{where}.distribution"
    shares = _mapping({"pfsp": 0.5, "random": 0.3, "baseline": 0.2} if shares is None else shares, place, _SHARES)
    _sum_to_one([_number(value, f"{place}.{name}", low=0) for name, value in shares.items()], place)
    baseline = float(shares.get("baseline", 0.0))
    rest = sum(float(value) for value in shares.values()) - baseline
    bots = (Entry("weak", baseline / 2), Entry("strong", baseline / 2)) if baseline else ()
    uniform = float(shares.get("random", 0.0))
    return ((Entry(SELF_PLAY, rest),) if rest else ()) + bots, "pfsp" if rest - uniform > uniform else "weighted"


def _name(data: Mapping[str, Any], where: str, folder: Path) -> str:
    """Return the name of one opponent, see :mod:`worldmpc.opponents.loaders`."""
    kind, checkpoint = _text(data, "type", where), _text(data, "checkpoint", where)
    if kind.lower() == "self_play":
        if checkpoint in ("", "latest"):
            return SELF_PLAY
        kind = _text(data, "agent_type", where)
    elif kind.lower() in TYPES:
        return TYPES[kind.lower()]
    known = (*TYPES, SELF_PLAY, "weighted_mixture", "archive", "run_checkpoints", *LOADERS)
    if not kind and not checkpoint:
        raise ConfigError(f"{where}: type is missing; known are {', '.join(known)}")
    if kind and kind.upper() not in LOADERS:
        near = difflib.get_close_matches(kind.lower(), [name.lower() for name in known], n=1)
        hint = f"did you mean {near[0].upper() if near[0].upper() in LOADERS else near[0]}?" if near else f"known are {', '.join(known)}"
        raise ConfigError(f"{where}.type: '{kind}' cannot be had here; {hint}")
    if not checkpoint:
        raise ConfigError(f"{where}.checkpoint: is missing; {kind} needs the path of one")
    path = Path(checkpoint)
    path = path if path.is_absolute() or path.exists() else folder / path
    if not path.exists():
        raise ConfigError(f"{where}.checkpoint: {checkpoint}: no such file or folder")
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


def _weights(parts: Sequence[Mapping[str, Any]], where: str) -> list[float]:
    """Return the weights of parts, which sum to 1, or are all alike, which cannot be mistaken."""
    weights = [_number(part.get("weight", 1.0), f"{where}[{number}].weight", low=0) for number, part in enumerate(parts)]
    return _sum_to_one(weights, where)


def _sum_to_one(weights: list[float], where: str) -> list[float]:
    total = sum(weights)
    if total <= 0 or (abs(total - 1) > 1e-3 and len(set(weights)) > 1):
        raise ConfigError(f"{where}: weights sum to {total:g}, not to 1 ({', '.join(f'{weight:g}' for weight in weights)})")
    return weights


def _number(value: Any, where: str, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
        bound = "a finite number" if low == -math.inf else f"a number of at least {low:g}"
        raise ConfigError(f"{where}: expected {bound}, got {value!r}")
    return float(value)


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text, empty where there is none."""
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}.{key}: expected a text, got {value!r}")
    return value or ""


def _mapping(data: Any, where: str, known: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected keys with values, got {data!r}")
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'; known are {', '.join(known)}")
    return data


def _parts(data: Any, where: str, known: Collection[str]) -> list[Mapping[str, Any]]:
    """Return the parts of a mixture."""
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        raise ConfigError(f"{where}: expected a list that is not empty, got {data!r}")
    return [_mapping(part, f"{where}[{number}]", known) for number, part in enumerate(data)]
