"""``worldmpc tournament``: everybody against everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from worldmpc.cli.output import check_target, console_for, say, write_json
from worldmpc.cli.text import TOURNAMENT
from worldmpc.cli.words import listed, no_more_words, split_words
from worldmpc.config import ConfigError
from worldmpc.envs import canonical_task, make_envs
from worldmpc.opponents.ratings import History, Ratings
from worldmpc.report.games import OUTCOMES, share
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.report.tournament import plot_tournament, tournament_record
from worldmpc.runtime import keep_freed_memory, set_threads
from worldmpc.training.folder import lock
from worldmpc.training.playing import Tournament, enter, entrants_of


def tournament(words: list[str]) -> int:
    """Play what is missing, print and write the table, and return the exit status."""
    options, rest = split_words(words, TOURNAMENT)
    no_more_words(rest, "tournament", TOURNAMENT)
    if options["players"] is None:
        raise ConfigError("players: expected at least two, as in players=[weak,strong,runs/a]")
    if options["games"] < 1:
        raise ConfigError(f"games: expected at least 1, got {options['games']}")
    task = canonical_task(options["task"])
    players = entrants_of(listed("players", options["players"]))
    Ratings()  # without what rates them there is no use in playing
    keep_freed_memory()
    set_threads(options["threads"])
    with make_envs(task) as envs:
        entrants = enter(players, envs.spec, options["mode"])
    out = Path(options["out"] or Path("results", task.replace("/", "-"), "tournament"))
    check_target(str(out / "tournament.json"), "out")
    console = console_for(None)
    with lock(out, "out"):
        games = Tournament(task, entrants, options["games"], options["seed"], History(out / "history.jsonl"), options["mode"])
        for number, pair in enumerate(games.pairs, 1):
            where = f"{number} of {len(games.pairs)}: {' against '.join(pair)}"
            if len(games.played[pair]) == options["games"]:
                say(console, f"{where}: played before")
            for done in games.play(pair):
                say(console, f"{where}: {done} of {options['games']} games")
        record = {
            **tournament_record(players, {one.label: one.id for one in entrants}, games.all_games(), options["seed"]),
            "command": command_line(),
            "commit": git_commit(),
            "machine": machine_info(),
            "threads": options["threads"],
            "task": task,
            "mode": options["mode"],
            "seed": options["seed"],
            "games": options["games"],
            "history": "history.jsonl",
        }
        _print(record, console)
        write_json(str(out / "tournament.json"), record)
        plot_tournament(record, out / "tournament.png")
    say(console, f"wrote tournament.json, tournament.png and history.jsonl to {out}")
    return 0


def _print(record: dict[str, Any], console: Console) -> None:
    ratings = Table(title=f"{record['task']}, {record['games']} games per pair")
    ratings.add_column("player")
    for name in ("rating", "mu", "sigma", *OUTCOMES, "score"):
        ratings.add_column(name, justify="right")
    for player in record["players"]:
        numbers = [f"{player[name]:.1f}" for name in ("rating", "mu", "sigma")]
        ratings.add_row(player["name"], *numbers, *(str(player[outcome]) for outcome in OUTCOMES), f"{100 * player['score']:.0f} %")
    console.print(ratings)
    pairs = Table(title="pairs, as their first player saw them: count (share, 95 % interval)")
    for name in ("player", "against"):
        pairs.add_column(name)
    for name in (*OUTCOMES, "mean length"):
        pairs.add_column(name, justify="right")
    for pair in record["pairs"]:
        pairs.add_row(*pair["players"], *(share(pair, outcome) for outcome in OUTCOMES), f"{pair['length_mean']:.0f}")
    console.print(pairs)
