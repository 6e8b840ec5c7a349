"""Numbers as tables show them."""

from __future__ import annotations

import math

from worldmpc.report.cells import percent, rounded, span


def test_small_numbers_keep_decimals() -> None:
    assert [rounded(value) for value in (941.4, -12.6, 10.0, 4.236, -0.5, 0.0, math.nan)] == ["941", "-13", "10", "4.24", "-0.50", "0", "-"]
    assert span(-1.5, 12.0) == "-1.50..12" and [percent(value) for value in (0.076, 1.0, math.nan)] == ["8", "100", "-"]
