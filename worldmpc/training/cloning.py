"""Decoys: policies cloned from what somebody did in games, to be played against as ``DECOYPOLICY:<path>``."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError
from worldmpc.envs import VecEnv
from worldmpc.models.cloning import DECOY, Clone, decoy_meta
from worldmpc.noise import NoiseStream, derive_seed
from worldmpc.opponents.games import play_games
from worldmpc.opponents.players import Player
from worldmpc.training.checkpoint import META, NAME, CheckpointError, load_checkpoint, save_checkpoint


class Demonstration(NamedTuple):
    """What somebody saw and did."""

    obs: Tensor  # [N, O] own views
    action: Tensor  # [N, A]
    game: Tensor  # [N] int64, which game a step is of


class Recorder:
    """Plays as another player does, and writes down what that one saw and did, game by game.

    Args:
        player: decides.
    """

    def __init__(self, player: Player) -> None:
        self.player = player
        self._begun = 0
        self._steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def init_carry(self, games: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Return what the player remembers of fresh games, and numbers that tell them from all others."""
        numbers = torch.arange(self._begun, self._begun + games)
        self._begun += games
        return self.player.init_carry(games, generator), numbers

    def act(self, carry: tuple[Any, Tensor], obs: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[Any, Tensor]]:
        """Own views [games, O] -> actions [games, A], which are written down."""
        own, numbers = carry
        action, own = self.player.act(own, obs, generator)
        self._steps.append((obs.clone(), action.clone(), numbers))
        return action, (own, numbers)

    def watch(self, carry: tuple[Any, Tensor], obs: Tensor, other_action: Tensor) -> tuple[Any, Tensor]:
        """Let the player see what the other one did."""
        return self.player.watch(carry[0], obs, other_action), carry[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the player's."""
        return self.player.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the player's."""
        self.player.load_state_dict(state)

    def seen(self) -> Demonstration:
        """Return everything so far."""
        return Demonstration(*(torch.cat(parts) for parts in zip(*self._steps, strict=True)))


def watch_games(envs: VecEnv, opponent: Player, against: Sequence[Player], games: int, seed: int) -> Demonstration:
    """Let somebody play games against each of some players, from where opponents sit, and return what it saw and did.

    Raises:
        EnvError: a game failed.
    """
    recorder = Recorder(opponent)
    for number, player in enumerate(against):
        play_games(envs, player, recorder, games, derive_seed(seed, "clone", number))
    return recorder.seen()


class CloneResult(NamedTuple):
    """How training ended; log-likelihoods are means over held-out steps, in nats."""

    log_likelihood: float
    """Of the clone."""
    marginal: float
    """Of the frequencies of the actions' bins, each for itself, whatever is seen."""
    train_log_likelihood: float
    best_epoch: int
    """The pass whose weights were kept; 0: those from before."""
    epochs: int
    steps: int
    """Steps learned from."""
    holdout_steps: int


def train_clone(
    clone: Clone,
    data: Demonstration,
    *,
    holdout: float = 0.2,
    epochs: int = 100,
    patience: int = 5,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 1,
) -> CloneResult:
    """Train a clone by maximum likelihood, until games held out are no longer predicted better; its best weights stay.

    Inputs are normalised while it learns; afterwards its first layer does that itself.

    Args:
        clone: learns, in place.
        data: what is cloned.
        holdout: share of the games that are held out, whole ones.
        epochs: passes over the others, at most.
        patience: passes without improvement after which training ends.
        batch_size: steps per update.
        lr: learning rate of Adam.
        seed: of the split and the order of steps.

    Raises:
        ConfigError: too few games for both parts.
    """
    generator = NoiseStream(seed, "training of a clone").generator
    games = data.game.unique()
    held = round(holdout * len(games))
    if not 0 < held < len(games):
        raise ConfigError(f"holdout: {holdout:g} of {len(games)} games leaves none of them on one side; play more games")
    out = torch.isin(data.game, games[torch.randperm(len(games), generator=generator)[:held]])
    mean, std = data.obs[~out].mean(0), data.obs[~out].std(0)
    std = torch.where(std > 1e-6, std, 1.0)  # what never changes says nothing
    obs, action, other_obs, other_action = data.obs[~out], data.action[~out], data.obs[out], data.action[out]
    marginal = _marginal(clone, action, other_action)
    obs, other_obs = (obs - mean) / std, (other_obs - mean) / std
    optimizer = torch.optim.Adam(clone.parameters(), lr)
    best, best_epoch, kept, epoch = _log_likelihood(clone, other_obs, other_action), 0, copy.deepcopy(clone.state_dict()), 0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(obs), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss = -clone.log_prob(obs[rows], action[rows]).mean()
            loss.backward()
            optimizer.step()
        now = _log_likelihood(clone, other_obs, other_action)
        if now > best:
            best, best_epoch, kept = now, epoch, copy.deepcopy(clone.state_dict())
        if epoch - best_epoch >= patience:
            break
    clone.load_state_dict(kept)
    train = _log_likelihood(clone, obs, action)
    _take_in(clone, mean, std)
    return CloneResult(best, marginal, train, best_epoch, epoch, len(obs), len(other_obs))


@torch.no_grad()
def _log_likelihood(clone: Clone, obs: Tensor, action: Tensor) -> float:
    parts = [clone.log_prob(*rows).sum() for rows in zip(obs.split(4096), action.split(4096), strict=True)]
    return float(torch.stack(parts).sum()) / len(obs)


def _marginal(clone: Clone, action: Tensor, other_action: Tensor) -> float:
    """Log-likelihood of actions [M, A] under the frequencies of actions [N, A], one count added to each so that none is impossible."""
    if clone.discrete:
        counts = action.sum(0) + 1
        return float((other_action @ (counts / counts.sum()).log()).mean())
    bins = nn.functional.one_hot(clone.nearest(action), clone.bins).sum(0) + 1  # [A, K]
    log_probs = (bins / bins.sum(-1, keepdim=True)).log()
    chosen = log_probs.expand(len(other_action), -1, -1).gather(-1, clone.nearest(other_action)[..., None])
    return float(chosen.sum((-1, -2)).mean()) - clone.action_dim * math.log(2 / clone.bins)


@torch.no_grad()
def _take_in(clone: Clone, mean: Tensor, std: Tensor) -> None:
    """Let the first layer read x where it has read (x - mean) / std."""
    first = clone.net[0]
    assert isinstance(first, nn.Linear)
    first.weight.copy_(first.weight / std)
    first.bias.sub_(first.weight @ mean)


def check_decoy_target(path: Path) -> None:
    """Check that a decoy can be written to a path, before hours go into it.

    Raises:
        ConfigError: a name that no checkpoint can have, or something there that is no decoy.
    """
    if not NAME.fullmatch(path.name):
        raise ConfigError(f"out: {path}: the last part names a folder; use letters, digits, '_', '-' and '.'")
    if not path.exists():
        return
    try:
        kind = load_checkpoint(path, groups=[])[1].get("kind") if (path / META).is_file() else None
    except CheckpointError:  # one that is damaged is no decoy either
        kind = None
    if kind != DECOY:
        raise ConfigError(f"out: {path} exists and is no decoy; choose another folder")


def save_decoy(clone: Clone, path: Path, training: Mapping[str, Any]) -> Path:
    """Write a decoy, with what there is to know about its training.

    Raises:
        CheckpointError: it could not be written.
    """
    return save_checkpoint(path.parent, path.name, {"clone": clone.state_dict()}, {**decoy_meta(clone), "training": dict(training)})
