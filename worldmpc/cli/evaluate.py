"""``worldmpc evaluate``: play episodes with a trained agent, of games of two against opponents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from worldmpc.cli.games import games_record, print_games
from worldmpc.cli.output import check_target, console_for, say, write_json
from worldmpc.cli.text import EVALUATE
from worldmpc.cli.words import expand_names, listed, override_values, split_words
from worldmpc.config import ConfigError, RunConfig, nest, network_width, plans
from worldmpc.envs import canonical_task
from worldmpc.noise import derive_seed
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import check_modes, keep_compiled_code, keep_freed_memory, set_threads, suggested_threads
from worldmpc.training.evaluator import MAX_ENVS, EvalResult, evaluation_envs
from worldmpc.training.evaluator import evaluate as play
from worldmpc.training.playing import play_against, playing_against
from worldmpc.training.restore import find_checkpoint, load_agent, trusted_task
from worldmpc.training.run import record_video
from worldmpc.types import Agent

ALLOWED = ("planner.", "env.", "compile")
"""Configuration keys that do not change what was trained."""


def evaluate(words: list[str]) -> int:
    """Play episodes, print a table, and return the exit status."""
    options, rest = split_words(words, EVALUATE)
    if options["checkpoint"] is None and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        options["checkpoint"] = rest.pop(0)
    for word in rest:
        if "=" in word and not expand_names([word])[0].startswith(ALLOWED):
            raise ConfigError(f"{word}: evaluate takes {', '.join(EVALUATE)}, compile, and the keys of planner and env")
    changes = nest(override_values(rest))
    if options["checkpoint"] is None:
        raise ConfigError("checkpoint: expected checkpoint=PATH, a run folder, a checkpoint folder or a published .pt file")
    if options["episodes"] < 1:
        raise ConfigError(f"episodes: expected at least 1, got {options['episodes']}")
    opponents = None if options["opponents"] is None else listed("opponents", options["opponents"])
    check_target(options["json"])
    check_target(options["video"], "video")
    keep_freed_memory()
    console = console_for(options["json"])
    path = find_checkpoint(options["checkpoint"])
    task = None if options["task"] is None else canonical_task(options["task"])
    agent, config = load_agent(path, task, device=options["device"], seed=options["seed"], overrides=changes)
    if task is None and agent.spec.name != config.task:
        raise ConfigError(
            f"task: {path} was trained on the environment object {agent.spec.name}; name a task that makes it: task=suite/name"
        )
    if task is None:
        trusted_task(config.task, path)
    if opponents is not None:
        config = playing_against(config, opponents)
    check_modes(config, str(agent.device))
    if config.compile:
        keep_compiled_code()
    set_threads(options["threads"] or suggested_threads(network_width(config)))
    mode = options["mode"]
    how = "policy prior alone" if mode == "prior" else f"{config.agent}, planning" if plans(config) else config.agent
    say(console, f"{config.task}: {how}, {path}, device {agent.device}")
    most = changes.get("env", {}).get("num_envs", MAX_ENVS)
    with evaluation_envs(config.task, config.env, options["episodes"], seed=config.seed, at_most=most) as envs:
        if envs.spec.seats is not None:
            result = play_against(agent, envs, options["episodes"], opponents, mode=mode)
        elif opponents is not None:
            raise ConfigError(f"opponents: {config.task} has one player; leave them out, or name a game of two, as task=hockey")
        else:
            result = play(agent, envs, options["episodes"], mode=mode)
    (print_games if result.games else _print)(result, console)
    games = games_record(result, config) if result.games else {}
    write_json(options["json"], _record(result, path, config, agent, mode) | games)
    if options["video"]:
        seed = derive_seed(config.seed, "video") % 2**31
        video_return = record_video(Path(options["video"]), config.task, config, agent, mode=mode, seed=seed)
        say(console, f"{options['video']}: one episode, return {video_return:.1f}")
    return 0


def _print(result: EvalResult, console: Console) -> None:
    episodes = Table(title=f"{len(result.returns)} episodes")
    for name in ("episode", "return", "decisions", "success"):
        episodes.add_column(name, justify="right")
    for index, (value, length, success) in enumerate(zip(result.returns, result.lengths, result.success, strict=True), start=1):
        episodes.add_row(str(index), f"{value:.2f}", str(length), "-" if np.isnan(success) else f"{success:g}")
    summary = _summary(result)
    success = summary["success"]
    episodes.add_section()
    for name in ("mean", "std", "min", "max"):
        first = name == "mean"
        length = f"{summary['length_mean']:.1f}" if first else ""
        rate = "" if not first else "-" if success is None else f"{success:.2f}"
        episodes.add_row(name, f"{summary[f'return_{name}']:.2f}", length, rate)
    console.print(episodes)


def _summary(result: EvalResult) -> dict[str, float | None]:
    success = float(np.mean(result.success))
    return {
        "return_mean": result.mean_return,
        "return_std": float(np.std(result.returns)),
        "return_min": min(result.returns),
        "return_max": max(result.returns),
        "length_mean": float(np.mean(result.lengths)),
        "success": None if np.isnan(success) else success,
    }


def _record(result: EvalResult, path: Path, config: RunConfig, agent: Agent, mode: str) -> dict[str, Any]:
    return {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "checkpoint": str(path),
        "task": config.task,
        "mode": mode,
        "seed": config.seed,
        "device": str(agent.device),
        "episodes": len(result.returns),
        **_summary(result),
        "returns": result.returns,
        "lengths": result.lengths,
        "successes": [None if np.isnan(value) else value for value in result.success],
        "config": config.to_dict(),
    }
