"""Pictures of laser hockey, by pygame."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from worldmpc.envs.hockey.rink import CENTER_X, CENTER_Y, HEIGHT, PUCK_RADIUS, RACKET, WALLS, WIDTH, RinkState

FPS = 50
SCALE = 60
"""Pixels per unit."""
SIZE = int(WIDTH * SCALE), int(HEIGHT * SCALE)
WHITE, BLACK, CIRCLE, GOALS = (255, 255, 255), (0, 0, 0), (204, 204, 204), (239, 203, 138)
RACKETS = (235, 98, 53), (93, 158, 199)


class Screen:
    """Draws states of a rink, 600 x 480 pixels, into a window or an array.

    Args:
        window: show them, at the game's pace; otherwise they are returned alone.
    """

    def __init__(self, window: bool) -> None:
        if not window:
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        import pygame

        self._pygame: Any = pygame
        self._surface = pygame.Surface(SIZE)
        self._window = self._clock = None
        if window:
            pygame.display.init()
            self._window, self._clock = pygame.display.set_mode(SIZE), pygame.time.Clock()
            pygame.display.set_caption("hockey")

    def draw(self, state: RinkState) -> np.ndarray | None:
        """Draw a state; return [480, 600, 3] uint8, or None where there is a window."""
        draw = self._pygame.draw
        self._surface.fill(WHITE)
        draw.circle(self._surface, CIRCLE, _pixel(0, 0), 100)
        for sign in (-1, 1):
            draw.circle(self._surface, GOALS, _pixel(sign * 250 / SCALE, 0), 75)
            draw.rect(self._surface, WHITE, (*_pixel(sign * (250 / SCALE + 2.0) - 2.0, 2.0), 4 * SCALE, 4 * SCALE))
        for corners in WALLS:
            self._shape(corners, BLACK)
        for (x, y, angle, *_), color, sign in zip((state.player1, state.player2), RACKETS, (1, -1), strict=True):
            cos, sin = math.cos(angle), math.sin(angle)
            self._shape(((x + sign * a * cos - b * sin, y + sign * a * sin + b * cos) for a, b in RACKET), color)
        draw.circle(self._surface, BLACK, _pixel(state.puck[0], state.puck[1]), PUCK_RADIUS * SCALE)
        if self._window is None or self._clock is None:
            return np.ascontiguousarray(self._pygame.surfarray.pixels3d(self._surface).transpose(1, 0, 2))
        self._pygame.event.pump()
        self._window.blit(self._surface, (0, 0))
        self._pygame.display.flip()
        self._clock.tick(FPS)
        return None

    def close(self) -> None:
        """Close the window."""
        if self._window is not None:
            self._pygame.display.quit()

    def _shape(self, corners: Iterable[tuple[float, float]], color: tuple[int, int, int]) -> None:
        self._pygame.draw.polygon(self._surface, color, [_pixel(x, y) for x, y in corners])


def _pixel(x: float, y: float) -> tuple[float, float]:
    """Where a place relative to the rink's centre is drawn: y points up."""
    return (x + CENTER_X) * SCALE, (CENTER_Y - y) * SCALE
