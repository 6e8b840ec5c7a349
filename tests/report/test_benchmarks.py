"""Benchmark records: reading, naming rows, comparing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worldmpc.config import ConfigError, make_config
from worldmpc.report.benchmarks import SCHEMA, changes, common_and_varying, parse_row, read_record, read_records, same_machine, settings

CPU = {"cpu": "Some CPU", "cores": 2, "ram_gib": 8.0, "gpu": None, "os": "Linux x86_64", "torch": "2.13.0"}
GPU = {**CPU, "gpu": "Some GPU"}


def bench_row(preset: str = "cpu", *, device: str = "cpu", threads: int = 2, end_to_end: bool = True, **overrides: Any) -> dict[str, Any]:
    """A row as ``worldmpc bench`` records it: plan 12.34 ms, update 4 ms, 40 decisions/s."""
    config = make_config(preset, **overrides)
    verb = {"precision": "fp32", "p10_ms": 3.0, "p90_ms": 15.0, "limit_ms": 1.0, "limit_fp32_ms": 1.0, "compile_s": None}
    return {
        "config": config.to_dict(),
        "device": device,
        "threads": threads,
        "obs_dim": 24,
        "action_dim": 6,
        "plan": {**verb, "median_ms": 12.34, "fraction": 0.5} if config.planner.mpc else None,
        "update": {**verb, "median_ms": 4.0, "fraction": 0.25},
        "launch_floor_us": None,
        "environment": {"decisions_per_s": 9000.0} if end_to_end else None,
        "end_to_end": {"task": config.task, "decisions_per_s": 40.0} if end_to_end else None,
        "memory": {"peak_rss_mib": 500.0, "peak_cuda_mib": None},
    }


def bench_record(rows: list[dict[str, Any]], machine: dict[str, Any] = CPU) -> dict[str, Any]:
    """A whole record."""
    return {"schema": SCHEMA, "command": "worldmpc bench", "commit": None, "machine": machine, "versions": {}, "rows": rows}


def test_settings_name_what_differs_from_the_preset() -> None:
    assert settings(parse_row(bench_row(), "x")) == {
        "model": "cpu",
        "preset": "cpu",
        "device": "cpu, 2 threads",
        "precision": "fp32",
        "compile": "no",
        "seeds": "1",
        "envs": "1",
        "obs + actions": "24 + 6",
    }
    other = bench_row("cpu", threads=1, compile=True, **{"model.size": "5", "model.mlp_dim": 64, "loss.batch_size": 32, "train.utd": 2.0})
    named = settings(parse_row(other, "x"))
    assert named["model"] == "256-64-512" and named["preset"] == "cpu loss.batch_size=32 train.utd=2.0"
    assert named["device"] == "cpu, 1 thread" and named["compile"] == "compile"


def test_common_and_varying_settings() -> None:
    common, varying = common_and_varying([parse_row(bench_row(model={"size": size}), "x") for size in ("1", "5")])
    assert varying == [{"model": "1"}, {"model": "5"}] and common["preset"] == "cpu" and "model" not in common


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"size": "1"}},
        {"model": {"num_q": 3}},
        {"planner": {"num_samples": 64}},
        {"planner": {"precision": "bf16"}},
        {"train": {"precision": "bf16"}},
        {"loss": {"batch_size": 64}},
        {"env": {"num_envs": 2}},
        {"compile": True},
        {"cuda_graph": True},
        {"device": "cuda"},
        {"threads": 1},
    ],
    ids=str,
)
def test_rows_with_other_settings_are_no_counterparts(other: dict[str, Any]) -> None:
    assert not changes([parse_row(bench_row(), "x")], [parse_row(bench_row(**other), "x")])


def test_changes() -> None:
    old, new = bench_row(), bench_row(seed=2, steps=5, **{"log.every": 3})  # none of which makes a difference
    new["plan"] |= {"median_ms": 6.17, "fraction": 0.9}
    new["end_to_end"]["decisions_per_s"] = 60.0
    earlier = bench_row()
    earlier["update"]["median_ms"] = 77.0  # of two counterparts the last one counts
    plan, update, training = changes([parse_row(new, "x")], [parse_row(earlier, "x"), parse_row(old, "x")])
    assert plan[1:] == ("plan", "ms", 12.34, 6.17, 2.0, 0.5, 0.9)
    assert update[1:] == ("update", "ms", 4.0, 4.0, 1.0, 0.25, 0.25)
    assert training[1:] == ("training", "decisions/s", 40.0, 60.0, 1.5, None, None)


@pytest.mark.parametrize(
    "other", [{"task": "toy/pointmass"}, {"train": {"utd": 2.0}}, {"env": {"workers": "async"}}, {"end_to_end": False}]
)
def test_training_is_compared_on_the_same_task_alone(other: dict[str, Any]) -> None:
    found = changes([parse_row(bench_row(), "x")], [parse_row(bench_row(**other), "x")])
    assert [change.name for change in found] == ["plan", "update"]


def test_a_record_of_an_older_version_has_the_defaults_of_new_keys() -> None:
    row = bench_row()
    del row["config"]["cuda_graph"], row["config"]["planner"]["precision"]
    assert len(changes([parse_row(bench_row(), "x")], [parse_row(row, "x")])) == 3


def test_same_machine() -> None:
    assert same_machine(CPU, {**CPU, "torch": "2.14.0", "ram_gib": 7.9})
    assert not any(same_machine(CPU, {**CPU, **other}) for other in ({"gpu": "Some GPU"}, {"cores": 4}, {"cpu": "B"}, {"os": "Darwin"}))


def test_reading(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(bench_record([bench_row(), bench_row("debug")], GPU)))
    (tmp_path / "b.json").write_text('{"rows": []}')
    record = read_record(tmp_path / "a.json")
    assert record.machine == GPU and [row.config.preset for row in record.rows] == ["cpu", "debug"]
    assert record.rows[0].plan is not None and record.rows[0].plan.median_ms == 12.34 and record.rows[0].training == 40.0
    (found,) = read_records(tmp_path)
    assert found.rows == record.rows and found.source == f"{tmp_path.name}/a.json"
    with pytest.raises(ConfigError, match="b.json: no record of `worldmpc bench`"):
        read_record(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="no such folder"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no such file"):
        read_record(tmp_path)


def test_damaged_rows(tmp_path: Path) -> None:
    def message(change: dict[str, Any]) -> str:
        (tmp_path / "a.json").write_text(json.dumps(bench_record([bench_row(), bench_row() | change])))
        with pytest.raises(ConfigError) as caught:
            read_record(tmp_path / "a.json")
        return str(caught.value)

    assert "a.json, row 2: cannot be read (model.size: expected one of" in message({"config": {"model": {"size": "2"}}})
    assert "a.json, row 2: cannot be read (planner.width: unknown" in message({"config": {"planner": {"width": 3}}})
    assert "a.json, row 2: no entry 'median_ms'" in message({"update": {}})
    assert "a.json, row 2: cannot be read" in message({"update": 3.0})
    assert "a.json, row 2: cannot be read" in message({"plan": bench_row()["plan"] | {"median_ms": "fast"}})
