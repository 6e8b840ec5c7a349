"""Functions of nested tensors."""

from typing import NamedTuple

import pytest
import torch

from worldmpc.functional import parameter_table, tree_fill, tree_tensors, tree_where


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


def test_trees_are_taken_apart_and_put_together():
    tree = Pair(torch.zeros(3), (torch.ones(2, 2), torch.zeros(0, 4)))
    filled = tree_fill(tree, [tensor + 5 for tensor in tree_tensors(tree)])
    assert isinstance(filled, Pair) and torch.equal(filled.left, torch.full((3,), 5.0)) and filled.right[1].shape == (0, 4)
    assert tree_fill((), []) == () and float(tree.left.sum()) == 0
    for wrong in ([], [torch.zeros(3)], [torch.zeros(4), torch.ones(2, 2), torch.zeros(0, 4)]):
        with pytest.raises(ValueError, match="expected tensors of shapes"):
            tree_fill(tree, wrong)


def test_parameter_table_counts_what_is_learned():
    module = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(3, 2), "frozen": torch.nn.Linear(3, 2).requires_grad_(False), "b": torch.nn.Linear(1, 1)}
    )
    assert parameter_table(module) == [("a", 8), ("b", 2), ("total", 10)]
    assert parameter_table(torch.nn.ModuleDict()) == [("total", 0)]
