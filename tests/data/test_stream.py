"""Rollouts: what is packed, what is handed out, and that both go on where they were."""

from __future__ import annotations

import pytest
import torch

import worldmpc
from tests.trees import differences
from worldmpc.config import ConfigError
from worldmpc.data.rollout import Experience
from worldmpc.data.stream import StreamSource
from worldmpc.types import DataSource, RolloutBatch, Transition

EXTRAS = ("log_prob", "value")


def transition(number: float, num_envs: int = 2, done: bool = False, valid: tuple[bool, ...] | None = None) -> Transition:
    """A step in which everything tells its number, and 100 more per environment."""
    base = number + 100 * torch.arange(num_envs)
    flag = torch.full((num_envs,), done)
    good = torch.ones(num_envs, dtype=torch.bool) if valid is None else torch.tensor(valid)
    extras = {"log_prob": -base, "value": base / 10}
    return Transition(base[:, None].expand(-1, 3), base[:, None], base, flag & False, flag, base[:, None].expand(-1, 3) + 1, good, extras)


def make(steps: int = 4, num_envs: int = 2, epochs: int = 2, size: int = 4, seed: int = 0) -> StreamSource:
    """A source whose advantage is the reward."""
    experience = Experience(steps, num_envs, (3,), 1)
    return StreamSource(experience, lambda full: full.flat(full.reward.clone()), epochs, size, torch.Generator().manual_seed(seed))


def fill(source: StreamSource, begin: float = 0.0) -> None:
    """Observe one rollout."""
    for index in range(source.experience.steps - source.experience.filled):
        source.observe(transition(begin + index, source.experience.num_envs))


def test_satisfies_the_protocol() -> None:
    source: DataSource = make()
    assert source.seed_decisions == 0 and "4 steps x 2 environments" in source.describe()


def test_a_rollout_is_packed_in_order_of_time() -> None:
    rollout = Experience(3, 2, (3,), 1)
    for index in range(3):
        assert not rollout.ready_for_training
        rollout.add(transition(index))
    assert rollout.ready_for_training
    assert rollout.reward.tolist() == [[0, 100], [1, 101], [2, 102]] and rollout.obs[:, 1, 0].tolist() == [100, 101, 102]
    assert torch.equal(rollout.last_obs, transition(2).next_obs)
    batch = rollout.flat(torch.full((3, 2), 5.0))
    assert batch.reward.tolist() == [0, 100, 1, 101, 2, 102] and torch.equal(batch.returns, batch.value + 5)
    assert torch.equal(batch.log_prob, -batch.reward) and torch.equal(batch.action[:, 0], batch.reward)
    rollout.clear()
    assert not rollout.ready_for_training
    rollout.add(transition(7))
    assert rollout.reward[0].tolist() == [7, 107]


def test_every_epoch_hands_out_every_step_once_in_another_order() -> None:
    source = make(steps=6, epochs=3, size=4)
    fill(source)
    assert source.ready() == 9
    epochs = []
    for _ in range(3):
        parts = [source.next() for _ in range(3)]
        assert all(len(part.reward) == 4 for part in parts)
        epochs.append(torch.cat([part.reward for part in parts]).tolist())
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert sorted(epochs[0]) == [*range(6), *range(100, 106)]
    assert source.ready() == 0 and source.updates == 9 and source.decisions == 12


def test_fields_of_a_minibatch_belong_together() -> None:
    source = make()
    fill(source)
    batch = source.next()
    assert isinstance(batch, RolloutBatch)
    assert torch.equal(batch.obs[:, 0], batch.reward) and torch.equal(batch.value, batch.reward / 10)
    assert torch.equal(batch.advantage, batch.reward) and torch.equal(batch.returns, batch.reward + batch.value)


def test_advantages_are_computed_once_per_rollout() -> None:
    calls = []
    source = make()
    prepare = source.prepare
    source.prepare = lambda experience: calls.append(1) or prepare(experience)
    for _ in range(2):
        fill(source)
        while source.ready():
            source.next()
    assert len(calls) == 2


@pytest.mark.parametrize(("size", "expected"), [(3, [3, 3, 2]), (8, [8]), (100, [8]), (1, [1] * 8)])
def test_sizes_of_minibatches(size: int, expected: list[int]) -> None:
    source = make(epochs=1, size=size)
    fill(source)
    assert [len(source.next().reward) for _ in range(source.ready())] == expected


def test_steps_that_are_not_valid_are_left_out() -> None:
    source = make(steps=3, epochs=1, size=5)
    source.observe(transition(0))
    source.observe(transition(1, valid=(False, True)))
    source.observe(transition(50, valid=(False, False)))  # nothing in it: it takes no place
    assert source.experience.filled == 2
    source.observe(transition(2))
    assert source.decisions == 5 and source.ready() == 1
    assert sorted(source.next().reward.tolist()) == [0, 2, 100, 101, 102]


def test_vector_environments_that_reset_one_step_late() -> None:
    """No transition from the end of an episode into the next one: in the counting environment the observation counts the steps."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    from worldmpc.envs.toy import Counter

    envs = worldmpc.make_envs(SyncVectorEnv([Counter, lambda: Counter(env_id=1, lengths=(2, 4))], autoreset_mode=AutoresetMode.NEXT_STEP))
    source = StreamSource(Experience(12, 2, (3,), 1), lambda full: full.flat(full.reward), 1, 100, torch.Generator())
    obs, extras = envs.reset(), dict.fromkeys(EXTRAS, torch.zeros(2))
    while not source.ready():
        step = envs.step(torch.zeros(2, 1))
        source.observe(Transition(obs, torch.zeros(2, 1), step.reward, step.terminated, step.truncated, step.next_obs, step.valid, extras))
        obs = step.obs
    batch = source.next()
    assert torch.equal(batch.reward, batch.obs[:, 0] + 1) and len(batch.reward) == source.decisions < 24


@pytest.mark.parametrize("filled", [0, 1, 3])
def test_resumed_within_a_rollout(filled: int) -> None:
    one, two = make(), make(seed=9)
    for index in range(filled):
        one.observe(transition(index))
    carry_over(one, two)
    finish(one, filled)
    finish(two, filled)
    assert not differences(vars_of(one), vars_of(two))


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resumed_within_the_updates(done: int) -> None:
    """Also between two passes, where the next order is not drawn yet."""
    one, two = make(), make(seed=9)
    fill(one)
    for _ in range(done):
        one.next()
    carry_over(one, two)
    assert one.ready() == two.ready() == 4 - done
    while one.ready():
        assert all(torch.equal(a, b) for a, b in zip(one.next(), two.next(), strict=True))
    assert two.updates == 4 and two.ready() == 0
    finish(one, 0)
    finish(two, 0)
    assert not differences(vars_of(one), vars_of(two))


def test_saved_state_does_not_change_with_what_is_observed_later() -> None:
    """The restored source has its own memory."""
    one, two = make(), make()
    one.observe(transition(3))
    two.load_data(one.data_state())
    one.load_data(None)
    one.observe(transition(8))
    assert two.experience.reward[0].tolist() == [3, 103]


def test_without_saved_data_a_new_rollout_begins() -> None:
    source = make()
    fill(source)
    source.next()
    source.load_data(None)
    assert source.ready() == 0 and source.updates == 1 and source.decisions == 8
    fill(source, 50)
    assert sorted(source.next().reward.tolist() + source.next().reward.tolist()) == [50, 51, 52, 53, 150, 151, 152, 153]


def test_cut_ends_running_episodes() -> None:
    source = make()
    source.cut()
    source.observe(transition(0))
    source.observe(transition(1))
    source.cut()
    source.observe(transition(2))
    assert source.experience.truncated[:3, 0].tolist() == [False, True, False] and not source.experience.terminated.any()


def test_errors_say_what_is_wrong() -> None:
    source = make()
    with pytest.raises(RuntimeError, match="0 of 4 steps"):
        source.next()
    with pytest.raises(RuntimeError, match="empty"):
        _ = source.experience.last_obs
    with pytest.raises(ConfigError, match="log_prob and value"):
        source.observe(transition(0)._replace(extras={}))
    with pytest.raises(ConfigError, match="needs value of"):
        source.observe(transition(0)._replace(extras={"log_prob": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"obs: expected shape \[2, 3\]"):
        source.observe(transition(0, num_envs=3))
    fill(source)
    with pytest.raises(RuntimeError, match="train on it"):
        source.observe(transition(9))
    with pytest.raises(ConfigError, match="same sizes"):
        make(num_envs=3).load_data(source.data_state())
    with pytest.raises(ConfigError, match="same sizes"):
        make(steps=3).load_data(source.data_state())
    for name in ("update_epochs", "minibatch_size"):
        with pytest.raises(ConfigError, match=name):
            make(**{{"update_epochs": "epochs", "minibatch_size": "size"}[name]: 0})
    with pytest.raises(ConfigError, match="rollout_steps"):
        make(steps=0)


def carry_over(one: StreamSource, two: StreamSource) -> None:
    """Save and restore, as the trainer does."""
    two.load_state_dict(one.state_dict())
    two.load_data({name: value.clone() for name, value in one.data_state().items()})
    two.generator.set_state(one.generator.get_state())


def finish(source: StreamSource, begin: float) -> None:
    """Complete the rollout and do half of its updates."""
    fill(source, begin)
    for _ in range(2):
        source.next()


def vars_of(source: StreamSource) -> dict:
    """All that a source consists of."""
    return source.state_dict() | source.data_state() | {"generator": source.generator.get_state()}
