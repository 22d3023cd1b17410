"""The few pieces of HTML that the page is made of. Text enters a page through `escape_text` and no other way."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from purld.report.figures import ReportFigure

# As in browser.js: whatever is invisible or moves the text around it, except line breaks and tabs.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffc\ud800-\udfff]"
)


def escape_text(value: object) -> str:
    """Text for HTML, with invisible characters named."""
    return html.escape(_INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(value)))


@dataclass(frozen=True)
class PageSection:
    """A part of the page under its own heading. One without a body is left out."""

    ident: str
    heading: str
    body: str

    def html(self) -> str:
        """The section as an element."""
        return f'<section id="{self.ident}">\n<h2>{escape_text(self.heading)}</h2>\n{self.body}</section>\n'

    def link(self) -> str:
        """A link to it."""
        return f'<a href="#{self.ident}">{escape_text(self.heading)}</a>'


_SCROLLS = ' tabindex="0"'  # what scrolls sideways on a phone must do so by keyboard


def figure_grid(drawings: Sequence[ReportFigure]) -> str:
    """Figures as a grid; empty without any."""
    parts = [
        f'<figure class="{"wide" if d.wide else "panel"}"><h3>{escape_text(d.heading)}</h3>'
        f'<div class="plot" role="img" aria-label="{escape_text(d.heading)}"{_SCROLLS if d.wide else ""}>{d.svg}</div>'
        f"<figcaption>{escape_text(d.caption)}</figcaption></figure>\n"
        for d in drawings
    ]
    return f'<div class="figures">{"".join(parts)}</div>\n' if parts else ""


def scrolling_table(label: str, heads: Iterable[str], body: str) -> str:
    """A table that scrolls by itself where it is too wide, also by keyboard; `body` is its rows as HTML."""
    row = "".join(f'<th scope="col">{escape_text(head)}</th>' for head in heads)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>\n'
        f"<thead><tr>{row}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )
