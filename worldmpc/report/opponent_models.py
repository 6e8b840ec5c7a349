"""Records of ``python -m benchmarks.opponent_models`` as a markdown table."""

from __future__ import annotations

from typing import Any

from worldmpc.report.cells import escaped, percent
from worldmpc.report.records import named_table

SCHEMA = "worldmpc.opponent_models/1"
"""What every record says about itself."""
_NETWORK = "network_"


def opponent_models_table(words: str) -> str:
    """Return the markdown table of a record: what imagined opponents expect of unseen games, one row per run and opponent.

    Raises:
        RunError: not one file, or one that is no such record.
    """
    return named_table(words, SCHEMA, "benchmarks.opponent_models", _table)


def _table(record: dict[str, Any]) -> str:
    rows = record["rows"]
    networks = list(dict.fromkeys(key for row in rows for key in row if key.startswith(_NETWORK)))
    expected = ["belief", *networks, "marginal", "uniform"]
    titles = ["belief", *(f"network of {escaped(name.removeprefix(_NETWORK))}" for name in networks), "frequencies", "uniform"]
    lines = ["| seed | plays | games | identified | " + " | ".join(titles) + " |", "|--:|---|" + "--:|" * (2 + len(titles))]
    for row in rows:
        numbers = [f"{row[name]:.2f}" if name in row else "" for name in expected]
        numbers[0] = f"**{numbers[0]}**"
        cells = [str(row["seed"]), escaped(row["opponent"]), str(row["games"]), f"{percent(row['identified'])} %", *numbers]
        lines.append("| " + " | ".join(cells) + " |")
    text = (
        "Log-density of the other player's next action in nats per decision, mean over games that nobody learned from, before the action "
        "is seen: of the networks mixed by the belief so far, of each network alone, of how often actions fall into the same bins in other "
        "such games, and of a uniform guess. Identified: games at whose end the belief is largest for who really played."
    )
    return "\n".join([*lines, "", text])
