"""The functional loop: it learns, every part can be exchanged, and it goes on bit for bit where it was."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import worldmpc
from tests.trees import differences
from worldmpc.config import ConfigError, EnvConfig, PPOConfig
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.on_policy import LossError
from worldmpc.training.checkpoint import CheckpointError
from worldmpc.training.configs import AgentConfig, CurriculumConfig, TrainerConfig, TrainingConfig, small_fast_config
from worldmpc.training.curriculum import Curriculum, CurriculumTask
from worldmpc.training.evaluation import PolicyEvaluator
from worldmpc.training.functional import (
    TrainingState,
    create_training_components,
    default_training_step,
    functional_training_loop,
    make_experience,
    run_training,
)
from worldmpc.training.policy_store import PolicyRecord, PolicyStore
from worldmpc.training.restore import load_agent

CONFIG = TrainerConfig(total_timesteps=128, tensorboard=False, progress="none", device="cpu")
PPO = PPOConfig(rollout_steps=8, minibatch_size=16, update_epochs=2)


def tasks(*names, strategy="fixed", **config):
    config = {"num_envs": 4, **config}
    return Curriculum([CurriculumTask(name, f"toy/{name}", EnvConfig(**config)) for name in names], strategy)


def policy(obs=1, action=1, seed=1):
    return ActorCritic(obs, action, (8,), seed=seed)


def loop(steps=128, network=None, curriculum=None, store=None, ppo=PPO, config=None, **kwargs):
    config = dataclasses.replace(config or CONFIG, total_timesteps=steps)
    network = None if network == "store" else network or policy()
    return functional_training_loop(config, ppo, network, curriculum or tasks("balance"), store, **kwargs)


def test_learns_identity():
    """At random: 6.7, at best: 20."""
    config = dataclasses.replace(CONFIG, total_timesteps=3072, learning_rate=1e-2)
    ppo = PPOConfig(rollout_steps=32, minibatch_size=64, update_epochs=8, gamma=0.0)
    network = ActorCritic(3, 3, (32,), discrete=True)
    state = functional_training_loop(config, ppo, network, tasks("identity-discrete", num_envs=8))
    assert state.epoch == 12 and state.agent_steps == 3072 and state.updates == 12 * 8 * 4
    assert PolicyEvaluator({"a": ["toy/identity-discrete"]}).evaluate(network)["a/score"] > 18


def test_by_hand_equals_the_step():
    """The loop in one's own hands, as in the migration guide."""
    envs = worldmpc.make_envs("toy/balance", EnvConfig(num_envs=4))
    experience = make_experience(PPO, envs)
    components = create_training_components(CONFIG, PPO, policy(), envs, experience)
    state = TrainingState()
    while state.agent_steps < CONFIG.total_timesteps:
        metrics = default_training_step(state, components, CONFIG, experience)
    assert state.epoch == 4 and state.agent_steps == 128 and state.updates == 16
    assert {"policy_loss", "value_loss", "entropy_loss", "total_loss", "approx_kl", "clipfrac"} <= set(metrics)
    assert components["evaluator"] is None and components["checkpointer"] is None


def test_custom_losses_reach_the_update():
    calls = []

    def extra(**batch):
        calls.append(set(batch))
        return torch.tensor(0.5)

    state = loop(64, custom_losses=[extra])
    assert calls == [{"policy", "obs", "actions", "rewards", "values", "advantages"}] * 8 and state.metrics["custom/extra"] == 0.5


def test_step_function_replaces_the_step():
    seen = []

    def step(state, components, config, experience, custom_losses=None):
        assert custom_losses == ["anything"]
        seen.append((state.agent_steps, sorted(components), experience.steps))
        state.agent_steps += 50
        return {"mine": 1.0}

    network = policy()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = loop(128, network, step_fn=step, custom_losses=["anything"])
    names = ["checkpointer", "collector", "evaluator", "optimizer", "ppo", "stats_logger"]
    assert seen == [(0, names, 8), (50, names, 8), (100, names, 8)]
    assert state.metrics == {"mine": 1.0} and state.epoch == 3 and not differences(before, network.state_dict())


def test_a_step_that_counts_nothing_is_an_error():
    with pytest.raises(ConfigError, match="step_fn: state.agent_steps did not grow"):
        loop(step_fn=lambda state, *rest: {})


def test_stops_when_asked():
    def step(state, components, config, experience, custom_losses=None):
        metrics = default_training_step(state, components, config, experience, custom_losses)
        state.should_stop = state.epoch == 2
        return metrics

    state = loop(10_000, step_fn=step)
    assert state.epoch == 2 and state.should_stop and state.agent_steps == 64

    def on_epoch(state, components):
        state.should_stop = state.epoch == 3

    assert loop(10_000, on_epoch=on_epoch).agent_steps == 96


def test_learning_rate_and_clip_are_scheduled():
    rates = []

    def on_epoch(state, components):
        rates.append(components["optimizer"].param_groups[0]["lr"])

    loop(128, config=dataclasses.replace(CONFIG, schedule="cosine", learning_rate=1.0, final_lr_scale=0.5), on_epoch=on_epoch)
    assert all(math.isclose(rate, 0.5 + 0.25 * (1 + math.cos(math.pi * epoch / 4)), rel_tol=1e-6) for epoch, rate in enumerate(rates))


def make_run(folder, name="run"):
    return dataclasses.replace(CONFIG, run_dir=str(folder / name), checkpoint_interval=2), PolicyStore(folder / name / "policies")


def everything(state, network):
    return {"metrics": state.metrics, "model": network.state_dict(), "counters": [state.epoch, state.agent_steps, state.updates]}


@pytest.mark.parametrize(
    ("names", "strategy"), [("balance", "fixed"), ("balance identity", "progress"), ("balance identity", "round_robin")]
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, names, strategy):
    """With the environments in the middle of their episodes; with several tasks also with their curriculum."""
    config, store = make_run(tmp_path, "whole")
    whole = policy()
    expected = loop(32 * 9, whole, tasks(*names.split(), strategy=strategy), store, config=config)
    config, store = make_run(tmp_path)
    loop(32 * 5, policy(), tasks(*names.split(), strategy=strategy), store, config=config)
    resumed = policy(seed=7)  # its parameters come from the checkpoint
    found = loop(32 * 9, resumed, tasks(*names.split(), strategy=strategy), store, config=config, resume=True)
    assert not differences(everything(expected, whole), everything(found, resumed))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, 10))
    others = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    same = [{name: value for name, value in record.items() if not name.startswith("time/")} for record in records]
    assert same == [{name: value for name, value in record.items() if not name.startswith("time/")} for record in others]


def test_resumed_after_its_end_does_nothing(tmp_path):
    config, store = make_run(tmp_path)
    network = policy()
    state = loop(64, network, None, store, config=config)
    again = loop(64, policy(seed=3), None, store, config=config, resume=True)
    assert again.agent_steps == state.agent_steps == 64 and again.epoch == 2


def test_resuming_nothing_begins(tmp_path):
    config, store = make_run(tmp_path)
    assert loop(64, None, None, store, config=config, resume=True).epoch == 2
    with pytest.raises(ConfigError, match="trainer.run_dir: .* holds an earlier training"):
        loop(64, None, None, store, config=config, step_fn=lambda *arguments: pytest.fail("collected before it said so"))
    (tmp_path / "run" / "checkpoints" / "trainer_state" / "meta.json").unlink()
    (tmp_path / "run" / "checkpoints" / "trainer_state").rename(tmp_path / "gone")  # as after an end before the first checkpoint
    assert loop(64, None, None, store, config=config, resume=True).epoch == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="resume: needs trainer.run_dir"):
        loop(64, resume=True)


def test_a_policy_of_another_architecture_is_not_resumed(tmp_path):
    config, store = make_run(tmp_path)
    loop(64, "store", None, store, config=config)
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        loop(128, policy(), None, store, config=config, resume=True)


def test_checkpoints_are_written_at_the_interval_and_at_the_end(tmp_path):
    config, store = make_run(tmp_path)
    state = loop(32 * 5, policy(), None, store, config=config)
    assert store.names() == ["policy_000002", "policy_000004", "policy_000005"]
    assert store.policy("policy_000005").metadata["agent_steps"] == state.agent_steps == 160


def test_agents_are_not_loaded_from_a_training_of_components(tmp_path):
    """What ``worldmpc evaluate`` does with its path."""
    config, store = make_run(tmp_path)
    loop(32, policy(), None, store, config=config)
    run = tmp_path / "run"
    for path in (run, run / "checkpoints", run / "checkpoints" / "trainer_state", run / "policies" / "policy_000001"):
        with pytest.raises(CheckpointError, match="written by worldmpc.training.components.* PolicyEvaluator"):
            load_agent(path)


def test_the_store_makes_the_policy(tmp_path):
    config, store = make_run(tmp_path)
    store.agent = AgentConfig(hidden_size=5)
    loop(32, "store", None, store, config=config)
    assert store.policy("policy_000001").policy.architecture["hidden"] == [5, 5]


def test_tasks_alternate_and_their_episodes_go_on():
    curriculum = tasks("balance", "identity", strategy="round_robin")
    collectors = []
    reports = []
    report = curriculum.report
    curriculum.report = lambda name, score: reports.append(name) or report(name, score)
    loop(32 * 6, policy(), curriculum, on_epoch=lambda state, components: collectors.append(components["collector"]))
    assert [collector.vecenv.spec.name for collector in collectors] == ["toy/balance", "toy/identity"] * 3
    assert collectors[0] is collectors[2] and collectors[1].agent_steps == 96
    assert reports.count("identity") == 1  # the first episodes of 20 steps end in the third rollout of 8


def test_tasks_of_other_dimensions_are_refused():
    with pytest.raises(ConfigError, match="toy/pointmass has"):
        loop(128, policy(), tasks("balance", "pointmass", strategy="round_robin"))


def test_tasks_of_other_discounts_are_refused():
    both = [CurriculumTask(str(discount), "toy/balance", EnvConfig(num_envs=4, discount=discount)) for discount in (0.5, 0.9)]
    with pytest.raises(ConfigError, match="0.9 has env.discount=0.9, 0.5 has 0.5"):
        loop(128, curriculum=Curriculum(both, "round_robin"))


def test_what_is_no_task_is_refused():
    class Bare:
        def env_cfg(self):
            return {"num_envs": 4}

    class Named(Bare):
        name, env = "balance", "toy/balance"

    class Source:
        def __init__(self, *found):
            self.found = iter(found)

        def get_task(self):
            return next(self.found)

    with pytest.raises(ConfigError, match="returned a Bare without name and env; return a CurriculumTask"):
        loop(64, curriculum=Source(Bare()))
    with pytest.raises(ConfigError, match="without name and env"):  # the second one as well
        loop(64, curriculum=Source(tasks("balance").get_task(), Bare()))
    with pytest.raises(ConfigError, match="env_cfg\\(\\) of balance returned a dict"):
        loop(64, curriculum=Source(Named()))


def test_any_store_of_policies(tmp_path):
    class Memory:
        def __init__(self):
            self.records = {}

        def create(self, env):
            return PolicyRecord("initial", policy())

        def save(self, name, policy, metadata=None):
            self.records[name] = PolicyRecord(name, policy, f"memory://{name}", dict(metadata or {}))
            return self.records[name]

        def policy(self, uri):
            return self.records[uri]

    store = Memory()
    assert loop(32, "store", None, store).epoch == 1 and not store.records
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
    loop(32, "store", None, store, config=config)
    assert list(store.records) == ["policy_000001"]
    assert loop(64, "store", None, store, config=config, resume=True).epoch == 2


def test_any_source_of_tasks():
    class Always:
        def get_task(self):
            return CurriculumTask("balance", "toy/balance", EnvConfig(num_envs=4))

    assert loop(64, curriculum=Always()).epoch == 2


def test_discount_of_the_environments_counts():
    gammas = []
    loop(32, curriculum=tasks("balance", discount=0.5), on_epoch=lambda state, components: gammas.append(components["ppo"].config.gamma))
    assert gammas == [0.5]


def test_evaluation_at_the_interval(tmp_path):
    config, store = make_run(tmp_path)
    config = dataclasses.replace(config, evaluate_interval=2, evaluate_episodes=2)
    state = loop(128, policy(), None, store, config=config)
    assert set(state.evals) == {"tasks/balance", "tasks/score"}
    suite = {"other": ["toy/identity"]}
    assert set(loop(64, config=dataclasses.replace(CONFIG, evaluate_interval=1, evaluate_episodes=2), suite=suite).evals) == {
        "other/toy/identity",
        "other/score",
    }
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["eval/tasks/score" in record for record in records] == [False, True, False, True]


def test_evaluation_does_not_disturb_training():
    one, two = policy(), policy()
    loop(128, one)
    loop(128, two, config=dataclasses.replace(CONFIG, evaluate_interval=1, evaluate_episodes=2))
    assert not differences(one.state_dict(), two.state_dict())


def test_missing_parts_are_named():
    envs = worldmpc.make_envs("toy/balance", EnvConfig(num_envs=4))
    experience = make_experience(PPO, envs)
    for changes, message in (({"run_dir": "x"}, "policy_store"), ({"evaluate_interval": 1}, "suite")):
        with pytest.raises(ConfigError, match=message):
            create_training_components(dataclasses.replace(CONFIG, **changes), PPO, policy(), envs, experience)
    with pytest.raises(ConfigError, match="policy: give one"):
        functional_training_loop(CONFIG, PPO, None, tasks("balance"))


def test_divergence_ends_the_loop_with_the_reason():
    with pytest.raises(LossError, match="value_loss"):
        loop(64, config=dataclasses.replace(CONFIG, max_loss=1e-3))


def test_whole_trainings_from_configurations(tmp_path):
    small = small_fast_config()
    trainer = dataclasses.replace(
        small.trainer, total_timesteps=1024, run_dir=str(tmp_path / "run"), progress="none", tensorboard=False, device="cpu"
    )
    state, network = run_training(dataclasses.replace(small, trainer=trainer))
    assert state.agent_steps == 1024 and network.architecture["hidden"] == [128, 128]
    trainer = dataclasses.replace(trainer, total_timesteps=2048)
    again, _ = run_training(dataclasses.replace(small, trainer=trainer), resume=True)
    assert again.agent_steps == 2048 and again.epoch == 4
    several = TrainingConfig.from_dict(
        {
            "trainer": {"total_timesteps": 512, "progress": "none", "device": "cpu"},
            "ppo": {"rollout_steps": 16, "minibatch_size": 64},
            "curriculum": {"strategy": "round_robin", "tasks": ["toy/balance", "toy/identity"]},
        }
    )
    assert several.curriculum == CurriculumConfig("round_robin", ("toy/balance", "toy/identity"))
    assert run_training(several)[0].epoch == 4
