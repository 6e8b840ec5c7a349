"""Checkpoints with and without imagined opponents load each other, and say what was kept and what is new."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from worldmpc.agents import make_agent
from worldmpc.config import make_config
from worldmpc.training.checkpoint import save_checkpoint
from worldmpc.training.create import create_agent
from worldmpc.training.restore import load_agent
from worldmpc.training.specs import spec_dict
from worldmpc.training.transfer import fit_opponents
from worldmpc.training.two_player import attach_references
from worldmpc.types import EnvSpec, Seat, SequenceBatch

SPEC = EnvSpec("hockey/self-play", (18,), 4, 251, other=Seat((18,), 4))


def agent_of(*references, enabled=True, **changes):
    over = {"opponent_simulation": {"enabled": True, "opponent_agents": list(references), **changes}} if enabled else {}
    return make_agent(make_config("debug", task="hockey", **over), SPEC)


def trained(agent):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.rand(*shape, generator=generator) * 2 - 1  # noqa: E731
    zero = torch.zeros(3, 8)
    extras = {"other_action": draw(3, 8, 4), "other_obs": draw(3, 8, 18)}
    batch = SequenceBatch(draw(4, 8, 18), draw(3, 8, 4), draw(3, 8), zero, zero, zero + 1, zero.long(), extras)
    for name in agent.simulation.references if agent.simulation else ():
        agent.simulation.store(name, draw(20, 18), draw(20, 4))
    for _ in range(3):
        agent.update(batch)
    return agent


def saved(agent, folder):
    return save_checkpoint(
        folder, "agent", {"agent": agent.state_dict()}, {"config": agent.config.to_dict(), "spec": spec_dict(agent.spec)}
    )


def loaded(path, **simulation):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent, _ = load_agent(path, overrides={"opponent_simulation": simulation} if simulation else None)
    return agent, [str(warning.message).partition(": ")[2] for warning in caught]


def acts(agent):
    carry = agent.init_carry(3)
    agent.reset_eval_noise(1)
    return agent.act(carry, torch.linspace(-1, 1, 54).view(3, 18), "eval").action


def test_the_same_opponents_load_without_a_word(tmp_path):
    agent = trained(agent_of("weak", "strong"))
    again, notes = loaded(saved(agent, tmp_path))
    assert notes == [] and torch.equal(acts(again), acts(agent))
    assert len(again.simulation.buffers["weak"]) == 20


def test_without_opponents_what_was_saved_with_them(tmp_path):
    agent = trained(agent_of("weak"))
    plain, notes = loaded(saved(agent, tmp_path), enabled=False)
    assert plain.simulation is None and plain.model.opponents is None
    assert notes == [
        "dynamics.0.weight and reward.0.weight: the columns of the opponent's action are left out",
        "the world model's optimiser begins anew",
        "imagined opponents left out: weak, anyone",
    ]
    z, action = torch.rand(5, 16), torch.rand(5, 4)
    still = torch.zeros(5, 4)  # an opponent that does nothing
    assert torch.allclose(plain.model.next(z, action), agent.model.next(z, torch.cat((action, still), -1)), atol=1e-6)
    assert torch.equal(plain.model.pi(z), agent.model.pi(z)) and bool(acts(plain).isfinite().all())


def test_with_opponents_what_was_saved_without_them(tmp_path):
    plain = trained(agent_of(enabled=False))
    agent, notes = loaded(saved(plain, tmp_path), enabled=True, opponent_agents=["weak"])
    assert notes == [
        "dynamics.0.weight and reward.0.weight: the columns of the opponent's action are new, and 0 at first",
        "the world model's optimiser begins anew",
        "imagined opponents new, not trained yet: weak, anyone",
    ]
    z, action, other = torch.rand(5, 16), torch.rand(5, 4), torch.rand(5, 4)
    assert torch.allclose(agent.model.next(z, torch.cat((action, other), -1)), plain.model.next(z, action), atol=1e-6)
    joint = torch.cat((action, other), -1)
    assert torch.allclose(agent.model.reward(z, joint), plain.model.reward(z, action), atol=1e-6)
    trained(agent)  # it learns on
    assert not torch.allclose(agent.model.next(z, joint), plain.model.next(z, action), atol=1e-6)


def test_reordered_opponents_keep_their_own_networks_and_buffers(tmp_path):
    agent = trained(agent_of("weak", "strong"))
    other, notes = loaded(saved(agent, tmp_path), opponent_agents=["strong", "weak"])
    assert notes == ["imagined opponents kept: strong, weak, anyone", "the optimiser of imagined opponents begins anew"]
    z = torch.rand(5, 16)
    for name in ("weak", "strong", "anyone"):
        old, new = (one.simulation.clones[one.simulation.names.index(name)] for one in (agent, other))
        assert torch.equal(old.logits(z), new.logits(z))
    rows = agent.simulation.buffers["strong"].state_dict()["rows"]
    assert torch.equal(other.simulation.buffers["strong"].state_dict()["rows"], rows)
    assert not torch.equal(other.simulation.buffers["weak"].state_dict()["rows"], rows)


def test_a_changed_list_keeps_whoever_is_still_there(tmp_path):
    agent = trained(agent_of("weak", "strong"))
    other, notes = loaded(saved(agent, tmp_path), opponent_agents=["strong", "random"], pooled=False)
    assert notes == [
        "imagined opponents left out: weak, anyone",
        "imagined opponents kept: strong",
        "the optimiser of imagined opponents begins anew",
        "imagined opponents new, not trained yet: random",
    ]
    assert len(other.simulation.buffers["strong"]) == 20 and len(other.simulation.buffers["random"]) == 0
    trained(other)


def test_another_width_of_networks_begins_anew(tmp_path):
    agent = trained(agent_of("weak"))
    other, notes = loaded(saved(agent, tmp_path), hidden=[24])
    assert notes[-1] == "imagined opponents new, not trained yet: weak, anyone"
    assert len(other.simulation.buffers["weak"]) == 20  # what was seen outlasts the network
    assert bool(acts(other).isfinite().all())


def test_opponents_are_known_by_what_they_are_not_by_their_names():
    agent = trained(agent_of("TDMPC2:old/place"))
    agent.simulation.ids["TDMPC2:old/place"] = "digest"
    moved = agent_of("TDMPC2:new/place")
    moved.simulation.ids["TDMPC2:new/place"] = "digest"
    state, notes = fit_opponents(agent.state_dict(), moved)
    assert "imagined opponents kept: TDMPC2:new/place, anyone" in notes
    moved.load_state_dict(state)
    z = torch.rand(5, 16)
    assert torch.equal(moved.simulation.clones[0].logits(z), agent.simulation.clones[0].logits(z))
    replaced = agent_of("TDMPC2:old/place")
    replaced.simulation.ids["TDMPC2:old/place"] = "another digest"
    assert "imagined opponents new, not trained yet: TDMPC2:old/place" in fit_opponents(agent.state_dict(), replaced)[1]


def test_states_without_opponents_pass_as_they_are():
    agent = agent_of(enabled=False)
    state = agent.state_dict()
    fitted, notes = fit_opponents(state, agent_of(enabled=False))
    assert notes == [] and fitted.keys() == state.keys() and all(fitted[name] is state[name] for name in state)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_run_goes_on_in_all_three_cases(tmp_path, before, after):
    from worldmpc.training.run import run

    def configured(enabled, steps, references, **more):
        over = {"opponent_simulation": {"enabled": True, "opponent_agents": references}} if enabled else {}
        sizes = {"env": {"num_envs": 2, "episode_length": 20}, "eval": {"episodes": 2, "prior": False, "video": False}}
        sizes["log"] = {"progress": "none"}
        return make_config(
            "debug", task="hockey", opponents=["weak"], steps=steps, eval_freq=10_000, train={"seed_decisions": 20}, **sizes, **over, **more
        )

    first = run(configured(before, 60, ["weak"], run_dir=str(tmp_path / "run")))
    result = run(configured(after, 120, ["still", "weak"], resume=str(first.run_dir)))
    assert result.finished and result.decisions == 120


def reference(folder, seed):
    """Save an agent to be imagined."""
    plain = make_agent(make_config("debug", task="hockey", seed=seed), SPEC)
    save_checkpoint(folder.parent, folder.name, {"agent": plain.state_dict()}, {"config": plain.config.to_dict(), "spec": spec_dict(SPEC)})


def created(path, *references):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent = create_agent({"checkpoint_path": str(path), "opponent_simulation.opponent_agents": [f"TDMPC2:{one}" for one in references]})
    return agent, " ".join(str(warning.message) for warning in caught)


def test_files_are_known_by_what_is_in_them(tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    reference(one, 1)
    agent = trained(create_agent(agent_of(f"TDMPC2:{one}").config, SPEC))
    path = saved(agent, tmp_path / "runs")
    again, notes = created(path, one)
    z = torch.rand(5, 16)
    assert "new" not in notes and torch.equal(again.simulation.clones[0].logits(z), agent.simulation.clones[0].logits(z))
    shutil.copytree(one, moved)
    for found, notes in (created(path, moved), loaded(path, opponent_agents=[str(moved)])):  # by another path, with and without the type
        assert "not trained yet" not in str(notes) and f"kept: {found.simulation.names[0]}, anyone" in str(notes)
        assert torch.equal(found.simulation.clones[0].logits(z), agent.simulation.clones[0].logits(z))
    shutil.rmtree(one)
    reference(one, 2)
    other, notes = created(path, one)
    assert f"new, not trained yet: TDMPC2:{one}" in notes
    assert not torch.equal(other.simulation.clones[0].logits(z), agent.simulation.clones[0].logits(z))
    acting, notes = loaded(path)  # who only acts has no use for what is there now
    assert notes == [] and torch.equal(acts(acting), acts(agent))
    shutil.rmtree(one)
    assert loaded(path)[1] == []


def test_a_reference_that_plays_counts_by_any_name(tmp_path):
    folder = tmp_path / "one"
    reference(folder, 1)
    agent = agent_of(f"TDMPC2:{folder}", "weak")
    attach_references(agent, 2, met=["weak", str(folder), "self_play_3"])
    assert agent.simulation.demonstrations.also == {"weak": "weak", str(folder): f"TDMPC2:{folder}"}
    extras = {"other_action": torch.full((2, 4), 0.3), "other_views": torch.zeros(2, 1, 18), "steps": torch.ones(2)}
    agent.watch_game(agent.init_carry(2), torch.zeros(2, 18), extras, names=[str(folder), "weak"], fresh=torch.zeros(2, dtype=torch.bool))
    rows = {name: buffer.state_dict()["rows"][:, 18] for name, buffer in agent.simulation.buffers.items()}
    assert rows[f"TDMPC2:{folder}"][0] == rows["weak"][1] == pytest.approx(0.3) and rows["weak"][0] != pytest.approx(0.3)
