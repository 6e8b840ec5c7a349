"""Tournaments: records, tables inside pages, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.series import results, write_games
from worldmpc.opponents.ratings import PlayedGame
from worldmpc.report import tables
from worldmpc.report.runs import RunError
from worldmpc.report.tournament import plot_tournament, tournament_record, tournament_table

OUTCOMES = {("a", "b"): (6, 3, 1), ("a", "c|d"): (8, 2, 0), ("b", "c|d"): (5, 5, 0)}


def record() -> dict[str, Any]:
    games = [PlayedGame(pair, result, 1, n) for pair, counts in OUTCOMES.items() for n, result in enumerate(results(*counts))]
    sources = {"a": "SAC:runs/a", "b": "weak", "c|d": "still"}
    machine = {"cpu": "Test CPU", "cores": 2}
    facts = {"task": "hockey/self-play", "games": 10, "command": "worldmpc tournament", "machine": machine, "threads": 1}
    return {**tournament_record(sources, {name: f"id of {name}" for name in sources}, games, 1), **facts}


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
