"""The learning results of ``results`` and the records of ``benchmarks`` as markdown tables inside README and docs.

``python -m worldmpc.report.tables README.md docs/results.md`` rewrites the blocks between ``<!-- results:begin -->`` and
``<!-- results:end -->``, and likewise ``gates``, ``benchmarks``, ``variants``, ``precision`` and ``planners``. Blocks between
``<!-- compare:begin results/variants/*.csv baseline=tdmpc2 -->`` and ``<!-- compare:end -->`` say themselves what they hold, in the words
of ``worldmpc compare variants=true``; a page may have several. ``overhead``, ``goals``, ``tournament`` and
``opponent_models`` name their record, ``games`` its records, ``<!-- games:begin results/hockey/*.json -->``. With ``--check`` nothing is
written, and a stale block is a failure.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from worldmpc.files import write_whole
from worldmpc.report.benchmarks import Record, Row, Verb, read_records, settings
from worldmpc.report.cells import rounded, span
from worldmpc.report.compare import MIN_SEEDS, Comparison, compare
from worldmpc.report.games import games_table
from worldmpc.report.gates import gates_table
from worldmpc.report.goal_records import goals_table
from worldmpc.report.opponent_models import opponent_models_table
from worldmpc.report.overhead import overhead_table
from worldmpc.report.planners import planners_table
from worldmpc.report.precision import curves_table, precision_table
from worldmpc.report.reference import DEFAULT_ALGORITHM
from worldmpc.report.runs import Run, RunError, load_result_folder
from worldmpc.report.tournament import tournament_table
from worldmpc.report.variant_tables import variants_markdown

BLOCKS = (
    *("results", "gates", "benchmarks", "variants", "precision", "planners"),
    *("compare", "overhead", "goals", "tournament", "games", "opponent_models"),
)
"""Kinds of marked blocks."""
_HEADER = ("task", "preset", "seeds", "simulator steps", "return (min..max)", "prior alone", "published (min..max)", "gate", "data")


def results_table(results: str | Path, algorithm: str = DEFAULT_ALGORITHM) -> str:
    """Return the markdown table of the algorithm's result CSVs in a folder, one row per task and preset.

    Raises:
        RunError: no such folder, or a result file that cannot be read.
    """
    folder = Path(results)
    runs = [run for run in load_result_folder(folder) if run.agent == algorithm]
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


def benchmarks_table(benchmarks: str | Path) -> str:
    """Return the markdown table of all records of ``worldmpc bench`` in a folder, one row per measured configuration.

    Raises:
        ConfigError: no such folder, or a record that cannot be read.
    """
    records = read_records(benchmarks)
    measured = [(record, row) for record in records for row in record.rows]
    if not measured:
        return f"No benchmarks in `{Path(benchmarks).as_posix()}/` yet."
    header = (*settings(measured[0][1]), "plan ms", "update ms", "decisions/s", "environment alone", "task", "machine", "data")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(settings(measured[0][1])) + "--:|" * 4 + "---|" * 3]
    lines += ["| " + " | ".join(_benchmark_cells(record, row)) + " |" for record, row in measured]
    text = (
        "Median milliseconds of a plan (one decision in each of the envs) and of an update, and in brackets the share of them that the "
        "needed matrix products alone take, in the same precision and measured in turns; decisions per second of training, and of the "
        "environments with random actions."
    )
    return "\n".join([*lines, "", text])


def marked_blocks(file: str | Path) -> list[str]:
    """Return the blocks that a markdown file has: their kinds, each with the words behind ``begin`` where there are any.

    Raises:
        RunError: no such file, no block in it, or one that is not marked exactly once.
    """
    file = Path(file)
    if not file.exists():
        raise RunError(f"{file}: no such file")
    text = file.read_text(encoding="utf-8")
    blocks: list[str] = []
    for kind in BLOCKS:
        marks = re.findall(rf"<!-- {kind}:(begin|end)(?: (.*?))? -->", text)
        found = [f"{kind} {words}".strip() for mark, words in marks if mark == "begin"]
        if [mark for mark, _ in marks] != ["begin", "end"] * len(found) or len(set(found)) < len(found):
            begin, end = block_marks(found[0] if found else kind)
            raise RunError(f"{file}: expected exactly one block from {begin} to {end}")
        blocks += found
    if not blocks:
        raise RunError(f"{file}: expected exactly one block from {' to '.join(block_marks(BLOCKS[0]))}")
    return blocks


def block_marks(block: str) -> tuple[str, str]:
    """Return the lines around a block, which is its kind, or kind and words."""
    kind, _, words = block.partition(" ")
    return f"<!-- {kind}:begin {words}".strip() + " -->", f"<!-- {kind}:end -->"


def rewrite(file: str | Path, tables: Mapping[str, str]) -> bool:
    """Put tables (block -> text) into the marked blocks of a markdown file and return whether the file changed.

    Raises:
        RunError: see :func:`marked_blocks`.
    """
    file = Path(file)
    before, after = _with_tables(file, tables)
    if after != before:
        write_whole(file, after)
    return after != before


def is_stale(file: str | Path, tables: Mapping[str, str]) -> bool:
    """Return whether a marked block of a markdown file differs from its table; nothing is written.

    Raises:
        RunError: see :func:`marked_blocks`.
    """
    before, after = _with_tables(Path(file), tables)
    return before != after


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check markdown files; return 0, 1 where a checked block is stale, 2 for unusable files."""
    parser = argparse.ArgumentParser(prog="python -m worldmpc.report.tables", description="Recorded results as markdown.")
    parser.add_argument("files", nargs="*", default=["README.md"], help="markdown files with marked blocks (default README.md)")
    parser.add_argument("--results", default="results", help="folder of result CSVs (default results)")
    parser.add_argument("--benchmarks", default="benchmarks/results", help="folder of benchmark records (default benchmarks/results)")
    parser.add_argument("--variants", default="benchmarks/curves", help="folder of variants' result CSVs (default %(default)s)")
    baseline = "results/dmc-cartpole-swingup.csv"
    parser.add_argument("--baseline", default=baseline, help="result CSV that variants stand beside (default %(default)s)")
    precision = "benchmarks/results/precision.json"
    parser.add_argument("--precision", default=precision, help="record of benchmarks.precision (default %(default)s)")
    planners = "benchmarks/results"
    parser.add_argument("--planners", default=planners, help="folder of records of worldmpc bench planners (default %(default)s)")
    parser.add_argument("--algorithm", default=DEFAULT_ALGORITHM, help="published curves to compare with (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block is stale")
    options = parser.parse_args(argv)
    makers = {
        "results": lambda: results_table(options.results, options.algorithm),
        "gates": lambda: gates_table(options.results),
        "benchmarks": lambda: benchmarks_table(options.benchmarks),
        "variants": lambda: curves_table(
            {"float32, each seed alone": options.baseline}
            | {file.stem.replace("_", " "): file for file in sorted(Path(options.variants).glob("*.csv"))}
        ),
        "precision": lambda: precision_table(options.precision),
        "planners": lambda: planners_table(options.planners),
    }
    try:
        needed = {block for file in options.files for block in marked_blocks(file)}
        tables = {block: _make(makers, *block.split(" ", 1)) for block in sorted(needed)}
        stale = [file for file in options.files if (is_stale if options.check else rewrite)(file, tables)]
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for file in stale:
        sys.stdout.write(f"{file}: {'stale, run python -m worldmpc.report.tables' if options.check else 'rewritten'}\n")
    return int(options.check and bool(stale))


def _make(makers: Mapping[str, Callable[[], str]], kind: str, words: str = "") -> str:
    named = {
        "compare": variants_markdown,
        "overhead": overhead_table,
        "goals": goals_table,
        "tournament": tournament_table,
        "games": games_table,
        "opponent_models": opponent_models_table,
    }
    if kind in named:
        return named[kind](words)
    if words:
        raise RunError(f"blocks of {kind} take no words, got '{words}'")
    return makers[kind]()


def _with_tables(file: Path, tables: Mapping[str, str]) -> tuple[str, str]:
    """Return the text of a file as it is, and as it should be."""
    blocks = marked_blocks(file)
    text = before = file.read_text(encoding="utf-8")
    for block in blocks:
        begin, end = block_marks(block)
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{tables[block]}\n{end}{tail}"
    return before, text


def _benchmark_cells(record: Record, row: Row) -> list[str]:
    machine = record.machine
    name = machine["gpu"] if row.device.startswith("cuda") else f"{machine['cpu']}, {machine['cores']} cores"
    rates = [rounded(math.nan if rate is None else rate) for rate in (row.training, row.environment)]
    return [*settings(row).values(), _verb_cell(row.plan), _verb_cell(row.update), *rates, row.task or "-", name, f"`{record.source}`"]


def _verb_cell(verb: Verb | None) -> str:
    return "-" if verb is None else f"**{verb.median_ms:.{1 if verb.median_ms >= 10 else 2}f}** ({verb.fraction:.0%})"


def _cells(row: Comparison, sources: str) -> list[str]:
    reference = row.reference
    published = f"{reference.mean:.0f} ({reference.min:.0f}..{reference.max:.0f})" if reference else "-"
    gate = {True: "pass", False: "**fail**", None: "-"}[row.passed]
    name = row.kind.name.removeprefix("tdmpc2, ")
    seeds = str(len(row.seeds)) if len(row.seeds) >= MIN_SEEDS else f"{len(row.seeds)} (*)"
    ours = f"**{rounded(row.mean)}** ({span(row.min, row.max)})"
    return [row.task, name, seeds, f"{row.step:,}", ours, rounded(row.prior_mean), published, gate, sources]


def _sources(row: Comparison, runs: Sequence[Run], folder: Path) -> str:
    used = {run.source for run in runs if run.kind == row.kind}
    return ", ".join(f"`{folder.name}/{source.relative_to(folder).as_posix()}`" for source in sorted(used))


if __name__ == "__main__":
    sys.exit(main())
