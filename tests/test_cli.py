"""The command line: what users type, and that every mistake ends in one clear line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from tests.report.conftest import make_folder  # noqa: F401  (a fixture)
from worldmpc.cli import main
from worldmpc.config import PRESETS, RunConfig, flat_fields, make_config
from worldmpc.envs import VecEnv
from worldmpc.envs.toy import MAKERS, PointMass
from worldmpc.report.runs import load_results, load_run
from worldmpc.training.checkpoint import CheckpointError, CheckpointStore, load_checkpoint, save_checkpoint
from worldmpc.training.restore import find_checkpoint, load_agent

GOLDEN = Path(__file__).parent / "golden"
TINY = [
    "preset=debug",
    "threads=1",
    "steps=40",
    "eval_freq=40",
    "env.episode_length=10",
    "train.seed_decisions=20",
    "planner.iterations=1",
    "eval.episodes=2",
    "eval.video=false",
    "checkpoint.every=20",
    "log.every=10",
    "log.progress=none",
    "log.tensorboard=false",
]


class Sketchy(gymnasium.Env[Any, Any]):
    """Seven observations, three actions, and something going wrong after a while."""

    total = 0

    def __init__(self, trouble: str = "") -> None:
        self.observation_space = Box(-1.0, 1.0, (7,), np.float32)
        self.action_space = Box(-1.0, 1.0, (3,), np.float32)
        self.trouble = trouble

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(7, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        Sketchy.total += 1
        if Sketchy.total == 60:
            if self.trouble == "raise":
                raise RuntimeError("the gripper\nis stuck")
            if self.trouble == "nan":
                return np.full(7, np.nan, np.float32), 0.0, False, False, {}
            if self.trouble in ("SIGTERM", "SIGINT"):
                os.kill(os.getpid(), getattr(signal, self.trouble))
        return np.zeros(7, np.float32), 1.0, False, False, {"success": True}


def _uninstalled() -> gymnasium.Env[Any, Any]:
    raise gymnasium.error.DependencyNotInstalled("Box2D is not installed, run `pip install gymnasium[box2d]`")


@pytest.fixture(scope="module", autouse=True)
def _register() -> Iterator[None]:
    for name in ("", "raise", "nan", "SIGTERM", "SIGINT"):
        gymnasium.register(f"Sketchy{name}-v0", entry_point=Sketchy, kwargs={"trouble": name}, max_episode_steps=10)
    gymnasium.register("Uninstalled-v0", entry_point=_uninstalled)
    yield
    for name in [key for key in gymnasium.registry if key.startswith(("Sketchy", "Uninstalled"))]:
        del gymnasium.registry[name]


@pytest.fixture(autouse=True)
def _start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLDMPC_TRACEBACK", raising=False)
    Sketchy.total = 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TINY, "task=toy/pointmass", f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with one line on stderr, and return that line."""

    def run(*words: str, status: int = 2) -> str:
        capsys.readouterr()
        found = main(list(words))
        err = capsys.readouterr().err
        assert found == status, err
        lines = [line for line in err.splitlines() if not line.startswith("worldmpc: warning: ")]
        assert len(lines) == 1 and lines[0].startswith("worldmpc: error: "), err
        return lines[0]

    return run


# Help.


def test_train_help_lists_every_key_with_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, item in flat_fields():
        assert f" {name}=" in text and item.metadata["help"] in text, name
    for part in ("planner.horizon=3 [int]", "env.workers=sync [sync|async]", "env.discount=null [float or null]", "planner.mpc=true"):
        assert part in text
    for preset in PRESETS:
        assert f"preset={preset}" in text
    assert f"loss.batch_size={PRESETS['cpu']['loss']['batch_size']}, " in text  # what the preset changes


@pytest.mark.parametrize("command", ["evaluate", "tournament", "clone", "play", "compare", "report", "bench", "tasks"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    assert f"usage: worldmpc {command}" in capsys.readouterr().out


def test_help_is_fast_and_does_not_import_torch():
    code = (
        "import sys, time; begin = time.perf_counter(); import worldmpc\n"
        "from worldmpc.cli import main; from worldmpc.cli.text import COMMANDS\n"
        "assert main(['--help']) == 0 and len(COMMANDS) > 5 and not any(main([name, '--help']) for name in COMMANDS)\n"
        "assert not {'torch', 'hydra', 'numpy'} & set(sys.modules); print(time.perf_counter() - begin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1.5


def test_no_command_and_unknown_commands(fails: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert "did you mean train?" in fails("trian")
    assert "`worldmpc train task=toy/pointmass`" in fails("task=toy/pointmass")
    assert main(["--version"]) == 0


# Training.


def test_train_leaves_everything_where_it_belongs(trained: Path):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "meta.json", "metrics.jsonl", "eval.csv", "curve.png", "checkpoints"} <= names
    config = RunConfig.from_dict(json.loads((trained / "config.json").read_text()))
    assert config.preset == "debug" and config.planner.num_samples == PRESETS["debug"]["planner"]["num_samples"]  # from the preset
    assert config.steps == 40 and config.planner.iterations == 1  # ours come on top of the preset's
    assert load_run(trained).env_steps == 40
    assert {path.name for path in trained.parent.iterdir()} == {"run"}  # nothing of Hydra's


def test_composition_is_defaults_then_preset_then_overrides(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from omegaconf import OmegaConf

    words = ["planner.num_samples=99", "preset=cpu", "loss.batch_size=7", "model.size=1", "steps=1e5", "env.discount=0.9", "seed=3"]
    assert main(["train", "--cfg", "job", *words]) == 0
    shown = RunConfig.from_dict(OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out)))  # type: ignore[arg-type]
    overrides = {"planner.num_samples": 99, "loss.batch_size": 7, "model.size": "1", "steps": 100_000, "env.discount": 0.9}
    assert shown == make_config("cpu", seed=3, **overrides)
    assert not list(tmp_path.iterdir())


def test_multirun_trains_one_run_per_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *TINY, "task=toy/pointmass", "-m", "seed=1,2"]) == 0
    runs = tmp_path / "runs" / "toy-pointmass"
    assert sorted(path.name for path in runs.iterdir()) == ["tdmpc2-debug-seed1", "tdmpc2-debug-seed2"]
    assert [load_run(path).seed for path in sorted(runs.iterdir())] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no multirun.yaml, outputs or the like
    assert "run 2:" in capsys.readouterr().out


def test_multirun_goes_on_after_a_failure_and_then_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *TINY, "--multirun", "task=gym/Sketchyraise-v0,toy/pointmass"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "the gripper is stuck" in lines[0] and lines[1] == "worldmpc: 1 of 2 runs failed"
    assert load_run(tmp_path / "runs" / "toy-pointmass" / "tdmpc2-debug-seed1").env_steps == 40


@pytest.mark.parametrize("words", [["seed=1,x"], ["task=toy/pointmass,toy/pointmas"], ["planner.horizon=3,0"]])
def test_multirun_checks_all_runs_before_the_first(words: list[str], tmp_path: Path, fails: Callable[..., str]):
    fails("train", *TINY, "-m", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
@pytest.mark.parametrize(
    ("words", "first_evaluation"), [(["-m", "seed=1,2"], False), (["-m", "seed=1,2"], True), (["sweep=variants"], False)]
)
def test_a_signal_saves_and_stops_a_whole_sweep(name: str, status: int, words: list[str], first_evaluation: bool, tmp_path: Path):
    episodes = ["eval.episodes=100"] if first_evaluation else []  # the signal comes with the 60th step, evaluation included
    assert main(["train", *TINY, "steps=100000", *episodes, f"task=gym/Sketchy{name}-v0", *words]) == status
    (run,) = (tmp_path / "runs").rglob("config.json")
    saved = CheckpointStore(run.parent / "checkpoints", keep=1).newest_valid()
    decisions = load_checkpoint(saved, ["loop"])[0]["loop"]["decisions"]
    assert decisions == 0 if first_evaluation else decisions > 0


# Mistakes.


def test_too_little_memory_is_said_with_what_to_lower(fails: Callable[..., str]):
    assert "out of memory" in (line := fails("train", *TINY, "task=toy/pointmass", "loss.batch_size=10000000000000", status=1))
    assert "lower model.size, loss.batch_size" in line


MISTAKES = [
    ("task=dmc/cartpole-swingpu", "did you mean dmc/cartpole-swingup"),
    ("task=toy/pointmas", "did you mean toy/pointmass?"),
    ("task=tyo/pointmass", "did you mean toy/pointmass?"),
    ("planer.horizon=3", "planer.horizon: unknown configuration key; did you mean planner.horizon"),
    ("horizon=3", "did you mean loss.horizon or planner.horizon"),
    ("planner={horizn: 3}", "planner.horizn: unknown configuration key"),
    ("planner.horizon=abc", "planner.horizon: expected int, got 'abc'"),
    ("planner.mpc=maybe", "planner.mpc: expected bool, got 'maybe'"),
    ("planner=5", "planner.name: expected one of mppi, cem, icem"),
    ("env=5", "env: expected keys below it"),
    ("agent=dqnn", "agent: unknown agent 'dqnn'; one of tdmpc2, tdmpc_square, boom, bmpc, director, mpc"),
    ("preset=tuned", "preset: agent=tdmpc2 has no tuned settings for toy/pointmass"),
    ("env.workers=proces", "env.workers: expected one of sync, async"),
    ("model.latent_dim=20", "model.latent_dim: expected a multiple of model.simnorm_dim (8), got 20"),
    ("planner.horizon=0", "planner.horizon: expected at least 1, got 0"),
    ("threads=99999999999999999999", "threads: expected at most"),
    ("env.action_repeat=1000000000000000000000", "env.action_repeat: expected at most"),
    ("model.vmax=1e6", "model.vmax: expected at most 80"),
    ("preset=big", "preset: unknown preset 'big'; one of default, cpu, debug"),
    ("preset=[cpu,debug]", "preset: unknown preset"),
    ("device=quantum", "device: expected auto, cpu, cuda, cuda:<index> or mps, got 'quantum'"),
    ("replay.storage_device=tpu", "replay.storage_device: expected auto, cpu, cuda"),
    ("optim.lr=nan", "optim.lr: expected a finite number, got nan"),
    ("seed=1,2", "several values need -m"),
    ("seeds=1,2,3", r"seeds=1,2,3: a list needs brackets: 'seeds=[1,2,3]'"),
    ("multi_gamma.gammas=0.97", "multi_gamma.gammas: expected a list, as in multi_gamma.gammas=[primary,0.97], got 0.97"),
    ("multi_gamma={enabled: true, gammas: [0.9, primary]}", "multi_gamma.gammas: primary, the task's own discount, must be the first one"),
    ("seed", "expected key=value"),
    ("+seed=1", "write seed=value"),
    ("~seed", "write seed=value"),
    ("run_dir=a(b", "cannot be parsed"),
    ("task=${nowhere}", "Interpolation key 'nowhere' not found"),
    ("hydra.nothing=1", "hydra.nothing"),
    ("--seed", "unknown option"),
    ("sweep=nothing", "sweep: unknown set 'nothing'; one of multi_gamma_ablation, variants"),
    ("label=a b", "label: expected letters, digits and"),
    ("multi_gamma.gammas=[one]", "multi_gamma.gammas: expected primary or float, got 'one'"),
    ("multi_gamma.enabled=true", "multi_gamma.gammas: empty although enabled"),
    ("multi_gamma={enabled: true, gammas: [0.9, 0.97]}", "multi_gamma.gammas: the first discount must be the task's, 0.95, got 0.9"),
    ("multi_gamma_gammas=[0.9]", "did you mean multi_gamma.gammas"),
    ("model.value=v", "model.value: policy.objective=max_q needs values of actions"),
    ("reanalyze.interval=10", "reanalyze.interval: policy.objective=max_q uses no stored plan"),
    ("policy.objective=kl_to_planner", "use model.policy=clipped"),
    ("multi_gamma.gammas=[primary,0.9]", "multi_gamma.gammas: nothing learns these discounts; add multi_gamma.enabled=true"),
    ("resume=nowhere", "resume: expected never, auto, a run folder or a checkpoint folder, got 'nowhere'"),
]


@pytest.mark.parametrize(("word", "message"), MISTAKES, ids=[word for word, _ in MISTAKES])
def test_unusable_input_is_one_line_and_leaves_nothing_behind(word: str, message: str, tmp_path: Path, fails: Callable[..., str]):
    assert message in fails("train", "task=toy/pointmass", word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("word", "way"), [("seed=5", ", or go on with resume="), ("planner.name=icem", ""), ("model.mlp_dim=32", "")])
def test_resuming_another_run_names_only_ways_that_work(word: str, way: str, trained: Path, fails: Callable[..., str]):
    line = fails("train", *TINY, "task=toy/pointmass", f"run_dir={trained}", "resume=auto", word)
    assert line.endswith(f"holds a run with another {word.partition('=')[0]}; choose another run_dir{way}{trained if way else ''}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be used")
def test_cuda_without_cuda(tmp_path: Path, fails: Callable[..., str]):
    assert "use device=cpu or device=auto" in fails("train", "task=toy/pointmass", "device=cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gym/HalfCheeta-v5", "did you mean gym/HalfCheetah-v5"),
        ("gym/no_such_module:Env-v0", "needs the module no_such_module, which is not installed"),
        ("gym/Uninstalled-v0", "pip install gymnasium[box2d]"),
    ],
)
def test_environment_that_cannot_be_made(task: str, message: str, tmp_path: Path, fails: Callable[..., str]):
    assert message in fails("train", *TINY, f"task={task}")
    assert not list(tmp_path.rglob("config.json"))


def test_environment_that_raises_is_saved_and_named(tmp_path: Path, fails: Callable[..., str]):
    line = fails("train", *TINY, "steps=1000", "task=gym/Sketchyraise-v0", status=1)
    assert "gym/Sketchyraise-v0" in line and "the gripper is stuck" in line and "saved at" in line
    assert list(tmp_path.rglob("agent.safetensors"))


def test_environment_that_returns_nan(fails: Callable[..., str]):
    assert "non-finite observation" in fails("train", *TINY, "steps=1000", "task=gym/Sketchynan-v0", status=1)


def test_divergence(fails: Callable[..., str]):
    assert "train.max_loss" in fails("train", *TINY, "task=toy/pointmass", "train.max_loss=1e-9", status=1)


def test_tracebacks_only_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLDMPC_TRACEBACK", "1")
    assert main(["train", "seeds=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_error_keeps_its_traceback_in_a_file(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]):
    import worldmpc.training.run as module

    def broken(config: RunConfig) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(module, "run_seeds", broken)
    line = fails("train", "task=toy/pointmass", status=1)
    file = Path(line.rpartition(" is in ")[2].rstrip(")"))
    assert "unexpected TypeError: a bug" in line and "Traceback" in file.read_text()
    file.unlink()


def test_full_disk_and_interrupt(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]):
    import worldmpc.training.run as module

    def full(config: RunConfig) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    def interrupted(config: RunConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_seeds", full)
    assert fails("train", "task=toy/pointmass", status=1) == "worldmpc: error: metrics.jsonl: No space left on device"
    monkeypatch.setattr(module, "run_seeds", interrupted)
    assert fails("train", "task=toy/pointmass", status=130) == "worldmpc: error: interrupted"


def test_a_second_process_shows_one_line_too(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "worldmpc", "train", "planner.horizon=0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not list(tmp_path.iterdir())


# Existing runs.


def test_existing_run_is_not_overwritten(trained: Path, fails: Callable[..., str]):
    before = (trained / "eval.csv").read_text()
    assert "already holds a run" in fails("train", *TINY, "task=toy/pointmass", f"run_dir={trained}")
    assert (trained / "eval.csv").read_text() == before


def test_resume_with_another_architecture(trained: Path, fails: Callable[..., str]):
    before = (trained / "config.json").read_text()
    line = fails("train", *TINY, "task=toy/pointmass", f"resume={trained}", "model.mlp_dim=24", "steps=80")
    assert "does not fit this architecture" in line
    assert (trained / "config.json").read_text() == before


def test_resume_from_a_damaged_checkpoint(trained: Path, tmp_path: Path, fails: Callable[..., str]):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000040"
    shutil.copytree(trained / "checkpoints" / "step_000000040", checkpoint)
    file = checkpoint / "agent.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "agent.safetensors: checkpoint is damaged" in fails("train", *TINY, "task=toy/pointmass", f"resume={checkpoint}")
    assert "agent.safetensors: checkpoint is damaged" in fails("evaluate", f"checkpoint={checkpoint}")
    (checkpoint / "meta.json").unlink()
    assert "neither a run folder" in fails("evaluate", f"checkpoint={checkpoint}")


# Evaluation.


def test_evaluate_a_run_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", f"checkpoint={trained}", "episodes=3", "video=out/v.mp4", "json=out/e.json", "threads=1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "e.json").read_text())
    assert record["return_mean"] == pytest.approx(np.mean(record["returns"])) and len(record["returns"]) == 3
    assert record["lengths"] == [10, 10, 10] and record["successes"] == [None] * 3 and record["success"] is None
    assert {"command", "commit", "machine", "checkpoint", "config"} <= record.keys()
    assert str(find_checkpoint(trained)) in out and f"{record['return_mean']:.2f}" in out and "planning" in out
    assert (tmp_path / "out" / "v.mp4").stat().st_size > 0


def test_evaluation_repeats_and_depends_on_seed_and_mode(trained: Path, capsys: pytest.CaptureFixture[str]):
    def returns(*words: str) -> list[float]:
        capsys.readouterr()
        assert main(["evaluate", str(trained), "episodes=2", "threads=1", "--json", "-", *words]) == 0
        return json.loads(capsys.readouterr().out)["returns"]

    first = returns()
    assert returns() == first
    assert returns("seed=2") != first and returns("mode=prior") != first and returns("planner.num_samples=40") != first


def test_best_checkpoint_is_preferred_and_a_damaged_one_passed_over(trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    best = run / "checkpoints" / "best"
    if not best.exists():
        shutil.copytree(run / "checkpoints" / "step_000000020", best)
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == best
    file = best / "agent.safetensors"
    content = file.read_bytes()
    file.unlink()  # it may be a hard link
    file.write_bytes(content[:-1])
    with pytest.warns(UserWarning, match="using the newest checkpoint"):
        assert find_checkpoint(run).name == "step_000000040"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="neither a run folder"):
        find_checkpoint(run)


def test_load_agent_acts_as_the_saved_one(trained: Path):
    agent, config = load_agent(trained, device="cpu")
    saved = load_checkpoint(find_checkpoint(trained), ["agent"])[0]["agent"]
    assert config.task == "toy/pointmass" and config.planner.iterations == 1 and agent.updates == saved["updates"]
    for name, value in agent.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name


@pytest.mark.parametrize("name", ["tiny_ckpt_new", "tiny_ckpt_old", "tiny_episodic_ckpt_new"])
def test_evaluate_a_published_checkpoint(name: str, capsys: pytest.CaptureFixture[str]):
    words = [f"checkpoint={GOLDEN / name}.pt", "task=gym/Sketchy-v0", "episodes=2", "threads=1", "planner.num_samples=32"]
    assert main(["evaluate", *words, "planner.num_elites=8", "json=-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["returns"] == [10.0, 10.0] and record["success"] == 1.0
    assert record["config"]["model"]["simnorm_layout"] == "consecutive" and record["config"]["model"]["continuation"] == "hard"
    assert record["config"]["model"]["termination"] == ("on" if "episodic" in name else "off")
    assert record["config"]["planner"]["iterations"] == 6 and record["config"]["planner"]["num_samples"] == 32


def test_published_checkpoint_takes_its_discount_from_the_episode_length():
    agent, _ = load_agent(GOLDEN / "tiny_ckpt_new.pt", "gym/Sketchy-v0", device="cpu", overrides={"env": {"episode_length": 5}})
    assert agent.discount == 0.95
    agent, _ = load_agent(GOLDEN / "tiny_ckpt_new.pt", lambda: Sketchy(), device="cpu")
    assert agent.discount == 0.99


EVALUATE_MISTAKES = [
    ([], "checkpoint: expected checkpoint=PATH"),
    (["checkpoint=nowhere"], "nowhere: no such file or folder"),
    (["checkpoint=nowhere.pt"], "no file at nowhere.pt"),
    (["checkpoint=."], "neither a run folder"),
    (["checkpoint=RUN", "episodes=0"], "episodes: expected at least 1, got 0"),
    (["checkpoint=RUN", "episodes=many"], "episodes: expected a whole number, got 'many'"),
    (["checkpoint=RUN", "threads=-2"], "threads: expected 0 or more, got -2"),
    (["checkpoint=RUN", "json=."], "json: cannot write . (Is a directory)"),
    (["checkpoint=RUN", "video=."], "video: cannot write . (Is a directory)"),
    (["checkpoint=RUN", "env.num_envs=0"], "env.num_envs: expected at least 1, got 0"),
    (["checkpoint=RUN", "opponents=weak"], "opponents: toy/pointmass has one player; leave them out, or name a game of two"),
    (["checkpoint=RUN", "mode=greedy"], "mode: expected one of eval, prior"),
    (["checkpoint=RUN", "model.size=5"], "model.size=5: evaluate takes"),
    (["checkpoint=RUN", "planner.horizn=5"], "planner.horizn: unknown configuration key"),
    (["checkpoint=RUN", "task=toy/balance"], "was trained on 2 observations and 2 actions, toy/balance has 1 observations and 1 actions"),
    (["checkpoint=PT"], "does not say which task"),
    (["checkpoint=PT", "task=toy/pointmass"], "was trained on 7 observations and 3 actions, toy/pointmass has 2 observations and 2"),
    (["checkpoint=PT", "task=gym/Sketchy-v0", "planner=diffusion", "planner.prior=learned"], "planner.prior: "),
    (["checkpoint=CUT", "task=gym/Sketchy-v0"], "cut.pt: not a readable PyTorch checkpoint"),
    (["checkpoint=EMPTY", "task=gym/Sketchy-v0"], "empty.pt: not a readable PyTorch checkpoint"),
]


@pytest.mark.parametrize(("words", "message"), EVALUATE_MISTAKES, ids=[message for _, message in EVALUATE_MISTAKES])
def test_evaluate_mistakes(words: list[str], message: str, trained: Path, tmp_path: Path, fails: Callable[..., str]):
    (tmp_path / "cut.pt").write_bytes((GOLDEN / "tiny_ckpt_new.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    places = {"RUN": trained, "PT": GOLDEN / "tiny_ckpt_new.pt", "CUT": "cut.pt", "EMPTY": "empty.pt"}
    for name, place in places.items():
        words = [word.replace(f"checkpoint={name}", f"checkpoint={place}") for word in words]
    assert message in fails("evaluate", *words)


def test_a_checkpoint_cannot_name_a_module_to_import(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    """Only the user can."""
    (tmp_path / "evilmod.py").write_text(
        "import gymnasium\nfrom pathlib import Path\nfrom worldmpc.envs.toy import PointMass\nPath('executed').touch()\n"
        "gymnasium.register('Evil-v0', entry_point=PointMass, max_episode_steps=5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree, meta = load_checkpoint(find_checkpoint(trained))
    task = "gym/evilmod:Evil-v0"
    meta = {**meta, "config": {**meta["config"], "task": task}, "spec": {**meta["spec"], "name": task}}
    path = save_checkpoint(tmp_path, "evil", {"agent": tree["agent"]}, meta)
    line = fails("evaluate", f"checkpoint={path}", "episodes=1")
    assert f"{path} was trained on {task}, which imports a module; name it with task={task} if you trust it" in line
    assert not Path("executed").exists()
    assert main(["evaluate", f"checkpoint={path}", f"task={task}", "episodes=1", "mode=prior"]) == 0 and Path("executed").exists()
    gymnasium.registry.pop("Evil-v0")


def test_evaluate_takes_as_many_environments_as_asked_for(trained: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []

    def watch(env: Any, *args: Any, **kwargs: Any) -> VecEnv:
        made.append(env.num_envs)
        return VecEnv(env, *args, **kwargs)

    monkeypatch.setattr("worldmpc.envs.VecEnv", watch)
    for words, number in (([], 10), (["env.num_envs=2"], 2), (["env.num_envs=40"], 11)):
        made.clear()
        assert main(["evaluate", f"checkpoint={trained}", "episodes=11", "mode=prior", "env.episode_length=2", *words]) == 0
        assert made == [number]


def test_evaluate_plays_endless_episodes_side_by_side(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worldmpc.training.evaluator.MAX_DECISIONS", 3)
    gymnasium.register("Endless-v0", entry_point=lambda: PointMass(length=None))
    words = ["mode=prior", "env.episode_length=null", "json=-"]
    assert main(["evaluate", f"checkpoint={trained}", "task=gym/Endless-v0", "episodes=12", *words]) == 0
    gymnasium.registry.pop("Endless-v0")
    out, err = capsys.readouterr()
    assert json.loads(out)["lengths"] == [3] * 12 and "12 of 12 episodes had no end after 3 decisions" in err


def test_evaluate_chooses_threads_as_training_does(trained: Path, monkeypatch: pytest.MonkeyPatch):
    from worldmpc import runtime

    monkeypatch.setattr(runtime, "_offered_threads", lambda: 3)
    assert main(["evaluate", f"checkpoint={trained}", "episodes=1", "mode=prior"]) == 0
    assert torch.get_num_threads() == 2


def test_video_of_an_environment_that_cannot_render(fails: Callable[..., str]):
    words = [f"checkpoint={GOLDEN}/tiny_ckpt_new.pt", "task=gym/Sketchy-v0", "episodes=1", "planner.mpc=false", "video=v.mp4"]
    assert "gym/Sketchy-v0" in fails("evaluate", *words, status=1)


# Reports.


def test_compare_and_report(make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    for seed in (1, 2, 3):
        make_folder([(50_000, 400.0), (100_000, 800.0 + seed)], seed=seed)
    assert main(["compare", "runs", "at=100000", "json=out/c.json"]) == 0
    out = capsys.readouterr().out
    assert "cartpole-swingup" in out and "802" in out and "…" not in out
    assert json.loads((tmp_path / "out" / "c.json").read_text())[0]["seeds"] == [1, 2, 3]
    assert main(["compare", "runs", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == 100_000
    assert main(["report", "runs", "export=mine.csv"]) == 0
    assert len(load_results("mine.csv")) == 3 and not (tmp_path / "curves.png").exists()
    assert main(["report", "mine.csv", "--out", "a.png"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0


def test_compare_variants(make_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]):  # noqa: F811
    for seed in (1, 2, 3):
        folder = make_folder([(50_000, 400.0), (100_000, 800.0 + seed)], seed=seed)
        if seed == 3:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"label": "other"}))
    assert main(["compare", "runs", "variants=true", "algorithm=tdmpc2,bmpc-1m", "json=out/v.json"]) == 0
    out = capsys.readouterr().out
    assert "other" in out and "IQM" in out and "BMPC" in out and "1 seed; evidence needs at least 3" in out
    assert json.loads((tmp_path / "out" / "v.json").read_text())["aggregate"][1]["label"] == "other"
    assert main(["compare", "runs", "variants=true", "at=50000", "baseline=other", "json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"][0]["step"] == 50_000
    assert "baseline: no runs of 'x'; there are other, tdmpc2" in fails("compare", "runs", "variants=true", "baseline=x")
    assert "baseline: needs variants=true" in fails("compare", "runs", "baseline=other")
    assert "not all 3 runs were evaluated at 60,000" in fails("compare", "runs", "variants=true", "at=60000")
    assert "unknown reference algorithm 'x'" in fails("compare", "runs", "variants=true", "algorithm=tdmpc2,x")
    assert "variants: expected one of true, false, got 'yes'" in fails("compare", "runs", "variants=yes")


def test_report_mistakes(make_folder: Callable[..., Path], tmp_path: Path, fails: Callable[..., str]):  # noqa: F811
    (tmp_path / "empty").mkdir()
    assert "no such file or folder" in fails("compare", "nowhere")
    assert "no run folder and no result CSV" in fails("compare", "empty")
    assert "expected at least one path" in fails("compare")
    assert "did you mean algorithm=?" in fails("compare", "empty", "algoritm=sac")
    assert "did you mean algorithm=?" in fails("compare", "empty", "--algoritm", "sac")
    assert "unknown reference algorithm 'tdmpc3'; did you mean" in fails("compare", "empty", "algorithm=tdmpc3")
    assert "at: expected a simulator step above 0" in fails("compare", "empty", "at=0")
    assert "at: expected a whole number" in fails("compare", "empty", "at=soon")
    assert "no run folder and no result CSV" in fails("report", "empty")
    folder = make_folder([(100_000, 800.0)])
    (folder / "config.json").write_text('{"task": "dmc')
    assert "config.json: not JSON" in fails("compare", "runs")
    (tmp_path / "cut.csv").write_text("task,seed,env_steps,return_mean\ndmc/walker-walk,1,abc,3\n")
    assert "cut.csv, line 2: env_steps: expected a number" in fails("compare", "cut.csv")


def test_tasks(capsys: pytest.CaptureFixture[str], fails: Callable[..., str]):
    assert main(["tasks", "toy"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"toy/{name}" for name in MAKERS]
    assert main(["tasks"]) == 0
    assert {"dmc/walker-walk", "gym/HalfCheetah-v5", "toy/balance", "director_walker_walk"} <= set(capsys.readouterr().out.splitlines())
    assert "unknown suite 'dcm'" in fails("tasks", "dcm")
    assert "one suite at most" in fails("tasks", "dmc", "toy")


def test_a_reader_that_has_enough():
    command = f"{sys.executable} -m worldmpc train --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stderr


def test_named_set_trains_every_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "über=all"  # which needs quotes
    assert main(["train", *TINY, "sweep=multi_gamma_ablation", "task=toy/pointmass", f'run_dir="{folder}"']) == 0
    folders = sorted(path.name for path in (folder).iterdir())
    assert folders == ["A0", "A1", "A2", "A3", "A4"]
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in folders}
    assert {name: config["label"] for name, config in configs.items()} == dict(zip(folders, folders, strict=True))
    heads = {name: json.loads((folder / name / "meta.json").read_text())["parameters"].get("auxiliary", 0) for name in folders}
    assert heads["A0"] == 0 < heads["A1"] < heads["A2"] == heads["A3"] < heads["A4"] == 5 * heads["A1"]
    assert (folder / "A2" / "snapshots.jsonl").exists() and not (folder / "A0" / "snapshots.jsonl").exists()


def test_named_set_is_checked_before_the_first_run(tmp_path: Path, fails: Callable[..., str]):
    assert "planner.horizon: expected at least 1" in fails("train", *TINY, "sweep=variants", "task=toy/pointmass", "planner.horizon=0")
    assert "agent: sweep=variants sets it for each of its labels" in fails("train", *TINY, "sweep=variants", "agent=boom")
    assert "label: sweep=variants sets it" in fails("train", *TINY, "sweep=variants", "label=mine")
    assert "run_dir: several runs would write into one folder" in fails("train", *TINY, "-m", "seed=1,2", f"run_dir={tmp_path}/x")
    assert "run_dir: several runs of each label" in fails("train", *TINY, "sweep=variants", "-m", "seed=1,2", f"run_dir={tmp_path}/x")
    assert "--cfg: shows the configuration of one run" in fails("train", "sweep=variants", "--cfg")
    assert not list(tmp_path.iterdir())


def test_a_name_stands_for_a_task_and_its_settings(tmp_path: Path, fails: Callable[..., str]):
    words = ["task=director_walker_walk", "manager.goal_interval=5", "goal_vae.n_classes=4", "manager.batch_size=4"]
    assert main(["train", *TINY, *words, f"run_dir={tmp_path}/run"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["task"], config["agent"]) == ("dmc/walker-walk", "director") and config["manager"]["goal_interval"] == 5
    assert config["goal_vae"] | {"n_latents": 8, "n_classes": 4} == config["goal_vae"]
    assert (tmp_path / "run" / "goals.csv").exists()
    assert main(["report", str(tmp_path / "run"), f"out={tmp_path}/c.png"]) == 0 and (tmp_path / "c-goals.png").exists()
    assert "agent: task=director_walker_walk is a name for agent=director" in fails("train", *words, "agent=tdmpc2")
    assert "worker.mode: expected one of goal_conditioned, planner_bonus" in fails("train", *words, "worker.mode=both")
    assert "manager.goal_interval: expected at most the episode's 3 decisions" in fails("train", *TINY, *words, "env.episode_length=3")
    assert "trainer: agent=sac never reads it; leave it out, or use agent=director" in fails("train", "agent=sac", "trainer=director")
