"""Whole runs: what they leave behind, and that nothing that happens to them loses anything."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.trees import differences, leaves
from worldmpc.config import ConfigError, make_config
from worldmpc.envs import EnvError
from worldmpc.envs.toy import Balance, PointMass
from worldmpc.models import kernels, native
from worldmpc.training import trainer
from worldmpc.training.checkpoint import CheckpointError, CheckpointStore, load_checkpoint
from worldmpc.training.hooks import EvalHook
from worldmpc.training.run import run, run_seeds
from worldmpc.training.trainer import DivergenceError

QUIET = {"eval.video": False, "log.progress": "none", "log.tensorboard": False}


def config(folder, **overrides):
    return make_config(
        "debug",
        **{"task": "toy/balance", "run_dir": str(folder), "steps": 120, "eval_freq": 60, "checkpoint.every": 40, **QUIET, **overrides},
    )


def state_of(folder: Path):
    """Every tensor and number of the newest checkpoint."""
    return dict(leaves(load_checkpoint(CheckpointStore(folder / "checkpoints", keep=2).newest_valid())[0]))


def assert_same_end(one: Path, two: Path) -> None:
    """Bit-equal state, and equal evaluations and losses."""
    assert [name for name in differences(state_of(one), state_of(two)) if name != "loop.seconds"] == []
    assert [row["return_mean"] for row in evaluations(one)] == [row["return_mean"] for row in evaluations(two)]
    timeless = [[{key: value for key, value in row.items() if not key.startswith("time/")} for row in records(path)] for path in (one, two)]
    assert timeless[0] == timeless[1]


def evaluations(folder):
    with (folder / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_leaves_everything_behind(tmp_path, capsys):
    folder = tmp_path / "run"
    result = run(config(folder, **{"log.tensorboard": True, "eval.video": True, "log.progress": "plain"}))
    assert result.finished and result.env_steps == 120
    assert {"config.json", "meta.json", "metrics.jsonl", "eval.csv", "tb", "checkpoints", "curve.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert [int(row["env_steps"]) for row in evaluations(folder)] == [0, 60, 120]
    assert all(row["prior_return_mean"] for row in evaluations(folder))
    assert {"decisions", "env_steps", "updates", "episodes", "train/total_loss", "train/plan_std", "time/decisions_per_s"} <= records(
        folder
    )[-1].keys()
    assert json.loads((folder / "config.json").read_text())["task"] == "toy/balance"
    output = capsys.readouterr().out
    assert "dynamics" in output and output.count("replay:") == 1
    last = [line for line in output.splitlines() if line.startswith("done:")][-1]
    assert f"return {result.last_return:.1f}" in last and "curve.png" in last
    assert ("no video: " in output) != (folder / "final.mp4").exists()


VARIANTS = {
    "published": {},
    "reanalysed": {"agent": "bmpc"},
    "all at once": {
        "multi_gamma.enabled": True,
        "multi_gamma.gammas": ["primary", 0.9],
        "model.num_dynamics": 2,
        "planner.uncertainty_coef": 0.1,
        "train.reset_every": 7,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_after_the_end_extends_the_run(variant, tmp_path):
    own = VARIANTS[variant]
    run(config(tmp_path / "short", steps=60, **own))
    run(config(tmp_path / "short", steps=120, resume="auto", **own))
    run(config(tmp_path / "long", steps=120, **own))
    assert_same_end(tmp_path / "short", tmp_path / "long")
    assert records(tmp_path / "long")[-1]["updates"] > 20
    snapshots = [path / "snapshots.jsonl" for path in (tmp_path / "short", tmp_path / "long")]
    assert [path.exists() for path in snapshots] == [variant == "all at once"] * 2
    if snapshots[0].exists():
        one, other = (path.read_text() for path in snapshots)
        assert one == other and one.count("\n") > 1


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL three times, wherever it hits, then run to the end."""
    arguments = [f"{name}={value}".lower() if isinstance(value, bool) else f"{name}={value}" for name, value in QUIET.items()]
    arguments += [
        "preset=debug",
        "task=toy/balance",
        "steps=600",
        "eval_freq=100",
        "checkpoint.every=50",
        "threads=1",
        "log.every=33",
        "train.utd=0.7",
        "env.num_envs=2",
    ]
    command = [sys.executable, "-m", "worldmpc", "train", *arguments, "resume=auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"run_dir={tmp_path / 'whole'}"], check=True, env=environment, capture_output=True)
    killed, kills = tmp_path / "killed", 0
    chance = random.Random(int.from_bytes(os.urandom(4)))
    while kills < 3:
        process = subprocess.Popen([*command, f"run_dir={killed}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list((killed / "checkpoints").glob("step_*"))) if killed.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if len(list((killed / "checkpoints").glob("step_*"))) > min(before, 1):
                break
        time.sleep(chance.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run([*command, f"run_dir={killed}"], check=True, env=environment, capture_output=True)
    assert_same_end(tmp_path / "whole", killed)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    command = [sys.executable, "-m", "worldmpc", "train", "preset=debug", "task=toy/balance", "steps=100000", f"run_dir={tmp_path / 'run'}"]
    command += ["eval.video=false", "log.progress=none", "threads=1", "checkpoint.every=1000000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "resume=auto" in output.splitlines()[-1] and "Traceback" not in errors
    assert int(state_of(tmp_path / "run")["loop.decisions"]) >= 100


def test_corrupt_newest_checkpoint_is_named_and_the_previous_one_used(tmp_path):
    run(config(tmp_path / "broken"))
    store = CheckpointStore(tmp_path / "broken" / "checkpoints", keep=2)
    newest = store.newest_valid()
    with (newest / "agent.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.warns(UserWarning, match=newest.name):
        run(config(tmp_path / "broken", resume="auto"))
    run(config(tmp_path / "whole"))
    assert_same_end(tmp_path / "broken", tmp_path / "whole")


def test_fresh_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [run(config(None, run_dir=None, steps=60)).run_dir for _ in range(2)]
    assert [folder.name for folder in folders] == ["tdmpc2-debug-seed1", "tdmpc2-debug-seed1-2"]
    assert run(config(None, run_dir=None, steps=80, resume="auto")).run_dir == folders[1]
    assert run(config(None, run_dir=None, steps=100, resume=str(folders[0]))).run_dir == folders[0]


def test_existing_run_is_not_overwritten(tmp_path):
    run(config(tmp_path / "run", steps=60))
    before = (tmp_path / "run" / "eval.csv").read_text()
    with pytest.raises(ConfigError, match="already holds a run; go on with resume=auto"):
        run(config(tmp_path / "run"))
    assert (tmp_path / "run" / "eval.csv").read_text() == before


def test_two_processes_cannot_share_a_folder(tmp_path):
    from worldmpc.training.folder import lock

    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"), pytest.raises(ConfigError, match="another process is writing"):
        run(config(tmp_path / "run"))


def test_checkpoint_of_another_architecture(tmp_path):
    run(config(tmp_path / "run", steps=60))
    with pytest.raises(CheckpointError, match=r"dynamics\.0\.weight|encoder\.0"):
        run(config(None, run_dir=None, resume=str(tmp_path / "run"), **{"model.mlp_dim": 24}))


def test_auto_resumes_only_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run(config(None, run_dir=None, steps=60))
    other = run(config(None, run_dir=None, steps=60, resume="auto", **{"loss.batch_size": 16}))
    assert first.run_dir != other.run_dir and json.loads((first.run_dir / "config.json").read_text())["loss"]["batch_size"] == 8
    with pytest.raises(ConfigError, match=r"another loss\.batch_size"):
        run(config(first.run_dir, steps=80, resume="auto", **{"loss.batch_size": 16}))
    continued = run(config(None, run_dir=None, steps=80, resume=str(first.run_dir), **{"loss.batch_size": 16}))
    assert continued.run_dir == first.run_dir and continued.env_steps == 80


def test_runs_of_earlier_versions_go_on(tmp_path):
    """Keys that did not exist then are what the preset has them now, not a change."""
    first = run(config(tmp_path / "run", steps=60))
    old = json.loads((first.run_dir / "config.json").read_text())
    for name in ("policy", "value", "reanalyze", "multi_gamma", "label"):
        del old[name]
    del old["model"]["num_dynamics"]
    (first.run_dir / "config.json").write_text(json.dumps(old))
    assert run(config(first.run_dir, steps=80, resume="auto")).env_steps == 80
    with pytest.raises(ConfigError, match=r"another value\.target"):
        run(config(first.run_dir, steps=90, resume="auto", **{"value.target": "n_step"}))


@pytest.mark.parametrize(
    "change", [{"task": "toy/pointmass"}, {"env.action_repeat": 2}, {"model.simnorm_layout": "consecutive"}, {"planner.horizon": 4}]
)
def test_what_would_change_the_past_is_refused(tmp_path, change):
    run(config(tmp_path / "run", steps=60))
    before = (tmp_path / "run" / "eval.csv").read_text()
    with pytest.raises((ConfigError, CheckpointError)):
        run(config(None, run_dir=None, resume=str(tmp_path / "run"), **change))
    assert (tmp_path / "run" / "eval.csv").read_text() == before


def test_auxiliary_values_of_another_kind_do_not_go_on(tmp_path):
    heads = {"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.97], "multi_gamma.bootstrap": "self"}
    folder = run(config(tmp_path / "run", steps=60, **heads)).run_dir
    for key, value in (("gammas", ["primary", 0.995]), ("head", "separate"), ("hidden_layers", 1), ("bootstrap", "primary")):
        with pytest.raises(ConfigError, match=rf"multi_gamma\.{key}.*begin a new run"):
            run(config(None, run_dir=None, resume=str(folder), **{**heads, f"multi_gamma.{key}": value}))
    assert run(config(None, run_dir=None, resume=str(folder), **{**heads, "steps": 80, "multi_gamma.loss_weight": 0.2})).env_steps == 80


def test_going_on_from_an_older_checkpoint_leaves_the_best_of_what_came_after_behind(tmp_path, capsys):
    folder = run(config(tmp_path / "run", steps=60, **{"checkpoint.every": 20, "checkpoint.keep": 9})).run_dir
    store = CheckpointStore(folder / "checkpoints", keep=9)
    store._link_best(folder / "checkpoints" / "step_000000060")
    run(config(None, run_dir=None, resume=str(folder / "checkpoints" / "step_000000020"), steps=20))
    assert "the best checkpoint was of a later step than this run goes on from, and is forgotten" in capsys.readouterr().out
    assert store.best is None or load_checkpoint(store.best)[1]["env_steps"] == 20


def test_resume_goes_on_in_its_own_folder(tmp_path):
    run(config(tmp_path / "run", steps=60))
    with pytest.raises(ConfigError, match="goes on in its own folder"):
        run(config(tmp_path / "other", resume=str(tmp_path / "run")))


def test_own_environment_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(config(None, run_dir=None, task="dmc/cartpole-swingup", steps=60), task=Balance)
    assert result.run_dir == Path("runs/Balance/tdmpc2-debug-seed1")
    assert json.loads((result.run_dir / "config.json").read_text())["task"] == "Balance"


def stop_in_evaluation(folder, behind):
    """A hook that lets the evaluation after the given decision end in its middle, once."""

    def stop(state, metrics):
        if state.decisions == behind and not (folder / "once").exists():
            (folder / "once").touch()
            act = state.agent.act

            def stopping(carry, obs, mode):
                state.stop = state.stop or mode == "prior"
                return act(carry, obs, mode)

            state.agent.act = stopping

    return stop


def test_stop_during_an_evaluation(tmp_path):
    """The evaluation is left, everything is saved, and the resumed run does it again."""
    stopped = tmp_path / "stopped"
    result = run(config(stopped, eval_freq=70), extra_hooks=(stop_in_evaluation(stopped, 60),))
    assert not result.finished and result.env_steps == 70
    run(config(stopped, eval_freq=70, resume="auto"))
    run(config(tmp_path / "whole", eval_freq=70))
    assert_same_end(stopped, tmp_path / "whole")


def test_stop_where_episodes_are_reported(tmp_path):
    """The record of a step whose evaluation is stopped is written again, with the episodes that it is about."""
    stopped, often = tmp_path / "stopped", {"eval_freq": 40, "log.every": 20, "task": "toy/pointmass", "env.episode_length": 15}
    assert not run(config(stopped, **often), extra_hooks=(stop_in_evaluation(stopped, 39),)).finished
    run(config(stopped, resume="auto", **often))
    run(config(tmp_path / "whole", **often))
    assert any(row["decisions"] == 40 and "train/episode_return" in row for row in records(tmp_path / "whole"))
    assert_same_end(stopped, tmp_path / "whole")


def test_stop_during_the_first_evaluation(tmp_path):
    """There is no step yet whose hooks could be done again."""

    def stopping(self, state):
        state.stop, state.settled = True, False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvalHook, "run", stopping)
        assert not run(config(tmp_path / "stopped")).finished
    run(config(tmp_path / "stopped", resume="auto"))
    run(config(tmp_path / "whole"))
    assert [row["decisions"] for row in evaluations(tmp_path / "stopped")] == ["0", "60", "120"]
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_records_without_checkpoints_are_not_wiped(tmp_path):
    """Somebody who needed the disk removed them; going on from nothing would begin with emptying the records."""
    run(config(tmp_path / "run", steps=60))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "eval.csv").read_text(), (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"has records of 60 decisions and no checkpoint.*choose another run_dir, or remove"):
        run(config(tmp_path / "run", resume="auto"))
    assert before == ((tmp_path / "run" / "eval.csv").read_text(), (tmp_path / "run" / "metrics.jsonl").read_text())


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\); do not start the run twice"):
        assert run(config(tmp_path / "run", steps=20)).finished


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    """As with ``| head``: nothing more is shown, and the run is done."""
    words = "train preset=debug task=toy/balance steps=120 eval.video=false log.progress=plain log.every=10 threads=1"
    command = f"{sys.executable} -m worldmpc {words} run_dir={tmp_path / 'run'} | head -n 1"
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120)
    assert [row["decisions"] for row in evaluations(tmp_path / "run")][-1] == "120"


def test_resumed_equals_uninterrupted_with_the_products_of_large_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "NATIVE_FROM", 1)

    def stop_at_70(state, metrics):
        state.stop = state.decisions == 70

    assert not run(config(tmp_path / "stopped"), extra_hooks=(stop_at_70,)).finished
    run(config(tmp_path / "stopped", resume="auto"))
    run(config(tmp_path / "whole"))
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_renderer_that_fails_never_fails_the_run(tmp_path):
    class Unseen(Balance):
        def render(self):
            raise ZeroDivisionError("no light")

    result = run(config(tmp_path / "run", steps=60, **{"eval.video": True}), task=Unseen)
    assert result.finished and not (tmp_path / "run" / "final.mp4").exists()


@pytest.mark.parametrize("resume", ["nowhere", "."])
def test_resume_from_nothing(tmp_path, resume, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="resume: expected never, auto, a run folder or a checkpoint folder"):
        run(config(tmp_path / "run", resume=resume))


class Misbehaving(Balance):
    """Goes wrong at its 70th step."""

    total, how = 0, "raise"

    def step(self, action):
        Misbehaving.total += 1
        obs, reward, *rest = super().step(action)
        if Misbehaving.total == 70:
            if self.how == "raise":
                raise ValueError("motor on fire")
            reward = float("nan")
        return obs, reward, *rest


@pytest.mark.parametrize(("how", "message"), [("raise", "motor on fire"), ("nan", "non-finite reward")])
def test_failing_environment_saves_and_says_so(tmp_path, how, message):
    made = []

    def factory():
        made.append(Misbehaving() if not made else Balance())
        return made[-1]

    Misbehaving.total, Misbehaving.how = 0, how
    with pytest.raises(EnvError, match=message):
        run(config(tmp_path / "run"), task=factory)
    assert int(state_of(tmp_path / "run")["loop.decisions"]) == 69


def test_diverging_loss_saves_and_names_the_term(tmp_path):
    def poison(state, metrics):
        if state.decisions == 90:
            state.source.replay._data[:, 1] = np.nan

    with pytest.raises(DivergenceError, match=r"reward_loss is nan.*saved at 91 simulator steps"):
        run(config(tmp_path / "run"), extra_hooks=(poison,))
    assert state_of(tmp_path / "run")["agent.model.dynamics.0.weight"].isfinite().all()


def test_a_diverged_run_goes_on_with_other_settings(tmp_path, monkeypatch):
    """On a GPU losses are read at log intervals, so that the state saved holds those of the update that was not applied."""
    monkeypatch.setattr(trainer, "check_losses", lambda *arguments: None)
    with pytest.raises(DivergenceError, match="saved at"):
        run(config(tmp_path / "run", **{"train.max_loss": 1e-3, "log.every": 10}))
    assert run(config(None, run_dir=None, resume=str(tmp_path / "run"), **{"log.every": 10})).finished


def test_full_disk_ends_with_one_line_and_older_checkpoints_intact(tmp_path, monkeypatch):
    save = CheckpointStore.save

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(self, step, *arguments, **keywords):
        if step == 80:
            monkeypatch.setattr(os, "fsync", no_space)
        return save(self, step, *arguments, **keywords)

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(config(tmp_path / "run"))
    monkeypatch.undo()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step_"))
    assert "step_000000080" not in kept and kept
    run(config(tmp_path / "run", resume="auto"))
    run(config(tmp_path / "whole"))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_environment_object_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ConfigError, match="pass a function"):
        run(config(tmp_path / "run"), task=PointMass())


def test_ends_once_the_wanted_return_is_reached(tmp_path):
    wanted = {"train.until_return": 5.0, "eval_freq": 40}
    result = run(config(tmp_path / "run", task="toy/balance", **wanted))
    assert result.finished and result.env_steps in (0, 40, 80) and result.last_return >= 5
    again = run(config(tmp_path / "run", resume="auto", **wanted))
    assert again.finished and again.env_steps == result.env_steps
    assert not run(config(tmp_path / "other", **{"train.until_return": 1e6})).last_return >= 1e6


def test_seeds_train_together_and_load_alone(tmp_path):
    """Folders, files and checkpoints as of solo runs; resumed together or alone."""
    both = run_seeds(config(tmp_path / "both", seeds=(4, 9)))
    assert [result.run_dir.name for result in both] == ["seed4", "seed9"] and all(result.finished for result in both)
    for result, seed in zip(both, (4, 9), strict=True):
        assert [row["env_steps"] for row in evaluations(result.run_dir)] == ["0", "60", "120"]
        assert json.loads((result.run_dir / "config.json").read_text())["seed"] == seed
        solo = run(config(tmp_path / f"solo{seed}", seed=seed))
        # Before anything is learned they are the same bit for bit, then to rounding, which planning amplifies.
        assert evaluations(result.run_dir)[0]["return_mean"] == evaluations(solo.run_dir)[0]["return_mean"]
        assert records(result.run_dir)[0]["train/total_loss"] == pytest.approx(records(solo.run_dir)[0]["train/total_loss"], rel=0.2)
    alone = run(config(both[0].run_dir, seed=4, steps=160, resume="auto"))
    assert alone.run_dir == both[0].run_dir and alone.env_steps == 160


def test_seeds_go_on_together_from_the_last_common_checkpoint(tmp_path):
    def stop_at_90(state, metrics):
        state.stop = state.stop or state.decisions == 90

    first = run_seeds(config(tmp_path / "both", seeds=(1, 2), **{"checkpoint.every": 40}), extra_hooks=(stop_at_90,))
    assert [result.env_steps for result in first] == [90, 90]
    shutil.rmtree(first[1].run_dir / "checkpoints" / "step_000000090")
    second = run_seeds(config(tmp_path / "both", seeds=(1, 2), resume="auto", **{"checkpoint.every": 40}))
    assert all(result.finished and result.env_steps == 120 for result in second)
    whole = run_seeds(config(tmp_path / "whole", seeds=(1, 2), **{"checkpoint.every": 40}))
    for one, two in zip(second, whole, strict=True):
        assert_same_end(one.run_dir, two.run_dir)


def test_a_damaged_checkpoint_of_one_seed_takes_all_to_the_one_before(tmp_path, capsys):
    fine = {"checkpoint.every": 40}
    whole = run_seeds(config(tmp_path / "both", seeds=(1, 2), **fine))
    file = whole[0].run_dir / "checkpoints" / "step_000000120" / "agent.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for name in ("best", "last"):  # whatever else points at the same step
        shutil.rmtree(whole[0].run_dir / "checkpoints" / name, ignore_errors=True)
    with pytest.warns(UserWarning, match="trying the one before"):
        again = run_seeds(config(tmp_path / "both", seeds=(1, 2), resume="auto", **fine))
    assert all(result.finished and result.env_steps == 120 for result in again)


def test_seeds_that_are_added_or_lost_catch_up_alone(tmp_path, capsys):
    first = run_seeds(config(tmp_path / "many", seeds=(1, 2)))
    shutil.rmtree(first[1].run_dir)
    results = run_seeds(config(tmp_path / "many", seeds=(1, 2, 3), resume="auto", steps=160))
    assert [(result.run_dir.name, result.env_steps, result.finished) for result in results] == [
        (f"seed{seed}", 160, True) for seed in (1, 2, 3)
    ]
    output = " ".join(capsys.readouterr().out.split())
    assert "seed 3 catches up alone from 0 simulator steps" in output
    assert "seed 2: return" in output and "seed 3: return" in output
    solo = run(config(tmp_path / "solo", seed=3))
    assert evaluations(results[2].run_dir)[0]["return_mean"] == evaluations(solo.run_dir)[0]["return_mean"]


class _Fails(PointMass):
    """Raises at its n-th step, in the seeds of one run after the other."""

    made: list[int] = []
    at: dict[int, int] = {}

    def __init__(self):
        super().__init__()
        self._number, self._steps = len(_Fails.made), 0
        _Fails.made.append(self._number)

    def step(self, action):
        self._steps += 1
        if self._steps == _Fails.at.get(self._number):
            raise RuntimeError("broken joint")
        return super().step(action)


@pytest.mark.parametrize("who", [0, 1])
def test_an_environment_that_fails_costs_no_other_seed_its_state(tmp_path, monkeypatch, who):
    """Environments are made in the order of the seeds, each followed by those of its evaluation."""
    monkeypatch.setattr(_Fails, "made", [])
    count = {"eval.episodes": 2, "checkpoint.every": 1000}
    training = [0, 3][who]
    monkeypatch.setattr(_Fails, "at", {training: 95})
    with pytest.raises(EnvError, match=rf"^seed {who + 1}: .*broken joint.*\[saved at"):
        run_seeds(config(tmp_path / "both", seeds=(1, 2), **count), task=_Fails)
    saved = [CheckpointStore(tmp_path / "both" / f"seed{seed}" / "checkpoints", keep=9).newest_valid() for seed in (1, 2)]
    expected = ["step_000000095", "step_000000095"]
    expected[who] = "step_000000094"
    assert [path.name for path in saved] == expected
    monkeypatch.setattr(_Fails, "at", {})
    results = run_seeds(config(tmp_path / "both", seeds=(1, 2), resume="auto", **count), task=_Fails)
    assert all(result.finished and result.env_steps == 120 for result in results)


def test_an_evaluation_that_fails_in_the_end_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_Fails, "made", [])
    monkeypatch.setattr(_Fails, "at", {1: 60})  # in the second evaluation of seed 1; one takes 20 steps without planning and 20 with it
    options = {"eval.episodes": 2, "checkpoint.every": 1000, "eval_freq": 1000, "env.episode_length": 20}
    with pytest.raises(EnvError, match=r"broken joint.*\[saved at 120"):
        run_seeds(config(tmp_path / "both", seeds=(1, 2), **options), task=_Fails)
    for seed in (1, 2):
        assert CheckpointStore(tmp_path / "both" / f"seed{seed}" / "checkpoints", keep=9).newest_valid().name == "step_000000120"


def test_seeds_name_who_diverged(tmp_path):
    with pytest.raises(DivergenceError, match=r"^seed 1: .* \[saved at .*seed1\]"):
        run_seeds(config(tmp_path / "both", seeds=(1, 2), **{"train.max_loss": 1e-9}))
    assert all((tmp_path / "both" / name / "checkpoints").is_dir() for name in ("seed1", "seed2"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cuda_graph": True}, "cuda_graph: needs device=cuda, this run is on cpu"),
        ({"seeds": (1, 1)}, "seeds: expected different numbers"),
        ({"seeds": ()}, "seeds: expected different numbers"),
        ({"seeds": (1, 2), "train.until_return": 5.0}, "train.until_return: expected null with seeds"),
        ({"seeds": (1, 2), "resume": "somewhere"}, "resume: expected never or auto with seeds"),
        ({"seeds": "1,2"}, "seeds: expected a list"),
    ],
)
def test_modes_that_cannot_be_had(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path / "run", **overrides))
    assert not (tmp_path / "run").exists()


def test_compile_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="compile: needs a C\\+\\+ compiler.*leave it out"):
        run(config(tmp_path / "run", compile=True))


def test_seeds_need_environments_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match="seeds: every seed needs environments of its own"):
        run(config(tmp_path / "run", seeds=(1, 2)), task=PointMass())


def test_says_that_the_networks_in_c_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: "not compiled")
    run(config(tmp_path / "run", steps=10, **{"log.progress": "plain"}))
    assert "the faster networks in C are not used (not compiled)" in capsys.readouterr().out
