"""Match texts against question templates to recover the slots that fill them.

Slots whose name starts with `n` hold numbers from 1 to 99, all others one word; a slot that occurs twice must hold the
same text twice.
"""

from __future__ import annotations

import functools
import re

Slots = dict[str, str]


def parse_slots(template: str, text: str) -> Slots | None:
    """Return the slots that fill `template` to make `text`, or None if none do."""
    match = _pattern(template).fullmatch(text)
    return match.groupdict() if match else None


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    pattern, seen = "", set[str]()
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pattern += re.escape(piece)
        elif piece in seen:
            pattern += f"(?P={piece})"
        else:
            seen.add(piece)
            pattern += f"(?P<{piece}>{'[1-9][0-9]?' if piece.startswith('n') else '[A-Za-z]+'})"
    return re.compile(pattern)
