"""Comparison of planners: equal budgets, counted on real models; what the command writes; mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from worldmpc.bench.budget import (
    DECIDED,
    MIN_CANDIDATES,
    PLANNERS,
    TOLERANCE,
    Counting,
    Traits,
    budgeted,
    count,
    model_evaluations,
    traits_of,
)
from worldmpc.bench.planners import HORIZONS, Subject, analytic, compare, prepare
from worldmpc.cli import main
from worldmpc.config import ConfigError, DynamicsConfig, ModelConfig, PlannerConfig, make_config
from worldmpc.envs.toy import LinearQuadratic
from worldmpc.models.analytic import ANALYTIC, CartPole, Pendulum
from worldmpc.models.behaviour import BehaviourPolicy, BehaviourValue
from worldmpc.models.composed import ComposedModel
from worldmpc.models.one_step import OneStepDynamics
from worldmpc.models.trajectory import TrajectoryModel
from worldmpc.models.value_based import initialise
from worldmpc.models.world_model import WorldModel
from worldmpc.planners import make_planner, propose, rollout_return
from worldmpc.types import ModelStep

TINY = ModelConfig(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=2)
NO_POLICY = Traits()


def world(discrete: bool) -> WorldModel:
    model = WorldModel(TINY, 3, 2, terminates=True, discrete=discrete)
    model.trajectory = TrajectoryModel(2, 3, 16, (16,), discrete=discrete)
    return model


def learned(name: str, discrete: bool) -> ComposedModel:
    dynamics = OneStepDynamics(DynamicsConfig(name=name, hidden=(16,), members=2, particles=4), 3, 2, terminates=True, seed=1)  # type: ignore[arg-type]
    policy = BehaviourPolicy(dynamics.observations, 3, 2, (16,), discrete)
    value = BehaviourValue(dynamics.observations, 3, (16,), 10.0)
    initialise([policy.net, value.net], 1)
    return ComposedModel(dynamics, policy, value, TrajectoryModel(2, 3, 3, (16,), discrete=discrete))


MODELS: dict[str, tuple[Callable[[], Any], int, bool, Traits]] = {
    "pendulum": (lambda: ComposedModel(Pendulum()), 1, False, NO_POLICY),
    "cartpole": (lambda: ComposedModel(CartPole()), 2, True, NO_POLICY),
    "tdmpc2": (lambda: world(False), 2, False, Traits(True)),
    "tdmpc2-discrete": (lambda: world(True), 2, True, Traits(True, True)),
    "mlp": (lambda: learned("mlp", False), 2, False, Traits(True)),
    "ensemble-discrete": (lambda: learned("ensemble", True), 2, True, Traits(True, True, 4)),
}
"""Model, actions, whether they are one-hot, and traits."""


# Budgets.


@pytest.mark.parametrize("kind", MODELS)
def test_all_planners_imagine_what_they_are_given(kind: str):
    maker, action_dim, discrete, traits = MODELS[kind]
    model, horizon = maker(), 3
    assert traits_of(model) == traits
    tried = set()
    for name, values in PLANNERS.items():
        impossible = (name == "mcts" and not discrete) or ("gradient_steps" in values and discrete)
        impossible |= not traits.proposes and (name == "policy_guided" or values.get("prior") == "learned")
        if impossible:
            continue
        for budget in (120 * traits.particles, 211 * traits.particles):
            config = PlannerConfig(**budgeted(name, budget, horizon, traits))
            planner = make_planner(config, action_dim, 0.97, 2, discrete)
            counted = count(planner, model, 0.1 * torch.randn(2, 4 if kind == "cartpole" else 3))
            assert counted == model_evaluations(config, traits), name
            assert abs(counted - budget) <= TOLERANCE * budget, name
        tried.add(name)
    assert len(tried) >= 6


TRAITS = [Traits(), Traits(True), Traits(True, True), Traits(True, False, 20)]


@pytest.mark.parametrize("traits", TRAITS)
@pytest.mark.parametrize("name", PLANNERS)
def test_every_budget_that_is_not_too_small_is_met(name: str, traits: Traits):
    for horizon in (1, 3, 20, 50):
        with pytest.raises(ConfigError, match=f"evaluations: 1 are too few for {name}".replace("+", r"\+")) as error:
            budgeted(name, 1, horizon, traits)
        least = int(str(error.value).split("use at least ")[1].split(",")[0])
        for budget in (least, least + 1, int(1.07 * least), int(1.53 * least), 2 * least + 1, 5 * least, 17 * least + 3):
            sizes = budgeted(name, budget, horizon, traits)
            config = make_config(agent="mbmpc", planner=sizes).planner  # the configuration takes them
            assert abs(model_evaluations(config, traits) - budget) <= TOLERANCE * budget, (horizon, budget)
            assert sizes["horizon"] == horizon and set(sizes) <= set(DECIDED)
            assert name == "mcts" or sizes["num_samples"] >= MIN_CANDIDATES and sizes["num_pi_trajs"] <= sizes["num_samples"]
        with pytest.raises(ConfigError, match="too few"):
            budgeted(name, int(0.9 * least), horizon, traits)


def test_small_budgets_cost_iterations():
    assert [budgeted("cem", 20 * sequences, 20)["iterations"] for sequences in (16, 30, 32, 50, 96, 5000)] == [1, 1, 2, 3, 6, 6]
    assert budgeted("cem", 50_000, 20, iterations=9)["iterations"] == 9
    assert {budgeted(name, 50_000, 20)["iterations"] for name in ("random_shooting", "policy_guided")} == {1}


def test_proposals_and_elites_are_of_the_published_shares():
    sizes = budgeted("mppi", 6 * 512 * 3 + 24 * 2, 3, Traits(True))
    assert (sizes["iterations"], sizes["num_samples"], sizes["num_elites"], sizes["num_pi_trajs"]) == (6, 512, 64, 24)
    assert budgeted("mppi", 10_000, 3)["num_pi_trajs"] == 0  # nobody to propose


def test_a_tree_search_without_value_pays_for_playouts():
    assert (
        budgeted("mcts", 2000, 20)["num_simulations"] == 100 and budgeted("mcts", 2000, 20, Traits(True, True))["num_simulations"] == 2000
    )


def test_unknown_planners_are_named():
    with pytest.raises(ConfigError, match="planners: unknown planner 'cemm'; did you mean cem"):
        budgeted("cemm", 1000, 5)
    with pytest.raises(ConfigError, match="unknown planner 'qqq'; use some of random_shooting, cem"):
        budgeted("qqq", 1000, 5)


# Counting.


class Steps:
    """Walks along a line; knows nothing but the protocol."""

    def encode(self, obs: torch.Tensor) -> torch.Tensor:
        return obs

    def step(self, z: torch.Tensor, action: torch.Tensor) -> ModelStep:
        return ModelStep(z + action, z[..., 0], torch.ones(z.shape[:-1]))

    def propose(self, z: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return eps

    def terminal_value(self, z: torch.Tensor, eps: torch.Tensor, critics: torch.Tensor) -> torch.Tensor:
        return z[..., 0]


class Fast(Steps):
    """Answers whole sequences at once, every second time."""

    asked = 0

    def fast_returns(self, z, actions, discount, eps, critics):
        self.asked += 1
        return actions.sum((0, -1)) if self.asked % 2 else None

    def fast_proposals(self, z, eps):
        return eps


def test_counting_by_hand():
    z, actions, critics = torch.zeros(2, 7, 1), torch.ones(3, 2, 7, 1), torch.tensor([0, 1])
    slow, fast = Counting(Steps()), Counting(Fast())
    assert not hasattr(slow, "fast_returns") and not hasattr(slow, "rollout") and hasattr(fast, "fast_returns")
    rollout_return(slow, z, actions, 0.9, actions[0], critics)  # type: ignore[arg-type]
    propose(slow, z[:, 0], actions)  # type: ignore[arg-type]
    assert slow.steps == 3 * 14 + 2 * 14
    for _ in range(2):  # the second time it refuses, and is asked step by step
        rollout_return(fast, z, actions, 0.9, actions[0], critics)  # type: ignore[arg-type]
    propose(fast, z[:, 0], actions)  # type: ignore[arg-type]
    assert fast.steps == 2 * 3 * 14 + 2 * 14 and fast.model.asked == 2


# Comparing.


def test_returns_are_those_of_the_task_and_repeat():
    """On the linear-quadratic task, whose optimum is known, planners that refine come close to it, and random shooting less so."""
    subject, seeds = analytic("toy/linear-quadratic", 10, 1200), (1, 2)
    names = ["random_shooting", "cem", "policy_guided", "mcts", "diffusion+prior"]
    plans = prepare(subject, names, {}, iterations=6, device="cpu")
    how: dict[str, Any] = {"seeds": seeds, "episodes": 3, "repeats": 2, "device": "cpu"}
    rows = {row["planner"]: row for row in compare(subject, plans, {}, **how)}
    assert list(rows) == names
    assert rows["policy_guided"]["reason"] == "policy_guided needs a policy prior, and agent=mpc has none, as it learns nothing"
    assert rows["mcts"]["reason"] == "mcts needs a discrete action space"
    assert rows["diffusion+prior"]["reason"] == "this model has no learned prior over action sequences"
    assert not any("return_mean" in rows[name] for name in names[2:])
    for name in names[:2]:
        row = rows[name]
        assert row["reason"] is None and abs(row["counted"] - 1200) <= TOLERANCE * 1200
        assert row["plan"]["best_ms"] <= row["plan"]["median_ms"] and row["config"]["planner"]["name"] == name
        means = [sum(row["returns"][seed]) / 3 for seed in seeds]
        assert all(len(row["returns"][seed]) == 3 for seed in seeds) and means[0] != means[1]
        assert row["return_mean"] == pytest.approx(sum(means) / 2)
        assert (row["return_min"], row["return_max"]) == pytest.approx((min(means), max(means)))
    assert rows["random_shooting"]["return_mean"] > LinearQuadratic.RANDOM_RETURN / 2
    assert (
        rows["cem"]["return_mean"] > rows["random_shooting"]["return_mean"]
        and rows["cem"]["return_mean"] > 1.5 * LinearQuadratic.OPTIMAL_RETURN - 1
    )
    again = next(iter(compare(subject, {"cem": plans["cem"]}, {}, **{**how, "seeds": (2,)})))
    assert again["returns"][2] == rows["cem"]["returns"][2]


def test_subjects():
    assert (
        analytic("gym/CartPole-v1", None, 10) == Subject("gym/CartPole-v1", None, 20, 10)
        and analytic("gym/Acrobot-v1", None, 10).horizon == 50
    )
    assert set(HORIZONS) < set(ANALYTIC) and analytic("gym/Acrobot-v1", 7, 10).horizon == 7
    with pytest.raises(ConfigError, match="task: no known equations for dmc/walker-walk; there are for gym/CartPole-v1"):
        analytic("walker-walk", None, 10)


# The command.

QUICK = ["bench", "planners", "seeds=1,2", "episodes=2", "repeats=1", "env.episode_length=4"]


def test_record_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    words = ["task=gym/CartPole-v1,toy/linear-quadratic", "planners=cem,mcts,cem+gradient", "evaluations=200,150", "horizon=10,5"]
    assert main([*QUICK, *words, "planner.momentum=0.2", "json=out/p.json"]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "p.json").read_text())
    assert record.keys() == {"schema", "command", "commit", "machine", "versions", "rows"} and record["schema"] == "worldmpc.planners/1"
    rows = record["rows"]
    assert [(row["task"], row["planner"]) for row in rows] == [
        (task, name) for task in ("gym/CartPole-v1", "toy/linear-quadratic") for name in ("cem", "mcts", "cem+gradient")
    ]
    reasons = [row["reason"] for row in rows]
    assert reasons[2] == "there is no gradient for discrete actions" and reasons[4] == "mcts needs a discrete action space"
    assert reasons[:2] == [None] * 2 and all(reason in text.replace("\n", " ") for reason in ("there is no gradient",))
    assert [row["horizon"] for row in rows] == [10] * 3 + [5] * 3
    for row in rows:
        if row["reason"] is None:
            assert abs(row["counted"] - row["evaluations"]) <= 0.05 * row["evaluations"] and row["threads"] == 1 and row["device"] == "cpu"
            momentum = 0.1 if row["planner"] == "mcts" else 0.2  # for those that read it
            assert row["config"]["planner"]["momentum"] == momentum and row["config"]["env"]["episode_length"] == 4
            assert set(row["returns"]) == {"1", "2"}
            assert f"{row['model']}, {row['planner']}: return " in text


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of TD-MPC2."""
    folder = tmp_path_factory.mktemp("planners") / "run"
    words = ["preset=debug", "task=toy/pointmass", "threads=1", "steps=40", "eval_freq=40", "train.seed_decisions=20", "eval.episodes=1"]
    quiet = ["eval.video=false", "log.progress=none", "log.tensorboard=false", "checkpoint.every=40"]
    assert main(["train", *words, *quiet, f"run_dir={folder}"]) == 0
    return folder


def test_planners_of_a_learned_model(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    names = "policy_guided,mppi,diffusion,cem+gradient,diffusion+prior,mcts"
    assert main([*QUICK, f"checkpoint={run_folder}", f"planners={names}", "evaluations=500", "json=-"]) == 0
    rows = {row["planner"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {row["model"] for row in rows.values()} == {"latent toy/pointmass"} and {row["horizon"] for row in rows.values()} == {3}
    for name in ("policy_guided", "mppi", "diffusion", "cem+gradient"):
        assert abs(rows[name]["counted"] - 500) <= 25 and rows[name]["reason"] is None
        assert rows[name]["config"]["agent"] == "tdmpc2" and rows[name]["config"]["planner"]["name"] == name.partition("+")[0]
    assert rows["mppi"]["sizes"]["num_pi_trajs"] > 0 and rows["mppi"]["traits"]["proposes"]
    assert rows["mcts"]["reason"] == "mcts needs a discrete action space"
    assert rows["diffusion+prior"]["reason"] == "this model has no learned prior over action sequences"


MISTAKES = [
    (["planners=cem,mppii"], "planners: unknown planner 'mppii'; did you mean mppi?"),
    (["planners=cem,,mppi"], "planners: expected different names"),
    (["planners=cem", "evaluations=100"], "evaluations: 100 are too few for cem at horizon 20; use at least 320"),
    (["evaluations=many"], "evaluations: expected whole numbers, 1 or more"),
    (["evaluations=1000,2000"], "evaluations: expected one number, or one for each of the 3 tasks and checkpoints, got 2"),
    (["horizon=0"], "horizon: expected whole numbers, 1 or more"),
    (["seeds=1,1"], "seeds: expected different whole numbers, 0 or more"),
    (["episodes=0"], "episodes: expected at least 1, got 0"),
    (["task=dmc/walker-walk"], "task: no known equations for dmc/walker-walk"),
    (["task=gym/Nothing-v7"], "Nothing-v7"),
    (["checkpoint=nowhere"], "checkpoint: nowhere: no such file or folder"),
    (["planner.num_samples=5"], "planner.num_samples: follows from"),
    (["optim.lr=1"], "optim.lr: bench planners takes task, checkpoint"),
    (["planner.momentum=2"], "planner.momentum: expected in [0, 1)"),
    (["planner.momentun=0.2"], "planner.momentun: unknown configuration key"),
    (["episods=3"], "episods: unknown configuration key"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_one_line_before_measuring(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldmpc.cli.bench_planners.compare", lambda *args, **kwargs: pytest.fail("measured"))
    assert main(["bench", "planners", *words, "json=p.json"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err and not Path("p.json").exists()


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    from worldmpc.cli.text import BENCH_PLANNERS

    assert main(["bench", "planners", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "worldmpc bench planners [name=value ...]" in text and all(name in BENCH_PLANNERS["planners"].help for name in PLANNERS)
    assert all(f" {name}=" in text and option.help in text for name, option in BENCH_PLANNERS.items())
