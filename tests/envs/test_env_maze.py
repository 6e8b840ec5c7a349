"""Mazes: walls, what is paid, and how far chance gets."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from worldmpc.config import ConfigError
from worldmpc.envs import canonical_task, list_tasks, make_envs
from worldmpc.envs.maze import LAYOUTS, PointMaze


def towards(maze: PointMaze, cell: tuple[int, int]) -> np.ndarray:
    wanted = np.clip((np.array(cell) + 0.5 - maze._position), -maze.SPEED, maze.SPEED)
    return np.clip((wanted - maze.DRAG * maze._velocity) / maze.PUSH, -1, 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_way_leads_to_the_goal_and_is_paid_there(name: str) -> None:
    maze = PointMaze(name)
    check_env(maze, skip_render_check=True)
    maze.reset(seed=1)
    cells, total, index = maze.way, 0.0, 0
    best = 200 - 4 * (len(cells) - 1)
    assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in zip(cells, cells[1:], strict=False))
    for time in range(1, 201):
        if np.abs(maze._position - (np.array(cells[index]) + 0.5)).max() < 0.4 and index + 1 < len(cells):
            index += 1
        _, reward, terminated, truncated, info = maze.step(towards(maze, cells[index]))
        total += reward
        assert not terminated and truncated == (time == 200) and info["success"] == reward
    assert best - 20 <= total <= best + 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_nobody_gets_into_a_wall(name: str) -> None:
    maze, generator = PointMaze(name), np.random.default_rng(0)
    for seed in range(5):
        maze.reset(seed=seed)
        held = generator.uniform(-1, 1, 2)
        for time in range(200):
            if time % 7 == 0:
                held = generator.choice([-1.0, 1.0], 2)
            obs, *_ = maze.step(held)
            assert not maze.walls[tuple(maze._position.astype(int))] and np.abs(obs).max() <= 1


def test_a_push_is_worth_five_and_walls_stop() -> None:
    maze = PointMaze("hook")
    maze.reset(seed=1)
    maze._position = np.array([1.5, 2.5])
    maze.step(np.array([0.0, 1.0]))
    for _ in range(60):
        obs, *_ = maze.step(np.zeros(2))
    assert maze._position == pytest.approx([1.5, 2.5 + 0.05 / (1 - 0.8)], abs=1e-4) and obs[2:] == pytest.approx([0, 0], abs=1e-4)
    for _ in range(60):
        obs, *_ = maze.step(np.array([-1.0, -1.0]))
    assert maze._position[0] < 1.25 and maze._position[1] < 1.25 and (np.abs(obs[2:]) <= 0.2 + 1e-6).all()


def test_chance_does_not_find_the_far_goals() -> None:
    for name in ("hook", "u", "spiral"):
        with make_envs(f"maze/{name}", None, seed=1) as envs:
            envs.reset()
            generator = torch.Generator().manual_seed(0)
            rewards = [envs.step(torch.rand(1, 2, generator=generator) * 2 - 1).reward for _ in range(4000)]
        assert torch.stack(rewards).sum() == 0


def test_frames_show_walls_goal_and_point() -> None:
    maze = PointMaze("u", render=True)
    maze.reset(seed=1)
    frame = maze.render()
    assert frame.shape == (7 * 32, 9 * 32, 3) and frame.dtype == np.uint8
    assert (frame == (200, 30, 30)).all(-1).sum() == 121 and (frame == (120, 200, 120)).all(-1).sum() == 1024
    assert PointMaze("u").render() is None
    assert isinstance(maze, gymnasium.Env)


def test_names() -> None:
    assert list_tasks("maze") == [f"maze/{name}" for name in LAYOUTS] and canonical_task("maze/U") == "maze/u"
    with pytest.raises(ConfigError, match="did you mean maze/spiral"):
        canonical_task("maze/spirl")
