"""Records of ``worldmpc bench``: reading them, naming their rows, and holding two of them against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from worldmpc.config import ConfigError, ModelConfig, RunConfig, flat_fields, lookup, make_config, resolve_model

SCHEMA = "worldmpc.bench/1"
"""What every record says about itself."""
_SAME_MACHINE = ("cpu", "cores", "gpu", "os")
_WIDTHS = ("enc_dim", "mlp_dim", "latent_dim")
_SHOWN = {"model.size", *(f"model.{name}" for name in _WIDTHS), "planner.precision", "env.num_envs"}
"""Keys that :func:`settings` has an entry of its own for."""


class Verb(NamedTuple):
    """Plan or update: milliseconds, the limit in the verb's own precision, the share of it in the median, and seconds of compiling."""

    precision: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    limit_ms: float
    limit_fp32_ms: float
    fraction: float
    compile_s: float | None


class Row(NamedTuple):
    """One measured configuration."""

    config: RunConfig
    device: str
    threads: int
    obs_dim: int
    action_dim: int
    plan: Verb | None
    update: Verb
    launch_floor_us: float | None
    task: str | None
    """What the last two were measured on; None where they were left out."""
    environment: float | None
    """Decisions per second with random actions."""
    training: float | None
    """Decisions per second of training."""
    peak_rss_mib: float
    peak_cuda_mib: float | None


class Record(NamedTuple):
    """What one command measured on one machine."""

    source: str
    machine: dict[str, Any]
    rows: list[Row]


class Change(NamedTuple):
    """Plan or update (ms), or training (decisions/s), of a new row and of its counterpart; ``speed`` is above 1 where the new is faster."""

    row: Row
    name: str
    unit: str
    old: float
    new: float
    speed: float
    old_fraction: float | None
    new_fraction: float | None


def read_record(path: str | Path) -> Record:
    """Read a file that ``worldmpc bench json=`` wrote.

    Raises:
        ConfigError: no such file, no such record, or one that this version cannot read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    data = _load(path)
    if not is_record(data):
        raise ConfigError(f"{path}: no record of `worldmpc bench` (of this version, which writes schema {SCHEMA})")
    return parse_record(data, str(path))


def read_records(folder: str | Path) -> list[Record]:
    """Read all records in a folder, in the order of their names; JSON files of other kinds are passed over.

    Raises:
        ConfigError: no such folder, a file that is not JSON, or a record that this version cannot read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    files = sorted(folder.rglob("*.json"))
    loaded = {file.relative_to(folder).as_posix(): _load(file) for file in files}
    place = folder.name if folder.is_absolute() else folder.as_posix()
    return [parse_record(data, f"{place}/{name}") for name, data in loaded.items() if is_record(data)]


def is_record(data: Any) -> bool:
    """Return whether JSON data is a record of ``worldmpc bench`` in the format of this version."""
    return isinstance(data, dict) and data.get("schema") == SCHEMA


def parse_record(data: Mapping[str, Any], source: str) -> Record:
    """Check a record's data.

    Raises:
        ConfigError: something is missing, or a configuration that this version does not know; ``source`` names the record.
    """
    if not isinstance(data.get("machine"), dict) or not isinstance(data.get("rows"), list):
        raise ConfigError(f"{source}: expected machine and rows")
    return Record(source, data["machine"], [parse_row(row, f"{source}, row {number}") for number, row in enumerate(data["rows"], 1)])


def parse_row(data: Mapping[str, Any], source: str) -> Row:
    """Check the data of a row.

    Raises:
        ConfigError: something is missing, or a configuration that this version does not know; ``source`` names the row.
    """
    try:
        return Row(
            config=RunConfig.from_dict(data["config"]),
            **{name: data[name] for name in ("device", "threads", "obs_dim", "action_dim", "launch_floor_us")},
            plan=None if data["plan"] is None else _verb(data["plan"]),
            update=_verb(data["update"]),
            task=None if data["end_to_end"] is None else data["end_to_end"]["task"],
            environment=None if data["environment"] is None else float(data["environment"]["decisions_per_s"]),
            training=None if data["end_to_end"] is None else float(data["end_to_end"]["decisions_per_s"]),
            **{name: data["memory"][name] for name in ("peak_rss_mib", "peak_cuda_mib")},
        )
    except KeyError as error:
        raise ConfigError(f"{source}: no entry {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from error


def settings(row: Row) -> dict[str, str]:
    """Return what was measured, as every benchmark table shows it."""
    config = row.config
    plan, update = config.planner.precision, config.train.precision
    cores = f", {row.threads} thread{'s' * (row.threads != 1)}" if row.device == "cpu" else ""
    ways = [name for name, used in (("compile", config.compile), ("graph", config.cuda_graph)) if used]
    return {
        "model": _model(config.model),
        "preset": " ".join([config.preset, *_beyond_preset(config)]),
        "device": row.device + cores,
        "precision": plan if plan == update else f"{plan} / {update}",
        "compile": " + ".join(ways) or "no",
        "seeds": str(len(config.seeds or (1,))),
        "envs": str(config.env.num_envs),
        "obs + actions": f"{row.obs_dim} + {row.action_dim}",
    }


def common_and_varying(rows: Sequence[Row]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return (settings that all rows share, the other settings of each row)."""
    each = [settings(row) for row in rows]
    common = {name: value for name, value in each[0].items() if all(one[name] == value for one in each)}
    return common, [{name: value for name, value in one.items() if name not in common} for one in each]


def changes(new: Sequence[Row], old: Sequence[Row]) -> list[Change]:
    """Return old and new of every row that has a counterpart (the last one) with the same settings; training on the same task alone."""
    counterparts = {_key(row): row for row in old}
    found: list[Change] = []
    for row in new:
        before = counterparts.get(_key(row))
        if before is None:
            continue
        for name, now, then in (("plan", row.plan, before.plan), ("update", row.update, before.update)):
            if now is not None and then is not None:
                speed = then.median_ms / now.median_ms
                found.append(Change(row, name, "ms", then.median_ms, now.median_ms, speed, then.fraction, now.fraction))
        if row.training and before.training and _training_key(row) == _training_key(before):
            speed = row.training / before.training
            found.append(Change(row, "training", "decisions/s", before.training, row.training, speed, None, None))
    return found


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two descriptions of machines agree in what makes them fast."""
    return all(one.get(name) == other.get(name) for name in _SAME_MACHINE)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the decoding as well
        raise ConfigError(f"{path}: not JSON ({error})") from error


def _verb(data: Mapping[str, Any]) -> Verb:
    numbers = {name: float(data[name]) for name in Verb._fields if name not in ("precision", "compile_s")}
    return Verb(precision=data["precision"], **numbers, compile_s=data["compile_s"])


def _key(row: Row) -> tuple[Any, ...]:
    """What must be equal for plans and updates to be comparable."""
    config = row.config
    ways = (config.train.precision, config.compile, config.cuda_graph)
    measured = (row.device, row.threads, row.obs_dim, row.action_dim)
    return (
        resolve_model(config.model),
        config.planner,
        config.loss.batch_size,
        config.env.num_envs,
        len(config.seeds or (1,)),
        *ways,
        *measured,
    )


def _training_key(row: Row) -> tuple[Any, ...]:
    config = row.config
    return row.task, config.env, config.train.utd, config.train.overlap, config.replay.windows, config.replay.storage_device


def _model(config: ModelConfig) -> str:
    """A published size by its name, other widths as they are."""
    found, published = resolve_model(config), resolve_model(ModelConfig(size=config.size))
    widths = [getattr(found, name) for name in _WIDTHS]
    own = widths != [getattr(published, name) for name in _WIDTHS]
    return "-".join(map(str, widths)) if own else config.size


def _beyond_preset(config: RunConfig) -> list[str]:
    """Words for all that differs from the preset, decides about speed, and has no column of its own."""
    plain = make_config(config.preset)
    names = [name for name, _ in flat_fields() if name.startswith(("model.", "planner.", "env.")) and name not in _SHOWN]
    names += ["loss.batch_size", "train.utd", "train.overlap"]
    changed = {name: lookup(config, name) for name in names if lookup(config, name) != lookup(plain, name)}
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items()]
