"""YAML in, ``section.key=value`` overrides, frozen dataclasses out, and back.

Unknown keys are refused with the nearest known one; types are checked, never guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from distfl.errors import ConfigError

Schema = TypeVar("Schema")


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Refuse a value that has the right type but makes no sense."""
    if not ok:
        raise ConfigError(f"{key} = {value!r}", f"{key} must be {rule}", f"set {key} to a value that is {rule}")


def load(schema: type[Schema], path: str | os.PathLike, overrides: list[str] = ()) -> Schema:
    """Read a YAML file and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: missing file, not YAML, unknown key, wrong type or senseless value.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder, there is no such file" if path.is_dir() else "there is no such file"
        raise ConfigError(f"config file {path}", found, "name an existing file, for instance one of configs/")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}", f"not a readable text file: {error}", "name a YAML file, see configs/") from None
    values = _parse(text, f"config file {path}")
    parsed = [(key, _parse(value, f"override {key}={value}")) for key, value in map(_split_override, overrides)]
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}", f"{_said(type(values))}, not sections with keys", "see configs/smoke.yaml for the shape")
    for key, value in parsed:
        _override(values, key, value)
    return from_dict(schema, values)


def _parse(text: str, what: str) -> Any:
    import yaml  # the server rank and the command line read YAML, client ranks never do

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice: YAML alone would take the last one silently."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that are none, endless nesting
        raise ConfigError(what, f"not YAML: {error}", "mend it at the place named above") from None


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}", "no '=' with a key before it", "write section.key=value, for instance training.batch=4")
    return key, value


def _override(values: dict, key: str, value: object) -> None:
    *sections, last = key.split(".")
    here: Any = values
    for name in sections:
        try:
            here = here[int(name)] if isinstance(here, list) else here.setdefault(name, {})
        except (ValueError, IndexError):
            here = None
        if not isinstance(here, (dict, list)):
            raise ConfigError(
                f"override {key}={value}", f"{name!r} is not a section with keys", "name the key as section.key or fleet.groups.0.key"
            )
    if isinstance(here, list):
        raise ConfigError(
            f"override {key}={value}", f"{last!r} would replace an entry of a list", f"name a key of that entry: {key}.KEY=..."
        )
    here[last] = value


def from_dict(schema: type[Schema], values: dict) -> Schema:
    """Build a config from plain values, checking keys and types (raises ConfigError)."""
    return _convert(schema, values, "")


def to_dict(config: object) -> dict:
    """The effective values, as plain YAML- and JSON-ready ones; ``from_dict`` takes them back."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: object) -> str:
    """The effective config as YAML."""
    import yaml  # see _parse()

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _convert(kind: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, key)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, key)
    if origin is Literal:
        if isinstance(value, bool) and "on" in arguments:  # YAML 1.1 reads on and off as true and false
            value = "on" if value else "off"
        if value not in arguments:
            raise ConfigError(
                f"{key} = {value!r}",
                f"allowed are {', '.join(map(str, arguments))}{_nearest(value, arguments)}",
                f"set {key} to one of these",
            )
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(items))
        if len(items) != len(arguments):
            raise ConfigError(f"{key} = {value!r}", f"{len(items)} values, {len(arguments)} needed", f"give {key} {len(arguments)} values")
        return tuple(_convert(a, item, f"{key}[{i}]") for i, (a, item) in enumerate(zip(arguments, items)))
    wanted = origin or kind
    if wanted is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{key} = {value!r}", f"{_said(type(value))} where {_said(wanted)} is needed", f"give {key} as {_said(wanted)}")
    if wanted is float and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r}", "not a finite number", f"give {key} a finite number, or leave it away for its default")
    return value


def _section(kind: Any, values: Any, key: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(
            key or "config", f"{_said(type(values))} where keys are needed", f"write keys of {kind.__name__} below {key or 'the top'}"
        )
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            where = f"{key}.{name}" if key else str(name)
            raise ConfigError(f"key {where}", f"unknown{_nearest(name, hints)}", f"use one of: {', '.join(hints)}")
    converted = {name: _convert(hints[name], value, f"{key}.{name}" if key else name) for name, value in values.items()}
    for entry in dataclasses.fields(kind):
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if needed and entry.name not in converted:
            raise ConfigError(f"section {key or 'config'}", f"the key {entry.name} is missing", f"add {entry.name}")
    return kind(**converted)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a section's keys: evaluated once, for all ranks that are forked from this process."""
    return typing.get_type_hints(kind)


def _said(kind: type) -> str:
    """A type in words that need no Python."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "keys with values"}
    return "nothing (null)" if kind is type(None) else words.get(kind, f"a {kind.__name__}")


def _nearest(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def expand(path: str, key: str) -> Path:
    """A path with ``~`` and ``${VARIABLES}`` filled in (raises ConfigError where one is not set)."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise ConfigError(
            f"{key} = {path}", "it names an environment variable that is not set", f"export the variable, or set {key}=/path/to/data"
        )
    return Path(expanded)
