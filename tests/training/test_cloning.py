"""Decoys: what is written down of games, what is learned from it, and the way to disk and back."""

from __future__ import annotations

import math

import pytest
import torch

from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import make_envs
from worldmpc.models.cloning import Clone
from worldmpc.opponents.loaders import load_player
from worldmpc.opponents.players import StillPlayer
from worldmpc.training.checkpoint import load_checkpoint, save_checkpoint
from worldmpc.training.cloning import Demonstration, Recorder, check_decoy_target, save_decoy, train_clone, watch_games
from worldmpc.training.two_player import context_of, load_saved
from worldmpc.types import Seat

TASK = "hockey/self-play-shooting"


class Switch(StillPlayer):
    """Does one of two things, which of them the first observation says; the second action is a coin's."""

    def act(self, carry, obs, generator):
        first = torch.where(obs[:, 0] > 0, 1.0, -1.0)
        second = torch.where(torch.rand(len(obs), generator=generator) < 0.5, 1.0, -1.0)
        return torch.stack((first, second), 1), carry


def demonstration(games=20, steps=50, seed=0, scale=(30.0, 0.01, 0.0), shift=(5.0, -100.0, 7.0)):
    """Observations of very different sizes, one of which never changes, and what a Switch does there."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(games * steps, 3, generator=generator)
    action, _ = Switch(Seat((3,), 2)).act((), rows, generator)
    return Demonstration(rows * torch.tensor(scale) + torch.tensor(shift), action, torch.arange(games).repeat_interleave(steps))


def test_a_recorder_writes_down_whole_games_and_changes_none():
    with make_envs(TASK, EnvConfig(num_envs=3)) as envs:
        seat = envs.spec.seats[0]
        names = ("strong", "random")
        data = watch_games(
            envs, load_player("strong", context_of(TASK, seat)), [load_player(n, context_of(TASK, seat)) for n in names], 4, 1
        )
    counts = data.game.unique(return_counts=True)[1]
    assert len(counts) == 8 and counts.max() <= 81  # no two games have a number in common
    assert data.obs.shape == (len(data.game), 18) and data.action.shape == (len(data.game), 4)
    assert set(data.action[:, 3].tolist()) <= {0.0, 1.0}  # a bot's own actions: to shoot or not
    for number in data.game.unique():
        held = data.obs[data.game == number][:, 16]
        assert ((held[1:] == held[:-1] - 1) | (held[1:] == 15) | (held[1:] == 0)).all()  # steps of one game, in their order


def test_a_recorder_leaves_memory_to_the_player():
    class Counting(StillPlayer):
        def init_carry(self, games, generator):
            return (torch.zeros(games),)

        def act(self, carry, obs, generator):
            return self.action.expand(len(obs), -1) + carry[0][:, None], (carry[0] + 1,)

        def watch(self, carry, obs, other_action):
            return (carry[0] + 10,)

    recorder, generator = Recorder(Counting(Seat((1,), 1))), torch.Generator()
    carry = recorder.init_carry(2, generator)
    for expected in (0.0, 11.0):
        action, carry = recorder.act(carry, torch.zeros(2, 1), generator)
        carry = recorder.watch(carry, torch.zeros(2, 1), torch.zeros(2, 1))
        assert action.tolist() == [[expected]] * 2
    assert recorder.seen().game.tolist() == [0, 1, 0, 1] and recorder.init_carry(1, generator)[1].tolist() == [2]


def test_a_clone_learns_what_can_be_known_and_no_more():
    data = demonstration()
    clone = Clone(3, 2, [16], seed=1)
    before = clone.log_prob(data.obs, data.action).mean()
    result = train_clone(clone, data, lr=1e-2, epochs=20, seed=1)
    bin_width = math.log(2 / clone.bins)
    # One of two values is known, of the other one bit is missing; a distribution that never looks misses two.
    assert result.log_likelihood == pytest.approx(-math.log(2) - 2 * bin_width, abs=0.1)
    assert result.marginal == pytest.approx(-2 * math.log(2) - 2 * bin_width, abs=0.05)
    assert before < result.marginal and (result.steps, result.holdout_steps) == (800, 200)
    # The weights that are left read observations as they come.
    everything = float(clone.log_prob(data.obs, data.action).mean().detach())
    assert everything == pytest.approx(0.8 * result.train_log_likelihood + 0.2 * result.log_likelihood, abs=1e-3)


def test_choices_are_cloned_as_well():
    data = demonstration()
    choices = torch.nn.functional.one_hot((data.action[:, 0] > 0).long(), 3).float()
    clone = Clone(3, 3, [16], discrete=True)
    result = train_clone(clone, data._replace(action=choices), lr=1e-2, epochs=20)
    assert result.log_likelihood > -0.1 and result.marginal == pytest.approx(-math.log(2), abs=0.05)


def test_training_ends_where_held_out_games_are_no_longer_predicted_better():
    data = demonstration(games=5, steps=20)
    noise = data._replace(action=torch.rand(100, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1)  # nothing to be learned
    clone = Clone(3, 2, [64])
    result = train_clone(clone, noise, lr=1e-2, epochs=200, patience=3, batch_size=16)
    assert result.epochs == result.best_epoch + 3 < 50
    repeated = Clone(3, 2, [64])
    assert train_clone(repeated, noise, lr=1e-2, epochs=200, patience=3, batch_size=16) == result
    assert all(torch.equal(one, two) for one, two in zip(clone.state_dict().values(), repeated.state_dict().values(), strict=True))


@pytest.mark.parametrize("holdout", [0.01, 0.99])
def test_too_few_games_are_refused(holdout):
    with pytest.raises(ConfigError, match=f"^holdout: {holdout} of 4 games leaves none of them on one side; play more games"):
        train_clone(Clone(3, 2, [8]), demonstration(games=4), holdout=holdout)


def test_a_decoy_comes_back_as_it_was_saved(tmp_path):
    clone = Clone(18, 4, [8])
    path = save_decoy(clone, tmp_path / "decoys" / "mine", {"opponent": "strong"})
    loaded = load_saved(path)
    obs, uniform = torch.randn(5, 18), torch.rand(5, 4)
    assert isinstance(loaded, Clone) and torch.equal(loaded.sample(obs, uniform), clone.sample(obs, uniform))
    assert load_checkpoint(path, [])[1]["training"] == {"opponent": "strong"}
    with make_envs(TASK) as envs:
        assert load_player(f"DECOYPOLICY:{path}", context_of(TASK, envs.spec.seats[1])).clone.hidden == (8,)


def test_a_decoy_takes_the_place_of_a_decoy_alone(tmp_path):
    check_decoy_target(tmp_path / "new")
    check_decoy_target(save_decoy(Clone(2, 1, [4]), tmp_path / "old", {}))
    save_checkpoint(tmp_path, "agent", {"agent": {"x": torch.zeros(1)}}, {"config": {}})
    (tmp_path / "folder").mkdir()
    for name in ("agent", "folder"):
        with pytest.raises(ConfigError, match=f"^out: .*{name} exists and is no decoy; choose another folder"):
            check_decoy_target(tmp_path / name)
    with pytest.raises(ConfigError, match="^out: .*: the last part names a folder; use letters"):
        check_decoy_target(tmp_path / "a b")
