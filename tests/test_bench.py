"""The benchmark: counted products against a count by hand and against what torch counts in the real code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from worldmpc import runtime
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.bench import Limit, Product, bench, plan_products, synthetic_batch, total_flops, update_products
from worldmpc.cli import main
from worldmpc.config import ConfigError, RunConfig, make_config
from worldmpc.types import EnvSpec

CPU = torch.device("cpu")


def by_hand_config() -> RunConfig:
    """Obs 3, action 1, latent 8, all hidden layers 4, 2 bins, 3 critics; 2 windows of 2 steps; 5 candidates, 1 proposal, 3 iterations."""
    sizes = {"enc_dim": 4, "mlp_dim": 4, "latent_dim": 8, "num_enc_layers": 2, "num_q": 3, "num_bins": 2}
    planner = {"horizon": 2, "iterations": 3, "num_samples": 5, "num_elites": 2, "num_pi_trajs": 1}
    return make_config(model=sizes, planner=planner, loss={"batch_size": 2})


# Multiplications per row, by hand.
ENCODER = 3 * 4 + 4 * 8
DYNAMICS = 9 * 4 + 4 * 4 + 4 * 8
REWARD = 9 * 4 + 4 * 4 + 4 * 2
CRITIC = 9 * 4 + 4 * 4 + 4 * 2
POLICY = 8 * 4 + 4 * 4 + 4 * 2
TERMINATION = 8 * 4 + 4 * 4 + 4 * 1


def test_plan_flops_by_hand():
    once = 1 * ENCODER + 1 * (2 * POLICY + 1 * DYNAMICS)
    iteration = 5 * (2 * DYNAMICS + 2 * REWARD + POLICY + 2 * CRITIC)
    assert total_flops(plan_products(by_hand_config(), 3, 1)) == 2 * (once + 3 * iteration)
    with_termination = total_flops(plan_products(by_hand_config(), 3, 1, terminates=True))
    assert with_termination == 2 * (once + 3 * (iteration + 5 * 2 * TERMINATION))


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
def test_counted_products_are_those_of_the_code(terminates: bool):
    """Torch counts what the code multiplies; all that it does beyond the count is known."""
    config = make_config("debug", **{"model.num_q": 3, "env.num_envs": 2, "model.termination": "on" if terminates else "off"})
    obs_dim, dim, latent, width = 5, 3, 16, 16
    agent = TDMPC2(config, EnvSpec("x", (obs_dim,), dim, None), CPU)
    carry, obs = agent.init_carry(2), torch.randn(2, obs_dim)
    with FlopCounterMode(display=False) as counter:
        agent.act(carry, obs, "explore")
    counted = total_flops(plan_products(config, obs_dim, dim, terminates=terminates))
    assert counter.get_total_flops() == counted
    with FlopCounterMode(display=False) as counter:
        agent.update(synthetic_batch(3, 8, obs_dim, dim, CPU))
    counted = total_flops(update_products(config, obs_dim, dim, terminates=terminates))
    unneeded = 2 * width * (dim * 3 * 8 * (1 + 1 + 3) + latent * 2 * 4 * 8)  # gradients of whole first inputs, sliced afterwards
    assert counted <= counter.get_total_flops() <= counted + unneeded


def test_more_iterations_in_large_action_spaces():
    config = make_config("debug")
    few, many = (sum(p.count for p in plan_products(config, 5, dim) if p.name == "reward") for dim in (19, 20))
    assert (few, many) == (3 * 2, 3 * 4)


def test_limit_does_the_products():
    products = [Product("a", "forward", 3, 4, 5, 2), Product("b", "weights", 4, 5, 3), Product("c", "inputs", 3, 5, 4)]
    limit = Limit(products, CPU)
    with FlopCounterMode(display=False) as counter:
        limit()
    assert counter.get_total_flops() == total_flops(products) == 2 * (2 * 60 + 60 + 60)


def test_bench_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    words = ["preset=debug", "task=toy/pointmass", "threads=1", "repeats=4", "seconds=0.2", "obs_dim=5", "action_dim=3"]
    assert main(["bench", *words, "json=out/b.json"]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "b.json").read_text())
    assert {"command", "commit", "machine", "versions", "threads", "device", "config", "end_to_end", "memory"} <= record.keys()
    for name in ("plan", "update"):
        row = record[name]
        assert name in text and 0 < row["limit_ms"] <= row["limit_median_ms"]
        assert row["best_ms"] <= row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["fraction"] == pytest.approx(row["limit_ms"] / row["median_ms"]) and row["fraction_best"] < 1
        assert row["flops"] == sum(2 * p["m"] * p["n"] * p["k"] * p["count"] for p in row["products"])
    training = record["end_to_end"]
    assert training["task"] == "toy/pointmass" and training["decisions"] >= 1
    assert abs(training["updates"] - training["decisions"]) <= 1  # utd 1
    assert record["threads"] == 1 and record["memory"]["peak_rss_mib"] > 50 and record["memory"]["peak_cuda_mib"] is None
    assert record["config"]["preset"] == "debug" and record["obs_dim"] == 5


def test_bench_without_planning_and_without_training():
    record = bench(make_config("debug", threads=1, **{"planner.mpc": False}), repeats=1, seconds=0)
    assert "plan" not in record and record["end_to_end"] is None and record["update"]["median_ms"] > 0


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


def test_bench_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]):
    for words in (["model.size=7"], ["repeats=x"], ["planer.horizon=3"], ["device=quantum", "seconds=0"], ["task=toy/nothing"]):
        assert main(["bench", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
