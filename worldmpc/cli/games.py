"""Games of two as tables on the console, and as the records of ``worldmpc evaluate``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from worldmpc.config import RunConfig
from worldmpc.opponents.games import GameResult
from worldmpc.report.games import GAMES, OUTCOMES, games_list, series_record, share
from worldmpc.training.evaluator import EvalResult

_SEATS = {1: "in seat 1", 2: "in seat 2"}
_STARTERS = {1: "beginning", 2: "opponent begins"}


def print_games(result: EvalResult, console: Console) -> None:
    """Print games won, drawn and lost against each opponent, with 95 % intervals, also by seat and by who has begun."""
    table = Table(title=f"{len(result.returns)} games: count (share, 95 % interval)")
    table.add_column("opponent")
    for name in ("", "games", *OUTCOMES, "mean return"):
        table.add_column(name, justify="left" if name == "" else "right")
    for name, games in result.games.items():
        table.add_section()
        table.add_row(name, "all", *_cells(games))
        for key, words in (("seat", _SEATS), ("starter", _STARTERS)):
            parts = {value: [game for game in games if getattr(game, key) == value] for value in words}
            if all(parts.values()):
                for value, own in parts.items():
                    table.add_row("", words[value], *_cells(own))
    console.print(table)


def _cells(games: list[GameResult]) -> list[str]:
    counts = series_record(games)
    return [str(counts["games"]), *(share(counts, outcome) for outcome in OUTCOMES), f"{counts['return_mean']:.2f}"]


def games_record(result: EvalResult, config: RunConfig) -> dict[str, Any]:
    """Return what an evaluation by games adds to the record of one by episodes: results and games by opponent."""
    return {
        "schema": GAMES,
        "agent": config.label or config.agent,
        "opponents": {name: {**series_record(games), "list": games_list(games)} for name, games in result.games.items()},
    }
