"""The benchmark: counted products against a count by hand and against what torch counts in the real code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from worldmpc import functional, runtime
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.bench import (
    LaunchFloor,
    Limit,
    Product,
    bench,
    limits,
    measure_environment,
    plan_products,
    synthetic_batch,
    total_flops,
    update_products,
)
from worldmpc.cli import main
from worldmpc.config import ConfigError, RunConfig, make_config
from worldmpc.models import kernels
from worldmpc.types import EnvSpec

CPU = torch.device("cpu")
TINY = ["preset=debug", "task=toy/pointmass", "threads=1", "repeats=2", "obs_dim=5", "action_dim=3"]


def by_hand_config(env: dict[str, int] | None = None, planner: dict[str, int] | None = None) -> RunConfig:
    """Obs 3, action 1, latent 8, all hidden layers 4, 2 bins, 3 critics; 2 windows of 2 steps; 5 candidates, 1 proposal, 3 iterations."""
    sizes = {"enc_dim": 4, "mlp_dim": 4, "latent_dim": 8, "num_enc_layers": 2, "num_q": 3, "num_bins": 2}
    planner = {"horizon": 2, "iterations": 3, "num_samples": 5, "num_elites": 2, "num_pi_trajs": 1} | (planner or {})
    return make_config(model=sizes, planner=planner, loss={"batch_size": 2}, env=env or {})


# Multiplications per row, by hand.
ENCODER = 3 * 4 + 4 * 8
DYNAMICS = 9 * 4 + 4 * 4 + 4 * 8
REWARD = 9 * 4 + 4 * 4 + 4 * 2
CRITIC = 9 * 4 + 4 * 4 + 4 * 2
POLICY = 8 * 4 + 4 * 4 + 4 * 2
TERMINATION = 8 * 4 + 4 * 4 + 4 * 1
FIRST_LATENT = 8 * 4  # its columns of a first layer


@pytest.mark.parametrize("envs", [1, 3])
def test_plan_flops_by_hand(envs: int):
    config = by_hand_config({"num_envs": envs})
    # For the environment: encoder, the first latent in dynamics and reward, the first policy step; then one proposal of two steps.
    once = ENCODER + 2 * FIRST_LATENT + POLICY + (POLICY + DYNAMICS - FIRST_LATENT)
    iteration = 5 * (2 * DYNAMICS - FIRST_LATENT + 2 * REWARD - FIRST_LATENT + POLICY + 2 * CRITIC)
    assert total_flops(plan_products(config, 3, 1)) == 2 * envs * (once + 3 * iteration)
    with_termination = total_flops(plan_products(config, 3, 1, terminates=True))
    assert with_termination == 2 * envs * (once + 3 * (iteration + 5 * 2 * TERMINATION))


def test_plan_of_one_step_and_without_proposals():
    config = by_hand_config(planner={"horizon": 1})
    iteration = 5 * (DYNAMICS + REWARD - 2 * FIRST_LATENT + POLICY + 2 * CRITIC)
    assert total_flops(plan_products(config, 3, 1)) == 2 * (ENCODER + 2 * FIRST_LATENT + POLICY + 3 * iteration)
    config = by_hand_config(planner={"horizon": 1, "num_pi_trajs": 0})
    assert total_flops(plan_products(config, 3, 1)) == 2 * (ENCODER + 2 * FIRST_LATENT + 3 * iteration)


def test_update_flops_by_hand():
    rows, policy_rows, batch = 4, 6, 2
    target = rows * (ENCODER + POLICY + 2 * CRITIC)
    # Forward and weights cost the same; the first layer's input gradient covers the latent (8 of 9 inputs) or nothing.
    encoder = batch * (2 * ENCODER + 4 * 8)
    dynamics = rows * (2 * DYNAMICS + DYNAMICS - 1 * 4)
    heads = rows * ((2 * REWARD + REWARD - 1 * 4) + 3 * (2 * CRITIC + CRITIC - 1 * 4))
    policy = policy_rows * (2 * POLICY + POLICY - 8 * 4)
    policy_critics = policy_rows * 2 * (CRITIC + CRITIC - 8 * 4)
    total = target + encoder + dynamics + heads + policy + policy_critics
    assert total_flops(update_products(by_hand_config(), 3, 1)) == 2 * total
    with_termination = total_flops(update_products(by_hand_config(), 3, 1, terminates=True))
    assert with_termination == 2 * (total + rows * 3 * TERMINATION)


@pytest.mark.parametrize("terminates", [False, True])
def test_counted_products_are_those_of_the_code(terminates: bool, monkeypatch: pytest.MonkeyPatch):
    """Torch counts what the code multiplies by its functions; it is all that is counted, and what it does beyond that is known."""
    monkeypatch.setattr(kernels, "NATIVE_FROM", 1 << 60)  # torch sees nothing of what the library does
    config = make_config("debug", **{"model.num_q": 3, "env.num_envs": 2, "model.termination": "on" if terminates else "off"})
    obs_dim, dim, latent, width = 5, 3, 16, 16
    agent = TDMPC2(config, EnvSpec("x", (obs_dim,), dim, None), CPU)
    carry, obs = agent.init_carry(2), torch.randn(2, obs_dim)
    with FlopCounterMode(display=False) as counter:
        agent.act(carry, obs, "explore")
    counted = total_flops(plan_products(config, obs_dim, dim, terminates=terminates))
    envs, proposals, candidates, iterations = 2, 2 * 4, 2 * 16, 2
    # The first latent anew for every candidate, in dynamics and reward, and for every proposal, in the policy as well.
    unneeded = latent * width * (2 * iterations * candidates + proposals - 2 * envs)
    unneeded += (proposals - envs) * (latent * width + width * width + width * 2 * dim)
    assert counted <= counter.get_total_flops() <= counted + 2 * unneeded
    with FlopCounterMode(display=False) as counter:
        agent.update(synthetic_batch(3, 8, obs_dim, dim, CPU))
    counted = total_flops(update_products(config, obs_dim, dim, terminates=terminates))
    unneeded = width * (dim * 3 * 8 * (1 + 1 + 3) + latent * 2 * 4 * 8)  # gradients of whole first inputs, sliced afterwards
    assert counted <= counter.get_total_flops() <= counted + 2 * unneeded


def test_more_iterations_in_large_action_spaces():
    config = make_config("debug")
    few, many = (sum(p.count for p in plan_products(config, 5, dim) if p.name == "terminal critics") for dim in (19, 20))
    assert (few, many) == (2 * 3 * 2, 2 * 3 * 4)


PRODUCTS = [Product("a", "forward", 3, 4, 5, 2), Product("b", "weights", 4, 5, 3), Product("c", "inputs", 3, 5, 4)]


def test_limit_does_the_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "ONEDNN", False)  # torch does not count its products
    limit = Limit(PRODUCTS, CPU)
    with FlopCounterMode(display=False) as counter:
        limit()
    assert counter.get_total_flops() == total_flops(PRODUCTS) == 2 * (2 * 60 + 60 + 60)


class Types(TorchDispatchMode):
    """Remembers the types of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [result.dtype] * ("mm" in str(func) or "linear" in str(func))
        return result


@pytest.mark.parametrize("way", [0, 1, -1])
def test_limit_multiplies_in_the_precision_asked_for(way: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "_fastest", lambda ways: ways[way])
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.float32 if way == -1 else torch.bfloat16)):
        limit = Limit(PRODUCTS, CPU, precision)
        with Types() as types:
            limit()
        assert types.seen == [dtype] * 4  # float32 is the last way of bf16


@pytest.mark.skipif(not limits.ONEDNN, reason="PyTorch has no oneDNN here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_libraries_multiply(dtype: torch.dtype):
    left, right, out = torch.randn(3, 5).to(dtype), torch.randn(5, 4).to(dtype), torch.zeros(3, 4, dtype=dtype)
    blas, onednn = limits._ways(left, right, out)
    blas()
    torch.testing.assert_close(out, (left.double() @ right.double()).to(dtype))
    torch.testing.assert_close(onednn(), out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_limit_and_launch_floor_on_a_gpu():
    device = torch.device("cuda")
    floor, limit = LaunchFloor(device), Limit(PRODUCTS, device, "bf16")
    floor.calls.zero_()
    limit()
    floor()
    floor()
    torch.cuda.synchronize()
    assert floor.calls.item() == 2.0
    row = bench(make_config("debug", device="cuda", task="toy/pointmass", **{"planner.precision": "bf16"}), repeats=3, seconds=0.2)
    assert 0 < row["launch_floor_us"] < 1e3 * row["plan"]["limit_ms"] + 1e3 and row["memory"]["peak_cuda_mib"] > 0
    assert row["plan"]["precision"] == "bf16" and row["update"]["precision"] == "fp32" and row["device"] == "cuda"


def test_rows_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *TINY, "seconds=0.1", "planner.precision=fp32,bf16", "env.num_envs=1,2", "json=out/b.json"]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "b.json").read_text())
    assert record.keys() == {"schema", "command", "commit", "machine", "versions", "rows"}
    found = [(row["config"]["planner"]["precision"], row["config"]["env"]["num_envs"]) for row in record["rows"]]
    assert found == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    assert "preset debug, device cpu, 1 thread" in text and "4 of 4: planner.precision=bf16 env.num_envs=2" in text
    for row in record["rows"]:
        for name in ("plan", "update"):
            verb = row[name]
            assert f" {verb['fraction']:.0%} " in text and verb["compile_s"] is None
            assert verb["best_ms"] <= verb["p10_ms"] <= verb["median_ms"] <= verb["p90_ms"]
            assert 0 < verb["limit_ms"] <= verb["limit_fp32_ms"] and verb["limit_ms"] <= verb["limit_median_ms"]
            assert verb["fraction"] == pytest.approx(verb["limit_ms"] / verb["median_ms"])
            assert verb["fraction_best"] == pytest.approx(verb["limit_ms"] / verb["best_ms"])
            assert verb["flops"] == sum(2 * p["m"] * p["n"] * p["k"] * p["count"] for p in verb["products"])
        assert (row["plan"]["precision"], row["update"]["precision"]) == (row["config"]["planner"]["precision"], "fp32")
        assert row["update"]["limit_ms"] == row["update"]["limit_fp32_ms"]
        training, envs = row["end_to_end"], row["config"]["env"]["num_envs"]
        assert training["task"] == "toy/pointmass" and training["decisions"] >= 1
        assert abs(training["updates"] - training["decisions"]) <= envs  # utd 1
        assert row["environment"]["task"] == "toy/pointmass" and row["environment"]["decisions_per_s"] > training["decisions_per_s"]
        assert row["threads"] == 1 and row["device"] == "cpu" and row["launch_floor_us"] is None
        assert row["memory"]["peak_rss_mib"] > 50 and row["memory"]["peak_cuda_mib"] is None
        assert row["config"]["preset"] == "debug" and row["obs_dim"] == 5
    single, double = record["rows"][0]["plan"], record["rows"][1]["plan"]
    assert double["flops"] == 2 * single["flops"]


def test_compare_with_an_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *TINY, "seconds=0.02", "model.mlp_dim=24", "json=old.json"]) == 0
    old = json.loads(Path("old.json").read_text())
    old["machine"]["cpu"] = "Another CPU"
    old["rows"][0]["update"] |= {"median_ms": 1e6, "fraction": 0.0123}
    Path("old.json").write_text(json.dumps(old))
    capsys.readouterr()
    assert main(["bench", *TINY, "seconds=0.02", "model.mlp_dim=24,32", "--compare", "old.json"]) == 0
    text = capsys.readouterr().out.partition("against old.json")[2]
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "ms " in line or "decisions/s" in line] == ["plan", "update", "training"]
    update = next(line for line in lines if line.split()[:1] == ["update"])
    assert "1000000 ms" in update and "1%" in update
    assert "1 of 2 rows have a counterpart there" in text
    assert "old machine: Another CPU" in text and "warning: the machines differ" in text
    assert main(["bench", *TINY, "repeats=1", "seconds=0", "loss.batch_size=9", "compare=old.json"]) == 0
    assert "no row of old.json has the settings" in capsys.readouterr().out


def test_a_configuration_that_fails_costs_only_its_own_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "b.json"
    assert main(["bench", *TINY, "seconds=0", "loss.batch_size=8,10000000000000,9", f"json={file}"]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("worldmpc: error: loss.batch_size=10000000000000: out of memory: ")
    assert [row["config"]["loss"]["batch_size"] for row in json.loads(file.read_text())["rows"]] == [8, 9]
    assert "3 of 3: loss.batch_size=9" in out and "debug loss.batch_size=9" in out


def test_rows_before_an_interruption_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from worldmpc import bench as package

    def interrupted(config: RunConfig, **sizes: float) -> dict[str, Any]:
        if config.loss.batch_size == 9:
            raise KeyboardInterrupt
        return bench(config, **sizes)  # type: ignore[arg-type]

    monkeypatch.setattr(package, "bench", interrupted)
    assert main(["bench", *TINY, "seconds=0", "loss.batch_size=8,9,10", "json=-"]) == 130
    assert [row["config"]["loss"]["batch_size"] for row in json.loads(capsys.readouterr().out)["rows"]] == [8]


def test_environment_alone():
    found = measure_environment(make_config("debug", task="toy/pointmass", **{"env.num_envs": 3, "env.action_repeat": 2}), 0.05)
    assert found["num_envs"] == 3 and found["seconds"] >= 0.05 and found["best_ms"] <= found["median_ms"]
    assert found["decisions_per_s"] == pytest.approx(3 * found["vector_steps"] / found["seconds"])
    assert found["env_steps_per_s"] == pytest.approx(2 * found["decisions_per_s"])


def test_bench_without_planning_and_without_training():
    row = bench(make_config("debug", threads=1, **{"planner.mpc": False}), repeats=1, seconds=0)
    assert row["plan"] is row["environment"] is row["end_to_end"] is None and row["update"]["median_ms"] > 0


def test_compiling_is_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(functional, "COMPILE_BACKEND", "eager")
    row = bench(make_config("debug", threads=1, compile=True, **{"planner.iterations": 1, "planner.horizon": 1}), repeats=1, seconds=0)
    for name in ("plan", "update"):
        assert 1e3 * row[name]["compile_s"] > row[name]["median_ms"]


def test_bench_chooses_threads_as_training_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "_offered_threads", lambda: 3)
    assert bench(make_config("debug"), repeats=1, seconds=0)["threads"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"repeats": 0}, "repeats"), ({"obs_dim": 0}, "obs_dim"), ({"action_dim": -1}, "action_dim"), ({"seconds": float("nan")}, "seconds")],
)
def test_bench_refuses_sizes_out_of_range(arguments: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=f"{message}: expected"):
        bench(make_config("debug"), **arguments)  # type: ignore[arg-type]


MISTAKES = [
    (["model.size=1,7"], "model.size: expected one of cpu, 1, 5"),
    (["repeats=x"], "repeats: expected a whole number"),
    (["repeats=0", "loss.batch_size=8,9"], "repeats: expected at least 1"),
    (["planer.horizon=3"], "planer.horizon: unknown configuration key"),
    (["device=cpu,quantum", "seconds=0"], "device: expected auto, cpu"),
    (["task=toy/pointmass,toy/nothing"], "toy/nothing"),
    (["model.mlp_dim=interval(1,9)"], "expected one value or a list of them"),
    (["compare=nowhere.json"], "nowhere.json: no such file"),
    (["compare=other.json"], "other.json: no record of `worldmpc bench`"),
    (["compare=cut.json"], "cut.json: not JSON"),
    (["compare=hollow.json"], "hollow.json, row 1: no entry 'config'"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_one_line_before_measuring(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldmpc.bench.bench", None)
    Path("other.json").write_text('{"rows": []}')
    Path("cut.json").write_text('{"rows": [')
    Path("hollow.json").write_text('{"schema": "worldmpc.bench/1", "machine": {}, "rows": [{}]}')
    assert main(["bench", *words, "json=b.json"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err and not Path("b.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cuda_graph=true"], "cuda_graph: needs device=cuda, this run is on cpu; leave it out"),
        (["json=FOLDER"], "json: cannot write FOLDER (Is a directory); choose another file"),
        (["json=FOLDER/file/x.json"], "json: cannot write FOLDER/file/x.json"),
    ],
)
def test_what_cannot_work_is_said_before_measuring(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("worldmpc.bench.bench", lambda *args, **kwargs: pytest.fail("measured"))
    assert main(["bench", "preset=debug", *(word.replace("FOLDER", str(tmp_path)) for word in words)]) == 2
    assert message.replace("FOLDER", str(tmp_path)) in capsys.readouterr().err


def test_a_record_that_was_not_written_leaves_no_file(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr("worldmpc.bench.bench", broken)
    assert main(["bench", "preset=debug", f"json={tmp_path / 'new' / 'record.json'}"]) != 0
    assert list((tmp_path / "new").iterdir()) == []
