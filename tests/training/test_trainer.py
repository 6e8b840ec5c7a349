"""The training loop: what is stored, when it learns, and that nothing outside disturbs it."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.trees import differences, leaves
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, make_config
from worldmpc.envs import EnvError, make_envs
from worldmpc.envs.toy import Counter, PointMass
from worldmpc.noise import derive_seed
from worldmpc.training import evaluator
from worldmpc.training.evaluator import evaluate
from worldmpc.training.trainer import DivergenceError, Every, check_losses, collect_together, make_state, train


def make(task="toy/balance", num_envs=1, seed_decisions=20, **overrides):
    fixed = {"env.num_envs": num_envs, "replay.capacity": 2000, "train.seed_decisions": seed_decisions}
    config = make_config("debug", task=task, **{**fixed, **overrides})
    envs = make_envs(task, config.env, seed=config.seed)
    return make_state(TDMPC2(config, envs.spec), envs)


def snapshot(state):
    return dict(leaves(state.state_dict()))


@pytest.mark.parametrize("num_envs", [1, 3])
def test_no_step_across_a_reset_is_ever_stored(num_envs):
    """In the counting environment an observation holds step, episode and environment, and the reward is the step."""
    state = make("toy/counter", num_envs, seed_decisions=400)
    train(state, [], 300)
    replay = state.source.replay
    batch = replay.sample(torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64))
    real = batch.mask > 0
    before, after = batch.obs[:-1][real], batch.obs[1:][real]
    assert torch.equal(after[:, 0], before[:, 0] + 1) and torch.equal(after[:, 1:], before[:, 1:])
    assert torch.equal(batch.reward[real], after[:, 0])
    assert batch.terminated.sum() > 0 and batch.truncated.sum() > 0 and (batch.mask == 0).any()


@pytest.mark.parametrize("how", ["evaluate", "reset"])
def test_environments_that_somebody_else_has_reset(how):
    """Running episodes end where they were: no transition leads into those that were begun, no return is of two episodes."""
    state = make("toy/counter", seed_decisions=400)
    train(state, [], 35)
    if how == "evaluate":
        evaluate(state.agent, state.envs, 1)
    else:
        state.envs.reset()
    train(state, [], 90)
    batch = state.source.replay.sample(torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64))
    real = batch.mask > 0
    before, after = batch.obs[:-1][real], batch.obs[1:][real]
    assert torch.equal(after[:, 0], before[:, 0] + 1) and torch.equal(after[:, 1:], before[:, 1:])
    assert all(episode.ret == episode.length * (episode.length + 1) / 2 for episode in state.finished)


def test_one_seed_that_fails_does_not_cost_the_others_their_step():
    """Also where its action is refused before its environments begin."""
    states = [make(), make()]

    class Team:
        def act(self, carries, obs):
            outputs = [state.agent.act(carry, own, "explore") for state, carry, own in zip(states, carries, obs, strict=True)]
            return [outputs[0], outputs[1]._replace(action=outputs[1].action * torch.nan)]

        def update(self, batches):
            raise AssertionError("there is nothing to update yet")

    for state in states:
        state.envs.reset()
        state.begun, state.source.seed_decisions = state.envs.begun, 0
    with pytest.raises(EnvError, match="^seed 1: "):
        collect_together(Team(), states)
    assert [state.decisions for state in states] == [1, 0]
    assert all(state.state_dict() for state in states)


@pytest.mark.parametrize(("num_envs", "utd"), [(1, 1.0), (3, 1.0), (2, 0.5), (1, 2.0)])
def test_updates_per_decision(num_envs, utd):
    state = make(num_envs=num_envs, **{"train.utd": utd})
    train(state, [], 18)
    assert state.updates == 0
    train(state, [], 60)
    assert state.decisions == 60 and state.updates == math.floor(60 * utd)


def test_counters_and_returns():
    state = make("toy/pointmass", **{"env.action_repeat": 2})
    train(state, [], 60)
    assert state.env_steps == 120 and state.episodes == len(state.finished) == 2
    assert [episode.length for episode in state.finished] == [25, 25]


def test_interrupted_and_resumed_equals_uninterrupted():
    """At every one of a few points, also in the middle of updates that are due."""
    whole = make(num_envs=2)
    train(whole, [], 70)
    for stop_at, stop_update in ((30, None), (44, None), (20, 7)):
        first = make(num_envs=2)
        if stop_update is not None:
            update, count = first.agent.update, iter(range(10_000))

            def counted(batch, state=first, update=update, count=count, last=stop_update):
                state.stop = next(count) + 1 >= last
                return update(batch)

            first.agent.update = counted
        train(first, [], stop_at)
        assert stop_update is None or first.updates == stop_update
        saved = first.state_dict()
        second = make(num_envs=2)
        second.load_state_dict(saved)
        train(second, [], 70)
        assert differences(snapshot(whole), snapshot(second)) == []


def test_states_of_before_there_was_success_are_resumed():
    first = make(num_envs=2, seed_decisions=100)
    train(first, [], 61)
    now, older = copy.deepcopy(first.state_dict()), copy.deepcopy(first.state_dict())
    loop = older["loop"]
    del loop["running_success"]
    loop["running_length"], loop["finished"] = loop["running_length"].float(), loop["finished"][:, :2]
    assert len(loop["finished"]) >= 1 and loop["running_return"].sum() > 0
    resumed = [make(num_envs=2, seed_decisions=100) for _ in range(2)]
    for state, saved in zip(resumed, (now, older), strict=True):
        state.load_state_dict(saved)
        train(state, [], 90)
    assert differences(*map(snapshot, resumed)) == []


def test_evaluation_and_hooks_do_not_disturb_training():
    alone, watched = make(), make()
    envs = make_envs("toy/balance", dataclasses.replace(watched.agent.config.env, num_envs=2), seed=9)
    train(alone, [], 60)
    train(watched, [lambda state, metrics: state.decisions % 20 == 0 and evaluate(state.agent, envs, 2, index=state.decisions)], 60)
    assert [name for name in differences(snapshot(alone), snapshot(watched)) if "streams.eval" not in name] == []


def test_evaluation_repeats_and_counts_every_environment_alike():
    state = make()
    envs = make_envs("toy/balance", dataclasses.replace(state.agent.config.env, num_envs=3), seed=9)
    results = [evaluate(state.agent, envs, 7, index=index) for index in (1, 1, 2)]
    assert results[0][:2] == results[1][:2] != results[2][:2]
    assert len(results[0].returns) == 7 and results[0].returns == [float(length) for length in results[0].lengths]


def test_random_decisions_are_exactly_those_of_the_seed_phase():
    state = make(seed_decisions=20)
    acted = []
    act = state.agent.act
    state.agent.act = lambda *arguments: acted.append(state.decisions) or act(*arguments)
    train(state, [], 30)
    assert acted == list(range(20, 30))


def test_plans_start_anew_with_every_episode():
    """In training, and in evaluation."""
    state = make("toy/pointmass", seed_decisions=0)
    starts = []
    act = state.agent.act

    def watch(carry, obs, mode):
        starts.append(bool((carry.plan.mean == 0).all()))
        return act(carry, obs, mode)

    state.agent.act = watch
    train(state, [], 101)
    assert [index for index, fresh in enumerate(starts) if fresh] == [0, 50, 100]
    starts.clear()
    envs = make_envs("toy/pointmass", state.agent.config.env, seed=9)
    evaluate(state.agent, envs, 2)
    assert [index for index, fresh in enumerate(starts) if fresh] == [0, 50]


def test_resuming_without_a_replay_collects_before_it_learns():
    state = make(seed_decisions=20)
    train(state, [], 40)
    saved = state.state_dict()
    del saved["replay"]
    resumed = make(seed_decisions=20)
    resumed.load_state_dict(saved)
    train(resumed, [], 59)
    assert resumed.updates == 40
    train(resumed, [], 65)
    assert resumed.updates == 45


def test_windows_that_never_fit_are_an_error():
    state = make("toy/counter", seed_decisions=10, **{"replay.windows": "inside", "planner.horizon": 6})
    with pytest.raises(ConfigError, match="no window of 6 steps"):
        train(state, [], 1200)


def test_evaluation_ends_where_episodes_do_not(monkeypatch):
    monkeypatch.setattr(evaluator, "MAX_DECISIONS", 30)
    state = make()
    envs = make_envs(lambda: PointMass(length=None), dataclasses.replace(state.agent.config.env, num_envs=2), seed=9)
    agent = TDMPC2(make_config("debug"), envs.spec)
    with pytest.warns(UserWarning, match=r"^PointMass sets no time limit: 2 of 2 episodes .* after 30 decisions .*env.episode_length"):
        assert envs.spec.episode_length is None and evaluate(agent, envs, 2).lengths == [30] * 2
    with pytest.raises(ValueError, match="no time limit"):
        evaluate(agent, envs, 3)


def test_divergence_names_the_term_and_leaves_a_good_state():
    state = make()
    train(state, [], 40)
    before = snapshot(state)
    state.source.replay._data[:, 1] = math.nan  # rewards
    with pytest.raises(DivergenceError, match="reward_loss is nan"):
        train(state, [], 60)
    after = snapshot(state)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("agent.model.") and "target" not in name)


def test_exploding_loss_is_named():
    fine = {"total_loss": torch.tensor(3.0), "value_loss": torch.tensor(2.0), "pi_loss": torch.tensor(0.1)}
    check_losses(fine, 10.0)
    with pytest.raises(DivergenceError, match=r"value_loss is 50 \(limit train.max_loss=10\)"):
        check_losses(fine | {"total_loss": torch.tensor(20.0), "value_loss": torch.tensor(50.0)}, 10.0)
    metrics = fine | {"termination_loss": torch.tensor(2e3), "total_loss": torch.tensor(4e3)}
    with pytest.raises(DivergenceError, match="termination_loss is 2000"):
        check_losses(metrics, 10.0)
    with pytest.raises(DivergenceError, match="custom/mine is 99"):
        check_losses(fine | {"total_loss": torch.tensor(99.0), "custom/mine": torch.tensor(99.0)}, 10.0)
    with pytest.raises(DivergenceError, match="in some update"):
        check_losses(fine | {"skipped_updates": torch.tensor(1.0)}, 10.0)


def test_inexact_resume_closes_the_running_episode():
    """The environment cannot come back to where it was; no window may lead from the old episode into the new one."""
    state = make("toy/counter", seed_decisions=400)
    train(state, [], 101)
    resumed = make("toy/counter", seed_decisions=400)
    with pytest.warns(UserWarning, match="not resumed exactly"):
        resumed.load_state_dict(state.state_dict())
    train(resumed, [], 200)
    batch = resumed.source.replay.sample(torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64))
    real = batch.mask > 0
    assert torch.equal(batch.obs[1:][real][:, 0], batch.obs[:-1][real][:, 0] + 1)


def test_learns_a_point_mass_in_seconds():
    """Optimum 48.6 and random 22.9 per episode, both known in closed form."""
    config = make_config(
        "debug", task="toy/pointmass", seed=3,
        model={"enc_dim": 32, "mlp_dim": 32, "latent_dim": 32}, planner={"num_samples": 48, "num_elites": 8},
        **{"loss.batch_size": 32, "optim.lr": 1e-3, "replay.capacity": 5000, "train.seed_decisions": 200},
    )  # fmt: skip
    envs = make_envs(config.task, config.env, seed=3)
    state = make_state(TDMPC2(config, envs.spec), envs)
    train(state, [], 900)
    eval_envs = make_envs(config.task, dataclasses.replace(config.env, num_envs=5), seed=4)
    starts = eval_envs.reset(seed=derive_seed(3, "eval", 0))
    best = np.mean([PointMass.optimal_return(start.numpy()) for start in starts])
    result = evaluate(state.agent, eval_envs, 5)
    assert result.mean_return > best - 3.5
    assert evaluate(state.agent, eval_envs, 5, mode="prior").mean_return > PointMass.RANDOM_RETURN + 5  # it lags far behind the planner


class _Memory(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "u", "fsmblks", "uordblks", "f", "k")]


def test_memory_does_not_grow_with_updates():
    """Bytes in use, by the C library's own account, tensors included."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("no glibc to ask")
    mallinfo.restype = _Memory
    state = make()
    used = []

    def look(state, metrics):
        if state.decisions in (200, 500, 800):
            gc.collect()
            memory = mallinfo()
            used.append(memory.uordblks + memory.hblkhd)

    train(state, [look], 800)
    assert state.updates > 700
    assert used[2] - used[1] < 50_000


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_overlapped_updates_are_one_decision_behind(workers):
    """The same number of updates; a batch cannot hold the step under way; and bit-equal however it is interrupted."""
    overrides = {"train.overlap": True, "env.workers": workers, "num_envs": 2}
    state = make(**overrides)
    newest = []
    draw = state.source.next

    def watched():
        newest.append(len(state.source.replay))
        return draw()

    state.source.next = watched
    train(state, [], 60)
    assert state.updates == 60 and state.decisions == 60
    # Of the update at each step, only what was stored before that step was there to be drawn.
    assert newest[:40] == [20] * 20 + [value for value in range(22, 42, 2) for _ in range(2)]
    other = make(**overrides)
    for until in (25, 41, 60):
        train(other, [lambda current, metrics, until=until: setattr(current, "stop", current.decisions >= until)], 60)
        other.stop = False
    train(other, [], 60)
    assert differences(snapshot(state), snapshot(other)) == []
    for one in (state, other):
        one.envs.close()


def test_error_in_an_overlapped_update_leaves_a_state_that_can_be_saved():
    state = make(**{"train.overlap": True, "train.max_loss": 1e-9})
    with pytest.raises(DivergenceError, match="max_loss"):
        train(state, [], 60)
    snapshot(state)
    assert state.decisions == 21 and not state.settled


@pytest.mark.parametrize("lengths", [((1, 1), (2, 3)), ((3, 2), (3, 2))])
def test_an_interval_is_due_once_where_steps_begin_episodes(lengths):
    """Environments that take a step for beginning an episode advance by fewer decisions than there are of them, or by none."""
    vector = SyncVectorEnv([lambda own=own: Counter(lengths=own) for own in lengths], autoreset_mode=AutoresetMode.NEXT_STEP)
    envs = make_envs(vector)
    state = make_state(TDMPC2(make_config("debug", **{"train.seed_decisions": 1_000}), envs.spec), envs)
    due, advanced = [], []

    def hook(state, metrics):
        advanced.append(state.advanced)
        if Every(5).due(state.decisions, state.advanced):
            due.append(state.decisions)

    train(state, [hook], 60)
    assert [count // 5 for count in due] == list(range(1, 13)) and sum(advanced) == state.decisions and min(advanced) < 2
    again = make_state(state.agent, envs)
    again.load_state_dict({**state.state_dict(), "replay": None})
    assert again.advanced == state.advanced
