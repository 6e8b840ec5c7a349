"""Any Gymnasium environment: ``gym/<EnvId>`` or ``gym/<module>:<EnvId>`` (the module is imported first)."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from contextlib import suppress

import gymnasium

from worldmpc.config import ConfigError
from worldmpc.envs.wrappers import Env, SuiteEnv, own_step_limit

NEVER_TERMINATES = frozenset({"HalfCheetah", "HumanoidStandup", "Pendulum", "Pusher", "Reacher", "Swimmer"})
"""Gymnasium's own environments (any version) whose ``step`` always returns ``terminated`` False."""


def list_names() -> list[str]:
    """Return the ids that Gymnasium has registered; those with Box observations of one axis can be trained on."""
    return sorted(gymnasium.registry)


def resolve(name: str) -> str:
    """Return the name itself; ids exist only once their module is imported, so :func:`make` checks them.

    Raises:
        ConfigError: neither ``<EnvId>`` nor ``<module>:<EnvId>``.
    """
    module, colon, identifier = name.rpartition(":")
    if not identifier or (colon and not re.fullmatch(r"\w+(\.\w+)*", module)):
        raise ConfigError(f"task: expected gym/<EnvId> or gym/<module>:<EnvId>, got 'gym/{name}'")
    return name


def make(name: str, *, index: int = 0, unlimited: bool = False, render: bool = False) -> SuiteEnv:
    """Make the environment of an id; ``unlimited`` lifts the time limit it is registered with.

    Raises:
        ConfigError: unknown id or module, a module that cannot be imported, or a package that the environment needs is missing.
    """
    _import(name)
    try:
        env = _make(name, -1 if unlimited else None, render)
    except gymnasium.error.UnregisteredEnv as error:
        near = difflib.get_close_matches(name, list_names(), n=3)
        hint = f"did you mean {' or '.join(f'gym/{match}' for match in near)}?" if near else "`worldmpc tasks gym` lists all"
        raise ConfigError(f"task: unknown task 'gym/{name}'; {hint}") from error
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise ConfigError(_missing(name, error)) from error
    except gymnasium.error.Error as error:
        raise ConfigError(f"task: gym/{name}: {' '.join(str(error).split())}") from error
    known = ":" not in name and re.sub(r"-v\d+$", "", name) in NEVER_TERMINATES
    return SuiteEnv(env, f"gym/{name}", own_step_limit(env), can_terminate=not known)


def _make(name: str, limit: int | None, render: bool) -> Env:
    # Without frames render_mode is left out: environments of users need not know that argument.
    if render:
        # However one refuses it, it may do without; what has another cause shows again below.
        with suppress(Exception):
            return gymnasium.make(name, max_episode_steps=limit, disable_env_checker=True, render_mode="rgb_array")
    return gymnasium.make(name, max_episode_steps=limit, disable_env_checker=True)


def _import(name: str) -> None:
    """Import the module of ``<module>:<EnvId>``, whose code is the user's."""
    module = name.rpartition(":")[0]
    if not module:
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(_missing(name, error)) from error
    except Exception as error:
        raise ConfigError(f"task: gym/{name}: importing {module} raised {type(error).__name__}: {' '.join(str(error).split())}") from error


def _missing(name: str, error: Exception) -> str:
    module = name.partition(":")[0] if ":" in name else ""
    if module and importlib.util.find_spec(module.split(".")[0]) is None:
        return f"task: gym/{name} needs the module {module}, which is not installed; pip install the package that has it"
    text = " ".join(str(error).split())
    return f"task: gym/{name} needs a package that is not installed: {text}" + ("" if "pip install" in text else "; pip install it")
