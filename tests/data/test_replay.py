"""The replay against a reference of plain lists, over random streams of episodes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.reference import EXTRAS, Step, Stream, image
from worldmpc.config import ConfigError
from worldmpc.data import Replay
from worldmpc.planners.sampling import PLAN_RECORDS
from worldmpc.types import SequenceBatch, Transition

CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "num_envs": st.integers(1, 4),
        "share": st.integers(6, 14),
        "horizon": st.integers(1, 6),
        "padded": st.booleans(),
        "longest": st.sampled_from((1, 2, 4, 9, 40)),
        "invalid": st.sampled_from((0.0, 0.3)),
        "dtype": st.sampled_from((torch.float32, torch.uint8)),
    }
)


def make(num_envs: int, share: int, horizon: int, padded: bool, dtype: torch.dtype = torch.float32, **_: object) -> Replay:
    """A replay of ``share`` decisions per stream, for the reference's observations [1, 3] and actions [2]."""
    windows = "padded" if padded else "inside"
    return Replay(num_envs * share, num_envs, (1, 3), 2, horizon, windows=windows, obs_dtype=dtype, extras=EXTRAS)


def pair(case: dict) -> tuple[Replay, Stream]:
    """Replay and stream of a case."""
    replay = make(**case)
    names = ("num_envs", "padded", "seed", "longest", "invalid", "dtype")
    return replay, Stream(rows=replay.rows, **{name: case[name] for name in names})


def every(replay: Replay, horizon: int | None = None) -> SequenceBatch:
    """All available windows, each once: the middle of each window's share of [0, 1)."""
    count = replay.num_windows(horizon)
    return replay.sample((torch.arange(count, dtype=torch.float64) + 0.5) / count, horizon)


def check(batch: SequenceBatch, windows: list[list[Step]], horizon: int, dtype: torch.dtype) -> None:
    """Hold every window of a batch, field by field, against the reference's."""
    assert batch.mask.shape == (horizon, len(windows))
    for column, steps in enumerate(windows):
        count = len(steps)
        pad = horizon - count
        numbers = [step.obs for step in steps] + [steps[-1].next_obs] * (1 + pad)
        assert torch.equal(batch.obs[:, column], image(torch.tensor(numbers), dtype))
        assert all(one.next_obs == two.obs for one, two in zip(steps, steps[1:], strict=False))
        assert batch.mask[:, column].tolist() == [1.0] * count + [0.0] * pad
        for name in ("reward", "terminated", "truncated"):
            assert getattr(batch, name)[:, column].tolist() == [float(getattr(step, name)) for step in steps] + [0.0] * pad
        assert batch.action[:, column].tolist() == [[step.action, -step.action] for step in steps] + [[0.0, 0.0]] * pad
        for row, step in enumerate(steps):
            stored = batch.extras["num"][row, column].item(), *batch.extras["vec"][row, column].tolist()
            if step.extra is None:
                assert all(math.isnan(number) for number in stored)
            else:
                assert stored == (step.extra + 0.5, step.extra, -step.extra)
        assert (batch.extras["num"][count:, column] == 0).all() and (batch.extras["vec"][count:, column] == 0).all()


@settings(max_examples=30, deadline=None)
@given(CASES)
def test_available_windows_and_their_content_equal_the_reference(case: dict) -> None:
    """After every step, with wrap-around: the same starts, contiguous, inside one episode, right content, newest included."""
    replay, stream = pair(case)
    for number in range(3 * replay.rows):
        replay.add(stream.step())
        windows = stream.reference.windows(case["horizon"])
        assert len(replay) == stream.reference.stored() <= case["num_envs"] * case["share"]
        assert replay.num_windows() == len(windows)
        # Content after every step would be quadratic work; every start is still seen at all ages.
        if windows and number % 3 == 0:
            check(every(replay), windows, case["horizon"], case["dtype"])


@settings(max_examples=15, deadline=None)
@given(CASES, st.integers(1, 6))
def test_other_horizon_built_late_equals_one_kept_from_the_start(case: dict, other: int) -> None:
    """An index built from the stored flags is the one that watched every step, then and afterwards."""
    late, stream = pair(case)
    early = make(**case)
    early.num_windows(other)
    for number in range(2 * late.rows):
        step = stream.step()
        late.add(step)
        early.add(step)
        if number >= late.rows:
            windows = stream.reference.windows(other)
            assert late.num_windows(other) == early.num_windows(other) == len(windows)
            if windows and number % 3 == 0:
                check(every(late, other), windows, other, case["dtype"])
                assert_same(every(late, other), every(early, other))


@settings(max_examples=20, deadline=None)
@given(CASES, st.floats(0, 3))
def test_restored_continues_bit_equal(case: dict, fill: float) -> None:
    """A state put into a used buffer, then continued adds and samples, equal the uninterrupted buffer's."""
    replay, stream = pair(case)
    other, noise = pair({**case, "seed": case["seed"] + 1})
    for _ in range(int(fill * replay.rows)):
        replay.add(stream.step())
        other.add(noise.step())
    state = replay.state_dict()
    frozen = {name: tensor.clone() for name, tensor in state.items()}
    other.load_state_dict(state)
    assert len(other) == len(replay)
    for _ in range(replay.rows + 2):
        assert other.num_windows() == replay.num_windows()
        if replay.num_windows():
            assert_same(every(other), every(replay))
        step = stream.step()
        replay.add(step)
        other.add(step)
    assert all(same(state[name], frozen[name]) for name in frozen), "a state must not change with the buffer"
    assert_same_state(replay.state_dict(), other.state_dict())
    assert_same_state(replay.state_dict(copy=False), other.state_dict())


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal bit by bit up to NaN."""
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(torch.nan_to_num(one, 77.0), torch.nan_to_num(two, 77.0))


def assert_same(one: SequenceBatch, two: SequenceBatch) -> None:
    """Every field of two batches is equal."""
    assert one.extras.keys() == two.extras.keys()
    fields = {name: (one.extras[name], two.extras[name]) for name in one.extras}
    fields |= {name: (getattr(one, name), getattr(two, name)) for name in SequenceBatch._fields if name != "extras"}
    for name, (left, right) in fields.items():
        assert same(left, right), name


def assert_same_state(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Every field of two states is equal."""
    assert one.keys() == two.keys()
    for name in one:
        assert same(one[name], two[name]), name


def fill(replay: Replay, lengths: list[int], *, how: str = "terminated") -> int:
    """Feed one stream with episodes of given lengths (the last one open); rewards count up from 0. Returns the number of steps."""
    number = 0
    for which, length in enumerate(lengths):
        for index in range(length):
            last = index == length - 1 and which < len(lengths) - 1
            replay.add(one(number, terminated=last and how == "terminated", truncated=last and how == "truncated"))
            number += 1
    return number


def one(number: float, terminated: bool = False, truncated: bool = False, obs_dim: int = 2) -> Transition:
    """A transition of one environment whose numbers all derive from ``number``."""
    return Transition(
        obs=torch.full((1, obs_dim), float(number)),
        action=torch.full((1, 1), float(number)),
        reward=torch.tensor([float(number)]),
        terminated=torch.tensor([terminated]),
        truncated=torch.tensor([truncated]),
        next_obs=torch.full((1, obs_dim), number + 1.0),
        valid=torch.tensor([True]),
    )


def small(capacity: int = 100, horizon: int = 3, **options: object) -> Replay:
    """A replay of one stream, observations [2], action [1]."""
    return Replay(capacity, 1, (2,), 1, horizon, **options)  # type: ignore[arg-type]


def test_sampling_is_uniform_over_starts() -> None:
    """Every start is as likely as any other, whatever the lengths of its episode and stream."""
    replay = Replay(60, 3, (1, 3), 2, 3, extras=EXTRAS)
    stream = Stream(3, replay.rows, True, seed=3, longest=7, invalid=0.4, dtype=torch.float32)
    for _ in range(50):
        replay.add(stream.step())
    count = replay.num_windows()
    batch = replay.sample(torch.rand(200 * count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    hits = torch.unique(batch.index[0], return_counts=True)[1].double()
    assert len(hits) == count
    chi2 = float(((hits - 200) ** 2 / 200).sum())
    assert abs(chi2 - count) < 5 * math.sqrt(2 * count)


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53, 1.0])
def test_edges_of_u_select_oldest_and_newest(edge: float) -> None:
    """The smallest number selects the oldest start, the largest one the newest, and 1 itself does no harm."""
    replay = small(capacity=1000)
    steps = fill(replay, [500, 600])
    rewards = replay.sample(torch.tensor([edge], dtype=torch.float64)).reward[:, 0].tolist()
    assert rewards == ([steps - 3, steps - 2, steps - 1] if edge else [steps - 999, steps - 998, steps - 997])


def test_extras_of_any_shape() -> None:
    """Matrices, vectors and numbers side by side; none of them spills into another."""
    shapes = {"matrix": (2, 3), "number": (), "vector": (1,)}
    replay = small(extras=shapes)
    values = {name: torch.rand(4, *shape) for name, shape in shapes.items()}
    for index in range(4):
        replay.add(one(index)._replace(extras={name: value[index : index + 1] for name, value in values.items()}))
    batch = every(replay)
    for name, value in values.items():
        assert torch.equal(batch.extras[name][:, 1], value[1:4])
        replay.write(name, batch.index, batch.extras[name] + 1)
        assert torch.equal(every(replay).extras[name][:, 1], value[1:4] + 1)
    assert torch.equal(every(replay).reward, batch.reward)


def test_last_step_of_every_episode_is_reachable_and_newest_at_once() -> None:
    """Padded windows start at the final step too; a step that ended its episode can be trained on at once."""
    replay = small(horizon=3)
    assert fill(replay, [1, 2, 5, 4]) == 12
    assert every(replay).reward[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    replay.add(one(12, truncated=True))
    batch = every(replay)
    assert batch.reward[:, -1].tolist() == [12, 0, 0] and batch.obs[:, -1, 0].tolist() == [12, 13, 13, 13]
    assert batch.terminated[:, -1].tolist() == [0, 0, 0] and batch.truncated[:, -1].tolist() == [1, 0, 0]


def test_inside_never_draws_episodes_shorter_than_the_horizon() -> None:
    """Published windows: whole ones only, so short episodes are never seen and nothing is masked."""
    replay = small(horizon=3, windows="inside")
    fill(replay, [1, 2, 5, 4])
    batch = every(replay)
    assert batch.reward[0].tolist() == [3, 4, 5, 8, 9] and bool((batch.mask == 1).all())


@pytest.mark.parametrize("how", ["terminated", "truncated"])
def test_terminated_and_truncated_stay_apart(how: str) -> None:
    """Each end is reported in its own field, and the observation after it is the final one, not the reset's."""
    replay = small(horizon=2)
    fill(replay, [3, 3], how=how)
    batch = every(replay)
    other = {"terminated": "truncated", "truncated": "terminated"}[how]
    assert getattr(batch, how).sum() == 2 and getattr(batch, other).sum() == 0
    assert batch.obs[:, 1, 0].tolist() == [1, 2, 3] and batch.obs[:, 2, 0].tolist() == [2, 3, 3]


def test_write_is_seen_by_the_next_sample_and_padding_stays_clean() -> None:
    """Values written by a batch's index come back at those steps; writes to padding go nowhere."""
    replay = small(extras={"mean": (2,), "value": ()})
    fill(replay, [2, 5, 3])
    before = every(replay)
    assert torch.isnan(before.extras["value"][before.mask > 0]).all()
    replay.write("mean", before.index, before.obs[:-1] * 10)
    replay.write("value", before.index[:, 1], torch.full((3,), 7.0))
    after = every(replay)
    real = after.mask > 0
    assert torch.equal(after.extras["mean"][real], 10 * after.obs[:-1][real])
    assert (after.extras["mean"][~real] == 0).all()
    assert after.extras["value"][0, 1] == 7 and torch.isnan(after.extras["value"][0, 0])
    for name in ("obs", "action", "reward", "terminated", "truncated", "mask", "index"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_write_keeps_the_last_of_duplicates() -> None:
    """Windows overlap, so one row is written several times; on the CPU the last one wins, every time."""
    replay = small(extras={"value": ()})
    fill(replay, [6])
    replay.write("value", torch.full((5000,), 2), torch.arange(5000.0))
    assert every(replay).extras["value"][2, 0] == 4999


def test_steps_that_are_not_valid_leave_no_trace() -> None:
    """A masked entry changes nothing of its stream, whatever it holds."""
    replay = small()
    fill(replay, [4])
    before = replay.state_dict()
    replay.add(one(99, terminated=True)._replace(valid=torch.tensor([False])))
    assert_same_state(before, replay.state_dict())


def test_early_states_are_small_and_memory_is_reported() -> None:
    """A state holds used rows only; description and byte count follow the reserved memory."""
    replay = small(capacity=10_000)
    fill(replay, [10])
    assert len(replay.state_dict()["obs"]) == 11
    assert replay.num_bytes > 10_001 * (2 + 4) * 4
    assert "1 x 10,001 rows" in replay.describe() and "MB on cpu" in replay.describe()


def test_a_million_steps_of_24_dimensions_take_less_than_300_mb() -> None:
    """With six actions and what a plan leaves; nothing is written, so that nothing of it is really taken here."""
    replay = Replay(1_000_000, 1, (24,), 6, 3, extras={name: (6,) * rank for name, rank in PLAN_RECORDS.items()})
    assert 1_000_000 * (24 + 6) * 4 < replay.num_bytes < 300e6


def test_gathered_elsewhere() -> None:
    """Storage and training device may differ: batches arrive on the training device, ``write`` takes its indices."""
    replay = small(device="meta", storage_device="cpu", extras={"value": ()})
    fill(replay, [5])
    batch = replay.sample(torch.zeros(4, dtype=torch.float64))
    assert all(tensor.device.type == "meta" for tensor in (*batch[:-1], *batch.extras.values()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 2}, "replay.capacity: one window of 3 steps needs at least 3"),
        ({"capacity": 0}, "replay.capacity"),
        ({"horizon": 0}, "planner.horizon"),
        ({"windows": "outside"}, "replay.windows"),
    ],
)
def test_impossible_buffers_are_refused(options: dict, words: str) -> None:
    """Configuration errors name their key."""
    with pytest.raises(ConfigError, match=words):
        small(**options)


def test_too_long_a_horizon_and_too_early_a_sample_are_refused() -> None:
    """Both messages say what is missing."""
    replay = small(capacity=5)
    with pytest.raises(RuntimeError, match="no complete window of 3 steps"):
        replay.sample(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ConfigError, match="one window of 6 steps"):
        replay.num_windows(6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"obs": torch.zeros(1, 3)}, "expected obs"),
        ({"next_obs": torch.zeros(1, 1)}, "expected obs and next_obs"),
        ({"action": torch.zeros(1)}, "expected action"),
        ({"reward": torch.zeros(1, 1)}, "expected reward"),
        ({"extras": {"value": torch.zeros(1, 2)}}, "extra 'value'"),
    ],
)
def test_wrong_shapes_are_refused(change: dict, words: str) -> None:
    """Nothing is broadcast silently, nothing is stored in part."""
    replay = small(extras={"value": ()})
    with pytest.raises(ValueError, match=words):
        replay.add(one(0)._replace(**change))
    assert len(replay) == 0


def test_fractions_are_not_stored_as_bytes() -> None:
    """Normalised pixels handed to byte storage would all become 0."""
    with pytest.raises(ValueError, match="uint8"):
        small(obs_dtype=torch.uint8).add(one(0))


def test_writes_to_undeclared_or_misshapen_fields_are_refused() -> None:
    """The message lists what was declared."""
    replay = small(extras={"value": ()})
    with pytest.raises(ValueError, match="declared: value"):
        replay.write("mean", torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match="expected values"):
        replay.write("value", torch.zeros(2, dtype=torch.int64), torch.zeros(1))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: small(capacity=50), "'layout'.*1 environments x 101 rows.*1 x 51"),
        (lambda: Replay(100, 1, (3,), 1, 3), "'obs'"),
        (lambda: Replay(100, 1, (2,), 2, 3), "'action'"),
        (lambda: small(extras={"value": ()}), "missing \\['extras.value'\\]"),
        (lambda: Replay(100, 1, (2,), 1, 3, obs_dtype=torch.float64), "'obs': saved as torch.float32"),
    ],
)
def test_states_of_other_buffers_are_refused(other, words: str) -> None:  # noqa: ANN001
    """The field that does not fit is named, and the buffer stays as it was."""
    source = small()
    fill(source, [5])
    target = other()
    with pytest.raises(ValueError, match=words):
        target.load_state_dict(source.state_dict())
    assert len(target) == 0 and target.num_windows() == 0


@pytest.mark.parametrize("device", ["meta", "tpu", "CPU"])
def test_storage_device_is_checked(device: str) -> None:
    """By the name of its own key."""
    with pytest.raises(ConfigError, match="^replay.storage_device: expected auto, cpu, cuda, cuda:<index> or mps"):
        Replay(10, 1, (3,), 2, 3, storage_device=device)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("steps", [5, 9, 40])
def test_all_transitions(num_envs: int, steps: int) -> None:
    """Every stored step once with what followed it, also across the end of the ring, and never across the end of an episode."""
    replay = Replay(12 * num_envs, num_envs, (2,), 1, 2)
    for time in range(steps):
        now, done = torch.arange(num_envs) * 1000.0 + time, time % 7 == 6
        obs, flag = torch.stack((now, torch.full_like(now, float(time // 7))), 1), torch.zeros(num_envs, dtype=torch.bool)
        following = obs + torch.tensor([1.0, 0.0])
        replay.add(Transition(obs, now[:, None], 2 * now, flag | done, flag, following, ~flag))
    everything = replay.transitions(0.9)
    assert len(everything.obs) == len(replay) and everything.obs[:, 0].unique().numel() == len(replay)
    torch.testing.assert_close(everything.next_obs, everything.obs + torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(everything.reward, 2 * everything.action[:, 0])
    assert torch.equal(everything.terminated, (everything.obs[:, 0] % 1000 % 7 == 6).float()) and set(everything.discount.tolist()) <= {
        float(torch.tensor(0.9))
    }
