"""From the name of an opponent to a player: one registry by type.

A name is ``weak``, ``strong``, ``random`` or ``still``; ``TYPE:path`` with a type of :data:`LOADERS`; or the path of a run, a checkpoint or
a decoy alone, whose type is in it. A new type is one class with the methods of :class:`~worldmpc.opponents.players.Player`, and one line
here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from worldmpc.config import LATENT, ConfigError
from worldmpc.models.cloning import Clone
from worldmpc.opponents.players import AgentPlayer, BotPlayer, ClonePlayer, Player, RandomPlayer, StillPlayer
from worldmpc.types import Agent, Mode, Seat

OPPONENTS = "opponents"
"""The key of whom is played."""
HOCKEY = ("hockey", "hockey-real")
"""Suites whose bots are called weak and strong, and whose games know who is to start."""
Load = Callable[[Path], Agent | Clone]
"""Loads what was saved at a path, on the CPU; raises CheckpointError or ConfigError, with the path in the message."""


class Context(NamedTuple):
    """What a loader may need."""

    task: str
    """The game."""
    seat: Seat
    """Where the player is to sit."""
    load: Load
    mode: Mode = "eval"
    """How agents that plan act."""
    key: str = OPPONENTS
    """The configuration key that names the opponent, for messages."""


Loader = Callable[[str | None, Context], Player]
"""``(path, context) -> player``; the path is None where none was given."""


def _bot(kind: str) -> Loader:
    def load(path: str | None, context: Context) -> Player:
        if context.task.partition("/")[0] not in HOCKEY or context.seat.discrete:
            others = "random or self_play" if context.key == OPPONENTS else "random"
            raise ConfigError(f"{context.key}: {kind} is a bot of hockey with Box actions; {context.task} needs others, as {others}")
        return BotPlayer(kind, keep_mode=context.seat.obs_shape == (18,))

    return load


def _plain(kind: Callable[[Seat], Player]) -> Loader:
    return lambda path, context: kind(context.seat)


def _saved(kind: str, *agents: str) -> Loader:
    """Return the loader of what was saved: an agent of one of these names, or a decoy where there are none."""

    def load(path: str | None, context: Context) -> Player:
        assert path is not None
        found = context.load(Path(path))
        name = "" if isinstance(found, Clone) else found.config.agent
        if isinstance(found, Clone) != (not agents) or name not in (*agents, ""):
            raise ConfigError(f"{context.key}: {path} holds {f'agent={name}' if name else 'a decoy'}, not {kind}; leave the type out")
        return _seated(found, path, context)

    return load


def _seated(found: Agent | Clone, path: str, context: Context) -> Player:
    """Return a player of what was loaded, if it sees and does what its seat does."""
    if isinstance(found, Clone):
        made = Seat(found.obs_shape, found.action_dim, found.discrete)
    else:
        made = Seat(found.spec.obs_shape, found.spec.action_dim, found.spec.discrete)
    if made != context.seat:
        raise ConfigError(f"{context.key}: {path} was made for {_describe(made)}, its seat in {context.task} has {_describe(context.seat)}")
    return ClonePlayer(found) if isinstance(found, Clone) else AgentPlayer(found, context.mode)


ALONE: dict[str, Loader] = {"weak": _bot("weak"), "strong": _bot("strong"), "random": _plain(RandomPlayer), "still": _plain(StillPlayer)}
"""Names without a path."""
LOADERS: dict[str, Loader] = {
    "TDMPC2": _saved("TDMPC2", *LATENT),
    "SAC": _saved("SAC", "sac"),
    "TD3": _saved("TD3", "td3"),
    "PPO": _saved("PPO", "ppo"),
    "DQN": _saved("DQN", "dqn"),
    "MPC": _saved("MPC", "mpc", "mbmpc", "pets"),
    "DECOYPOLICY": _saved("DECOYPOLICY"),
}
"""Type -> what loads it from a path."""


class Name(NamedTuple):
    """An opponent as it was named."""

    text: str
    kind: str | None
    """One of :data:`LOADERS` or :data:`ALONE`; None: what is at the path says it."""
    path: str | None

    @property
    def label(self) -> str:
        """How tables and records call it."""
        return self.text if self.path is None else self.path.rstrip("/")


def is_saved(text: str) -> bool:
    """Return whether a name stands for something at a path, and that is there."""
    kind, colon, path = text.partition(":")
    return text not in ALONE and bool(text) and Path(path if colon and kind.upper() in LOADERS else text).exists()


def read_name(text: str, key: str = OPPONENTS) -> Name:
    """Return the type and path of a named opponent; ``key`` stands in messages.

    Raises:
        ConfigError: neither a known name, nor a known type with a path, nor a path that is there.
    """
    if text in ALONE:
        return Name(text, text, None)
    kind, colon, path = text.partition(":")
    if colon and kind.upper() in LOADERS:
        if not path or not Path(path).exists():
            raise ConfigError(f"{key}: {path}: no such file or folder (of {text})")
        return Name(text, kind.upper(), path)
    if text and Path(text).exists():
        return Name(text, None, text)
    alone = [*ALONE, *(["self_play"] if key == OPPONENTS else [])]
    words = [*alone, *(f"{name}:<path>" for name in LOADERS)]
    near = difflib.get_close_matches(kind, [*alone, *LOADERS], n=1)
    hint = f"did you mean {near[0]}{':<path>' if near[0] in LOADERS else ''}?" if near else f"use {', '.join(words)}, or a path"
    what = f"unknown type '{kind}' in '{text}'" if colon else f"'{text}' is no known opponent, and there is no such file or folder"
    raise ConfigError(f"{key}: {what}; {hint}")


def load_player(text: str, context: Context) -> Player:
    """Return the player that a name stands for.

    Raises:
        ConfigError: an unknown name or type, a path where nothing is, or a player of other observations or actions.
        CheckpointError: what is at the path cannot be read.
    """
    name = read_name(text, context.key)
    if name.kind in ALONE:
        return ALONE[name.kind](None, context)
    assert name.path is not None
    if name.kind is None:
        return _seated(context.load(Path(name.path)), name.path, context)
    return LOADERS[name.kind](name.path, context)


def _describe(seat: Seat) -> str:
    actions = f"{seat.action_dim} choices" if seat.discrete else f"{seat.action_dim} actions"
    return f"{' x '.join(map(str, seat.obs_shape))} observations and {actions}"
