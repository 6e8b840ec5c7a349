"""``worldmpc play``: a person with the keyboard in a game of hockey."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NamedTuple

import torch

from worldmpc.cli.output import console_for, say
from worldmpc.cli.text import PLAY
from worldmpc.cli.words import no_more_words, split_words
from worldmpc.config import ConfigError
from worldmpc.envs import canonical_task, episode_seed, make_env
from worldmpc.envs.hockey import check_packages
from worldmpc.envs.hockey.render import FPS, Screen
from worldmpc.envs.two_player import JointEnv
from worldmpc.noise import NoiseStream
from worldmpc.opponents.games import Tally
from worldmpc.opponents.loaders import HOCKEY, load_player, read_name
from worldmpc.opponents.players import Player
from worldmpc.runtime import keep_freed_memory, set_threads
from worldmpc.training.playing import check_names
from worldmpc.training.two_player import context_of

_OUTCOME = {1: "you won", 0: "a draw", -1: "you lost"}


def play(words: list[str]) -> int:
    """Play the games, say how they ended, and return the exit status."""
    options, rest = split_words(words, PLAY)
    no_more_words(rest, "play", PLAY)
    opponent = _opponent(options)
    if options["seat"] not in (1, 2):
        raise ConfigError(f"seat: expected 1 or 2, got {options['seat']}")
    if options["games"] < 1:
        raise ConfigError(f"games: expected at least 1, got {options['games']}")
    task = canonical_task(options["task"])
    suite = task.partition("/")[0]
    if suite not in HOCKEY:
        raise ConfigError(f"task: people play hockey alone, got {task}; use task=hockey")
    check_packages(suite, True)
    keep_freed_memory()
    set_threads(options["threads"])
    env = make_env(task)
    try:
        game = env.unwrapped
        if not isinstance(game, JointEnv) or game.seats[0].discrete:
            raise ConfigError(f"task: {task} has one player or no Box actions; use task=hockey")
        player = load_player(opponent, context_of(task, game.seats[1], options["mode"]))
        table = _Table(env, game, player, options["seat"], options["seed"])
        screen = _open_window()
        try:
            return _games(table, screen, options["games"], read_name(opponent).label)
        finally:
            screen.close()
    finally:
        env.close()


def _opponent(options: dict[str, Any]) -> str:
    """Return the one name that was given."""
    given = [options[name] for name in ("checkpoint", "opponent") if options[name] is not None]
    if len(given) != 1:
        raise ConfigError("opponent: expected either checkpoint=PATH or opponent=NAME, as in opponent=strong")
    check_names(given, "opponent")
    return given[0]


def _open_window() -> Screen:
    """Open the window.

    Raises:
        ConfigError: there is no display.
    """
    import pygame

    chosen = os.environ.get("SDL_VIDEODRIVER")
    hint = "play on a machine with a display (SDL_VIDEODRIVER=dummy plays without showing anything)"
    if sys.platform == "linux" and not any((chosen, os.environ.get("DISPLAY"), os.environ.get("WAYLAND_DISPLAY"))):
        raise ConfigError(f"play: there is no display; {hint}")
    try:
        screen = Screen(window=True)
    except pygame.error as error:
        raise ConfigError(f"play: no window can be opened ({error}); {hint}") from error
    if not chosen and pygame.display.get_driver() in ("offscreen", "dummy"):  # what SDL takes where it finds no display
        screen.close()
        raise ConfigError(f"play: no window can be opened; {hint}")
    return screen


def _games(table: _Table, screen: Screen, games: int, opponent: str) -> int:
    console, results = console_for(None), []
    say(console, "arrows push, w and s turn, space shoots; Esc ends")
    keyboard = Keyboard()
    for number in range(games):
        found = table.play(number, keyboard, screen)
        if found is None:
            say(console, f"game {number + 1}: not finished")
            break
        say(console, f"game {number + 1}: {_OUTCOME[found.winner]}, {found.steps} steps")
        if found.pace < 0.8 * FPS:
            say(console, f"{opponent} decided {found.pace:.0f} times per second, the game has {FPS}; an agent's mode=prior is faster")
        results.append(found.winner)
    score = Tally(*(results.count(outcome) for outcome in (1, 0, -1)))
    say(console, f"you {score.won}, {opponent} {score.lost}, drawn {score.drawn}")
    return 0


class Keyboard:
    """Which keys are down, from the window's events, and whether the person has had enough."""

    def __init__(self) -> None:
        import pygame

        self._pygame: Any = pygame
        self._down: set[int] = set()
        self.ended = False

    def read(self) -> None:
        """Take note of everything since the last time."""
        pygame = self._pygame
        for event in pygame.event.get():
            if event.type == pygame.KEYDOWN:
                self._down.add(event.key)
                self.ended |= event.key == pygame.K_ESCAPE
            elif event.type == pygame.KEYUP:
                self._down.discard(event.key)
            self.ended |= event.type == pygame.QUIT

    def action(self, seat: int, action_dim: int) -> list[float]:
        """Return what the keys mean, [4], or [3] where rackets do not catch, in the player's own view.

        Arrows point as on the screen, so from seat 2, whose view is turned by half a circle, they mean the opposite.
        """
        pygame, sign = self._pygame, 1.0 if seat == 1 else -1.0
        push_x, push_y = self._axis(pygame.K_LEFT, pygame.K_RIGHT), self._axis(pygame.K_DOWN, pygame.K_UP)
        shoot = float(pygame.K_SPACE in self._down)
        return [sign * push_x, sign * push_y, self._axis(pygame.K_w, pygame.K_s), shoot][:action_dim]

    def _axis(self, less: int, more: int) -> float:
        return float(more in self._down) - float(less in self._down)


class _Finished(NamedTuple):
    winner: int
    steps: int
    pace: float
    """Steps per second."""


class _Table:
    """A person in a seat, and a player opposite."""

    def __init__(self, env: Any, game: JointEnv, player: Player, seat: int, seed: int) -> None:
        self.env, self.game, self.player, self.seat, self.seed = env, game, player, seat, seed
        self.generator = NoiseStream(seed, "opponent").generator

    def play(self, number: int, keyboard: Keyboard, screen: Screen) -> _Finished | None:
        """Play a game; None where the person has ended it."""
        starter = self.seat if number % 2 == 0 else 3 - self.seat
        obs, _ = self.env.reset(seed=episode_seed(self.seed, 0, number), options={"seat": self.seat, "starter": starter})
        own, _ = self.game.seats
        width, carry, steps, began = own.obs_shape[0], self.player.init_carry(1, self.generator), 0, time.monotonic()
        while True:
            screen.draw(self.game.parallel.game.state)  # type: ignore[attr-defined]
            keyboard.read()
            if keyboard.ended:
                return None
            mine, view = torch.tensor([keyboard.action(self.seat, own.action_dim)]), torch.from_numpy(obs[None, width:])
            answer, carry = self.player.act(carry, view, self.generator)
            carry = self.player.watch(carry, view, mine)
            obs, _, terminated, truncated, info = self.env.step(torch.cat((mine, answer.to(mine)), 1)[0].numpy())
            steps += 1
            if terminated or truncated:
                screen.draw(self.game.parallel.game.state)  # type: ignore[attr-defined]
                return _Finished(int(info["success"]), steps, steps / (time.monotonic() - began))
