"""What bfloat16 changes in an agent's numbers and learning curves, as markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldmpc.report.runs import Run, RunError, load_results

_ERRORS = (
    ("value of an imagined sequence", "planning", "value_error_relative", "relative error", "{:.2%}"),
    ("elites", "planning", "elite_overlap", "shared with float32", "{:.0%}"),
    ("first action of the plan's mean", "planning", "plan_mean_moved", "moved by", "{:.3f}"),
    ("total loss", "learning", "total_loss", "relative error", "{:.2%}"),
    ("gradient of the world model", "learning", "cosine_of_gradients", "cosine with float32", "{:.4f}"),
    ("gradient of the world model", "learning", "ratio_of_gradient_norms", "norm relative to float32", "{:.3f}"),
)


def curves_table(files: Mapping[str, str | Path]) -> str:
    """Return the markdown table of result CSVs, name -> file, one row each: returns at the simulator steps that all their seeds have.

    Raises:
        RunError: no files, one that cannot be read, files of several tasks, or no step in common.
    """
    variants = {name: load_results(file) for name, file in files.items()}
    runs = [run for found in variants.values() for run in found]
    if not runs:
        raise RunError("curves: no result files")
    if len({run.task for run in runs}) > 1:
        raise RunError(f"curves: files of several tasks: {', '.join(sorted({run.task for run in runs}))}")
    common = set.intersection(*({one.env_steps for one in run.evals} for run in runs)) - {0}
    if not common:
        raise RunError("curves: no simulator step at which all runs were evaluated")
    steps = sorted(common)
    lines = ["| " + " | ".join(["variant", "seeds", *(f"{step:,}" for step in steps), "data"]) + " |"]
    lines.append("|---|" + "--:|" * (1 + len(steps)) + "---|")
    for name, found in variants.items():
        cells = [name, str(len(found)), *(_span(found, step) for step in steps), f"`{Path(files[name]).as_posix()}`"]
        lines.append("| " + " | ".join(cells) + " |")
    text = f"{runs[0].task}, preset {runs[0].preset}: mean episode return over seeds (lowest..highest) at simulator steps."
    return "\n".join([*lines, "", text])


def precision_table(file: str | Path) -> str:
    """Return the markdown table of a record of ``python -m benchmarks.precision``.

    Raises:
        RunError: the file cannot be read.
    """
    file = Path(file)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        rows = [(what, how, form, _part(record, part, name)) for what, part, name, how, form in _ERRORS]
        where = f"{record['task']}, preset {record['preset']}, {record['updates']:,} updates: {record['planning']['states']} states, "
        where += f"{record['learning']['batches']} batches; `{file.as_posix()}`."
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: no record of benchmarks.precision ({error!r})") from error
    lines = ["| in bfloat16 | | mean | 5% .. 95% |", "|---|---|--:|--:|"]
    for what, how, form, found in rows:
        numbers = [form.format(found[name]) for name in ("mean", "p5", "p95")]
        lines.append(f"| {what} | {how} | {numbers[0]} | {numbers[1]} .. {numbers[2]} |")
    return "\n".join([*lines, "", f"A trained agent on {where}"])


def _part(record: Mapping[str, Any], part: str, name: str) -> Mapping[str, float]:
    found = record[part]
    return found["relative_error_of_losses"][name] if name.endswith("_loss") else found[name]


def _span(runs: Sequence[Run], step: int) -> str:
    values = [next(one.return_mean for one in run.evals if one.env_steps == step) for run in runs]
    mean = math.fsum(values) / len(values)
    return f"{mean:.0f}" if len(values) == 1 else f"**{mean:.0f}** ({min(values):.0f}..{max(values):.0f})"
