"""What can be completed on a command line: the commands, their flags and arguments, and the keys of a configuration.

All of it is read from the commands and the configuration themselves, so that nothing has to be kept in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel

from purld.config.base import union_sections
from purld.config.schema import Config

Kind = Literal["file", "folder", "keys", "shell"]
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Flag:
    """A flag with its names, its help, and whether a value follows it; `values` if only some are allowed."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class CommandWords:
    """What may follow a command.

    Attributes:
        name: the command, or two words for a command of a group.
        help: its first line.
        flags: its flags.
        arguments: what each of its arguments is; the last one may be repeated.
    """

    name: str
    help: str
    flags: tuple[Flag, ...] = ()
    arguments: tuple[Kind, ...] = ()


@dataclass(frozen=True)
class CompletionTree:
    """All commands, and the values of every key that allows only some; empty for a key that takes any value."""

    commands: tuple[CommandWords, ...]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def build_tree(app: typer.Typer, values: Mapping[str, Sequence[str]]) -> CompletionTree:
    """Return what can be completed.

    Args:
        app: the application.
        values: of flags that take any text and mean one of a few, by the flag.
    """
    root: Any = typer.main.get_command(app)
    return CompletionTree(tuple(_commands(root, "", values)), config_keys())


def _commands(group: Any, prefix: str, values: Mapping[str, Sequence[str]]) -> Iterator[CommandWords]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield CommandWords(f"{prefix}{name}", command.get_short_help_str(80))
            yield from _commands(command, f"{name} ", values)
            continue
        flags = [
            Flag(
                tuple(parameter.opts),
                " ".join((parameter.help or "").split()),
                not parameter.is_flag,
                tuple(values.get(parameter.opts[0], ())),
            )
            for parameter in command.params
            if parameter.param_type_name == "option"
        ]
        flags.append(Flag(("-h", "--help"), "Show the help of this command.", False))
        arguments = [_kind(p.metavar or "") for p in command.params if p.param_type_name == "argument"]
        yield CommandWords(f"{prefix}{name}", command.get_short_help_str(80), tuple(flags), tuple(arguments))


def _kind(metavar: str) -> Kind:
    if "=" in metavar:
        return "keys"
    if "SHELL" in metavar:
        return "shell"
    return "folder" if "RUN" in metavar or "DIR" in metavar else "file"


def config_keys() -> dict[str, tuple[str, ...]]:
    """Return the dotted path of every key of a configuration, with its values where only some are allowed."""
    keys: dict[str, tuple[str, ...]] = {}
    for path, annotation in _leaves(Config, ""):
        keys[path] = tuple(dict.fromkeys([*keys.get(path, ()), *_allowed(annotation)]))
    return keys


def _leaves(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a section that hold a value, and those of the sections in it; a union gives all its keys."""
    for name, entry in section.model_fields.items():
        sections = union_sections(entry.annotation)
        if not sections:
            yield f"{prefix}{name}", entry.annotation
        for inner in sections:
            yield from _leaves(inner, f"{prefix}{name}.")


def _allowed(annotation: Any) -> list[str]:
    """Return the values of a type that allows only some."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    parts = [part for part in get_args(annotation) if part is not type(None)]
    named = [_allowed(part) for part in parts]
    return [value for values in named for value in values] if parts and all(named) else []
