"""What imagined opponents know of games that nobody learned from: ``python -m benchmarks.opponent_models RECORD RUN [RUN ...] [games=40]``.

Each run (trained with ``opponent_simulation.enabled=true``) plays unseen games against each of its references. Of every decision the
other player's action is predicted before it is seen: by each cloning network, by their mixture under the belief so far, and, to compare, by
how often actions fall into the same bins in the other half of these games, whatever is observed. All are log-densities in nats per
decision, the mean over games; ``uniform`` knows nothing. ``identified`` is the share of games in whose end the belief favours the reference
that played.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import EnvConfig
from worldmpc.envs import make_envs
from worldmpc.models.cloning import BINS
from worldmpc.noise import derive_seed
from worldmpc.opponents.games import play_games
from worldmpc.opponents.loaders import load_player
from worldmpc.opponents.players import AgentCarry, AgentPlayer
from worldmpc.opponents.simulation import ANYONE
from worldmpc.report.opponent_models import SCHEMA
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.training.restore import load_agent
from worldmpc.training.two_player import context_of


class Recorder(AgentPlayer):
    """Plays as an agent does, and writes down what its opponent did and what was expected of it; one game at a time."""

    def __init__(self, agent: TDMPC2) -> None:
        super().__init__(agent)
        assert agent.simulation is not None
        self.simulation, self.model = agent.simulation, agent.model
        self.games: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def init_carry(self, games: int, generator: torch.Generator) -> AgentCarry:
        """Begin a new record."""
        self.games.append([])
        return super().init_carry(games, generator)

    def note(self, own: Any, obs: Tensor, other_action: Tensor) -> Any:
        """Write down log-densities of the networks [K], the belief before [K], and the action [A2]."""
        z = self.model.encode(obs)
        density = torch.stack([clone.log_prob(z, other_action)[0] for clone in self.simulation.clones])
        self.games[-1].append((density.detach(), torch.log_softmax(own.belief[0], -1), other_action[0]))
        return super().note(own, obs, other_action)


@torch.no_grad()
def study(run: str, games: int) -> list[dict[str, Any]]:
    """Return one row per reference that plays."""
    agent, config = load_agent(run, device="cpu")
    assert isinstance(agent, TDMPC2) and agent.simulation is not None, f"{run}: imagines no opponents"
    names = agent.simulation.names
    rows = []
    for opponent in agent.simulation.references:
        recorder = Recorder(agent)
        with make_envs(config.task, EnvConfig(num_envs=1)) as envs:
            player = load_player(opponent, context_of(agent.spec.name, agent.simulation.other))
            play_games(envs, recorder, player, games, derive_seed(config.seed, "unseen", opponent))
        played = [game for game in recorder.games if game]
        density = [torch.stack([step[0] for step in game]) for game in played]
        belief = [torch.stack([step[1] for step in game]) for game in played]
        actions = [torch.stack([step[2] for step in game]) for game in played]
        mixture = [torch.logsumexp(one + before, -1) for one, before in zip(density, belief, strict=True)]
        last = [int((before[-1]).argmax()) for before in belief]
        row: dict[str, Any] = {"run": run, "seed": config.seed, "opponent": opponent, "games": len(played)}
        row |= {"decisions": sum(map(len, played)), "uniform": -agent.spec.action_dim * math.log(2), "marginal": marginal(actions)}
        row |= {f"network_{name}": mean([one[:, place] for one in density]) for place, name in enumerate(names)}
        row |= {"belief": mean(mixture), "identified": float(np.mean([names[place] == opponent for place in last]))}
        row["named_anyone"] = float(np.mean([names[place] == ANYONE for place in last]))
        rows.append(row)
        print(
            ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()), flush=True
        )
    return rows


def mean(games: list[Tensor]) -> float:
    """Return the mean over games of a quantity of every decision."""
    return float(np.mean([float(game.mean()) for game in games]))


def marginal(games: list[Tensor]) -> float:
    """Return how likely actions are by how often they fall into each bin in the other half of the games."""
    halves = games[::2], games[1::2]
    found = []
    for own, others in (halves, halves[::-1]):
        bins = [((game.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1) for game in others]
        counts = torch.nn.functional.one_hot(torch.cat(bins), BINS).sum(0).float() + 1  # none is impossible
        log_probs = (counts / counts.sum(-1, keepdim=True)).log()
        for game in own:
            place = ((game.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1)
            found.append(log_probs.gather(1, place.t()).sum(0) - game.shape[1] * math.log(2 / BINS))
    return mean(found)


def main() -> None:
    """Study runs and write."""
    torch.set_num_threads(1)
    words = [word for word in sys.argv[1:] if not word.startswith("games=")]
    games = next((int(word.partition("=")[2]) for word in sys.argv[1:] if word.startswith("games=")), 40)
    rows = [row for run in words[1:] for row in study(run, games)]
    facts = {"command": command_line(), "commit": git_commit(), "machine": machine_info(), "threads": 1}
    data = {"schema": SCHEMA, **facts, "rows": rows}
    Path(words[0]).write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
