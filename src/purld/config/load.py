"""Load a configuration from YAML and overrides, and explain in one sentence what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from purld.config.base import section_tags, union_sections
from purld.config.schema import Config
from purld.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, and validate the result.

    Paths in the file are relative to the working directory, like every path on a command line.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; the message names it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error}).") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: is not valid YAML: {problem}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys such as student, data and teacher.")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate plain values; `source` names them in messages.

    Raises:
        UserError: a key or value is wrong; the message names `source` and the key.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: write key.path=value, for example align.tau=0.9.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section.")
        values = child
    try:
        values[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML.") from None


def _number(value: Any) -> Any:
    """Return the number that a text spells: YAML 1.1 reads 1e-5 as text, on a command line it is a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    """Put the first problem of a failed validation into one sentence."""
    # A misspelt key is also a missing one; report the spelling.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    # Pydantic puts the tag of a union into the path ("teacher.openai.model"), which users never wrote.
    where, model = _locate(problem["loc"])
    key = ".".join(where)
    more = f" ({error.error_count() - 1} more problem(s) after this one)" if error.error_count() > 1 else ""
    match problem["type"]:
        case "extra_forbidden":
            known = list(model.model_fields) if model else []
            near = difflib.get_close_matches(where[-1], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(sorted(known))}."
            return f"unknown key {key}; {hint}{more}"
        case "missing":
            return f"key {key} is missing.{more}"
        case "union_tag_not_found":
            tag = problem["ctx"]["discriminator"].strip("'")
            return f"key {key}.{tag} is missing.{more}"
        case "union_tag_invalid":
            tag = problem["ctx"]["discriminator"].strip("'")
            value, allowed = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
            return f"{key}.{tag} is {value!r}; it can be {allowed}.{more}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            prefix = f"{key}: " if key else ""
            value = problem["input"]
            secret = problem["type"] == "secret_in_url"
            shown = f" (found {value!r})" if isinstance(value, str | int | float) and not secret else ""
            return f"{prefix}{message}{shown}.{more}"


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the path that the user wrote, and the section in which its last key was looked up."""
    written: list[str] = []
    model: type[BaseModel] | None = Config
    holder: type[BaseModel] | None = Config
    choices: dict[str, type[BaseModel]] = {}
    for part in map(str, location):
        if part in choices:
            model, choices = choices[part], {}
            continue
        holder = model
        written.append(part)
        field = model.model_fields.get(part) if model else None
        models = union_sections(field.annotation) if field else []
        model = models[0] if len(models) == 1 else None
        choices = {tag: m for m in models for tag in section_tags(m)} if len(models) > 1 else {}
    return written, holder
