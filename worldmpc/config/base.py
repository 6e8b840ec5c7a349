"""The machinery of configurations: declared keys, nested plain data, conversion with clear errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration value or key that cannot be used; the message says which and what to do."""


def key(default: Any, help: str) -> Any:
    """Declare a configuration field with its default and its meaning."""
    return field(default=default, metadata={"help": help})


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the nested values of ``over`` on top; neither is changed. A section given as text is its ``name``."""
    result = dict(base)
    for name, value in over.items():
        old = result.get(name)
        if isinstance(old, Mapping) and isinstance(value, str | list | tuple):
            value = {"name": value}
        if isinstance(old, str | list | tuple) and isinstance(value, Mapping):
            old = {"name": old}
        result[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


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


def hints(cls: type) -> dict[str, Any]:
    """Return the resolved annotations of a dataclass."""
    return typing.get_type_hints(cls)


def build(cls: type, data: Mapping[str, Any], unknown: Callable[[str], ConfigError], prefix: str = "") -> Any:
    """Build a dataclass, and those below it, from nested plain data; missing keys keep their defaults.

    A section that has a ``name`` may be given as that name alone: ``planner="cem"`` is ``planner={"name": "cem"}``.

    Raises:
        ConfigError: what ``unknown`` returns for a dotted key that does not exist, or a value of the wrong type.
    """
    kinds = hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        if name not in kinds:
            raise unknown(dotted)
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            if isinstance(value, str | list | tuple) and "name" in hints(typing.cast(type, kind)):
                value = {"name": value}
            if not isinstance(value, Mapping):
                raise ConfigError(f"{dotted}: expected keys below it, as in {dotted}.<key>=<value>, got {value!r}")
            values[name] = build(typing.cast(type, kind), value, unknown, f"{dotted}.")
        else:
            values[name] = _convert(value, kind, dotted)
    return cls(**values)


def _named(item: Any, dotted: str) -> Any:
    """Return ``{type: T, path: P}`` as ``T:P``, and anything else as it is."""
    if not isinstance(item, Mapping):
        return item
    if set(item) == {"type"}:
        return item["type"]
    if set(item) != {"type", "path"}:
        raise ConfigError(f"{dotted}: expected type and path, as in {{type: TDMPC2, path: ...}}, got {dict(item)}")
    return f"{item['type']}:{item['path']}"


def _convert(value: Any, kind: Any, dotted: str) -> Any:
    """Check a leaf against its annotation; numbers may widen from int to float, and an integral name to str."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        words = [word for argument in arguments if typing.get_origin(argument) is Literal for word in typing.get_args(argument)]
        if value in words:
            return value
        others = [argument for argument in arguments if argument is not type(None) and typing.get_origin(argument) is not Literal]
        if isinstance(value, str) and words and others != [str]:
            raise ConfigError(f"{dotted}: expected {' or '.join(words)} or {others[0].__name__}, got {value!r}")
        return _convert(value, others[0], dotted)
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
        if isinstance(value, str) and dotted.endswith(".name"):
            value = [value]
        if not isinstance(value, Sequence) or isinstance(value, str):
            words = [word for part in typing.get_args(arguments[0]) for word in typing.get_args(part)]
            raise ConfigError(f"{dotted}: expected a list, as in {dotted}=[{f'{words[0]},0.97' if words else '1,2,3'}], got {value!r}")
        return tuple(_convert(_named(item, dotted), arguments[0], dotted) for item in value)
    if not isinstance(value, kind):
        raise ConfigError(f"{dotted}: expected {kind.__name__}, got {value!r}")
    return value
