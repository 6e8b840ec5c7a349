"""``worldmpc train``: Hydra composes the configuration and launches the runs."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf

from worldmpc.cli.errors import INTERRUPTED, report_error
from worldmpc.cli.words import check_overrides, expand_names
from worldmpc.config import ConfigError, RunConfig, expand_task, make_config, merge, nest, preset_values, sweep_overrides

_QUIET = [{"override hydra/hydra_logging": "none"}, {"override hydra/job_logging": "none"}]
_HYDRA = {"run": {"dir": "."}, "output_subdir": None, "job": {"chdir": False, "name": "worldmpc"}, "sweep": {"subdir": "."}}
_ELSEWHERE = ("hydra/launcher", "hydra.launcher", "hydra.sweep.dir")
"""Overrides with which the folder of a sweep is needed beyond this process."""


def train(words: list[str]) -> int:
    """Train one run, with ``-m`` one per combination of values, with ``sweep=`` one per named configuration; return the exit status."""
    names = [word.partition("=")[2] for word in words if word.startswith("sweep=")]
    if not names:
        return _train_words(words)
    if "--cfg" in words:
        raise ConfigError("--cfg: shows the configuration of one run, leave out sweep=")
    each = {label: _words_of(words, label, overrides) for label, overrides in sweep_overrides(names[-1]).items()}
    _check_set(words, names[-1])
    for own in each.values():  # mistakes are found before the first run starts
        _check_combinations(check_overrides(expand_names(_flags(own)[2]), sweep="-m" in own or "--multirun" in own))
    codes = []
    with _received() as received:
        for label, own in each.items():
            sys.stdout.write(f"\n{names[-1]}: {label}\n")
            sys.stdout.flush()
            codes.append(_train_words(own))
            if received():  # whoever stops one configuration stops the set
                break
    failed = sum(code != 0 for code in codes)
    if failed:
        sys.stderr.write(f"worldmpc: {failed} of {len(codes)} configurations failed\n")
    return max(codes)


def _check_set(words: Sequence[str], name: str) -> None:
    """Refuse what would make a label stand for something else, or several runs write into one folder."""
    own = {word.partition("=")[0] for overrides in sweep_overrides(name).values() for word in overrides} | {"label"}
    sections = {key.partition(".")[0] for key in own if "." in key}
    for word in words:
        key = word.partition("=")[0]
        if key in own | sections:
            raise ConfigError(f"{key}: sweep={name} sets it for each of its labels; leave it out, or train without sweep=")
        if key == "run_dir" and ("-m" in words or "--multirun" in words):
            raise ConfigError("run_dir: several runs of each label would write into one folder; leave it out")


def _words_of(words: Sequence[str], label: str, overrides: Sequence[str]) -> list[str]:
    """Return the words of one configuration of a named set; each has a folder of its own."""
    own = [_below(word, label) if word.startswith("run_dir=") else word for word in words if not word.startswith("sweep=")]
    return [*overrides, f"label={label}", *own]


def _below(word: str, label: str) -> str:
    """``run_dir=a`` -> ``run_dir=a/label``, within the quotes that unusual paths need."""
    quote = word[-1] if word[-1] in "'\"" else ""
    return f"{word.removesuffix(quote)}/{label}{quote}"


def _train_words(words: list[str]) -> int:
    """Train one run, or with ``-m`` one per combination of values, and return the exit status."""
    multirun, show, words = _flags(expand_names(words))
    overrides = check_overrides(words, sweep=multirun)
    if multirun:
        _check_combinations(overrides)
    _store()
    with ExitStack() as stack:
        sweep_dir = "runs/.sweeps/${now:%Y-%m-%d_%H-%M-%S}"
        if multirun and not any(override.key_or_group.startswith(_ELSEWHERE) for override in overrides):
            sweep_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="worldmpc-"))
        if not any(override.key_or_group == "hydra.sweep.dir" for override in overrides):
            words = [f"hydra.sweep.dir='{sweep_dir}'", *words]
        stack.callback(GlobalHydra.instance().clear)
        setbase("1.3")
        hydra = Hydra.create_main_hydra2("worldmpc", create_config_search_path(None))
        if show:
            composed = hydra.compose_config("worldmpc", words, RunMode.RUN)
            sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(_to_config(composed).to_dict())))
            return 0
        if multirun:
            return _sweep(hydra, words)
        return hydra.run("worldmpc", _run_one, words).return_value


def _flags(words: Sequence[str]) -> tuple[bool, bool, list[str]]:
    """Return (many runs, only show the configuration, the other words)."""
    rest = [word for word in words if word not in ("-m", "--multirun")]
    multirun, show = len(rest) < len(words), "--cfg" in rest
    if show:
        index = rest.index("--cfg")
        del rest[index : index + 1 + (rest[index + 1 : index + 2] == ["job"])]
    if show and multirun:
        raise ConfigError("--cfg: shows the configuration of one run, leave out -m")
    return multirun, show, rest


def _store() -> None:
    """Tell Hydra all keys and their types; which agent's defaults and which preset lie below overrides is settled in :func:`_to_config`."""
    defaults = ["_self_", *_QUIET]
    ConfigStore.instance().store(name="worldmpc", node={"defaults": defaults, **RunConfig().to_dict(), "hydra": _HYDRA})


def _to_config(composed: DictConfig) -> RunConfig:
    """Put what was overridden on top of the agent's defaults and the preset."""
    words = composed.hydra.overrides.task if "hydra" in composed else HydraConfig.get().overrides.task
    names: list[str] = []
    for override in check_overrides(list(words)):
        value, key = override.value(), override.key_or_group
        names += [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
    raw: Any = OmegaConf.to_container(composed, resolve=False)
    chosen, settings = expand_task({name: raw[name] for name in ("task", "agent") if name in names})
    layers = merge(preset_values(composed.preset, chosen.get("agent", composed.agent), chosen.get("task")), settings)
    layered = OmegaConf.create(merge(RunConfig().to_dict(), layers))
    for name in names:
        value = chosen[name] if name in chosen else functools.reduce(operator.getitem, name.split("."), raw)
        OmegaConf.update(layered, name, value, force_add=True)
    given = nest(dict.fromkeys(names))
    return RunConfig.from_dict(OmegaConf.to_container(layered, resolve=True), given)  # type: ignore[arg-type]


def _check_combinations(overrides: Sequence[Any]) -> None:
    """Check all runs of a sweep before the first one starts, as far as that can be said without Hydra."""
    from worldmpc.envs import canonical_task

    names: list[str] = []
    choices: list[list[Any]] = []
    for override in overrides:
        if override.key_or_group.startswith("hydra") or "${" in str(override.input_line):
            continue
        if override.is_sweep_override() and not override.is_discrete_sweep():
            continue
        names.append(override.key_or_group)
        choices.append(list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()])
    if "run_dir" in names and math.prod(map(len, choices)) > 1 and len(choices[names.index("run_dir")]) == 1:
        raise ConfigError("run_dir: several runs would write into one folder; leave it out, or give as many folders")
    for values in itertools.product(*choices):
        flat = dict(zip(names, values, strict=True))
        canonical_task(make_config(flat.pop("preset", "default"), **flat).task)


def _sweep(hydra: Hydra, words: list[str]) -> int:
    try:
        batches = hydra.multirun("worldmpc", _run_many, words)
    except SystemExit as stop:
        return int(stop.code or 0)
    codes = [job.return_value for batch in batches or () for job in batch]
    failed = [code for code in codes if code]
    if failed:
        sys.stderr.write(f"worldmpc: {len(failed)} of {len(codes)} runs failed\n")
    return max(failed, default=0)


def _run_many(composed: DictConfig) -> int:
    """One run of a sweep: its error is reported, and the sweep goes on. A signal ends the whole sweep."""
    job = HydraConfig.get()
    sys.stdout.write(f"\nrun {job.job.num + 1}: {' '.join(job.overrides.task)}\n")
    sys.stdout.flush()
    try:
        status, finished = _train(composed)
    except Exception as error:
        return report_error(error)
    if not finished:
        raise SystemExit(status)
    return status


def _run_one(composed: DictConfig) -> int:
    try:
        return _train(composed)[0]
    except Exception as error:  # reported here, as Hydra prints lines of its own about errors that it sees
        return report_error(error)


def _train(composed: DictConfig) -> tuple[int, bool]:
    """Train, and return (exit status, whether the run reached its end)."""
    config = _to_config(composed)  # before the import of torch, so that mistakes are answered at once
    from worldmpc.training.run import run_seeds

    with _received() as received:
        finished = all(result.finished for result in run_seeds(config))
        # A run that was told to stop has saved itself, so a job scheduler's SIGTERM is no failure.
        return (INTERRUPTED if signal.SIGINT in received() and not finished else 0), finished


@contextmanager
def _received() -> Iterator[Any]:
    """Give a function that returns the signals received so far, whoever handles them; who listened before is told of them in the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    seen = bytearray()

    def read() -> bytes:
        with suppress(BlockingIOError):
            seen.extend(os.read(reader, 4096))
        return bytes(seen)

    try:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield read
        finally:
            signal.set_wakeup_fd(before)
            if before != -1 and read():
                os.write(before, read())
    finally:
        os.close(reader)
        os.close(writer)
