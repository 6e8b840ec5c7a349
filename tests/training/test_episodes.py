"""The account of running episodes: sums, ends, limits, and states of older checkpoints."""

from __future__ import annotations

import math

import torch

from tests.trees import differences
from worldmpc.training.episodes import Episode, EpisodeTally
from worldmpc.types import EnvStep


def step(reward, terminated=(0, 0), truncated=(0, 0), valid=(1, 1), success=(math.nan, math.nan)):
    flags = (torch.tensor(part).bool() for part in (terminated, truncated))
    obs = torch.zeros(2, 1)
    return EnvStep(obs, torch.tensor(reward), *flags, obs, torch.tensor(valid).bool(), torch.tensor(success))


def test_sums_begin_afresh_where_an_episode_ended():
    tally = EpisodeTally(2)
    assert tally.note(step((1.0, 10.0), success=(math.nan, 1.0))) == {}
    # Success counts wherever in the episode it was reported.
    assert tally.note(step((2.0, 20.0), truncated=(0, 1), success=(math.nan, 0.0))) == {1: Episode(30.0, 2, 1.0)}
    assert tally.note(step((0.0, 0.0), valid=(1, 0))) == {}  # a reset step of the second, which is none of its episode
    ended = tally.note(step((4.0, 5.0), terminated=(1, 1), success=(math.nan, 0.0)))
    assert ended[1] == Episode(5.0, 1, 0.0) and ended[0][:2] == (7.0, 4) and math.isnan(ended[0].success)


def test_episodes_that_do_not_end_are_cut_at_the_limit():
    tally = EpisodeTally(2, limit=2)
    found = [tally.note(step((1.0, 2.0), terminated=(0, index == 0))) for index in range(3)]
    assert [{env: episode[:2] for env, episode in ended.items()} for ended in found] == [{1: (2.0, 1)}, {0: (2.0, 2)}, {1: (4.0, 2)}]


def test_resumed_and_reset():
    one, two = EpisodeTally(2), EpisodeTally(2)
    one.note(step((1.0, 2.0), success=(1.0, math.nan)))
    saved = one.state_dict()
    two.load_state_dict(saved)
    one.note(step((1.0, 2.0)))
    assert two.note(step((3.0, 3.0), terminated=(1, 0))) == {0: Episode(4.0, 2, 1.0)}  # what was saved does not move
    older = {"running_return": torch.ones(2, dtype=torch.float64), "running_length": torch.full((2,), 3.0)}
    two.load_state_dict(older)
    assert math.isnan(two.note(step((1.0, 1.0), terminated=(1, 0)))[0].success)
    two.load_state_dict(older)
    assert two.note(step((1.0, 1.0), terminated=(1, 0)))[0][:2] == (2.0, 4)
    two.reset()
    assert not differences(two.state_dict(), EpisodeTally(2).state_dict())
