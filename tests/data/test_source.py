"""When updates are due, and that batches depend on the generator alone."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from worldmpc.config import ConfigError
from worldmpc.data import NoSource, Replay, ReplaySource
from worldmpc.types import DataSource, Transition


def make(num_envs: int = 1, utd: float = 1.0, seed_decisions: int = 10, windows: str = "padded", seed: int = 0) -> ReplaySource:
    """A source over a small replay, horizon 3, batches of 8."""
    replay = Replay(500, num_envs, (2,), 1, 3, windows=windows)  # type: ignore[arg-type]
    return ReplaySource(replay, 8, utd, seed_decisions, torch.Generator().manual_seed(seed))


def step(num_envs: int = 1, number: float = 0.0, done: bool = False, valid: bool = True) -> Transition:
    """The same step in every environment."""
    full = torch.full((num_envs,), number)
    flag = torch.zeros(num_envs, dtype=torch.bool)
    return Transition(full[:, None].expand(-1, 2), full[:, None], full, flag, flag | done, full[:, None].expand(-1, 2) + 1, flag | valid)


def drain(source: ReplaySource) -> int:
    """Do all updates that are due."""
    count = source.ready()
    for _ in range(count):
        source.next()
    assert source.ready() == 0
    return count


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("utd", [0.25, 0.29, 1.0, 2.0])
def test_updates_follow_decisions(num_envs: int, utd: float) -> None:
    """Nothing in the seed phase, all its updates at its end, then ``utd`` per decision for any number of environments."""
    source = make(num_envs, utd, seed_decisions=10)
    assert isinstance(source, ReplaySource)
    typed: DataSource = source
    total = 0
    for index in range(100):
        typed.observe(step(num_envs, index))
        decisions = num_envs * (index + 1)
        total += drain(source)
        expected = 0 if decisions < 10 else int(decisions * round(utd * 100)) // 100
        assert source.decisions == decisions and source.updates == total == expected


def test_entries_that_are_not_valid_do_not_count() -> None:
    """A reset step is no decision."""
    source = make(seed_decisions=1)
    source.observe(step(valid=False))
    assert source.decisions == 0 and source.ready() == 0


def test_nothing_is_due_before_there_is_a_window() -> None:
    """Published windows with episodes that are too short: wait, then catch up."""
    source = make(seed_decisions=2, windows="inside")
    for index in range(6):
        source.observe(step(number=index, done=index % 2 == 1))
        assert source.ready() == 0
    with pytest.raises(RuntimeError, match="no complete window"):
        source.next()
    assert source.updates == 0
    for index in range(3):
        source.observe(step(number=index))
    assert source.ready() == 9


def test_batches_depend_on_the_generator_alone_and_resume() -> None:
    """Saved counters, replay and generator continue with the same batches."""
    first, second = make(seed=1), make(seed=2)
    for index in range(30):
        first.observe(step(number=index))
    drain(first)
    second.load_state_dict(first.state_dict())
    second.replay.load_state_dict(first.replay.state_dict())
    second.generator.set_state(first.generator.get_state())
    for index in range(10):
        for source in (first, second):
            source.observe(step(number=100 + index))
        assert first.ready() == second.ready() == 1
        one, two = first.next(), second.next()
        assert all(torch.equal(a, b) for a, b in zip(one[:-1], two[:-1], strict=True))
        assert one.obs.shape == (4, 8, 2) and one.index.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 0}, "loss.batch_size"), ({"utd": 0.0}, "train.utd"), ({"seed_decisions": -1}, "train.seed_decisions")],
)
def test_values_out_of_range_are_refused(options: dict, words: str) -> None:
    """The error names the key."""
    values = {"batch_size": 8, "utd": 1.0, "seed_decisions": 0, **options}
    with pytest.raises(ConfigError, match=words):
        ReplaySource(make().replay, generator=torch.Generator(), **values)


def test_nothing_to_learn_from_counts_decisions():
    source = NoSource()
    assert isinstance(source, NoSource) and source.ready() == 0
    for number in range(4):
        source.observe(step(3, float(number)))
    other = NoSource()
    other.load_state_dict(source.state_dict())
    assert other.decisions == source.decisions == 12 and source.ready() == 0 and source.data_state() == {}
    with pytest.raises(RuntimeError, match="learns nothing"):
        source.next()


def test_batches_may_be_converted_or_drawn_otherwise():
    plain = make()
    converted = make()
    converted.convert = lambda windows: windows.reward.sum()  # type: ignore[assignment,return-value]
    drawn = ReplaySource(plain.replay, 8, Fraction(1, 3), 8, torch.Generator(), draw=lambda due: f"everything, {due} times")
    for number in range(20):
        for source in (plain, converted):
            source.observe(step(number=float(number)))
        drawn.decisions += 1
    assert float(converted.next()) == float(plain.next().reward.sum())  # type: ignore[arg-type]
    assert drawn.ready() == 1 and drawn.next() == "everything, 6 times" and drawn.ready() == 0 and drawn.updates == 6
    drawn.decisions += 1  # 21: a third of it is 7, which 0.333... as a float would miss
    assert drawn.ready() == 1 and "0.333333 updates per decision" in drawn.describe()


def test_state_of_the_data_comes_back():
    one, other = make(), make()
    for number in range(30):
        one.observe(step(number=float(number), done=number == 12))
    other.load_data(one.data_state())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.next().obs, other.next().obs) and one.describe() == other.describe()
    other.load_data(None)
    assert other.resume_at == 40  # acts for another seed phase first
