"""Tournaments and evaluations by games: records, tables inside pages, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worldmpc.opponents.games import GameResult, wilson
from worldmpc.opponents.ratings import PlayedGame
from worldmpc.report import tables
from worldmpc.report.runs import RunError
from worldmpc.report.tournament import (
    GAMES,
    games_list,
    games_table,
    plot_tournament,
    series_record,
    share,
    tournament_record,
    tournament_table,
)

OUTCOMES = {("a", "b"): (6, 3, 1), ("a", "c|d"): (8, 2, 0), ("b", "c|d"): (5, 5, 0)}


def results(won: int, drawn: int, lost: int) -> list[GameResult]:
    winners = [1] * won + [0] * drawn + [-1] * lost
    return [GameResult(winner, 10.0 * winner, 100, 1 + n % 2, 1 + n // 2 % 2) for n, winner in enumerate(winners)]


def record() -> dict[str, Any]:
    games = [PlayedGame(pair, result, 1, n) for pair, counts in OUTCOMES.items() for n, result in enumerate(results(*counts))]
    sources = {"a": "SAC:runs/a", "b": "weak", "c|d": "still"}
    machine = {"cpu": "Test CPU", "cores": 2}
    facts = {"task": "hockey/self-play", "games": 10, "command": "worldmpc tournament", "machine": machine, "threads": 1}
    return {**tournament_record(sources, {name: f"id of {name}" for name in sources}, games, 1), **facts}


def test_a_series_in_numbers():
    made = series_record(results(5, 2, 3))
    assert (made["games"], made["won"], made["drawn"], made["lost"], made["score"]) == (10, 5, 2, 3, 0.6)
    assert made["return_mean"] == pytest.approx(2.0) and made["intervals"]["won"] == list(wilson(5, 10))
    assert {seat: (own["won"], own["drawn"], own["lost"]) for seat, own in made["by_seat"].items()} == {"1": (3, 1, 1), "2": (2, 1, 2)}
    assert sum(own["won"] for own in made["by_starter"].values()) == 5 and made["by_starter"]["1"]["games"] == 6
    assert share(made, "won") == "5 (50 %, 24..76)"
    unknown = series_record([result._replace(starter=None) for result in results(1, 0, 0)])
    assert unknown["by_starter"] == {} and list(unknown["by_seat"]) == ["1"]
    assert games_list(results(0, 0, 1)) == [{"winner": -1, "return": -10.0, "length": 100, "seat": 1, "starter": 1}]


def test_a_tournament_in_numbers():
    made = record()
    assert [player["name"] for player in made["players"]] == ["a", "b", "c|d"]  # best first
    standings = {player["name"]: (player["won"], player["drawn"], player["lost"]) for player in made["players"]}
    assert standings == {"a": (14, 5, 1), "b": (6, 8, 6), "c|d": (0, 7, 13)}
    for player in made["players"]:
        assert player["rating"] == pytest.approx(player["mu"] - 3 * player["sigma"]) and player["games"] == 20
        assert player["score"] == pytest.approx((player["won"] + player["drawn"] / 2) / 20) and player["id"] == f"id of {player['name']}"
    assert [pair["players"] for pair in made["pairs"]] == [["a", "b"], ["a", "c|d"], ["b", "c|d"]]
    assert made["rated_by"]["model"] == "openskill BradleyTerryFull" and json.loads(json.dumps(made)) == made


def test_the_table_of_a_tournament(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = record()
    Path("t.json").write_text(json.dumps(made))
    lines = tournament_table("t.json").splitlines()
    first = made["players"][0]
    assert lines[0] == "| player | rating | mu ± sigma | won | drawn | lost | score | against a | against b | against c\\|d |"
    assert lines[2] == f"| a | **{first['rating']:.1f}** | {first['mu']:.1f} ± {first['sigma']:.1f} | 14 | 5 | 1 | 82 % |  | 75 % | 90 % |"
    assert lines[4].endswith("| 0 | 7 | 13 | 18 % | 10 % | 25 % |  |")
    assert lines[-1] == "`t.json`: `worldmpc tournament`; Test CPU, 2 cores, no GPU, 1 threads."
    assert tournament_table("none.json") == "Not measured yet: no `none.json`."
    Path("bad.json").write_text('{"schema": "other"}')
    with pytest.raises(RunError, match="bad.json: no record of worldmpc tournament"):
        tournament_table("bad.json")


def write_games(file: str, agent: str, mode: str, *series: tuple[str, tuple[int, int, int]]) -> None:
    opponents = {name: series_record(results(*counts)) for name, counts in series}
    Path(file).write_text(json.dumps({"schema": GAMES, "agent": agent, "mode": mode, "opponents": opponents}))


def test_the_table_of_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_games("a.json", "tdmpc2", "eval", ("weak", (6, 3, 1)), ("strong", (2, 4, 4)))
    write_games("b.json", "sac|x", "prior", ("weak", (0, 10, 0)))
    lines = games_table("*.json").splitlines()
    assert lines[2] == "| tdmpc2 | weak | 10 | 60 (31..83) | 30 (11..60) | 10 (2..40) | `a.json` |"
    assert lines[3].startswith("| tdmpc2 | strong | 10 | 20 (") and lines[4].startswith(
        "| sac\\|x, policy alone | weak | 10 | 0 (0..28) | 100 ("
    )
    assert len(games_table("b.json").splitlines()) == len(lines) - 2
    assert games_table("none/*.json") == "No games in `none/*.json` yet."
    Path("c.json").write_text("{}")
    for words, message in (
        ("*.json", "c.json: no record of games that worldmpc evaluate wrote"),
        ("", "blocks of games name their records"),
    ):
        with pytest.raises(RunError, match=message):
            games_table(words)


def test_blocks_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    write_games("a.json", "tdmpc2", "eval", ("weak", (6, 3, 1)))
    Path("t.json").write_text(json.dumps(record()))
    blocks = ["<!-- tournament:begin t.json -->\n<!-- tournament:end -->", "<!-- games:begin a.json -->\n<!-- games:end -->"]
    Path("page.md").write_text("# Games\n\n" + "\n\n".join(blocks) + "\n")
    assert tables.main(["page.md", "--check"]) == 1
    assert tables.main(["page.md"]) == 0 and tables.main(["page.md", "--check"]) == 0
    text = Path("page.md").read_text()
    assert "| a | **" in text and "| tdmpc2 | weak | 10 |" in text and text.index("| a | **") < text.index("games:begin")
    write_games("a.json", "tdmpc2", "eval", ("weak", (5, 4, 1)))
    capsys.readouterr()
    assert tables.main(["page.md", "--check"]) == 1 and "stale" in capsys.readouterr().out


def test_the_picture_of_a_tournament(tmp_path: Path):
    made = json.loads(json.dumps(record()).replace('"c|d"', '"runs/hockey-self-play/sac-default-seed1"'))
    figure = plot_tournament(made, tmp_path / "deep" / "t.png")
    assert (tmp_path / "deep" / "t.png").stat().st_size > 10_000
    scores, ratings = figure.axes
    texts = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in scores.texts if "%" in t.get_text()}
    assert texts == {(1, 0): "75 %", (2, 0): "90 %", (0, 1): "25 %", (2, 1): "75 %", (0, 2): "10 %", (1, 2): "25 %"}
    assert {t.get_text() for t in scores.texts if "/" in t.get_text()} == {"6/3/1", "8/2/0", "1/3/6", "5/5/0", "0/2/8", "0/5/5"}
    assert [label.get_text() for label in scores.get_yticklabels()] == ["a", "b", "...sac-default-seed1"]
    marks = next(line for line in ratings.lines if line.get_marker() == "D")
    assert list(marks.get_xdata()) == [player["rating"] for player in made["players"]]
    with pytest.raises(RunError, match="no image of the kind .bmpx"):
        plot_tournament(made, tmp_path / "t.bmpx")
