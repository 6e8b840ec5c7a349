"""The learning results of ``results/*.csv`` as a markdown table inside README and docs.

``python -m worldmpc.report.tables README.md docs/results.md`` rewrites the block between ``<!-- results:begin -->`` and
``<!-- results:end -->``; with ``--check`` it writes nothing and fails where a block is stale.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from worldmpc.report.compare import MIN_SEEDS, Comparison, compare
from worldmpc.report.reference import DEFAULT_ALGORITHM
from worldmpc.report.runs import Run, RunError, is_result_file, load_results

BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
_HEADER = ("task", "preset", "seeds", "simulator steps", "return (min..max)", "prior alone", "published (min..max)", "gate", "data")


def results_table(results: str | Path, algorithm: str = DEFAULT_ALGORITHM) -> str:
    """Return the markdown table of all result CSVs in a folder, one row per task, agent and preset.

    Raises:
        RunError: no such folder, or a result file that cannot be read.
    """
    folder = Path(results)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    runs = [run for file in sorted(folder.rglob("*.csv")) if is_result_file(file) for run in load_results(file)]
    if not runs:
        return f"No results in `{folder.name}/` yet."
    rows = compare(runs, algorithm)
    lines = ["| " + " | ".join(_HEADER) + " |", "|---|---|" + "--:|" * 5 + "---|---|"]
    lines += ["| " + " | ".join(_cells(row, _sources(row, runs, folder))) + " |" for row in rows]
    text = (
        "Episode return of planning: mean over seeds, lowest and highest seed, at equal simulator steps (decisions x action repeat). "
        "The gate is passed where our mean reaches the lowest published seed; '-' where there is no published point to compare with."
    )
    if any(len(row.seeds) < MIN_SEEDS for row in rows):
        text += f" (*) fewer than {MIN_SEEDS} seeds: an observation, not yet evidence."
    return "\n".join([*lines, "", text])


def rewrite(file: str | Path, table: str) -> bool:
    """Put the table into the marked block of a markdown file and return whether the file changed.

    Raises:
        RunError: no such file, or not exactly one marked block in it.
    """
    file = Path(file)
    before, after = _with_table(file, table)
    if after != before:
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        partial.write_text(after, encoding="utf-8")
        os.replace(partial, file)
    return after != before


def is_stale(file: str | Path, table: str) -> bool:
    """Return whether the marked block of a markdown file differs from the table; nothing is written.

    Raises:
        RunError: no such file, or not exactly one marked block in it.
    """
    before, after = _with_table(Path(file), table)
    return before != after


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check markdown files; return 0, 1 where a checked block is stale, 2 for unusable files."""
    parser = argparse.ArgumentParser(prog="python -m worldmpc.report.tables", description="Learning results as markdown.")
    parser.add_argument("files", nargs="*", default=["README.md"], help="markdown files with a marked block (default README.md)")
    parser.add_argument("--results", default="results", help="folder of result CSVs (default results)")
    parser.add_argument("--algorithm", default=DEFAULT_ALGORITHM, help="published curves to compare with (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block is stale")
    options = parser.parse_args(argv)
    try:
        table = results_table(options.results, options.algorithm)
        stale = [file for file in options.files if (is_stale if options.check else rewrite)(file, table)]
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for file in stale:
        sys.stdout.write(f"{file}: {'stale, run python -m worldmpc.report.tables' if options.check else 'rewritten'}\n")
    return int(options.check and bool(stale))


def _with_table(file: Path, table: str) -> tuple[str, str]:
    if not file.exists():
        raise RunError(f"{file}: no such file")
    text = file.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise RunError(f"{file}: expected exactly one block from {BEGIN} to {END}")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return text, f"{head}{BEGIN}\n{table}\n{END}{tail}"


def _cells(row: Comparison, sources: str) -> list[str]:
    reference = row.reference
    published = f"{reference.mean:.0f} ({reference.min:.0f}..{reference.max:.0f})" if reference else "-"
    gate = {True: "pass", False: "**fail**", None: "-"}[row.passed]
    name = row.preset if row.agent == "tdmpc2" else f"{row.agent}, {row.preset}"
    seeds = str(len(row.seeds)) if len(row.seeds) >= MIN_SEEDS else f"{len(row.seeds)} (*)"
    ours = f"**{_round(row.mean)}** ({_round(row.min)}..{_round(row.max)})"
    return [row.task, name, seeds, f"{row.step:,}", ours, _round(row.prior_mean), published, gate, sources]


def _sources(row: Comparison, runs: Sequence[Run], folder: Path) -> str:
    used = {run.source for run in runs if (run.task, run.agent, run.preset) == (row.task, row.agent, row.preset)}
    return ", ".join(f"`{folder.name}/{source.relative_to(folder).as_posix()}`" for source in sorted(used))


def _round(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
