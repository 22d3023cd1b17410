"""Keep today's date, where a chat template writes it, as a date in the template's layout and not as that of one day.

A template asks for it by `strftime_now(layout)`. `with_marked_dates` has it write the layout between two marks instead,
and what was marked can be written as a date again, in Python or in Ollama's language.
"""

from __future__ import annotations

import re
from datetime import datetime

_BEGIN, _END = "\ue0d0", "\ue0d1"  # of the private use area: no text has them
_MARKED = re.compile(f"{_BEGIN}(.*?){_END}", re.DOTALL)
_MONTHS: tuple[str, ...] = ("January", "February", "March", "April", "May", "June")
_MONTHS += ("July", "August", "September", "October", "November", "December")
# What `currentDate`, such as 2026-07-04, gives for a directive of strftime.
_PARTS = {
    "%Y": "{{ slice (currentDate) 0 4 }}",
    "%y": "{{ slice (currentDate) 2 4 }}",
    "%m": "{{ slice (currentDate) 5 7 }}",
    "%d": "{{ slice (currentDate) 8 10 }}",
}
_DIRECTIVE = re.compile(r"%-?.", re.DOTALL)


def with_marked_dates(template: str) -> str:
    """Return a chat template that writes a mark with the layout in the place of today's date."""
    # Of the line break that ends the macro Jinja leaves nothing; without it, it would take one of the template's own.
    return f"{{%- macro strftime_now(layout) -%}}{_BEGIN}{{{{ layout }}}}{_END}{{%- endmacro %}}\n{template}"


def fill_dates(text: str, date: datetime) -> str:
    """Return a text with a date in the place of its marks."""
    return _MARKED.sub(lambda found: date.strftime(found[1]), text)


def split_dates(text: str) -> list[tuple[str, bool]]:
    """Split a text at its dates: parts of it, and layouts, which are marked True."""
    return [(part, index % 2 == 1) for index, part in enumerate(_MARKED.split(text))]


def go_date(layout: str) -> str | None:
    """Return today's date in Ollama's language, whose `currentDate` knows the day alone; None for other layouts."""
    pieces, rest = [], layout
    while found := _DIRECTIVE.search(rest):
        pieces += [_literal(rest[: found.start()]), _action(found[0])]
        rest = rest[found.end() :]
    pieces.append(_literal(rest))
    return None if any(piece is None for piece in pieces) else "".join(piece or "" for piece in pieces)


def _action(directive: str) -> str | None:
    if directive in ("%b", "%B"):
        names = [name[:3] if directive == "%b" else name for name in _MONTHS]
        cases = "{{ else ".join(f'if eq . "{number:02d}" }}}}{name}' for number, name in enumerate(names, 1))
        return f"{{{{ with slice (currentDate) 5 7 }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}"
    return _PARTS.get(directive)


def _literal(text: str) -> str:
    return text if "{" not in text else "".join(f'{{{{ "{c}" }}}}' if c == "{" else c for c in text)
