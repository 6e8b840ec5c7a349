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
    most = max(row["places"] for row in record["rows"])
    lines = ["| task | seed | codes after | lost | marginal | perplexity | most likely |", "|---|" + "--:|" * 6]
    lines += ["| " + " | ".join(_codes(row)) + " |" for row in record["rows"]]
    codes = (
        "Codes, after so many updates: cross-entropy of the reconstruction and entropy of the mean latent, in nats per group, and classes "
        "in use per code: as the run logged them, and as most likely ones in a new episode after it."
    )
    header = "| task | seed | after | own future | no goal | began | random actions | held action's | no goal | began |"
    lines += ["", codes, "", header, "|---|" + "--:|" * 9]
    lines += ["| " + " | ".join(_reached(row)) + " |" for row in record["rows"]]
    reached = (
        "Similarity (0 to 1) to latents of an episode not learned from, after so many updates: first to the agent's own future, one "
        "goal interval ahead, of what plans for that latent alone reach, of what TD-MPC2's plans reach, of where it began, "
        "and of where random actions lead; then to what a random action, held for the interval, leads to. "
        f"Means over at most {most} places per run."
    )
    return "\n".join([*lines, "", reached])


def _codes(row: dict[str, Any]) -> list[str]:
    codes = [f"{row['recon_loss']:.3f}", f"{row['marginal_entropy']:.3f}", f"{row['perplexity']:.1f}", f"{row['perplexity_held_out']:.1f}"]
    return [row["task"], str(row["seed"]), f"{row['codes_after']:,}", *codes]


def _reached(row: dict[str, Any]) -> list[str]:
    names = ("without_goal", "where_it_began", "random_actions")
    own = [f"**{row['reached']:.3f}**", *(f"{row[name]:.3f}" for name in names)]
    held = [f"**{row['reached_of_held_action']:.3f}**", *(f"{row[f'{name}_of_held_action']:.3f}" for name in names[:2])]
    return [row["task"], str(row["seed"]), f"{row['updates']:,}", *own, *held]
