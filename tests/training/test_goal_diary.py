"""What an agent with goals wants, kept while it plays."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from worldmpc.agents import make_agent
from worldmpc.config import make_config
from worldmpc.envs import make_envs
from worldmpc.report.goals import GOALS, load_goals
from worldmpc.report.video import CAPTION
from worldmpc.training.evaluator import evaluate
from worldmpc.training.goal_diary import GoalDiary
from worldmpc.training.run import run

SMALL = {"manager.goal_interval": 4, "goal_vae.n_latents": 3, "goal_vae.n_classes": 4, "env.episode_length": 10}


def test_an_episode_is_noted_and_goals_stand_beside_its_frames():
    config = make_config("debug", agent="director", task="toy/pointmass", **SMALL)
    with make_envs(config.task, dataclasses.replace(config.env, num_envs=2), seed=3, render=True) as envs:
        agent = make_agent(config, envs.spec)
        diary, seen = GoalDiary(agent), []

        def watch(obs, output, step):
            diary.note(obs, output, step)
            seen.append((obs[0], output.carry.goal[0], step.next_obs[0]))

        result = evaluate(agent, envs, 4, record=True, watch=watch)
    seen = seen[:10]
    latents, goals, reached = (torch.stack(part) for part in zip(*seen, strict=True))
    latents, reached = agent.flat.model.encode(latents), agent.flat.model.encode(reached)
    torch.testing.assert_close(torch.tensor([step.similarity for step in diary.steps]), agent.hierarchy.similarity(reached, goals))
    assert len(diary.steps) == len(result.frames) == 10
    assert [step.begins for step in diary.steps] == [index % 4 == 0 for index in range(10)]
    assert all(0 < step.similarity <= 1 for step in diary.steps) and sum(step.reward for step in diary.steps) == result.returns[0]
    frames = diary.beside(result.frames)
    height, width, _ = result.frames[0].shape
    assert frames[0].shape == (height + CAPTION, 2 * width, 3)
    assert all(np.array_equal(a[CAPTION:, :width], b) for a, b in zip(frames, result.frames, strict=True))
    for frame, goal in zip(frames, goals, strict=True):
        nearest = result.frames[int(agent.hierarchy.similarity(latents, goal.expand_as(latents)).argmax())]
        assert np.array_equal(frame[CAPTION:, width:], nearest)
    assert np.array_equal(frames[0][:, width:], frames[3][:, width:])  # the same goal


def test_a_run_draws_its_goals(tmp_path):
    quiet = {"log.progress": "none", "log.tensorboard": False, "steps": 80, "eval_freq": 40, "run_dir": str(tmp_path / "run")}
    heads = {"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9]}
    folder = run(make_config("debug", agent="director", task="toy/pointmass", **SMALL, **heads, **quiet)).run_dir
    assert (folder / "snapshots.jsonl").exists()  # as TD-MPC2 leaves them
    assert len(load_goals(folder / GOALS)) == 10 and (folder / "goals.png").exists() and (folder / "final.mp4").exists()
    assert not (run(make_config("debug", task="toy/pointmass", **{**quiet, "run_dir": str(tmp_path / "flat")})).run_dir / GOALS).exists()
