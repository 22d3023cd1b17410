"""Make the HTML elements of the page. All text enters a page through `escape_text`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from purld.report.figures import ReportFigure

# As in browser.js: characters that are invisible or reorder the text around them, except line breaks and tabs.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffc\ud800-\udfff]"
)


def escape_text(value: object) -> str:
    """Return text escaped for HTML, with invisible characters replaced by their code points."""
    return html.escape(_INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", str(value)))


@dataclass(frozen=True)
class PageSection:
    """A section of the page with a heading. A section without a body is left out of the page."""

    ident: str
    heading: str
    body: str

    def to_html(self) -> str:
        """Return the section as an HTML element."""
        return f'<section id="{self.ident}">\n<h2>{escape_text(self.heading)}</h2>\n{self.body}</section>\n'

    def to_link(self) -> str:
        """Return a link to the section."""
        return f'<a href="#{self.ident}">{escape_text(self.heading)}</a>'


_FOCUSABLE = ' tabindex="0"'  # elements that scroll sideways must be reachable by keyboard


def figure_grid(figures: Sequence[ReportFigure]) -> str:
    """Return the figures as a grid; empty without figures."""
    parts = [_figure_element(figure) for figure in figures]
    return f'<div class="figures">{"".join(parts)}</div>\n' if parts else ""


def _figure_element(figure: ReportFigure) -> str:
    kind, focusable = ("wide", _FOCUSABLE) if figure.wide else ("panel", "")
    heading = escape_text(figure.heading)
    return (
        f'<figure class="{kind}"><h3>{heading}</h3>'
        f'<div class="plot" role="img" aria-label="{heading}"{focusable}>{figure.svg}</div>'
        f"<figcaption>{escape_text(figure.caption)}</figcaption></figure>\n"
    )


def scrolling_table(label: str, headings: Iterable[str], body: str) -> str:
    """Return a table that scrolls sideways where it is too wide, also by keyboard; `body` is its rows as HTML."""
    row = "".join(f'<th scope="col">{escape_text(heading)}</th>' for heading in headings)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>\n'
        f"<thead><tr>{row}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )
