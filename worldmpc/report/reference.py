"""Published learning curves, shipped with the package.

Steps are simulator steps. The released grid is 100,000 steps; values between grid points do not
exist and are never interpolated.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from dataclasses import dataclass
from importlib import resources

FILES = ("reference_curves.csv", "reference_curves_sota.csv")
DEFAULT_ALGORITHM = "tdmpc2"

_TITLES = {
    "tdmpc2": "TD-MPC2",
    "tdmpc2-pixels": "TD-MPC2, pixels",
    "tdmpc": "TD-MPC",
    "dreamerv3": "DreamerV3",
    "sac": "SAC",
    "bmpc-1m": "BMPC",
    "bmpc-4m": "BMPC",
    "boom": "BOOM",
    "mrq": "MR.Q",
    "simba_utd2": "Simba",
    "simbaV2_utd2": "SimbaV2",
}
_SIZES = {"tdmpc2": "5M", "tdmpc2-pixels": "5M"}


@dataclass(frozen=True)
class Point:
    """Published episode return at one simulator step."""

    step: int
    mean: float
    min: float
    max: float
    num_seeds: int | None
    """``None`` where the authors do not say."""


@dataclass(frozen=True)
class Curve:
    """Published learning curve of one algorithm on one task."""

    algorithm: str
    task: str
    """Published name, without suite."""
    band: str
    """What ``min`` and ``max`` of the points are: ``seeds``, or another band in words."""
    points: tuple[Point, ...]

    def at(self, step: int) -> Point | None:
        """Return the published point at exactly this simulator step, ``None`` where there is none."""
        return next((point for point in self.points if point.step == step), None)

    @property
    def first(self) -> Point:
        """First published point after the start of training."""
        return next(point for point in self.points if point.step > 0)

    @property
    def label(self) -> str:
        """Name for legends, with size and number of seeds where they are known."""
        seeds = [point.num_seeds for point in self.points if point.num_seeds]
        parts = ["published", _SIZES.get(self.algorithm, "")]
        parts.append(f"{max(seeds)} seeds" if seeds else "")
        return f"{_TITLES.get(self.algorithm, self.algorithm)} ({', '.join(part for part in parts if part)})"


def reference_task(task: str) -> tuple[str, bool] | None:
    """Return (published task name, from pixels) of a canonical task, ``None`` for suites without published curves.

    ``dmc/ball_in_cup-catch`` and ``dmc/cup-catch`` are the same task, ``dmc/walker-walk-pixels`` is the pixel version.
    A name without suite is taken as published.
    """
    suite, _, name = task.rpartition("/")
    if suite not in ("", "dmc"):
        return None
    name = name.replace("_", "-").replace("ball-in-cup", "cup")
    return name.removesuffix("-pixels"), name.endswith("-pixels")


def reference_curve(task: str, algorithm: str = DEFAULT_ALGORITHM) -> Curve | None:
    """Return the published curve of an algorithm on a task, ``None`` where there is none.

    ``task`` is canonical (``dmc/cartpole-swingup``) or published (``cartpole-swingup``). Curves from pixels are the algorithm
    ``tdmpc2-pixels``; a pixel task selects it by itself, so that state and pixel curves are never mixed.

    Raises:
        ValueError: unknown algorithm.
    """
    if algorithm not in algorithms():
        raise ValueError(f"unknown reference algorithm '{algorithm}'; one of {', '.join(algorithms())}")
    found = reference_task(task)
    if found is None:
        return None
    name, pixels = found
    if pixels and not algorithm.endswith("-pixels"):
        algorithm += "-pixels"
    return _curves().get((algorithm, name))


def algorithms() -> tuple[str, ...]:
    """Return the names of all algorithms with published curves, sorted."""
    return tuple(sorted({algorithm for algorithm, _ in _curves()}))


@functools.cache
def _curves() -> dict[tuple[str, str], Curve]:
    points: dict[tuple[str, str, str], list[Point]] = {}
    for name in FILES:
        text = resources.files("worldmpc.report").joinpath("data", name).read_text(encoding="utf-8")
        for row in csv.DictReader(text.splitlines()):
            algorithm, band = _split_algorithm(row["algorithm"])
            seeds = int(row["num_seeds"]) if row["num_seeds"] else None
            point = Point(int(row["step"]), float(row["mean"]), float(row["min"]), float(row["max"]), seeds)
            if math.isfinite(point.mean):
                points.setdefault((algorithm, row["task"], band), []).append(point)
    return {
        (algorithm, task): Curve(algorithm, task, band, tuple(sorted(found, key=lambda point: point.step)))
        for (algorithm, task, band), found in points.items()
    }


def _split_algorithm(name: str) -> tuple[str, str]:
    """``bmpc(1M;min/max=95%CI)`` -> (``bmpc-1m``, ``95%CI``); a plain name has its seeds as band."""
    match = re.fullmatch(r"([^(]+)(?:\((?:(\w+);)?min/max=([^)]+)\))?", name)
    if match is None:
        raise ValueError(f"reference data: cannot read algorithm '{name}'")
    base, budget, band = match.groups()
    return f"{base}-{budget.lower()}" if budget else base, band or "seeds"
