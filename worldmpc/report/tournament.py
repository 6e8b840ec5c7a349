"""Tournaments as records, tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from worldmpc.files import written_aside
from worldmpc.opponents.games import GameResult, Tally, tally
from worldmpc.opponents.ratings import MU, ORDERS, SIGMA, PlayedGame, rate_history
from worldmpc.report.cells import escaped, percent
from worldmpc.report.curves import DPI, PALETTE
from worldmpc.report.games import OUTCOMES, series_record
from worldmpc.report.records import named_table
from worldmpc.report.runs import RunError

TOURNAMENT = "worldmpc.tournament/1"
"""What the record of a tournament says about itself."""
_COLORS = LinearSegmentedColormap.from_list("score", (PALETTE[1], "#FFFFFF", PALETTE[0]))
_GREY = "#B0B0B0"
_LONGEST = 24
"""Characters of a name that a picture has room for; of a longer one the end is shown, which tells paths apart."""

_WIDEST = 10
"""Characters of a name that stands level above a column."""


def tournament_record(sources: Mapping[str, str], ids: Mapping[str, str], games: Sequence[PlayedGame], seed: int) -> dict[str, Any]:
    """Return ratings, standings and pairs of a tournament as plain data, players best first.

    Args:
        sources: label -> what the player was loaded from.
        ids: label -> what it is known by wherever it lies.
        games: all of them.
        seed: of the order in which ratings see them.
    """
    ratings = rate_history(games, seed)
    pairs: dict[tuple[str, str], list[GameResult]] = {}
    for game in games:
        pairs.setdefault(game.players, []).append(game.result)
    players = []
    for name, rating in ratings.items():
        own = [tally(results) if name == pair[0] else _turned(tally(results)) for pair, results in pairs.items() if name in pair]
        total = Tally(*(sum(part) for part in zip(*own, strict=True)))
        standing = {"games": total.games, **total._asdict(), "score": total.score}
        believed = {"mu": rating.mu, "sigma": rating.sigma, "rating": rating.shown}
        players.append({"name": name, "source": sources[name], "id": ids[name], **believed, **standing})
    return {
        "schema": TOURNAMENT,
        "rated_by": {"model": "openskill BradleyTerryFull", "mu": MU, "sigma": SIGMA, "beta": SIGMA / 2, "tau": 0.0, "orders": ORDERS},
        "players": players,
        "pairs": [{"players": list(pair), **series_record(results)} for pair, results in pairs.items()],
    }


def tournament_table(words: str) -> str:
    """Return the markdown table of a tournament's record: ratings, standings, and the score against everybody.

    Raises:
        RunError: not one file, or one that is no such record.
    """
    return named_table(words, TOURNAMENT, "worldmpc tournament", _tournament)


def _tournament(record: dict[str, Any]) -> str:
    players, scores = record["players"], _scores(record)
    names = [player["name"] for player in players]
    header = ["player", "rating", "mu ± sigma", "won", "drawn", "lost", "score", *(f"against {escaped(name)}" for name in names)]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    for player in players:
        name, own = player["name"], [f"{player['mu']:.1f} ± {player['sigma']:.1f}", *(str(player[outcome]) for outcome in OUTCOMES)]
        against = ["" if other == name else f"{percent(scores[name, other].score)} %" for other in names]
        cells = [escaped(name), f"**{player['rating']:.1f}**", *own, f"{percent(player['score'])} %", *against]
        lines.append("| " + " | ".join(cells) + " |")
    text = (
        f"{record['task']}, {record['games']} games per pair, from both seats and with both starters. Score: a win is a point, a "
        "draw half of one. Rating: mu - 3 sigma."
    )
    return "\n".join([*lines, "", text])


def plot_tournament(record: Mapping[str, Any], path: str | Path) -> Figure:
    """Draw a tournament into an image, of the kind that the file's name says, and return the figure.

    On the left every player's score against every other with games won, drawn and lost, best player first; on the right ratings: mu
    with one sigma, and mu - 3 sigma as a mark.

    Raises:
        RunError: an image of a kind that cannot be written.
    """
    path = Path(path)
    kind, kinds = path.suffix[1:].lower() or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in kinds:
        raise RunError(f"{path.name}: no image of the kind .{kind} can be written; use one of {', '.join(sorted(kinds))}")
    count = len(record["players"])
    names = [_short(player["name"]) for player in record["players"]]
    side = 1.15 * count
    figure = Figure(figsize=(side + 6.2, 0.8 * count + 2.0), dpi=DPI, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(side, 3.6))
    _draw_scores(left, record, names)
    _draw_ratings(right, record, names)
    figure.suptitle(
        f"{record['task']}: {record['games']} games per pair, both seats, both starters", x=0.012, ha="left", fontsize=13, fontweight="bold"
    )
    with written_aside(path) as partial:
        figure.savefig(partial, format=kind)
    return figure


def _draw_scores(axes: Axes, record: Mapping[str, Any], names: Sequence[str]) -> None:
    scores, players = _scores(record), [player["name"] for player in record["players"]]
    table = [[0.5 if one == two else scores[one, two].score for two in players] for one in players]
    axes.imshow(table, cmap=_COLORS, vmin=0, vmax=1, alpha=0.65, aspect="auto")
    for row, one in enumerate(players):
        for column, two in enumerate(players):
            if one == two:
                continue
            counted = scores[one, two]
            axes.text(column, row - 0.12, f"{percent(counted.score)} %", ha="center", va="center", fontsize=10.5, fontweight="bold")
            axes.text(column, row + 0.22, "/".join(map(str, counted)), ha="center", va="center", fontsize=8, color="#4D4D4D")
    slanted = max(map(len, names)) > _WIDEST
    axes.set_xticks(range(len(names)), names, rotation=25 * slanted, ha="left" if slanted else "center", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.tick_top()
    axes.tick_params(labelsize=9.5, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("score of the row's player: a draw is half a win; below it games won/drawn/lost", fontsize=9)


def _draw_ratings(axes: Axes, record: Mapping[str, Any], names: Sequence[str]) -> None:
    players, places = record["players"], range(len(names))
    axes.errorbar(
        [player["mu"] for player in players],
        places,
        xerr=[player["sigma"] for player in players],
        fmt="o",
        color=PALETTE[0],
        ecolor=PALETTE[0],
        elinewidth=2.2,
        capsize=4,
        markersize=6,
        label="mu, one sigma",
    )
    axes.plot([player["rating"] for player in players], places, "D", color=PALETTE[1], markersize=5, label="rating: mu - 3 sigma")
    for place, player in zip(places, players, strict=True):
        axes.annotate(
            f"{player['rating']:.1f}", (player["rating"], place), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9
        )
    axes.set_yticks(places, [])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("rating", fontsize=9)
    axes.tick_params(labelsize=9.5, color=_GREY, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9, frameon=False, handlelength=1.5)


def _scores(record: Mapping[str, Any]) -> dict[tuple[str, str], Tally]:
    """Return what each player has reached against each other."""
    found: dict[tuple[str, str], Tally] = {}
    for pair in record["pairs"]:
        one, two = pair["players"]
        found[one, two] = Tally(*(int(pair[outcome]) for outcome in OUTCOMES))
        found[two, one] = _turned(found[one, two])
    return found


def _turned(counted: Tally) -> Tally:
    return Tally(counted.lost, counted.drawn, counted.won)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else "..." + re.sub(r"^[^/]*/", "", name[3 - _LONGEST :])
