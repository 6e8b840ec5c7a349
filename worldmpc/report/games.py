"""Games of two in numbers: what a series was like, and evaluations by games as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worldmpc.opponents.games import GameResult, tally, wilson
from worldmpc.report.cells import escaped, percent
from worldmpc.report.runs import RunError
from worldmpc.report.statistics import Estimate, probability_of_improvement, stratified_bootstrap

GAMES = "worldmpc.games/1"
"""What the record of an evaluation by games says about itself."""
OUTCOMES = ("won", "drawn", "lost")


class _Series(NamedTuple):
    """The games of one trained agent against one opponent."""

    name: str
    opponent: str
    seed: int
    """That the agent was trained with."""
    counts: Mapping[str, Any]
    file: str


def series_record(results: Sequence[GameResult]) -> dict[str, Any]:
    """Return games won, drawn and lost with their 95 % intervals, the score, mean return and length, and the same by seat and starter."""
    values = {"seat": sorted({game.seat for game in results}), "starter": sorted({game.starter for game in results if game.starter})}
    return _counts(results) | {
        f"by_{name}": {str(value): _counts([game for game in results if getattr(game, name) == value]) for value in found}
        for name, found in values.items()
    }


def _counts(results: Sequence[GameResult]) -> dict[str, Any]:
    counted = tally(results)
    intervals = {name: list(wilson(count, counted.games)) for name, count in counted._asdict().items()}
    means = {
        "return_mean": sum(game.ret for game in results) / counted.games,
        "length_mean": sum(game.length for game in results) / counted.games,
    }
    return {"games": counted.games, **counted._asdict(), "score": counted.score, "intervals": intervals, **means}


def games_list(results: Sequence[GameResult]) -> list[dict[str, Any]]:
    """Return every game as plain data."""
    return [{"winner": g.winner, "return": g.ret, "length": g.length, "seat": g.seat, "starter": g.starter} for g in results]


def share(counts: Mapping[str, Any], name: str) -> str:
    """Return how often games were won, drawn or lost, with the interval: ``37 (74 %, 60..84)``."""
    low, high = counts["intervals"][name]
    return f"{counts[name]} ({percent(counts[name] / counts['games'])} %, {percent(low)}..{percent(high)})"


def games_table(words: str) -> str:
    """Return the markdown table of evaluations by games, one row per agent and opponent, and where there are several seeds their mean.

    words: files, ``*`` stands for many; with ``baseline=NAME`` other agents' scores are held against those of that one.

    Raises:
        RunError: no file named, one that is no such record, one seed of an agent twice, or no baseline.
    """
    patterns = [word for word in words.split() if not word.startswith("baseline=")]
    baseline = next((word.partition("=")[2] for word in words.split() if word.startswith("baseline=")), None)
    if not patterns:
        raise RunError("blocks of games name their records, as in <!-- games:begin results/hockey/*.json -->")
    found = [one for pattern in patterns for file in sorted(Path().glob(pattern)) for one in _read(file)]
    if not found:
        return f"No games in `{' '.join(patterns)}` yet."
    groups: dict[tuple[str, str], list[_Series]] = {}
    for one in found:
        groups.setdefault((one.name, one.opponent), []).append(one)
    for (name, opponent), group in groups.items():
        if len({one.seed for one in group}) < len(group):
            raise RunError(f"{', '.join(one.file for one in group)}: the same seed of {name} twice against {opponent}")
    several = any(len(group) > 1 for group in groups.values())
    lines = ["| agent | opponent | games | won, % | drawn, % | lost, % | data |", "|---|---|--:|--:|--:|--:|---|"]
    lines += ["| " + " | ".join(_cells(one, several)) + " |" for one in found]
    lines += ["| " + " | ".join(_mean_cells(group)) + " |" for group in groups.values() if len(group) > 1]
    text = "In brackets the 95 % interval (Wilson). From both seats and with both starters, where the game has them."
    text += " Rows in bold are means over seeds, with the lowest and the highest seed." * several
    return "\n".join([*lines, "", text, *([] if baseline is None else ["", *_against(groups, baseline)])])


def _read(file: Path) -> list[_Series]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["schema"] != GAMES:
            raise ValueError(record["schema"])
        name, seed = record["agent"] + ", policy alone" * (record["mode"] == "prior"), record["config"]["seed"]
        return [_Series(name, opponent, seed, counts, file.as_posix()) for opponent, counts in record["opponents"].items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: no record of games that worldmpc evaluate wrote ({error!r})") from error


def _cells(one: _Series, several: bool) -> list[str]:
    name = escaped(one.name) + f", seed {one.seed}" * several
    return [name, escaped(one.opponent), str(one.counts["games"]), *(_interval(one.counts, name) for name in OUTCOMES), f"`{one.file}`"]


def _interval(counts: Mapping[str, Any], outcome: str) -> str:
    low, high = counts["intervals"][outcome]
    return f"{percent(counts[outcome] / counts['games'])} ({percent(low)}..{percent(high)})"


def _mean_cells(group: Sequence[_Series]) -> list[str]:
    shares = {outcome: [100 * one.counts[outcome] / one.counts["games"] for one in group] for outcome in OUTCOMES}
    means = [f"**{np.mean(found):.0f}** ({min(found):.0f}..{max(found):.0f})" for found in shares.values()]
    games = sum(one.counts["games"] for one in group)
    return [f"**{escaped(group[0].name)}, {len(group)} seeds**", escaped(group[0].opponent), str(games), *means, ""]


def _against(groups: Mapping[tuple[str, str], Sequence[_Series]], baseline: str) -> list[str]:
    """Say of every other agent by how much it scores more than the baseline, over all opponents and seeds."""
    names = list(dict.fromkeys(name for name, _ in groups))
    if baseline not in names:
        raise RunError(f"baseline: no record of '{baseline}'; there are {', '.join(names)}")
    lines = []
    for name in names:
        met = [opponent for one, opponent in groups if one == name and (baseline, opponent) in groups]
        if name == baseline or not met:
            continue
        ours, theirs = ([np.array([one.counts["score"] for one in groups[who, opponent]]) for opponent in met] for who in (name, baseline))
        more = stratified_bootstrap(lambda x, y: float(np.mean([a.mean() - b.mean() for a, b in zip(x, y, strict=True)])), ours, theirs)
        better = stratified_bootstrap(probability_of_improvement, ours, theirs)
        lines.append(
            f"Score (a draw is half a win) of {name} less that of {baseline}, mean over {' and '.join(met)}: {_signed(more)}; "
            f"probability that a run of it scores more: {better.value:.2f} [{better.low:.2f}, {better.high:.2f}]. "
            "Intervals of 95 % by bootstrap over seeds within opponents."
        )
    return lines


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
