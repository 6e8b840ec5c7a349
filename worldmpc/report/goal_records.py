"""Records of ``python -m benchmarks.director_goals`` as a markdown table."""

from __future__ import annotations

from typing import Any

from worldmpc.report.records import named_table

SCHEMA = "worldmpc.director_goals/1"
"""What every record says about itself."""


def goals_table(words: str) -> str:
    """Return the markdown table of a record: what codes say of latents, and how near the worker gets to held-out ones.

    Raises:
        RunError: not one file, or one that is no such record.
    """
    return named_table(words, SCHEMA, "benchmarks.director_goals", _table)


def _table(record: dict[str, Any]) -> str:
    header = "| task | seed | codes after | lost | marginal | perplexity | reached after | reached | where it began | random actions |"
    lines = [header, "|---|" + "--:|" * 9]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in record["rows"]]
    most = max(row["places"] for row in record["rows"])
    text = (
        "Codes, after so many updates: cross-entropy of the reconstruction and entropy of the mean latent, in nats per group, and classes "
        "in use per code. Reached, after so many updates: mean similarity (0 to 1) to latents that an episode not learned from reached one "
        f"goal interval later, at most {most} per run; beside it that of where the worker began, and where random actions lead."
    )
    return "\n".join([*lines, "", text])


def _cells(row: dict[str, Any]) -> list[str]:
    codes = [f"{row['recon_loss']:.3f}", f"{row['marginal_entropy']:.3f}", f"{row['perplexity']:.1f}"]
    reached = [f"**{row['reached']:.3f}**", f"{row['where_it_began']:.3f}", f"{row['random_actions']:.3f}"]
    return [row["task"], str(row["seed"]), f"{row['codes_after']:,}", *codes, f"{row['updates']:,}", *reached]
