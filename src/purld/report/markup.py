"""Make the HTML elements of the page. All text enters a page through `escape_text`."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
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


def capitalised(sentence: str) -> str:
    """Return a sentence with its first letter in upper case, and the others as they are."""
    return sentence[:1].upper() + sentence[1:]


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


def figure_grid(figures: Sequence[ReportFigure]) -> str:
    """Return the figures as a grid; empty without figures."""
    parts = [_figure_element(figure) for figure in figures]
    return f'<div class="figures">{"".join(parts)}</div>\n' if parts else ""


def _figure_element(figure: ReportFigure) -> str:
    heading = escape_text(figure.heading)
    drawings = [("plot", figure.svg)]
    if figure.narrow_svg:
        drawings = [("plot on-desk", figure.svg), ("plot on-phone", figure.narrow_svg)]
    plots = "".join(f'<div class="{kind}" role="img" aria-label="{heading}">{svg}</div>' for kind, svg in drawings)
    return (
        f'<figure class="{"wide" if figure.narrow_svg else "panel"}"><h3>{heading}</h3>{plots}'
        f"<figcaption>{escape_text(figure.caption)}</figcaption></figure>\n"
    )


def wide_table(label: str, headings: Sequence[str], body: str) -> str:
    """Return a table that scrolls sideways where it is too wide, also by keyboard; on a phone a row is a card.

    Args:
        label: the table's name for screen readers.
        headings: the columns' headings.
        body: the rows as HTML, data cells last. A row under a heading that spans rows has fewer cells.
    """
    row = "".join(f'<th scope="col">{escape_text(heading)}</th>' for heading in headings)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>\n'
        f"<thead><tr>{row}</tr></thead>\n<tbody>{_name_cells(body, headings)}</tbody></table></div>\n"
    )


def _name_cells(body: str, headings: Sequence[str]) -> str:
    """Give every data cell its column's heading as `data-label`, which a phone shows beside it."""

    def name_row(match: re.Match[str]) -> str:
        row = match[0]
        names = iter(headings[len(headings) - row.count("<td") :])
        return re.sub("<td", lambda _: f'<td data-label="{escape_text(next(names))}"', row)

    return re.sub("<tr.*?</tr>", name_row, body, flags=re.DOTALL)
