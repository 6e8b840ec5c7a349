"""Scripted opponents of laser hockey: weak and strong."""

from __future__ import annotations

import math

import numpy as np

GAIN = {"weak": 0.5, "strong": 10.0}
"""How hard each of them corrects where it is."""


class ScriptedBot:
    """Meets a puck that comes, waits behind otherwise, and swings its racket all the time.

    Where its racket points follows a phase that no observation shows. It begins at random and goes on by random steps.

    Args:
        kind: weak or strong.
        rng: its random numbers.
        keep_mode: rackets catch the puck; it then has a fourth action, to shoot.
    """

    def __init__(self, kind: str, rng: np.random.Generator, keep_mode: bool = True) -> None:
        if kind not in GAIN:
            raise ValueError(f"scripted opponent: expected one of {', '.join(GAIN)}, got {kind!r}")
        self.kind, self.keep_mode, self._rng = kind, keep_mode, rng
        self.phase = rng.uniform(0, math.pi)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Choose: own view [18] -> [4], or [16] -> [3] without keep mode."""
        self.phase += 0.2 * self._rng.random()
        return self.aim(obs, self.phase)

    def aim(self, obs: np.ndarray, phase: float) -> np.ndarray:
        """What it does at a phase: [18] -> [4], or [16] -> [3]."""
        x, y, angle, vx, vy, spin, *_, puck_x, puck_y, puck_vx, puck_vy = (seen := obs.tolist())[:16]
        target_x, target_y = -3.5, 0.0
        if puck_vx < 0.5:
            target_y = puck_y
            if x < puck_x and abs(y - puck_y) < 0.5:
                distance = math.hypot(x - puck_x, y - puck_y)
                target_x, target_y = puck_x + 0.2, puck_y + 0.1 * puck_vy * distance
        gain, turn = GAIN[self.kind], math.pi / 3 * math.sin(phase) - angle
        action = [
            _steered((target_x - x) * gain, target_x - x, vx, 0.1),
            _steered((target_y - y) * gain * 0.2, target_y - y, vy, 0.1),
            _steered(turn * gain * 0.5, turn, spin, 1.0),
        ]
        if self.keep_mode:
            action.append(1.0 if 0 < seen[16] < 7 else 0.0)
        return np.array(action)


def _steered(push: float, error: float, speed: float, near: float) -> float:
    """Return a push in [-1, 1] that brakes where the error is gone in less than ``near`` seconds."""
    if abs(error / (speed + 0.01)) < near:
        push -= 0.5 * speed
    return push if -1.0 <= push <= 1.0 else math.copysign(1.0, push)
