"""Write a configuration as YAML with comments: a section per block, a key per line, its comment behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_WIDTH = 118
_FURTHEST = 46  # comments of a section begin in one column, unless a line is longer than this


def render_yaml(
    values: Mapping[str, Any],
    comments: Mapping[str, str],
    header: Sequence[str] = (),
    appended: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return a YAML text that reads back as `values`.

    Args:
        values: the sections; keys within a section are written one per line, what is below them in one line.
        comments: by dotted path of a key or a section, one line.
        header: the lines of the comment at the top.
        appended: by section, lines at its end that are commented out.
    """
    blocks = ["".join(f"# {line}\n" for line in header)] if header else []
    for name, section in values.items():
        if not isinstance(section, Mapping) or not section:
            blocks.append(_line(f"{_inline(name)}: {_inline(section)}", comments.get(name), 0))
            continue
        lines = {key: f"  {_inline(key)}: {_inline(value)}" for key, value in section.items()}
        column = max((len(line) for line in lines.values() if len(line) <= _FURTHEST), default=0)
        block = _line(f"{_inline(name)}:", comments.get(name), 0)
        block += "".join(_line(line, comments.get(f"{name}.{key}"), column) for key, line in lines.items())
        blocks.append(block + "".join(f"  # {line}\n" for line in (appended or {}).get(name, ())))
    return "\n".join(blocks)


def _line(text: str, comment: str | None, column: int) -> str:
    if comment is None:
        return f"{text}\n"
    placed = f"{text.ljust(column)}  # {comment}"
    indent = text[: len(text) - len(text.lstrip())]
    return f"{placed}\n" if len(placed) <= _WIDTH else f"{indent}# {comment}\n{text}\n"


def _inline(value: Any) -> str:
    """Return a value in YAML's flow style, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(inner)}" for key, inner in value.items()) + "}"
    listed = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True)
    return listed.strip().removeprefix("[").removesuffix("]")
