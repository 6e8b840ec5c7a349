"""Numbers and names as tables show them."""

from __future__ import annotations

import math


def rounded(value: float) -> str:
    """Return a number without decimals, a small one with two, a dash where there is none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 or value == 0 else f"{value:.2f}"


def span(low: float, high: float) -> str:
    """Return two numbers as ``low..high``."""
    return f"{rounded(low)}..{rounded(high)}"


def percent(share: float) -> str:
    """Return a share as percent without decimals, a dash where there is none."""
    return f"{100 * share:.0f}" if math.isfinite(share) else "-"


def escaped(words: str) -> str:
    """Return words as a cell of a markdown table."""
    return words.replace("|", "\\|")
