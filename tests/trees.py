"""Comparing nested states leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, copy) of every tensor and number."""
    for name, value in tree.items():
        if value is None or isinstance(value, str):
            continue
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", torch.as_tensor(value).clone()


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Return the names of leaves that are not bit-equal; NaN equals NaN."""
    first, second = dict(leaves(one)), dict(leaves(two))
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(_plain(first[name]), _plain(second[name]))]


def _plain(value: Tensor) -> Tensor:
    return value.nan_to_num(nan=-7e7) if value.is_floating_point() else value
