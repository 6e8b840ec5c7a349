"""What a run changes against its preset: exactly that, through a result file and back, and whether runs agree in it."""

from pathlib import Path

import pytest

from worldmpc.config import make_config
from worldmpc.report.overrides import different, overrides_of
from worldmpc.report.runs import export_results, find_runs


@pytest.mark.parametrize("preset", ["default", "cpu", "debug", "tuned"])
@pytest.mark.parametrize("agent", ["tdmpc2", "bmpc", "sac"])
def test_a_preset_overrides_nothing(preset: str, agent: str) -> None:
    if preset == "tuned" and agent != "tdmpc2":
        pytest.skip("has no tuned settings")
    task = {"tuned": {"task": "gym/CartPole-v1"}, "cpu": {"task": "dmc/walker-walk"}}.get(preset, {})
    length = {} if preset == "tuned" else {"steps": 7}
    own = {"seed": 3, **length, "label": "mine", "log.progress": "none", "threads": 1, "run_dir": "x"}
    assert overrides_of(make_config(preset, agent=agent, **task, **own).to_dict()) == {}


@pytest.mark.parametrize(
    ("preset", "own"),
    [
        ("tuned", {"task": "gym/CartPole-v1"}),
        ("debug", {"agent": "dqn", "task": "gym/CartPole-v1"}),
        ("debug", {"agent": "ppo", "ppo.anneal_clip": True}),
        ("debug", {"optim.schedule": "linear"}),
    ],
)
def test_the_length_of_a_run_counts_where_something_ends_with_it(preset, own) -> None:
    assert overrides_of(make_config(preset, **own, steps=777).to_dict())["steps"] == 777


def test_what_changes_no_result_does_not_count() -> None:
    own = {"env.workers": "async", "env.num_envs": 2, "env.num_workers": 2, "train.until_return": 3.0, "eval.prior": False, "seed": 9}
    logged = {"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9], "multi_gamma.debug_logging": True}
    found = overrides_of(make_config("debug", **own, **logged).to_dict())
    assert found == {"env.num_envs": 2, "multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9]}


def test_all_that_decides_about_results_is_found() -> None:
    own = {"reanalyze.batch_size": 20, "multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9], "planner.horizon": 5}
    assert overrides_of(make_config("cpu", agent="bmpc", **own).to_dict()) == own


def test_a_configuration_of_another_version() -> None:
    """Keys that it lacks have the preset's values; those that are gone, and all of an unknown preset, are overrides."""
    older = make_config("cpu").to_dict()
    del older["multi_gamma"], older["loss"]["rho"]
    assert overrides_of(older | {"gone": 1}) == {"gone": 1}
    found = overrides_of(make_config("cpu").to_dict() | {"preset": "theirs"})
    assert found["loss.batch_size"] == 128 and "loss.rho" not in found


def test_runs_that_differ() -> None:
    assert different([{"a": 1, "b": None}, {"a": 1, "b": None}, None]) == []
    assert different([{"a": 1}, {"a": 2}, {"c": 0}, None]) == ["a", "c"]
    assert different([{"a": None}, {}]) == ["a"]
    assert different([None, None]) == []


def test_result_files_carry_them(make_folder, tmp_path: Path) -> None:
    """Those of older files are unknown, not none."""
    folder = make_folder([(0, 1.0), (10, 2.0)])
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"horizon": 3', '"horizon": 4'))
    file = export_results(find_runs(folder), tmp_path / "one.csv")
    assert [run.overrides for run in find_runs(file)] == [{"planner.horizon": 4}]
    again = export_results(find_runs(file), tmp_path / "two.csv")
    assert again.read_text() == file.read_text()
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("# run")) + "\n")
    assert [run.overrides for run in find_runs(file)] == [None]
