"""Hold a configuration that is being written: its values, a comment per key, and lines that are left to the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purld.config.load import apply_override, parse_config
from purld.config.read_yaml import parse_yaml
from purld.config.schema import Config
from purld.errors import UserError
from purld.setup.render_yaml import render_yaml

_SECTIONS = ("student", "data", "teacher", "sft", "align", "evaluate")


class Draft:
    """The values of a configuration; what the user has set is never changed.

    Args:
        overrides: what the user has set, as `key.path=value`.

    Attributes:
        values: the sections.
        comments: by dotted path of a key, one line.

    Raises:
        UserError: an override is not written so, or sets a whole section.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        self.values: dict[str, Any] = {section: {} for section in _SECTIONS}
        self.comments: dict[str, str] = {}
        self._appended: dict[str, Sequence[str]] = {}
        for override in overrides:
            apply_override(self.values, override)
        for section in _SECTIONS:
            if not isinstance(self.values[section], dict):
                raise UserError(f"{section} is a section with keys of its own; write {section}.KEY=VALUE.")

    def get(self, path: str) -> Any:
        """Return the value of a dotted path; None if it has none."""
        value: Any = self.values
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def columns(self, section: str) -> dict[str, Any]:
        """Return the columns that the user has named in a section."""
        named = self.get(f"{section}.columns")
        return dict(named) if isinstance(named, Mapping) else {}

    def put(self, path: str, value: Any, comment: str | None = None) -> None:
        """Set a key of a section with a comment, unless the user has set it."""
        section, key = path.split(".")
        self.values[section].setdefault(key, value)
        if comment and self.values[section][key] == value:
            self.comments[path] = comment

    def replace(self, path: str, value: Mapping[str, Any], comment: str | None = None) -> None:
        """Set a key of a section to a mapping that holds what the user has set in it, or remove it if it is empty."""
        section, key = path.split(".")
        if isinstance(self.values[section].get(key, {}), dict):  # else reading the result back says what is wrong
            self.values[section].pop(key, None)
            if value:
                self.put(path, dict(value), comment)

    def append(self, section: str, lines: Sequence[str]) -> None:
        """Add lines to the end of a section, commented out."""
        self._appended[section] = lines

    def sort(self, section: str, first: Sequence[str]) -> None:
        """Put some keys of a section first, in this order."""
        values = self.values[section]
        self.values[section] = {key: values[key] for key in [*(k for k in first if k in values), *values]}

    def text(self, header: Sequence[str] = ()) -> str:
        """Return the YAML; `header` are the lines of the comment at its top."""
        values = {name: section for name, section in self.values.items() if section not in ({}, None)}
        return render_yaml(values, self.comments, header, self._appended)

    def read(self, source: str) -> Config:
        """Return the configuration that the text reads as; `source` names it in messages.

        Raises:
            UserError: a key or a value is wrong.
        """
        return parse_config(parse_yaml(self.text()), source)
