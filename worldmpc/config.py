"""Configuration: one frozen dataclass per part, presets, dotted overrides, validation.

Plain data in, plain data out: ``RunConfig.from_dict(config.to_dict()) == config``. Nothing here
imports torch, so that the command line starts fast. A field's ``help`` is the text that
``worldmpc train --help`` prints.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration value or key that cannot be used; the message says which and what to do."""


def key(default: Any, help: str) -> Any:
    """Declare a configuration field with its default and its meaning."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EnvConfig:
    """Environments."""

    num_envs: int = key(1, "environments stepped together")
    workers: Literal["sync", "async"] = key("sync", "sync: in this process; async: in worker processes that share memory with it")
    num_workers: int | None = key(None, "worker processes of workers=async; null: one per CPU core, at most one per environment")
    action_repeat: int | None = key(None, "simulator steps per decision; null: the suite's own (dmc 2, gym 1)")
    episode_length: int | None = key(None, "time limit in decisions; null: the environment's own")
    discount: float | None = key(None, "discount factor; null: from the episode length (published heuristic)")


@dataclass(frozen=True)
class ModelConfig:
    """World model."""

    size: str = key("5", "network sizes: cpu, or a published one in million parameters: 1, 5, 19, 48, 317")
    enc_dim: int | None = key(None, "hidden width of the encoder; null: from size")
    mlp_dim: int | None = key(None, "hidden width of all other networks; null: from size")
    latent_dim: int | None = key(None, "latent width, a multiple of simnorm_dim; null: from size")
    num_enc_layers: int | None = key(None, "encoder layers; null: from size")
    num_q: int | None = key(None, "number of critics, at least 2; null: from size")
    simnorm_dim: int = key(8, "group width of SimNorm")
    simnorm_layout: Literal["strided", "consecutive"] = key(
        "strided", "which latent entries form a group; strided is the faster one, consecutive the published order"
    )
    num_bins: int = key(101, "bins of the two-hot reward and value heads")
    vmin: float = key(-10.0, "lowest bin, in symlog space")
    vmax: float = key(10.0, "highest bin, in symlog space")
    dropout: float = key(0.01, "dropout in the first layer of each critic")
    log_std_min: float = key(-10.0, "lower bound of the policy's log standard deviation")
    log_std_max: float = key(2.0, "upper bound of the policy's log standard deviation")
    termination: Literal["auto", "on", "off"] = key("auto", "termination head; auto: where the environment can terminate")
    continuation: Literal["soft", "hard"] = key(
        "soft", "how planning weighs predicted termination: by its probability, or by the published threshold of 0.5"
    )


@dataclass(frozen=True)
class PlannerConfig:
    """Planner (MPPI)."""

    mpc: bool = key(True, "plan; false: act with the policy prior alone")
    precision: Literal["fp32", "bf16"] = key("fp32", "matrix products of planning; bf16: faster, parameters stay fp32")
    horizon: int = key(3, "planning horizon and length of the training windows, in decisions")
    iterations: int = key(6, "refinement iterations")
    extra_iterations: int = key(2, "added to iterations where the action space has 20 or more dimensions")
    num_samples: int = key(512, "candidate sequences per iteration, policy proposals included")
    num_elites: int = key(64, "candidates that the refit uses")
    num_pi_trajs: int = key(24, "candidates proposed by the policy prior")
    temperature: float = key(0.5, "weight of an elite: exp(temperature * (value - best value))")
    min_std: float = key(0.05, "lower bound of the sampling standard deviation")
    max_std: float = key(2.0, "initial value and upper bound of the sampling standard deviation")


@dataclass(frozen=True)
class LossConfig:
    """Objective."""

    batch_size: int = key(256, "windows per update")
    rho: float = key(0.5, "temporal decay: step t of a window weighs rho**t")
    consistency_coef: float = key(20.0, "weight of the latent consistency loss")
    reward_coef: float = key(0.1, "weight of the reward loss")
    value_coef: float = key(0.1, "weight of the value loss")
    termination_coef: float = key(1.0, "weight of the termination loss")
    entropy_coef: float = key(1e-4, "weight of the policy's entropy")
    tau: float = key(0.01, "Polyak rate of target critics and running scale")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisers."""

    lr: float = key(3e-4, "learning rate of model and policy")
    enc_lr_scale: float = key(0.3, "encoder learning rate relative to lr")
    grad_clip_norm: float = key(20.0, "largest gradient norm, model and policy apart")
    schedule: Literal["constant", "warmup", "cosine"] = key("constant", "learning-rate schedule; cosine warms up as well")
    warmup_updates: int = key(0, "updates of linear warm-up (schedules warmup and cosine)")
    final_lr_scale: float = key(0.1, "end of the cosine schedule relative to lr")


@dataclass(frozen=True)
class ReplayConfig:
    """Replay."""

    capacity: int = key(1_000_000, "most decisions kept, all environments together")
    windows: Literal["padded", "inside"] = key(
        "padded", "padded: windows may run past an episode's end, masked there; inside: only whole windows (published)"
    )
    storage_device: str = key("auto", "where the replay lives; auto: the training device")


@dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    utd: float = key(1.0, "updates per decision, whatever num_envs is")
    precision: Literal["fp32", "bf16"] = key("fp32", "matrix products of updates; bf16: autocast, parameters and losses stay fp32")
    overlap: bool = key(False, "update while the environments step, one decision behind: a batch cannot hold the step under way")
    seed_decisions: int | None = key(None, "random decisions before learning; null: max(1000, 5 episodes)")
    until_return: float | None = key(None, "end the run once an evaluation's mean return reaches this; null: go to steps")
    max_loss: float = key(1e6, "a loss term above this, or NaN, stops the run with a saved state")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation."""

    episodes: int = key(10, "episodes per evaluation, on environments of their own")
    prior: bool = key(True, "also evaluate the policy prior without planning")
    video: bool = key(True, "record an mp4 of the final agent")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = key(20_000, "simulator steps between checkpoints")
    keep: int = key(2, "newest checkpoints kept, besides the best")
    replay: bool = key(True, "include the replay, so that a resumed run equals an uninterrupted one")


@dataclass(frozen=True)
class LogConfig:
    """Logging."""

    every: int = key(1_000, "decisions between records in metrics.jsonl")
    tensorboard: bool = key(True, "write TensorBoard events")
    progress: Literal["auto", "live", "plain", "none"] = key("auto", "progress display; auto: live on a terminal")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    task: str = key("dmc/cartpole-swingup", "suite/name: dmc/<domain>-<task>, gym/<EnvId>, gym/<module>:<EnvId>, toy/<name>")
    agent: Literal["tdmpc2"] = key("tdmpc2", "algorithm")
    preset: str = key("default", "named set of values: default (5M, published), cpu, debug; overrides come on top")
    seed: int = key(1, "seed of networks, exploration, replay sampling and environments")
    seeds: tuple[int, ...] | None = key(
        None, "train these seeds together as one batched model, [1,2,3]; each ends as if trained alone with seed="
    )
    steps: int = key(1_000_000, "simulator steps to train for (decisions x action repeat)")
    eval_freq: int = key(10_000, "simulator steps between evaluations")
    device: str = key("auto", "auto, cpu, cuda, cuda:<index> or mps")
    threads: int = key(0, "CPU threads for torch; 0: chosen from the network width; 1 is best for several runs at once")
    compile: bool = key(False, "compile update and planner with torch.compile; takes a minute, the next run finds it cached")
    cuda_graph: bool = key(False, "capture update and planner as CUDA graphs, with or without compile")
    run_dir: str | None = key(None, "where the run writes; null: runs/<task>/<agent>-<preset>-seed<seed>")
    resume: str = key("never", "never: start a fresh run; auto: continue the newest checkpoint of this run, if any; or a checkpoint's path")
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Build and validate a configuration from nested plain data; missing keys keep their defaults.

        Raises:
            ConfigError: unknown key, wrong type, or a value out of range.
        """
        return validate(_build(cls, data, ""))


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {
        "model": {"size": "cpu"},
        "planner": {"num_samples": 96, "num_elites": 16, "num_pi_trajs": 8, "iterations": 3},
        "loss": {"batch_size": 128},
        "steps": 100_000,
        "eval_freq": 10_000,
    },
    "debug": {
        "model": {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_enc_layers": 2, "num_q": 2},
        "planner": {"num_samples": 16, "num_elites": 4, "num_pi_trajs": 4, "iterations": 2},
        "loss": {"batch_size": 8},
        "train": {"seed_decisions": 50},
        "steps": 500,
        "eval_freq": 250,
        "eval": {"episodes": 2},
        "checkpoint": {"every": 250},
        "log": {"every": 50},
    },
}
"""What each preset changes against the published defaults."""


def make_config(preset: str = "default", **overrides: Any) -> RunConfig:
    """Build a configuration from a preset and overrides.

    Overrides are nested mappings or dotted keys: ``make_config("cpu", seed=2, **{"planner.horizon": 5})``.

    Raises:
        ConfigError: unknown preset or key, wrong type, or a value out of range.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: unknown preset '{preset}'; one of {', '.join(PRESETS)}")
    data: dict[str, Any] = {"preset": preset}
    for source in (PRESETS[preset], nest(overrides)):
        data = merge(data, source)
    return RunConfig.from_dict(data)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the nested values of ``over`` on top; neither is changed."""
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        result[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def flat_fields(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every leaf of the configuration as (dotted key, field)."""
    for item in dataclasses.fields(cls):
        kind = _hints(cls)[item.name]
        if dataclasses.is_dataclass(kind):
            yield from flat_fields(typing.cast(type, kind), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def unknown_key(name: str) -> ConfigError:
    """Return the error for a key that does not exist, with the nearest keys."""
    known = [dotted for dotted, _ in flat_fields()]
    leaf = {dotted.rsplit(".", 1)[-1]: dotted for dotted in known}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [leaf[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(leaf), n=2) if leaf[match] not in near]
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `worldmpc train --help` lists all keys"
    return ConfigError(f"{name}: unknown configuration key{hint}")


def discount_from_episode_length(length: int | None) -> float:
    """Return the published heuristic clip((L/5 - 1) / (L/5), 0.95, 0.995) for ``L`` decisions; 0.99 without a limit."""
    if length is None:
        return 0.99
    fraction = length / 5
    return min(max((fraction - 1) / fraction, 0.95), 0.995)


def seed_decisions(config: RunConfig, episode_length: int | None) -> int:
    """Return the number of random decisions before learning: max(1000, 5 episodes) unless configured."""
    if config.train.seed_decisions is not None:
        return config.train.seed_decisions
    return max(1000, 5 * (episode_length or 0))


MODEL_SIZES: dict[str, dict[str, int]] = {
    "cpu": {"enc_dim": 128, "mlp_dim": 128, "latent_dim": 64, "num_enc_layers": 2, "num_q": 2},
    "1": {"enc_dim": 256, "mlp_dim": 384, "latent_dim": 128, "num_enc_layers": 2, "num_q": 2},
    "5": {"enc_dim": 256, "mlp_dim": 512, "latent_dim": 512, "num_enc_layers": 2, "num_q": 5},
    "19": {"enc_dim": 1024, "mlp_dim": 1024, "latent_dim": 768, "num_enc_layers": 3, "num_q": 5},
    "48": {"enc_dim": 1792, "mlp_dim": 1792, "latent_dim": 768, "num_enc_layers": 4, "num_q": 5},
    "317": {"enc_dim": 4096, "mlp_dim": 4096, "latent_dim": 1376, "num_enc_layers": 5, "num_q": 8},
}
"""Published sizes by million parameters, and ours for a CPU."""


def resolve_model(config: ModelConfig) -> ModelConfig:
    """Return the configuration with the widths that ``size`` stands for filled in."""
    sizes = {name: value for name, value in MODEL_SIZES[config.size].items() if getattr(config, name) is None}
    return dataclasses.replace(config, **sizes)


def validate(config: RunConfig) -> RunConfig:
    """Check every value that can be checked without an environment, and return the configuration.

    Raises:
        ConfigError: a value out of range, or two values that contradict each other.
    """

    def require(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ConfigError(f"{name}: expected {expected}, got {lookup(config, name)!r}")

    require(config.preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}")
    for name, _ in flat_fields():
        require(not isinstance(lookup(config, name), float) or math.isfinite(lookup(config, name)), name, "a finite number")
    for name in ("device", "replay.storage_device"):
        known = re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", lookup(config, name)) is not None
        require(known, name, "auto, cpu, cuda, cuda:<index> or mps")
    for name in ("env.num_envs", "planner.horizon", "planner.iterations", "planner.num_samples", "planner.num_elites"):
        require(lookup(config, name) >= 1, name, "at least 1")
    for name in (
        "loss.batch_size",
        "steps",
        "eval_freq",
        "replay.capacity",
        "eval.episodes",
        "checkpoint.every",
        "log.every",
        "checkpoint.keep",
    ):
        require(lookup(config, name) >= 1, name, "at least 1")
    for name in ("env.action_repeat", "env.episode_length", "env.num_workers"):
        require(lookup(config, name) is None or lookup(config, name) >= 1, name, "at least 1 or null")
    if config.env.num_workers is not None:
        require(config.env.workers == "async", "env.num_workers", "null, as env.workers=sync has no worker processes")
        require(config.env.num_workers <= config.env.num_envs, "env.num_workers", f"at most env.num_envs ({config.env.num_envs})")
    for name in ("planner.num_pi_trajs", "planner.extra_iterations", "optim.warmup_updates", "threads", "seed"):
        require(lookup(config, name) >= 0, name, "0 or more")
    require(config.seed < 2**63, "seed", "less than 2**63")
    if config.seeds is not None:
        distinct = len(set(config.seeds)) == len(config.seeds) > 0
        require(
            distinct and all(0 <= seed < 2**63 for seed in config.seeds), "seeds", "different numbers from 0 to 2**63 - 1, as in [1,2,3]"
        )
        require(len(config.seeds) <= 64, "seeds", "at most 64 of them")
        require(config.train.until_return is None, "train.until_return", "null with seeds, as they train in step")
        require(config.resume in ("never", "auto"), "resume", "never or auto with seeds, as each has a folder of its own")
    for name, most in (("threads", 4096), ("env.num_envs", 65_536), ("env.action_repeat", 100_000), ("env.episode_length", 10**9)):
        require((lookup(config, name) or 0) <= most, name, f"at most {most}")
    warms_up = config.optim.schedule != "warmup" or config.optim.warmup_updates >= 1
    require(warms_up, "optim.warmup_updates", "at least 1 for optim.schedule=warmup")
    require(config.planner.temperature >= 0, "planner.temperature", "0 or more")
    require(config.train.seed_decisions is None or config.train.seed_decisions >= 0, "train.seed_decisions", "0 or more, or null")
    for name in ("optim.lr", "optim.grad_clip_norm", "train.utd", "train.max_loss", "planner.min_std"):
        require(lookup(config, name) > 0, name, "more than 0")
    for name in ("loss.rho", "loss.tau", "optim.enc_lr_scale", "optim.final_lr_scale"):
        require(0 < lookup(config, name) <= 1, name, "in (0, 1]")
    for name in ("consistency_coef", "reward_coef", "value_coef", "termination_coef", "entropy_coef"):
        require(lookup(config, f"loss.{name}") >= 0, f"loss.{name}", "0 or more")
    require(config.env.discount is None or 0 <= config.env.discount < 1, "env.discount", "in [0, 1), or null")
    planner = config.planner
    require(planner.num_elites <= planner.num_samples, "planner.num_elites", f"at most planner.num_samples ({planner.num_samples})")
    require(planner.num_pi_trajs <= planner.num_samples, "planner.num_pi_trajs", f"at most planner.num_samples ({planner.num_samples})")
    require(planner.max_std >= planner.min_std, "planner.max_std", f"at least planner.min_std ({planner.min_std})")
    require(config.model.size in MODEL_SIZES, "model.size", f"one of {', '.join(MODEL_SIZES)}")
    model = resolve_model(config.model)
    for name in ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "simnorm_dim"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}: expected at least 1, got {getattr(model, name)}")
    assert model.latent_dim is not None and model.num_q is not None
    if model.latent_dim % model.simnorm_dim:
        raise ConfigError(f"model.latent_dim: expected a multiple of model.simnorm_dim ({model.simnorm_dim}), got {model.latent_dim}")
    if model.num_q < 2:
        raise ConfigError(f"model.num_q: expected at least 2, got {model.num_q}")
    require(model.num_bins >= 2, "model.num_bins", "at least 2")
    require(model.vmax > model.vmin, "model.vmax", f"more than model.vmin ({model.vmin})")
    require(model.vmax <= 80, "model.vmax", "at most 80, as bins are in symlog space and exp(80) is near the largest float32")
    require(model.vmin >= -80, "model.vmin", "at least -80, as bins are in symlog space and exp(80) is near the largest float32")
    require(0 <= model.dropout < 1, "model.dropout", "in [0, 1)")
    require(model.log_std_max > model.log_std_min, "model.log_std_max", f"more than model.log_std_min ({model.log_std_min})")
    return config


def lookup(config: Any, dotted: str) -> Any:
    """Return the value at a dotted key."""
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings for dotted keys."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        for name in reversed(dotted.split(".")):
            value = {name: value}
        nested = merge(nested, value)
    return nested


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type, data: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        if name not in hints:
            raise unknown_key(dotted)
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{dotted}: expected keys below it, as in {dotted}.<key>=<value>, got {value!r}")
            values[name] = _build(typing.cast(type, kind), value, f"{dotted}.")
        else:
            values[name] = _convert(value, kind, dotted)
    return cls(**values)


def _convert(value: Any, kind: Any, dotted: str) -> Any:
    """Check a leaf against its annotation; numbers may widen from int to float, and an integral name to str."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return _convert(value, next(argument for argument in arguments if argument is not type(None)), dotted)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{dotted}: expected one of {', '.join(map(str, arguments))}, got {value!r}")
    if isinstance(value, bool) and kind is not bool:
        raise ConfigError(f"{dotted}: expected {kind.__name__}, got {value!r}")
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, int):
        return str(value)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{dotted}: expected a list, as in {dotted}=[1,2,3], got {value!r}")
        return tuple(_convert(item, arguments[0], dotted) for item in value)
    if not isinstance(value, kind):
        raise ConfigError(f"{dotted}: expected {kind.__name__}, got {value!r}")
    return value
