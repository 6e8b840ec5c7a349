"""Series of games, and records of them."""

from __future__ import annotations

import json
from pathlib import Path

from worldmpc.opponents.games import GameResult
from worldmpc.report.games import GAMES, series_record


def results(won: int, drawn: int, lost: int) -> list[GameResult]:
    winners = [1] * won + [0] * drawn + [-1] * lost
    return [GameResult(winner, 10.0 * winner, 100, 1 + n % 2, 1 + n // 2 % 2) for n, winner in enumerate(winners)]


def write_games(file: str, agent: str, mode: str, *series: tuple[str, tuple[int, int, int]], seed: int = 1) -> None:
    opponents = {name: series_record(results(*counts)) for name, counts in series}
    Path(file).write_text(json.dumps({"schema": GAMES, "agent": agent, "mode": mode, "config": {"seed": seed}, "opponents": opponents}))
