"""Evaluator, policy store, checkpointer, logger and curriculum, each alone."""

from __future__ import annotations

import collections
import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

import worldmpc
from tests.trees import differences
from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs.toy import Balance, PointMass
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.training import components
from worldmpc.training.checkpoint import CheckpointError
from worldmpc.training.configs import AgentConfig, WandbConfig
from worldmpc.training.curriculum import Curriculum, CurriculumTask
from worldmpc.training.evaluation import PolicyEvaluator
from worldmpc.training.policy_store import PolicyRecord, PolicyStore, TrainingCheckpointer
from worldmpc.training.stats import StatsLogger, start_wandb
from worldmpc.types import EnvSpec

SPEC = EnvSpec("any", (3,), 2, None)


class Perfect(torch.nn.Module):
    """Goes to the origin of the point mass, and keeps the balance."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, obs, state=None, action=None, eps=None):
        return (-self.gain * obs).clamp(-1, 1), obs.sum(-1), obs.sum(-1), obs.sum(-1), None


def test_everything_is_under_one_roof():
    assert all(hasattr(components, name) for name in components.__all__)


def test_scores_of_a_suite():
    suite = {"easy": ["toy/pointmass"], "both": [CurriculumTask("balance", Balance), "toy/pointmass"]}
    scores = PolicyEvaluator(suite, episodes=4).evaluate(Perfect(10.0))
    assert set(scores) == {"easy/score", "easy/toy/pointmass", "both/score", "both/balance", "both/toy/pointmass"}
    assert scores["both/balance"] == 100 and 47 < scores["easy/toy/pointmass"] < 50
    assert math.isclose(scores["both/score"], (scores["both/balance"] + scores["both/toy/pointmass"]) / 2)
    assert PolicyEvaluator(suite, episodes=4).evaluate(Perfect(0.0))["both/balance"] < 60


def test_evaluations_repeat_and_can_differ(tmp_path):
    evaluator = PolicyEvaluator({"a": ["toy/pointmass"]}, PolicyStore(tmp_path), episodes=3, seed=5)
    policy = ActorCritic(2, 2, (8,))
    before = torch.get_rng_state()
    first = evaluator.evaluate(policy, index=1)
    assert first == evaluator.evaluate(policy, index=1) != evaluator.evaluate(policy, index=2)
    assert torch.equal(before, torch.get_rng_state())
    evaluator.policy_store.save("mine", policy)
    assert first == evaluator.evaluate("mine", index=1) == evaluator.evaluate(PolicyRecord("x", policy), index=1)


def test_a_policy_that_samples_by_itself_repeats_and_disturbs_nobody():
    class Sampling(torch.nn.Module):
        def forward(self, obs, state, action=None):
            return torch.randn(len(obs), 2), *[obs[:, 0]] * 3, None

    evaluator = PolicyEvaluator({"a": ["toy/pointmass"]}, episodes=2)
    before = torch.get_rng_state()
    first = evaluator.evaluate(Sampling(), index=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert first == evaluator.evaluate(Sampling(), index=1) != evaluator.evaluate(Sampling(), index=2)


def test_more_episodes_than_environments_without_a_time_limit():
    task = CurriculumTask("endless", lambda: PointMass(length=None))
    result = PolicyEvaluator({"a": [task]}, episodes=18).play(Perfect(10.0), task)
    assert len(result.returns) == 18


def test_bad_suites_and_policies():
    for suite in ({}, {"a": []}, {"a": ["toy/balance", "toy/balance"]}, {"a": [CurriculumTask("score", "toy/balance")]}):
        with pytest.raises(ConfigError, match="suite"):
            PolicyEvaluator(suite)
    for suite in ("toy/balance", ["toy/balance"]):
        with pytest.raises(ConfigError, match="suite: expected categories with lists of tasks"):
            PolicyEvaluator(suite)  # type: ignore[arg-type]
    for tasks in ("toy/balance", CurriculumTask("a", "toy/balance")):
        with pytest.raises(ConfigError, match="suite.a: expected a list of tasks, got .*put it in brackets"):
            PolicyEvaluator({"a": tasks})  # type: ignore[dict-item]
    for sizes in ((3, 2), (2, 1), (2, 2, (8,), True)):
        with pytest.raises(ConfigError, match="suite: toy/pointmass has .* the policy was made for"):
            PolicyEvaluator({"a": ["toy/pointmass"]}).evaluate(ActorCritic(*sizes))
    with pytest.raises(ConfigError, match="policy store"):
        PolicyEvaluator({"a": ["toy/balance"]}).evaluate("mine")


@pytest.mark.parametrize(
    ("agent", "spec"),
    [
        (AgentConfig(hidden_size=8), SPEC),
        (AgentConfig(hidden_size=8, num_layers=3), EnvSpec("choice", (4,), 3, None, discrete=True)),
        (AgentConfig("simple_cnn", hidden_size=8), EnvSpec("images", (3, 9, 9), 2, None)),
    ],
)
def test_policies_come_back_as_they_were(tmp_path, agent, spec):
    store = PolicyStore(tmp_path / "policies", agent, seed=3)
    record = store.create(spec)
    assert record.uri is None and not (tmp_path / "policies").exists()
    saved = store.save("first", record.policy, {"score": 3.5})
    obs = torch.rand(5, *spec.obs_shape)
    for uri in ("first", saved.uri, f"file://{saved.uri}"):
        found = PolicyStore(tmp_path / "policies", AgentConfig(hidden_size=99)).policy(uri)
        assert found.metadata == {"score": 3.5} and found.name == "first"
        assert all(torch.equal(a, b) for a, b in zip(found.policy(obs)[:4], record.policy(obs)[:4], strict=True))
    assert store.names() == ["first"]
    again = PolicyStore(tmp_path / "policies", agent, seed=3).create(spec).policy
    assert not differences(again.state_dict(), record.policy.state_dict())


def test_policies_of_environments(tmp_path):
    store = PolicyStore(tmp_path, AgentConfig(log_std_init=-1.0))
    with worldmpc.make_envs("toy/identity-discrete") as choice, worldmpc.make_envs("toy/pointmass") as box:
        assert store.create(choice).policy.log_std is None
        assert torch.equal(store.create(box).policy.log_std, torch.tensor([-1.0, -1.0]))


def test_networks_of_other_kinds(tmp_path):
    class Table(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.architecture = {"name": "table", "size": size}
            self.values = torch.nn.Parameter(torch.zeros(size))

    store = PolicyStore(
        tmp_path,
        AgentConfig(name="table"),
        builders={"table": lambda agent, spec, seed: Table(spec.action_dim)},
        loaders={"table": lambda architecture: Table(architecture["size"])},
    )
    policy = store.create(SPEC).policy
    torch.nn.init.ones_(policy.values)
    store.save("mine", policy)
    assert torch.equal(store.policy("mine").policy.values, torch.ones(2))
    with pytest.raises(ConfigError, match="holds a table, this store loads actor_critic"):
        PolicyStore(tmp_path).policy("mine")
    with pytest.raises(ConfigError, match="without `architecture`"):
        store.save("other", torch.nn.Linear(1, 1))


def test_store_errors(tmp_path):
    with pytest.raises(ConfigError, match="unknown policy 'transformer'; one of mlp, simple_cnn"):
        PolicyStore(tmp_path, AgentConfig(name="transformer")).create(SPEC)
    with pytest.raises(ConfigError, match="use simple_cnn for images"):
        PolicyStore(tmp_path).create(EnvSpec("images", (3, 9, 9), 2, None))
    with pytest.raises(ConfigError, match="use mlp for vectors"):
        PolicyStore(tmp_path, AgentConfig(name="simple_cnn")).create(SPEC)
    with pytest.raises(CheckpointError, match="nothing at none"):
        PolicyStore(tmp_path).policy("none")
    assert PolicyStore(tmp_path / "none").names() == []
    (tmp_path / "model.pt").write_bytes(b"pickled")
    with pytest.raises(CheckpointError):
        PolicyStore(tmp_path).policy(tmp_path / "model.pt")


def test_trainer_state_comes_back(tmp_path):
    policy = ActorCritic(3, 2, (4,))
    optimizer = torch.optim.Adam(policy.parameters())
    policy.value(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpointer = TrainingCheckpointer(tmp_path / "run", PolicyStore(tmp_path / "policies"))
    assert checkpointer.load_trainer_state() is None
    record = checkpointer.save_policy(policy, 12, {"score": 1.0})
    assert record.name == "policy_000012" and record.metadata == {"epoch": 12, "score": 1.0}
    checkpointer.save_trainer_state(480, 12, optimizer.state_dict(), extra={"a": torch.ones(2), "b": [1, None]})
    state = TrainingCheckpointer(tmp_path / "run", PolicyStore(tmp_path / "policies")).load_trainer_state()
    assert state["agent_step"] == 480 and state["epoch"] == 12 and state["policy_uri"] == "policy_000012"
    assert torch.equal(state["extra"]["a"], torch.ones(2)) and state["extra"]["b"] == [1, None]
    assert not differences(state["optimizer_state_dict"]["state"], optimizer.state_dict()["state"])
    other = torch.optim.Adam(policy.parameters())
    other.load_state_dict(state["optimizer_state_dict"])
    checkpointer.save_trainer_state(1, 1, {}, tmp_path / "elsewhere")
    assert checkpointer.load_trainer_state(tmp_path / "elsewhere")["agent_step"] == 1
    assert checkpointer.load_trainer_state()["agent_step"] == 480


def test_which_policy_is_loaded(tmp_path):
    """The checkpoint's, else the initial one, else the one at the default path, else a new one."""
    store = PolicyStore(tmp_path, AgentConfig(hidden_size=4))
    checkpointer = TrainingCheckpointer(tmp_path / "run", store)
    for name in ("saved", "initial", "default"):
        store.save(name, store.create(SPEC).policy)
    default = tmp_path / "default"
    assert checkpointer.load_policy({"policy_uri": "saved"}, SPEC, "initial", default).name == "saved"
    assert checkpointer.load_policy({"policy_uri": None}, SPEC, "initial", default).name == "initial"
    assert checkpointer.load_policy(None, SPEC, None, default).name == "default"
    assert checkpointer.load_policy(None, SPEC, None, tmp_path / "none").name == "initial"
    assert checkpointer.load_policy(None, SPEC).uri is None
    with pytest.raises(CheckpointError, match="nothing at gone"):
        checkpointer.load_policy({"policy_uri": "gone"}, SPEC, "initial")


class Run:
    """Stands for a run of Weights & Biases."""

    def __init__(self):
        self.logged, self.saved = [], []

    def log(self, record, step):
        self.logged.append((step, record))

    def save(self, pattern):
        self.saved.append(pattern)


def test_policies_are_uploaded_on_request(tmp_path):
    run = Run()
    checkpointer = TrainingCheckpointer(tmp_path, PolicyStore(tmp_path), run)
    record = checkpointer.save_policy(ActorCritic(3, 2, (4,)), 1)
    assert run.saved == [f"{record.uri}/*"]


def make_logger(folder, **options):
    return StatsLogger(folder, tensorboard=False, progress="none", console=Console(file=io.StringIO()), **options)


def test_stats_are_averaged_and_written_everywhere(tmp_path):
    run = Run()
    logger = make_logger(tmp_path, wandb_run=run, action_repeat=2)
    logger.add_stats({"episode_return": [1.0, 3.0], "episode_length": [10.0]})
    logger.add_stats({"episode_return": np.array([5.0]), "speed": torch.tensor(2.0)})
    for wrong in ("fast", ["fast"], None):
        with pytest.raises(ConfigError, match="stats.word: expected numbers, got"):
            logger.add_stats({"word": wrong})  # type: ignore[dict-item]
    record = logger.process_and_log(100, 1, {"policy_loss": 0.5}, updates=8, evals={"easy/score": 7.0})
    assert record["rollout/episode_return"] == 3.0 and record["rollout/speed"] == 2.0
    assert record["train/policy_loss"] == 0.5 and record["eval/easy/score"] == 7.0
    second = logger.process_and_log(200, 2, {"policy_loss": 0.25})
    assert "rollout/episode_return" not in second
    logger.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["decisions"] for line in lines] == [100, 200] and lines[0]["env_steps"] == 200 and lines[0]["episodes"] == 3
    assert lines[0]["rollout/episode_return"] == 3.0 and lines[0]["updates"] == 8
    with (tmp_path / "stats.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"epoch": "1", "agent_steps": "100", "name": "rollout/episode_return", "value": "3"} in rows
    assert [step for step, _ in run.logged] == [100, 200] and run.logged[0][1]["train/policy_loss"] == 0.5


def test_tensorboard_events(tmp_path):
    logger = StatsLogger(tmp_path, progress="none")
    logger.process_and_log(10, 1, {"policy_loss": 0.5})
    logger.close()
    assert list((tmp_path / "tb").iterdir())


def test_console_shows_progress():
    text = io.StringIO()
    logger = StatsLogger(None, progress="plain", console=Console(file=text), total_steps=500)
    logger.process_and_log(250, 1, {"policy_loss": 0.5}, updates=3)
    logger.process_and_log(500, 2, {"policy_loss": 0.5}, updates=6)
    logger.close()
    assert "decisions 500" in text.getvalue()


def test_only_the_master_writes(tmp_path):
    logger = make_logger(tmp_path / "run", is_master=False, wandb_run=(run := Run()))
    assert logger.process_and_log(1, 1, {"a_loss": 1.0})["train/a_loss"] == 1.0
    logger.close()
    assert not (tmp_path / "run").exists() and not run.logged


def test_records_of_a_resumed_run_are_cut(tmp_path):
    logger = make_logger(tmp_path)
    for epoch in (1, 2, 3):
        logger.process_and_log(100 * epoch, epoch, {"a_loss": float(epoch)})
    logger.close()
    again = make_logger(tmp_path)
    again.resume(200)
    again.process_and_log(300, 3, {"a_loss": 33.0})
    again.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["train/a_loss"] for record in records] == [1.0, 2.0, 33.0]
    with (tmp_path / "stats.csv").open() as file:
        assert [row["value"] for row in csv.DictReader(file) if row["name"] == "train/a_loss"] == ["1", "2", "33"]
    with pytest.raises(FileExistsError, match="earlier run"):
        make_logger(tmp_path).process_and_log(1, 1)


def test_wandb_is_off_unless_asked_for(monkeypatch):
    assert start_wandb(WandbConfig(), "name", {}) is None
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb.enabled: the package wandb is not installed"):
        start_wandb(WandbConfig(enabled=True), "name", {})


def choices(curriculum, count=8):
    return [curriculum.get_task().name for _ in range(count)]


def test_tasks_of_a_curriculum():
    assert choices(Curriculum("toy/balance"), 3) == ["toy/balance"] * 3
    assert choices(Curriculum(["a", "b", "c"], "round_robin"), 5) == ["a", "b", "c", "a", "b"]
    task = Curriculum(["toy/balance"], config=EnvConfig(num_envs=3)).get_task()
    assert task.env_cfg() == EnvConfig(num_envs=3)
    with task.make_envs(1) as envs:
        assert envs.num_envs == 3 and envs.spec.name == "toy/balance"


def test_weighted_choices():
    found = collections.Counter(choices(Curriculum(["a", "b", "c"], "weighted", weights=[1, 3, 0]), 2000))
    assert found["c"] == 0 and abs(found["b"] / 2000 - 0.75) < 0.05
    even = collections.Counter(choices(Curriculum(["a", "b"], "weighted"), 2000))
    assert abs(even["a"] / 2000 - 0.5) < 0.05
    assert choices(Curriculum(["a", "b"], "weighted", seed=1)) == choices(Curriculum(["a", "b"], "weighted", seed=1))
    assert choices(Curriculum(["a", "b"], "weighted", seed=1), 30) != choices(Curriculum(["a", "b"], "weighted", seed=2), 30)


def test_progress_chooses_what_is_being_learned():
    curriculum = Curriculum(["done", "learning", "forgotten"], "progress")
    for name in ("done", "learning"):
        curriculum.report(name, 1.0)
    assert curriculum.get_task().name == "forgotten"  # no score yet
    for step in range(20):
        curriculum.report("done", 100.0 + step % 2)
        curriculum.report("learning", float(step))
        curriculum.report("forgotten", 0.0)
    chances = dict(zip(curriculum.names, curriculum.probabilities().tolist(), strict=True))
    assert math.isclose(sum(chances.values()), 1.0) and chances["learning"] > 0.5 and min(chances.values()) > 0.05
    for step in range(20):
        curriculum.report("forgotten", -float(step))
    assert curriculum.probabilities()[2] > 0.3  # what gets worse needs practice as well


def test_without_any_progress_all_are_alike():
    curriculum = Curriculum(["a", "b"], "progress")
    for name in ("a", "b"):
        curriculum.report(name, 1.0)
    assert curriculum.probabilities().tolist() == [0.5, 0.5]


def test_progress_does_not_depend_on_the_scale_of_scores():
    one, two = Curriculum(["a", "b"], "progress"), Curriculum(["a", "b"], "progress")
    for step in range(10):
        for curriculum, scale in ((one, 1.0), (two, 1000.0)):
            curriculum.report("a", scale * step)
            curriculum.report("b", float(step % 3))
    assert torch.allclose(one.probabilities(), two.probabilities())


@pytest.mark.parametrize("strategy", ["round_robin", "weighted", "progress"])
def test_curriculum_is_resumed(strategy):
    one, two = Curriculum(["a", "b", "c"], strategy), Curriculum(["a", "b", "c"], strategy, seed=9)
    for step in range(5):
        one.report(one.get_task().name, float(step))
    two.load_state_dict(one.state_dict())
    assert choices(one, 20) == choices(two, 20)


def test_bad_curricula():
    for tasks in ([], ["a", "a"]):
        with pytest.raises(ConfigError, match="curriculum.tasks"):
            Curriculum(tasks)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ConfigError, match="curriculum.weights"):
            Curriculum(["a", "b"], "weighted", weights=weights)
    with pytest.raises(ConfigError, match="curriculum.strategy"):
        Curriculum(["a"], "hardest")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no task 'z'"):
        Curriculum(["a"]).report("z", 1.0)
    with pytest.raises(ConfigError, match="the saved curriculum has a"):
        Curriculum(["b"]).load_state_dict(Curriculum(["a"]).state_dict())
