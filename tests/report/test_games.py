"""Games in numbers, and evaluations by games as tables inside pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.series import results, write_games
from worldmpc.opponents.games import wilson
from worldmpc.report.games import games_list, games_table, series_record, share
from worldmpc.report.runs import RunError


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


def test_several_seeds_and_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for seed, (on, off) in enumerate([((9, 1, 0), (4, 2, 4)), ((7, 1, 2), (6, 0, 4)), ((8, 1, 1), (5, 1, 4))], 1):
        write_games(f"on-{seed}.json", "imagined", "eval", ("weak", on), ("strong", on), seed=seed)
        write_games(f"off-{seed}.json", "tdmpc2", "eval", ("weak", off), ("strong", off), seed=seed)
    write_games("other.json", "sac", "eval", ("random", (1, 0, 0)))
    lines = games_table("o*-*.json other.json baseline=tdmpc2").splitlines()
    assert lines[2].startswith("| tdmpc2, seed 1 | weak | 10 | 40 (") and lines[14].startswith("| sac, seed 1 | random | 1 |")
    assert lines[15:19] == [
        "| **tdmpc2, 3 seeds** | weak | 30 | **50** (40..60) | **10** (0..20) | **40** (40..40) |  |",
        "| **tdmpc2, 3 seeds** | strong | 30 | **50** (40..60) | **10** (0..20) | **40** (40..40) |  |",
        "| **imagined, 3 seeds** | weak | 30 | **80** (70..90) | **10** (10..10) | **10** (0..20) |  |",
        "| **imagined, 3 seeds** | strong | 30 | **80** (70..90) | **10** (10..10) | **10** (0..20) |  |",
    ]
    # Scores are 0.95, 0.75 and 0.85 to 0.5, 0.6 and 0.55; sac has met nobody of these.
    assert lines[-1].startswith("Score (a draw is half a win) of imagined less that of tdmpc2, mean over weak and strong: +0.300 [+0.2")
    assert "a run of it scores more: 1.00 [1.00, 1.00]" in lines[-1] and sum("less that of" in line for line in lines) == 1
    for words, message in (
        ("o*-*.json baseline=nobody", "baseline: no record of 'nobody'; there are tdmpc2, imagined"),
        ("on-1.json on-1.json", "on-1.json, on-1.json: the same seed of imagined twice against weak"),
    ):
        with pytest.raises(RunError, match=message):
            games_table(words)
