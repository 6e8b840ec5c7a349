"""Words of a command: options ``name=value`` (also ``--name value``), configuration overrides, and the rest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from worldmpc.config import ConfigError, RunConfig, flat_fields, lookup, unknown_key


class Option(NamedTuple):
    """An option of a command."""

    default: int | float | str | None
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()


def split_words(words: Sequence[str], options: Mapping[str, Option]) -> tuple[dict[str, Any], list[str]]:
    """Return (value of every option, words that are no option, in their order).

    Raises:
        ConfigError: an option without value, with a value of the wrong kind, or a ``--name`` that does not exist.
    """
    values = {name: option.default for name, option in options.items()}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.partition("=")
        if word.startswith("--"):
            name = name[2:].replace("-", "_")
            if name not in options:
                raise _unknown_option(word, options)
            if not equals:
                if not queue:
                    raise ConfigError(f"{word}: expected a value behind it")
                text = queue.pop(0)
        elif not equals or name not in options:
            rest.append(word)
            continue
        values[name] = _convert(name, text, options[name])
    return values, rest


def no_more_words(words: Sequence[str], command: str, options: Mapping[str, Option]) -> None:
    """Refuse words that a command has no use for.

    Raises:
        ConfigError: there is one.
    """
    if words:
        raise ConfigError(f"{words[0]}: {command} takes {', '.join(f'{name}=' for name in options)}")


def listed(name: str, text: str) -> list[str]:
    """Return the entries of a list as options have it: ``a``, ``a,b`` or ``[a,b]``.

    Raises:
        ConfigError: a bracket without the other, or an empty entry.
    """
    inner = text.strip()
    if inner.startswith("[") != inner.endswith("]"):
        raise ConfigError(f"{name}: expected a list as in {name}=[a,b], got '{text}'")
    entries = [entry.strip() for entry in inner.strip("[]").split(",")]
    if not all(entries):
        raise ConfigError(f"{name}: expected names, as in {name}=[a,b], got '{text}'")
    return entries


def check_overrides(words: Sequence[str], *, sweep: bool = False) -> list[Any]:
    """Parse configuration overrides, refuse what is none, and return Hydra's ``Override`` objects.

    Raises:
        ConfigError: not ``key=value``, an unknown key or preset, a value that cannot be parsed, or several values without ``sweep``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    names = {name for name, _ in flat_fields()}
    sections = {name.partition(".")[0] for name in names if "." in name}
    lists = {name for name, _ in flat_fields() if isinstance(lookup(RunConfig(), name), tuple) or name == "seeds"}
    parser = OverridesParser.create()
    parsed: list[Any] = []
    for word in expand_names(words):
        name = _check_word(word)
        passes = name.startswith(("hydra.", "hydra/"))
        if not passes and name not in names | sections:
            raise unknown_key(name)
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            reason = " ".join(str(error).splitlines()[0].split())
            raise ConfigError(f"{word}: cannot be parsed ({reason}); unusual text needs quotes inside quotes: '{name}=\"...\"'") from error
        if override.is_sweep_override() and not sweep:
            if name in lists:
                raise ConfigError(f"{word}: a list needs brackets: '{name}=[{word.partition('=')[2]}]'")
            raise ConfigError(f"{word}: several values need -m, for one run each; a text with commas needs quotes: '{name}=\"...\"'")
        if not passes:
            _check_value(name, override)
        parsed.append(override)
    return parsed


def expand_names(words: Sequence[str]) -> list[str]:
    """Write ``planner=cem`` as ``planner.name=cem``, for every section that has a name."""
    named = {name.removesuffix(".name") for name, _ in flat_fields() if name.endswith(".name")}
    expanded = []
    for word in words:
        name, equals, value = word.partition("=")
        short = bool(equals) and name in named and not value.lstrip().startswith(("{", "'{", '"{'))
        expanded.append(f"{name}.name={value}" if short else word)
    return expanded


def override_values(words: Sequence[str]) -> dict[str, Any]:
    """Return dotted key -> value of configuration overrides.

    Raises:
        ConfigError: see :func:`check_overrides`.
    """
    return {override.key_or_group: override.value() for override in check_overrides(words)}


def _check_word(word: str) -> str:
    """Return the key of ``key=value``."""
    name, equals, _ = word.partition("=")
    bare = name.lstrip("+~")
    if word.startswith("-"):
        raise ConfigError(f"{word}: unknown option; settings are key=value, and --help lists them all")
    if bare != name and not bare.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"{word}: keys cannot be added or removed; write {bare}=value to change one")
    if not name or not (equals or bare != name):
        raise ConfigError(f"{word}: expected key=value, as in seed=1")
    return bare


def _check_value(name: str, override: Any) -> None:
    """Check what Hydra would report less clearly: keys inside ``section={key: value}``."""
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return
    for value in override.sweep_iterator() if override.is_sweep_override() else [override.value()]:
        if isinstance(value, Mapping):
            for key in value:
                if f"{name}.{key}" not in dict(flat_fields()):
                    raise unknown_key(f"{name}.{key}")


def _convert(name: str, text: str, option: Option) -> int | float | str:
    if option.choices:
        if text not in option.choices:
            raise ConfigError(f"{name}: expected one of {', '.join(option.choices)}, got '{text}'")
        return text
    if not text:
        raise ConfigError(f"{name}: expected a value behind {name}=")
    if option.kind is str:
        return text
    try:
        number = float(text)
        if option.kind is int and not number.is_integer():
            raise ValueError(text)
        return option.kind(number)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: expected {'a whole number' if option.kind is int else 'a number'}, got '{text}'") from error


def _unknown_option(word: str, options: Mapping[str, Option]) -> ConfigError:
    near = difflib.get_close_matches(word.lstrip("-"), options, n=1)
    hint = f"did you mean {near[0]}=?" if near else f"options are {', '.join(f'{name}=' for name in options) or 'none'}"
    return ConfigError(f"{word}: unknown option; {hint}")
