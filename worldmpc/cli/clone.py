"""``worldmpc clone``: train a decoy of an opponent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldmpc.cli.output import check_target, console_for, say
from worldmpc.cli.text import CLONE
from worldmpc.cli.words import listed, no_more_words, split_words
from worldmpc.config import ConfigError, EnvConfig
from worldmpc.envs import canonical_task, make_envs
from worldmpc.models.cloning import Clone
from worldmpc.opponents.loaders import load_player
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, set_threads
from worldmpc.training.cloning import check_decoy_target, save_decoy, train_clone, watch_games
from worldmpc.training.playing import SERIES, check_names
from worldmpc.training.restore import identity
from worldmpc.training.two_player import context_of


def clone(words: list[str]) -> int:
    """Watch games, train, write the decoy, and return the exit status."""
    options, rest = split_words(words, CLONE)
    no_more_words(rest, "clone", CLONE)
    for name, example in (("opponent", "strong"), ("out", "decoys/strong")):
        if options[name] is None:
            raise ConfigError(f"{name}: expected {name}=..., as in {name}={example}")
    hidden = _checked(options)
    opponent, against, out = options["opponent"], listed("against", options["against"]), Path(options["out"])
    check_names([opponent], "opponent")
    check_names(against, "against")
    task = canonical_task(options["task"])
    check_decoy_target(out)
    check_target(str(out.parent / f".{out.name}.try"), "out")
    keep_freed_memory()
    set_threads(options["threads"])
    console, games, seed = console_for(None), options["games"], options["seed"]
    with make_envs(task, EnvConfig(num_envs=min(SERIES, games)), seed=seed) as envs:
        if envs.spec.seats is None:
            raise ConfigError(f"task: {task} has one player; name a game of two, as task=hockey")
        own, seat = envs.spec.seats
        who = identity(opponent)
        player = load_player(opponent, context_of(task, seat))
        others = [load_player(name, context_of(task, own)) for name in against]
        say(console, f"{task}: {opponent} plays {games} games against each of {', '.join(against)}")
        data = watch_games(envs, player, others, games, seed)
    made = Clone(seat.obs_shape[0], seat.action_dim, hidden, discrete=seat.discrete, seed=seed)
    names = ("holdout", "epochs", "patience", "batch_size", "lr")
    result = train_clone(made, data, **{name: options[name] for name in names}, seed=seed)
    training = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "task": task,
        "opponent": opponent,
        "id": who,
        "against": against,
        "games": games,
        "seed": seed,
        "hyperparameters": {name: options[name] for name in names},
        "result": result._asdict(),
    }
    path = save_decoy(made, out, training)
    say(
        console,
        f"log-likelihood of {result.holdout_steps:,} held-out steps, nats per step: clone {result.log_likelihood:.3f}, "
        f"frequencies of actions alone {result.marginal:.3f} (clone on the {result.steps:,} steps learned from "
        f"{result.train_log_likelihood:.3f}; best of {result.epochs} passes: {result.best_epoch})",
    )
    say(console, f"wrote {path}; play against it as DECOYPOLICY:{path}")
    return 0


def _checked(options: dict[str, Any]) -> list[int]:
    """Check numbers, and return the widths of the hidden layers."""
    for name in ("games", "epochs", "patience", "batch_size"):
        if options[name] < 1:
            raise ConfigError(f"{name}: expected at least 1, got {options[name]}")
    if not 0 < options["holdout"] < 1:
        raise ConfigError(f"holdout: expected a share between 0 and 1, got {options['holdout']:g}")
    if not 0 < options["lr"] < 1:
        raise ConfigError(f"lr: expected a number between 0 and 1, got {options['lr']:g}")
    widths = listed("hidden", options["hidden"])
    if not all(width.isdecimal() and int(width) > 0 for width in widths):
        raise ConfigError(f"hidden: expected whole numbers above 0, as in hidden=[128,128], got '{options['hidden']}'")
    return [int(width) for width in widths]
