"""Mazes for a point, with a reward at their end alone: what random exploration does not find. Pure numpy.

``maze/corridor`` is short enough to be found by chance now and then, ``maze/hook``, ``maze/u`` and ``maze/spiral`` are not.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from worldmpc.envs.wrappers import SuiteEnv, nearest_name

LAYOUTS: dict[str, tuple[str, ...]] = {
    "corridor": (
        "#######",
        "#S   G#",
        "#######",
    ),
    "hook": (
        "#######",
        "#S    #",
        "##### #",
        "#G    #",
        "#######",
    ),
    "u": (
        "#########",
        "#S      #",
        "####### #",
        "####### #",
        "####### #",
        "#G      #",
        "#########",
    ),
    "spiral": (
        "###########",
        "#S        #",
        "######### #",
        "#       # #",
        "# ##### # #",
        "# #G    # #",
        "# ####### #",
        "#         #",
        "###########",
    ),
}
"""Rows of cells: ``#`` wall, ``S`` start, ``G`` goal."""


class PointMaze(gymnasium.Env[Any, Any]):
    """A point is pushed through a maze and is paid 1 for every step that ends in the goal's cell.

    ``v' = 0.8 v + 0.05 a``, ``x' = x + v'`` in cells and cells per step, each axis apart; a wall stops it. Observed are both coordinates,
    scaled such that the maze is [-1, 1] along its longer side, and both velocities over 0.25, the most they can be. 200 steps; it begins
    at rest in the start's cell, up to 0.3 from its middle.

    Known answers: ``way`` has the cells to go through, and 204 less 4 for each of them bounds the return, up to a few steps. Of
    episodes of uniformly random actions about half come at most one cell far; the farthest of several hundred came seven cells far.
    """

    LENGTH = 200
    DRAG, PUSH = 0.8, 0.05
    SPEED = 0.25

    def __init__(self, layout: str = "u", *, length: int | None = LENGTH, render: bool = False) -> None:
        """Make a maze of :data:`LAYOUTS`; ``length`` None removes its time limit."""
        rows = LAYOUTS[layout]
        self.walls = np.array([[cell == "#" for cell in row] for row in rows])
        self.start, self.goal = (np.argwhere(np.array([list(row) for row in rows]) == cell)[0] for cell in "SG")
        self.observation_space = Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.render_mode = "rgb_array" if render else None
        self.step_limit = length
        self._position, self._velocity = self.start + 0.5, np.zeros(2)
        self._time = 0

    @property
    def way(self) -> list[tuple[int, int]]:
        """Cells of the shortest way, from the start's to the goal's."""
        first = int(self.start[0]), int(self.start[1])
        came: dict[tuple[int, int], tuple[int, int] | None] = {first: None}
        queue = [first]
        for row, column in queue:
            for near in ((row, column + 1), (row + 1, column), (row, column - 1), (row - 1, column)):
                if near not in came and not self.walls[near]:
                    came[near] = row, column
                    queue.append(near)
        cells: list[tuple[int, int]] = []
        cell: tuple[int, int] | None = (int(self.goal[0]), int(self.goal[1]))
        while cell is not None:
            cells.append(cell)
            cell = came[cell]
        return cells[::-1]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: [4], position and velocity."""
        super().reset(seed=seed)
        self._position, self._velocity = self.start + 0.5 + self.np_random.uniform(-0.3, 0.3, 2), np.zeros(2)
        self._time = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Push: [2] in [-1, 1] -> position and velocity [4], reward, terminated (never), truncated, info with ``success``."""
        self._velocity = self.DRAG * self._velocity + self.PUSH * np.clip(action, -1.0, 1.0)
        for axis in range(2):
            moved = self._position.copy()
            moved[axis] += self._velocity[axis]
            if self.walls[tuple(moved.astype(int))]:
                self._velocity[axis] = 0.0
            else:
                self._position = moved
        self._time += 1
        there = bool((self._position.astype(int) == self.goal).all())
        return self._observe(), float(there), False, self._time == self.step_limit, {"success": float(there)}

    def render(self) -> Any:
        """Return a frame [height, width, 3] uint8, 32 pixels per cell: walls grey, the goal green, the point red."""
        if self.render_mode is None:
            return None
        size = 32
        frame = np.full((*self.walls.shape, 3), 255, np.uint8)
        frame[self.walls] = 120
        frame[tuple(self.goal)] = (120, 200, 120)
        frame = frame.repeat(size, 0).repeat(size, 1)
        row, column = (self._position * size).astype(int)
        frame[max(row - 5, 0) : row + 6, max(column - 5, 0) : column + 6] = (200, 30, 30)
        return frame

    def _observe(self) -> np.ndarray:
        middle = np.array(self.walls.shape) / 2
        return np.concatenate(((self._position - middle) / middle.max(), self._velocity / self.SPEED)).astype(np.float32)


def list_names() -> list[str]:
    """Return the names of all tasks, without the suite's prefix."""
    return list(LAYOUTS)


def resolve(name: str) -> str:
    """Return the canonical form of a name, both without the suite's prefix.

    Raises:
        ConfigError: no such task.
    """
    return nearest_name(name, name.lower(), "maze", LAYOUTS)


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment of a canonical name; ``unlimited`` lifts its time limit."""
    env = PointMaze(name, length=None if unlimited else PointMaze.LENGTH, render=render)
    return SuiteEnv(env, f"maze/{name}", env.step_limit, can_terminate=False)
