"""Checkpoints of agents that imagine opponents, loaded by agents that imagine others, or nobody; and the reverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.opponents.simulation import ANYONE, OpponentSimulation
from worldmpc.types import Agent

WIDENED = ("dynamics.0.weight", "reward.0.weight")
"""First layers that read the other player's action behind everything else."""
NETWORKS = "opponents."


def fit_opponents(saved: Mapping[str, Any], agent: Agent) -> tuple[dict[str, Any], list[str]]:
    """Return the saved state of an agent as this one can load it, and one line for everything that was left out or is new.

    First layers of dynamics and reward lose the columns of the other player's action, or get such columns of zeros, with which they say
    what they said before. Imagined opponents are told apart by what they are (a bot's name, the digest of a checkpoint), not by their
    place: those that are in both keep their network and buffer, others begin anew. The optimiser of networks whose shape or number changed
    begins anew as well. Everything else stays as it is; a state that fits already is returned with no lines.
    """
    if not isinstance(agent, TDMPC2):
        return dict(saved), []
    simulation, former = agent.simulation, saved.get("simulation")
    if simulation is None and former is None:
        return dict(saved), []
    model, notes = dict(saved["model"]), []
    expected = agent.model.state_dict()
    state = {**saved, "model": model}
    changed = [name for name in WIDENED if name in model and model[name].shape[1] != expected[name].shape[1]]
    for name in changed:
        model[name] = _fitted(model[name], expected[name])
    if changed:
        how = "left out" if simulation is None else "new, and 0 at first"
        notes.append(f"{' and '.join(changed)}: the columns of the opponent's action are {how}")
        state["model_optimizer"] = agent.learner.state_dict()["model_optimizer"]
        notes.append("the world model's optimiser begins anew")
    networks = {name: model.pop(name) for name in list(model) if name.startswith(NETWORKS)}
    if simulation is not None:
        state["simulation"] = _matched(simulation, former, networks, model, expected, notes)
    elif former is not None:
        state["simulation"] = None
        notes.append(f"imagined opponents left out: {', '.join(former['names'])}")
    return state, notes


def _fitted(saved: Tensor, expected: Tensor) -> Tensor:
    """Cut or pad the last columns of a weight."""
    width = expected.shape[1]
    if saved.shape[1] > width:
        return saved[:, :width].contiguous()
    return torch.cat((saved, saved.new_zeros(len(saved), width - saved.shape[1])), 1)


def _matched(
    simulation: OpponentSimulation,
    former: Mapping[str, Any] | None,
    networks: Mapping[str, Tensor],
    model: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    notes: list[str],
) -> dict[str, Any]:
    """Return the simulation's state with what can be kept of a former one, and put its networks into ``model``."""
    own = simulation.state_dict()
    places = {} if former is None else {identity: place for place, identity in enumerate(former["ids"])}
    by_name = {} if former is None else {name: place for place, name in enumerate(former["names"])}
    kept, fresh = [], []
    for place, name in enumerate(simulation.names):
        identity = simulation.ids[name]
        # Whoever only acts has not looked behind paths: the name is then all that it knows.
        source = places.get(identity, by_name.get(name) if identity == name else None)
        prefix = f"{NETWORKS}{place}."
        wanted = {key: key.replace(prefix, f"{NETWORKS}{source}.", 1) for key in expected if key.startswith(prefix)}
        fits = source is not None and all(old in networks and networks[old].shape == expected[new].shape for new, old in wanted.items())
        model |= {new: networks[old] if fits else expected[new] for new, old in wanted.items()}
        (kept if fits else fresh).append(name)
        if source is not None and former is not None and name != ANYONE:  # what was seen outlasts the network
            old_name = former["names"][source]
            own["buffers"][name] = former["buffers"].get(old_name, own["buffers"][name])
    if former is not None:
        if list(former["names"]) == list(simulation.names) and not fresh:
            return {**own, **former}
        gone = [name for name, identity in zip(former["names"], former["ids"], strict=True) if identity not in simulation.ids.values()]
        gone = [name for name in gone if name not in kept]
        notes += [f"imagined opponents left out: {', '.join(gone)}"] if gone else []
        notes += [f"imagined opponents kept: {', '.join(kept)}"] if kept else []
        notes.append("the optimiser of imagined opponents begins anew")
    notes += [f"imagined opponents new, not trained yet: {', '.join(fresh)}"] if fresh else []
    return own
