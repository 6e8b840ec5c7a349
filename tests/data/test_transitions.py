"""Windows summed up as transitions, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from worldmpc.data import Replay
from worldmpc.data.transitions import n_step_transitions
from worldmpc.types import SequenceBatch, Transition

GAMMA = 0.5


def window(rewards, *, terminated=None, truncated=None, real=None, junk=0.0):
    """One window whose observations count 0, 1, 2, ...; behind its ``real`` steps everything is ``junk``."""
    steps = len(rewards)
    real = steps if real is None else real
    mask = (torch.arange(steps) < real).float()[:, None]

    def flags(at):
        return ((torch.arange(steps) == at).float() if at is not None else torch.zeros(steps))[:, None] * mask + junk * (1 - mask)

    return SequenceBatch(
        obs=torch.where(torch.arange(steps + 1) <= real, torch.arange(steps + 1.0), junk)[:, None, None],
        action=torch.tensor(rewards)[:, None, None] * 10,
        reward=torch.tensor(rewards)[:, None] * mask + junk * (1 - mask),
        terminated=flags(terminated),
        truncated=flags(truncated),
        mask=mask,
        index=torch.zeros(steps, 1, dtype=torch.long),
        extras={"name": torch.arange(float(steps))[:, None]},
    )


@pytest.mark.parametrize("junk", [0.0, 7.0])
@pytest.mark.parametrize(
    ("given", "reward", "next_obs", "terminated", "discount"),
    [
        (window([3.0]), 3.0, 1.0, 0.0, 0.5),
        (window([3.0], terminated=0), 3.0, 1.0, 1.0, 0.5),
        (window([1.0, 2.0, 4.0]), 1 + 1 + 1, 3.0, 0.0, 0.125),
        (window([1.0, 2.0, 4.0], terminated=2), 1 + 1 + 1, 3.0, 1.0, 0.125),
        (window([1.0, 2.0, 4.0], truncated=2), 1 + 1 + 1, 3.0, 0.0, 0.125),
        ({"rewards": [1.0, 2.0, 4.0], "terminated": 1, "real": 2}, 1 + 1, 2.0, 1.0, 0.25),
        ({"rewards": [1.0, 2.0, 4.0], "truncated": 1, "real": 2}, 1 + 1, 2.0, 0.0, 0.25),
        ({"rewards": [1.0, 2.0, 4.0], "terminated": 0, "real": 1}, 1.0, 1.0, 1.0, 0.5),
    ],
)
def test_by_hand(given, reward, next_obs, terminated, discount, junk):
    """Sums end with the episode; only a termination takes the value of what follows away; what stands in the padding does not count."""
    batch = window(**given, junk=junk) if isinstance(given, dict) else given
    got = n_step_transitions(batch, GAMMA)
    assert (got.reward.item(), got.next_obs.item(), got.terminated.item(), got.discount.item()) == (reward, next_obs, terminated, discount)
    assert got.obs.item() == 0.0 and got.action.item() == 10 * batch.reward[0].item() and got.extras["name"].item() == 0.0
    assert got.obs.shape == got.next_obs.shape == (1, 1) and got.reward.shape == got.discount.shape == (1,)


def test_windows_of_a_replay():
    """Every stored step becomes the transition that a loop over its episode finds."""
    n, lengths, ends = 3, (5, 1, 2, 4), ("terminated", "truncated", "truncated", "terminated")
    replay = Replay(100, 1, (1,), 1, n)
    expected = {}
    for episode, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        rewards = [float(torch.randn(())) for _ in range(length)]
        for t in range(length):
            last = torch.tensor([t == length - 1])
            obs = torch.tensor([[10.0 * episode + t]])
            flags = [last & torch.tensor(end == kind) for kind in ("terminated", "truncated")]
            replay.add(Transition(obs, torch.zeros(1, 1), torch.tensor([rewards[t]]), *flags, obs + 1, torch.tensor([True])))
            steps = min(n, length - t)
            total = sum(GAMMA**i * rewards[t + i] for i in range(steps))
            over = float(t + steps == length and end == "terminated")
            expected[10.0 * episode + t] = torch.tensor([total, 10.0 * episode + t + steps, over, GAMMA**steps])
    got = n_step_transitions(replay.sample(torch.rand(500, dtype=torch.float64)), GAMMA)
    assert set(got.obs.flatten().tolist()) == set(expected)
    found = torch.stack((got.reward, got.next_obs[:, 0], got.terminated, got.discount), 1)
    assert_close(found, torch.stack([expected[start] for start in got.obs.flatten().tolist()]))


def test_one_step_is_the_window_itself():
    """The short way for one step gives what the long way gives."""
    batch = window([1.0, 2.0], truncated=0, real=1)
    one = SequenceBatch(batch.obs[:2], *(field[:1] for field in batch[1:7]), {})
    for short, long in zip(n_step_transitions(one, GAMMA)[:6], n_step_transitions(batch, GAMMA)[:6], strict=True):
        assert torch.equal(short, long)
