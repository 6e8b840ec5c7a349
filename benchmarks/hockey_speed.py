"""How fast laser hockey is on one core: ``python -m benchmarks.hockey_speed RECORD [STEPS REPETITIONS]``.

Every face plays the same random actions, games begun anew where they end, which is part of the time. ``engine`` is the limit: Box2D
alone in the same world, begun anew as often, rackets pushed by the same numbers, nothing read and no rule applied. ``bots`` is the strong
bot against the weak one. Of each the best repetition counts, by CPU time (``process_time``) and by the clock, which differ where other
processes want the core.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from worldmpc.envs.hockey.bots import ScriptedBot
from worldmpc.envs.hockey.env import HockeyEnv, HockeyParallelEnv
from worldmpc.envs.hockey.game import Game
from worldmpc.envs.hockey.rink import DRIVE_DAMPING, DT, POSITION_ITERATIONS, PUSH, TURN, VELOCITY_ITERATIONS
from worldmpc.envs.two_player import JointEnv
from worldmpc.report.provenance import command_line, git_commit, machine_info

SCHEMA = "worldmpc.hockey_speed/1"
STILL = np.zeros(4, np.float32)
ENGINE_GAME = 220
"""Steps after which the engine's world is begun anew: about what random games last."""


def main() -> None:
    """Measure and write."""
    record = sys.argv[1]
    steps, repetitions = (int(value) for value in (sys.argv[2:] or ("20000", "7")))
    warnings.simplefilter("ignore", DeprecationWarning)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 2, 4)).astype(np.float32)
    faces: dict[str, Callable[[], int]] = {
        "engine": partial(play_engine, actions),
        "game": partial(play_game, actions),
        "gymnasium, still opponent": partial(play_gymnasium, actions, lambda obs: STILL),
        "gymnasium, weak": partial(play_gymnasium, actions, "weak"),
        "gymnasium, strong": partial(play_gymnasium, actions, "strong"),
        "pettingzoo": partial(play_pettingzoo, actions),
        "joint, for training": partial(play_joint, actions),
        "bots": partial(play_bots, steps),
    }
    load = os.getloadavg()[0]
    rows = [measure(face, function, steps, repetitions) for face, function in faces.items()]
    made = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }
    Path(record).write_text(json.dumps({"schema": SCHEMA, **made, "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['face']:28} {row['steps_per_cpu_s']:10,.0f} per CPU second {row['steps_per_s']:10,.0f} per second {row['games']:5} games"
        )


def measure(face: str, function: Callable[[], int], steps: int, repetitions: int) -> dict[str, Any]:
    """Return the best speeds of a function that takes so many steps and returns how many games it played."""
    cpu, wall, games = [], [], 0
    for _ in range(repetitions):
        cpu_began, began = time.process_time(), time.perf_counter()
        games = function()
        cpu.append(time.process_time() - cpu_began)
        wall.append(time.perf_counter() - began)
    speeds = {"steps_per_cpu_s": steps / min(cpu), "steps_per_s": steps / min(wall)}
    return {"face": face, "steps": steps, "games": games, "repetitions": repetitions, **speeds}


def play_engine(actions: np.ndarray) -> int:
    """Step the engine, pushed by actions [N, 2, 4]."""
    game, rng, begun = Game(), np.random.default_rng(1), 0
    for number, (one, two) in enumerate(actions.tolist()):
        if number % ENGINE_GAME == 0:
            game.reset(rng)
            begun += 1
            (left, right), step = game.rink.players, game.rink._world.Step
            left.linearDamping = right.linearDamping = DRIVE_DAMPING
        left.ApplyForceToCenter((one[0] * PUSH, one[1] * PUSH), True)
        left.ApplyTorque(one[2] * TURN, True)
        right.ApplyForceToCenter((two[0] * PUSH, two[1] * PUSH), True)
        right.ApplyTorque(two[2] * TURN, True)
        step(DT, VELOCITY_ITERATIONS, POSITION_ITERATIONS)
    return begun


def play_game(actions: np.ndarray) -> int:
    """Play by the rules, both views seen: actions [N, 2, 4]."""
    game, rng, ended = Game(), np.random.default_rng(1), 0
    game.reset(rng)
    for one, two in actions.tolist():
        step = game.step(one, two)
        game.observe()
        if step.goal or step.timeout:
            game.reset(rng)
            ended += 1
    return ended


def play_gymnasium(actions: np.ndarray, opponent: Any) -> int:
    """Play against an opponent of the environment's: of actions [N, 2, 4] the first player's."""
    env, ended = HockeyEnv(opponent), 0
    env.reset(seed=1)
    for action in actions[:, 0]:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
            ended += 1
    return ended


def play_pettingzoo(actions: np.ndarray) -> int:
    """Play for both: actions [N, 2, 4]."""
    env, ended = HockeyParallelEnv(), 0
    env.reset(seed=1)
    for one, two in actions:
        env.step({"player_1": one, "player_2": two})
        if not env.agents:
            env.reset()
            ended += 1
    return ended


def play_joint(actions: np.ndarray) -> int:
    """Play for both in the environment of both that training steps: actions [N, 2, 4]."""
    env, ended = JointEnv(HockeyParallelEnv()), 0
    env.reset(seed=1)
    for action in actions.reshape(len(actions), -1):
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
            ended += 1
    return ended


def play_bots(steps: int) -> int:
    """Let the strong bot play the weak one."""
    game, rng, ended = Game(), np.random.default_rng(1), 0
    one, two = ScriptedBot("strong", rng), ScriptedBot("weak", rng)
    game.reset(rng)
    for _ in range(steps):
        views = game.observe()
        step = game.step(one.act(views[0]).tolist(), two.act(views[1]).tolist())
        if step.goal or step.timeout:
            game.reset(rng)
            ended += 1
    return ended


if __name__ == "__main__":
    main()
