"""Variants against each other: per task at one step, and aggregated over tasks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from worldmpc.report.compare import to_json
from worldmpc.report.runs import Run, RunError, export_results
from worldmpc.report.statistics import iqm, stratified_bootstrap
from worldmpc.report.tables import block_marks, main, marked_blocks
from worldmpc.report.variant_tables import print_variants
from worldmpc.report.variants import VariantComparison, compare_variants

CARTPOLE, WALKER = "dmc/cartpole-swingup", "dmc/walker-walk"


@pytest.fixture
def make_runs(make_run: Callable[..., Run]) -> Callable[..., list[Run]]:
    """One run per final return: half of it after 50,000 steps, all of it after 100,000."""

    def build(finals: Sequence[float], task: str = CARTPOLE, label: str = "tdmpc2", **options: str) -> list[Run]:
        points = [[(0, 3.0), (50_000, final / 2), (100_000, final)] for final in finals]
        return [make_run(row, task=task, label=label, seed=seed, **options) for seed, row in enumerate(points, start=1)]

    return build


@pytest.fixture
def runs(make_runs: Callable[..., list[Run]]) -> list[Run]:
    """Two tasks, a baseline and a variant that is better on the first and equal on the second."""
    first = make_runs([700.0, 800.0, 900.0]) + make_runs([910.0, 920.0, 930.0], label="bmpc")
    return first + make_runs([500.0, 600.0, 700.0], WALKER) + make_runs([500.0, 600.0, 700.0], WALKER, "bmpc")


def test_tasks(runs: list[Run]) -> None:
    found = compare_variants(runs, ("tdmpc2", "boom"))
    assert [(task.task, task.step, task.steps) for task in found.tasks] == [
        (CARTPOLE, 100_000, (50_000, 100_000)),
        (WALKER, 100_000, (50_000, 100_000)),
    ]
    base, other = found.tasks[0].variants
    assert (base.label, other.label, other.seeds, other.presets) == ("tdmpc2", "bmpc", (1, 2, 3), ("cpu",))
    assert (base.mean, base.min, base.max, base.returns) == (800, 700, 900, (700, 800, 900))
    assert base.area == 600 and base.areas == (525, 600, 675) and base.prior_mean == pytest.approx(640)
    published, missing = found.tasks[0].published
    assert published.point is not None and published.point.mean == 839.4 and published.band == "seeds" and not published.reason
    assert missing.point is None and missing.reason == "no published curve of this task"
    assert found.notes == ()


def test_aggregate(runs: list[Run]) -> None:
    found = compare_variants(runs, replications=200)
    base, other = found.aggregate
    assert found.aggregate_tasks == (CARTPOLE, WALKER) and (base.better_final, base.better_area) == (None, None)
    # Of 500, 600, 700, 700, 800, 900 the middle four.
    assert base.final.value == pytest.approx(0.7) and base.area.value == pytest.approx(0.7 * 0.75)
    assert other.better_final is not None and other.better_area is not None
    assert other.better_final.value == 0.75 == other.better_area.value and 0.5 <= other.better_final.low < other.better_final.high <= 1
    table = np.array([[0.7, 0.8, 0.9], [0.5, 0.6, 0.7]]).T
    assert base.final == stratified_bootstrap(iqm, table, replications=200)
    assert to_json(found) == to_json(compare_variants(list(reversed(runs)), replications=200))
    assert to_json(found) != to_json(compare_variants(runs, replications=200, seed=1))


def test_the_step(runs: list[Run], make_run: Callable[..., Run]) -> None:
    early = compare_variants(runs, at=50_000, replications=2).tasks[0]
    assert early.step == 50_000 and early.variants[0].mean == 400 == early.variants[0].area
    assert early.published[0].point is None and early.published[0].reason == "no published point at this step"
    slow = make_run([(0, 1.0), (50_000, 100.0), (90_000, 200.0)], seed=4)
    found = compare_variants([*runs, slow], replications=2)
    assert [task.step for task in found.tasks] == [50_000, 100_000]
    assert found.tasks[0].variants[0].mean == pytest.approx((350 + 400 + 450 + 100) / 4)
    assert f"{CARTPOLE}: the variants' seeds differ" in found.notes
    assert f"the aggregate takes tasks at different steps: {CARTPOLE} at 50,000, {WALKER} at 100,000" in found.notes


def test_mistakes(runs: list[Run], make_run: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match="baseline: no runs of 'tdmpc'; there are bmpc, tdmpc2"):
        compare_variants(runs, baseline="tdmpc")
    with pytest.raises(RunError, match="not all 6 runs were evaluated at 60,000; they were at 50,000, 100,000"):
        compare_variants(runs, at=60_000)
    late = make_run([(0, 1.0), (20_000, 2.0)], seed=9)
    with pytest.raises(RunError, match=r"no simulator step above 0 at which all 7 runs were evaluated; runs/.*/9 has reached 20,000"):
        compare_variants([*runs, late])
    with pytest.raises(ValueError, match="unknown reference algorithm 'tdmpc3'"):
        compare_variants(runs, ("tdmpc3",))


def test_tasks_that_are_left_out(runs: list[Run], make_runs: Callable[..., list[Run]]) -> None:
    partly = [run for run in runs if (run.task, run.label) != (WALKER, "bmpc")]
    found = compare_variants(partly, replications=2)
    assert found.aggregate_tasks == (CARTPOLE,) and len(found.tasks) == 2
    assert found.notes == (f"{WALKER} is left out of the aggregate: no runs of bmpc",)
    pendulum = make_runs([-200.0] * 3, "gym/Pendulum-v1") + make_runs([-200.0] * 3, "gym/Pendulum-v1", "bmpc")
    found = compare_variants(pendulum)
    assert found.aggregate == () and found.notes == (
        "gym/Pendulum-v1 is left out of the aggregate: no normalised score outside of dmc",
        "no aggregate: no task is left",
    )


def test_notes(runs: list[Run], make_runs: Callable[..., list[Run]]) -> None:
    mixed = [replace(run, preset="default") if run.seed == 3 and run.label == "bmpc" else run for run in runs]
    again = make_runs([1.0], label="bmpc", preset="debug")
    few = make_runs([100.0], label="boom")
    notes = compare_variants([*mixed, *again, *few], replications=2).notes
    assert f"bmpc: mixes presets: cpu ({CARTPOLE}, {WALKER}), debug ({CARTPOLE}), default ({CARTPOLE}, {WALKER})" in notes
    assert f"{CARTPOLE}: the variants differ in preset" in notes
    assert any(note.startswith(f"{CARTPOLE}, bmpc: seed 1 was found twice") for note in compare_variants([*runs, runs[3]]).notes)
    assert f"{CARTPOLE}, boom: 1 seed; evidence needs at least 3" in notes
    changed = [replace(run, overrides={"loss.rho": 0.6} if run.seed == 1 else {}) for run in runs]
    assert f"{WALKER}, tdmpc2: the runs differ in loss.rho" in compare_variants(changed, replications=2).notes
    changed = [replace(run, overrides={"loss.rho": 0.6} if run.task == WALKER else {}) for run in runs]
    notes = compare_variants(changed, replications=2).notes
    assert "tdmpc2: tasks differ in loss.rho" in notes and not any("the runs differ" in note for note in notes)
    changed = [replace(run, overrides={"env.action_repeat": 4, "loss.rho": 0.6} if run.label == "bmpc" else {}) for run in runs]
    notes = compare_variants(changed, replications=2).notes
    assert notes == tuple(f"{task}: the variants differ in env.action_repeat" for task in (CARTPOLE, WALKER))
    changed = [replace(run, overrides=None if run.seed == 1 else {}) for run in runs]
    assert f"{WALKER}, bmpc: 1 of 3 runs: it is not known what they change" in compare_variants(changed, replications=2).notes


def test_runs_of_different_agents_under_one_label_all_count(runs: list[Run]) -> None:
    """None is dropped as if it were the other, and the mixture is said."""
    other = [replace(run, agent="boom") for run in runs if run.label == "bmpc"]
    found = compare_variants([*runs, *other], replications=2)
    assert found.tasks[0].variants[1].seeds == (1, 2, 3, 1, 2, 3)
    assert any(note.startswith("bmpc: mixes agents: boom") for note in found.notes)


def test_the_area_of_other_grids_says_so(runs: list[Run], make_run: Callable[..., Run]) -> None:
    seldom = [make_run([(0, 3.0), (100_000, 900.0)], task=CARTPOLE, label="seldom", seed=seed) for seed in (1, 2, 3)]
    found = compare_variants([*runs, *seldom], replications=2)
    assert found.tasks[0].steps == (100_000,)
    assert f"{CARTPOLE}: the area takes the 1 steps that all runs have in common, of up to 2 that some were evaluated at" in found.notes


def test_nan_is_shown_as_missing(make_runs: Callable[..., list[Run]]) -> None:
    found = compare_variants(make_runs([700.0, 800.0, 900.0]) + make_runs([950.0, 960.0, float("nan")], label="bmpc"), replications=20)
    assert found.tasks[0].variants[1].mean != found.tasks[0].variants[1].mean
    assert "| bmpc | 3 | **-** (-..-) |" in variants_text(found) and json.loads(to_json(found))["aggregate"][1]["final"]["value"] is None


def variants_text(found: VariantComparison) -> str:
    from worldmpc.report import variant_tables

    return variant_tables._tasks_markdown(found.tasks)


def test_print_and_json(runs: list[Run]) -> None:
    found = compare_variants(runs, ("tdmpc2", "bmpc-1m", "boom"), replications=20)
    out = io.StringIO()
    print_variants(found, Console(file=out, width=160))
    text = out.getvalue()
    assert "dmc/cartpole-swingup, return at 100,000 simulator steps" in text and "TD-MPC2 (published, 5M, 3 seeds)" in text
    assert (
        "95%CI" in text
        and "dmc/walker-walk, boom (published): no published curve of this task" in text
        and "IQM of return" in text
        and "…" not in text
    )
    assert "0.700 [" in text and "P(better than tdmpc2)" in text.replace("\n", " ")
    data = json.loads(to_json(found))
    assert data["tasks"][0]["variants"][1]["mean"] == 920 and data["aggregate"][1]["better_final"]["value"] == 0.75
    assert data["baseline"] == "tdmpc2" and data["replications"] == 20 and data["seed"] == 0


@pytest.fixture
def page(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with two blocks beside the result files of both labels."""
    monkeypatch.chdir(tmp_path)
    for label in ("tdmpc2", "bmpc"):
        export_results([run for run in runs if run.label == label], tmp_path / "results" / "variants" / f"{label}.csv")
    early = block_marks("compare results/variants/*.csv at=50000 algorithm=tdmpc2,boom")
    file = tmp_path / "variants.md"
    file.write_text("\n".join(["Top", *block_marks("compare results/variants/*.csv"), "Between", *early, "End", ""]))
    return file


def test_blocks(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert marked_blocks(page) == ["compare results/variants/*.csv", "compare results/variants/*.csv at=50000 algorithm=tdmpc2,boom"]
    assert main([str(page), "--check"]) == 1
    assert main([str(page)]) == 0 and main([str(page), "--check"]) == 0
    text = page.read_text()
    late, early = text.split("Between")
    head = f"| {CARTPOLE} | 100,000 "
    assert f"{head}| tdmpc2 | 3 | **800** (700..900) | 600 | 640 | `results/variants/tdmpc2.csv` |" in late
    assert f"{head}| TD-MPC2 (published, 5M, 3 seeds) | 3 | 839 (790..868) | - | - | - |" in late
    assert "| bmpc | 0.7" in late and "| 0.75 [" in late and "Aggregated over 2 tasks: dmc/cartpole-swingup, dmc/walker-walk." in late
    assert f"No published point at this step: TD-MPC2 (published, 5M, 3 seeds) on {CARTPOLE}, TD-MPC2 (published" in early
    assert f"No published curve of this task: boom (published) on {CARTPOLE}, boom (published) on {WALKER}." in early
    assert "| boom (published)" not in early
    for lines in ([line for line in part.splitlines() if line.startswith("|")] for part in (late, early)):
        assert {line.count("|") for line in lines} == {9, 6}
    (page.parent / "results" / "variants" / "bmpc.csv").unlink()
    assert main([str(page), "--check"]) == 1
    (page.parent / "results" / "variants" / "tdmpc2.csv").unlink()
    assert main([str(page)]) == 0 and "No results in `results/variants/*.csv` yet." in page.read_text()


def test_blocks_that_cannot_be_made(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ("results/variants/*.csv baseline=sac", "no runs of 'sac'; there are bmpc, tdmpc2"),
        ("results/variants/*.csv base=sac", "base=sac: unknown option; options are at, algorithm, baseline"),
        ("results/variants/*.csv at=soon", "at: expected a simulator step, got 'soon'"),
        ("results/variants/*.csv algorithm=x", "unknown reference algorithm 'x'"),
    ):
        page.write_text("\n".join(block_marks(f"compare {words}")))
        assert main([str(page)]) == 2
        assert message in capsys.readouterr().err
    page.write_text("<!-- precision:begin twice -->\n<!-- precision:end -->")
    assert main([str(page)]) == 2 and "blocks of precision take no words, got 'twice'" in capsys.readouterr().err
    begin, end = block_marks("compare a.csv")
    for text in (f"{begin}{end}{begin}{end}", f"{begin}{begin}{end}{end}", end, begin):
        page.write_text(text)
        assert main([str(page)]) == 2 and "expected exactly one block from" in capsys.readouterr().err


def test_variants_do_not_enter_the_table_of_results(page: Path) -> None:
    from worldmpc.report.tables import results_table

    assert "No results" in results_table(page.parent / "results")


def test_runs_that_have_just_begun_are_left_out(runs: list[Run], make_run: Callable[..., Run]) -> None:
    begun = make_run([(0, 3.0)], task=CARTPOLE, label="bmpc", seed=4)
    found = compare_variants([*runs, begun])
    assert found.tasks == compare_variants(runs).tasks
    assert any("left out, as it has no evaluation behind step 0 yet" in note for note in found.notes)
    only = [make_run([(0, 3.0)], task=CARTPOLE, seed=5), *(run for run in runs if run.label == "bmpc")]
    with pytest.raises(RunError, match=r"no runs of 'tdmpc2'; there are bmpc, and 1 without an evaluation behind step 0"):
        compare_variants(only)


def test_a_short_run_is_named(runs: list[Run], make_run: Callable[..., Run]) -> None:
    short = make_run([(0, 3.0), (50_000, 300.0)], task=CARTPOLE, label="bmpc", seed=4)
    found = compare_variants([*runs, short])
    assert found.tasks[0].step == 50_000
    assert any(note.startswith(f"{CARTPOLE}: compared at 50,000, where ") and note.endswith("others reach 100,000") for note in found.notes)


def test_labels_are_text(make_runs: Callable[..., list[Run]]) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_variants(compare_variants(make_runs([1.0, 2.0, 3.0]) + make_runs([1.0, 2.0, 3.0], label="[/x]|y")), console)
    assert "[/x]|y" in console.file.getvalue()  # type: ignore[attr-defined]
