"""Functions of nested tensors."""

from typing import NamedTuple

import pytest
import torch

from worldmpc.functional import tree_where


class Pair(NamedTuple):
    left: torch.Tensor
    right: tuple[torch.Tensor, ...]


@pytest.mark.parametrize("nested", [Pair, lambda *parts: parts], ids=["named", "plain"])
def test_tree_where_chooses_row_by_row(nested):
    mask = torch.tensor([True, False, True])
    yes, no = (Pair(value(3), nested(value(3, 2), value(3, 2, 4))) for value in (torch.ones, torch.zeros))
    chosen = tree_where(mask, yes, no)
    assert isinstance(chosen, Pair) and isinstance(chosen.right, type(yes.right))
    for part in (chosen.left, *chosen.right):
        assert torch.equal(part, mask.float().view(-1, *[1] * (part.dim() - 1)).expand(part.shape))
