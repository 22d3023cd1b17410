"""Load a configuration from YAML and overrides, and explain in one sentence what is wrong with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from purld.config.base import MAY_BE_SECRET, section_tags, union_sections
from purld.config.read_yaml import parse_yaml, read_yaml
from purld.config.schema import TEMPLATE_NAME, Config
from purld.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, and validate the result.

    Paths in the file are relative to the working directory, like every path on a command line.

    Raises:
        UserError: the file is missing or not plain YAML, or a key or value is wrong; the message names it.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys such as student, data and teacher.")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate plain values; `source` names them in messages.

    Raises:
        UserError: a key or value is wrong; the message names `source` and the key.
    """
    try:
        return _with_template_text(Config.model_validate(values))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def _with_template_text(config: Config) -> Config:
    """Return the configuration with the text of the chat template in place of its file's name.

    A word that names no file is the name of one of the model's own templates, and stays. With the text a run keeps the
    template that it began with, whatever becomes of the file.

    Raises:
        UserError: the file cannot be read.
    """
    named = config.student.chat_template
    if named is None or "{{" in named or "{%" in named:
        return config
    if TEMPLATE_NAME.fullmatch(named) and not Path(named).exists():
        return config  # one of the model's own
    try:
        text = Path(named).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(f"student.chat_template: {named} cannot be read ({reason}).") from None
    return config.model_copy(update={"student": config.student.model_copy(update={"chat_template": text})})


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the value that `key.path=value` names, in place.

    Raises:
        UserError: it is not written so, or its value is not plain YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override[:80]!r}: write key.path=value, for example align.tau=0.9.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override[:80]!r}: {parent} is a value, not a section.")
        values = child
    try:
        values[last] = _number(parse_yaml(text))
    except yaml.YAMLError:
        raise UserError(f"override {override[:80]!r}: the value is not valid YAML.") from None


def _number(value: Any) -> Any:
    """Return the number that a text spells: YAML 1.1 reads 1e-5 as text, on a command line it is a number."""
    if isinstance(value, str) and any(map(str.isdigit, value)):  # "inf" and "nan" stay text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    """Put the first problem of a failed validation into one sentence."""
    # A misspelt key is also a missing one; report the spelling.
    problems = error.errors()
    problem = min(problems, key=lambda found: found["type"] != "extra_forbidden")
    # Pydantic puts the tag of a union into the path ("teacher.openai.model"), which users never wrote.
    where, model = _locate(problem["loc"])
    key = ".".join(where)
    places = [_locate(found["loc"])[0] for found in problems]
    others = len(set(map(tuple, places))) - 1
    more = f" ({others} more problem(s) after this one)" if others else ""
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
            return f"{_nearest_value(f'{key}.{tag}', problem['ctx']['tag'], problem['ctx']['expected_tags'])}{more}"
        case "literal_error":
            return f"{_nearest_value(key, problem['input'], problem['ctx']['expected'])}{more}"
        case "model_type" | "model_attributes_type":
            return f"{_how_to_write_section(key, problem['loc'], problem['input'])}{more}"
        case "list_type":
            return f"{key} is a list{_found(problem['input'])}; write {key}=[{problem['input']}].{more}"
        case _:
            here = [found for found, place in zip(problems, places) if place == where]
            words = [found["ctx"]["expected"] for found in here if found["type"] == "literal_error"]
            return f"{_describe_value(key, problem, words)}.{more}"


def _describe_value(key: str, problem: ErrorDetails, words: Sequence[str]) -> str:
    """Say what a key's value must be: of a type, or one of `words`, or what its check says."""
    message = problem["msg"].removeprefix("Value error, ")
    if wanted := _PLAIN_TYPES.get(problem["type"].removesuffix("_parsing").removesuffix("_type")):
        message = " or ".join([f"Input should be {wanted}", *(word.strip("'") for word in words)])
    found = "" if problem["type"] == MAY_BE_SECRET else _found(problem["input"])
    if key and message.startswith("Input should be "):
        return f"{key} must be {message.removeprefix('Input should be ')}{found}"
    return f"{key}: {message}{found}" if key else f"{message}{found}"


def _found(value: Any) -> str:
    return f" (found {repr(value)[:80]})" if isinstance(value, str | int | float) else ""


_PLAIN_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "int_from_float": "a whole number",
    "bool": "true or false",
    "string": "a text",
}
_SHORT_FORMS = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32", "float": "float32"}


def _nearest_value(key: str, value: Any, expected: str) -> str:
    """Say which of the values in quotes in `expected` is meant, and how to write it."""
    allowed = re.findall(r"'([^']*)'", expected)
    text = re.sub(r"[\s-]+", "_", str(value).strip().lower())
    text = _SHORT_FORMS.get(text, text)
    near = difflib.get_close_matches(text, allowed, n=1) or [a for a in allowed if text in a or a in text]
    hint = f"did you mean {near[0]}? Write {key}={near[0]}; " if near else ""
    return f"{key} is {str(value)[:80]!r}; {hint}it can be {', '.join(allowed)}."


def _how_to_write_section(key: str, location: tuple[int | str, ...], value: Any) -> str:
    """Say that a section has keys of its own, and write its first one as an example."""
    field: Any = None
    section: Any = Config
    for part in map(str, location):
        field = section.model_fields.get(part) if section else None
        sections = union_sections(field.annotation) if field else []
        section = sections[0] if len(sections) == 1 else None
    tags = {tag: s for s in sections for tag in section_tags(s)} if field and len(sections) > 1 else {}
    shown = _found(value)
    if tags:
        name = "method" if "method" in sections[0].model_fields else "kind"
        near = str(value) if str(value) in tags else next(iter(tags))
        return f"{key} is a section with keys of its own{shown}; write {key}.{name}={near}."
    if section is None:
        return f"{key} is a section with keys of its own{shown}."
    first, entry = next(iter(section.model_fields.items()))
    example = "VALUE" if entry.is_required() or entry.default is None else entry.default
    without = f", or {key}=null to do without" if field is not None and field.default is None else ""
    return f"{key} is a section with keys of its own{shown}; write {key}.{first}={example}{without}."


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """Return the path that the user wrote, and the section in which its last key was looked up."""
    written: list[str] = []
    model: type[BaseModel] | None = Config
    holder: type[BaseModel] | None = Config
    choices: dict[str, type[BaseModel]] = {}
    annotation: Any = None
    for part in map(str, location):
        if part in choices:
            model, choices = choices[part], {}
            continue
        if model is None and get_origin(annotation) in (Union, UnionType):
            continue  # which of the types that the last key may have
        holder = model
        written.append(part)
        field = model.model_fields.get(part) if model else None
        annotation = field.annotation if field else None
        models = union_sections(annotation)
        model = models[0] if len(models) == 1 else None
        choices = {tag: m for m in models for tag in section_tags(m)} if len(models) > 1 else {}
    return written, holder
