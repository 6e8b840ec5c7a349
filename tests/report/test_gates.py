"""The table of gates: who passes, who misses, and what was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from worldmpc.config import AGENTS, make_config
from worldmpc.report.gates import Gate, gates_table, read_gates
from worldmpc.report.runs import RunError

GATE = Gate("dqn", "gym/CartPole-v1", "", 100, 475.0, "somebody 500")


def write(folder: Path, returns: dict[int, float], preset: str = "tuned", step: int = 100) -> None:
    rows = [f"gym/CartPole-v1,dqn,{preset},{seed},{step},{value}" for seed, value in returns.items()]
    (folder / f"{preset}.csv").write_text("task,agent,preset,seed,env_steps,return_mean\n" + "\n".join(rows) + "\n")


def row(folder: Path, gate: Gate = GATE) -> str:
    return gates_table(folder, [gate]).splitlines()[2]


@pytest.mark.parametrize(
    ("returns", "verdict"),
    [({1: 500.0, 2: 450.0, 3: 476.0}, "pass"), ({1: 500.0, 2: 420.0, 3: 476.0}, "**missed**"), ({1: 500.0, 2: 500.0}, "few seeds")],
)
def test_a_gate_is_the_mean_over_three_seeds(tmp_path, returns, verdict):
    write(tmp_path, returns)
    assert f"| {verdict} |" in row(tmp_path) and f"({min(returns.values()):.0f}..{max(returns.values()):.0f})" in row(tmp_path)


def test_other_steps_tasks_and_agents_do_not_count(tmp_path):
    write(tmp_path, {1: 500.0, 2: 500.0, 3: 500.0}, step=90)
    assert "not measured" in row(tmp_path)
    write(tmp_path, {1: 500.0, 2: 500.0, 3: 500.0})
    for other in (GATE._replace(agent="ppo"), GATE._replace(task="gym/Acrobot-v1"), GATE._replace(env_steps=200)):
        assert "not measured" in row(tmp_path, other)


def test_each_preset_has_a_row(tmp_path):
    write(tmp_path, {1: 500.0, 2: 500.0, 3: 500.0})
    write(tmp_path, {1: 100.0, 2: 100.0, 3: 100.0}, preset="default")
    lines = gates_table(tmp_path, [GATE]).splitlines()[2:4]
    assert {"missed" in line for line in lines} == {True, False}


def test_a_gate_may_ask_for_a_planner(tmp_path):
    cells = [f"gym/CartPole-v1,mpc,default,{planner},{seed},100,500" for planner in ("cem", "icem") for seed in range(3)]
    (tmp_path / "mpc.csv").write_text("task,agent,preset,planner,seed,env_steps,return_mean\n" + "\n".join(cells) + "\n")
    gate = GATE._replace(agent="mpc")
    assert "mpc with icem" in row(tmp_path, gate._replace(planner="icem")) and "pass" in row(tmp_path, gate._replace(planner="icem"))
    assert "not measured" in row(tmp_path, gate._replace(planner="mppi"))
    assert sum("pass" in line for line in gates_table(tmp_path, [gate]).splitlines()) == 2, "both planners, apart"


def test_the_gates_of_the_package_name_agents_that_there_are():
    gates = read_gates()
    assert len(gates) == len({(gate.agent, gate.task, gate.planner) for gate in gates})
    for gate in gates:
        planner = {"planner.name": gate.planner} if gate.planner else {}
        assert gate.agent in AGENTS and make_config(agent=gate.agent, task=gate.task, **planner).task == gate.task and gate.env_steps >= 0


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        gates_table(tmp_path / "none")
