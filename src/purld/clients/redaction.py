"""Remove an API key from what a server sent, in every form in which servers and proxies quote one.

All forms are compared by letters and digits only, after escapes are decoded. So one comparison covers JSON and URL
escapes, HTML entities, line wraps, a key spread over a list, and both alphabets of base64. The time is linear in the
text, whatever it holds.
"""

from __future__ import annotations

import base64
import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from purld.clients.ledger import CallResult

REDACTED = "[key]"
MIN_SECRET_LENGTH = 16  # a shorter key may be a placeholder such as EMPTY, which an answer may contain by chance
# The shortest piece of a key that is removed, in letters and digits. An answer is training data: less may be removed.
MIN_PIECE = 7
MIN_PIECE_IN_ANSWER = 12
# Shorter pieces are removed where those in one text make up half of the key.
MIN_SHORT_PIECE = 5
MORE_WITHOUT_DIGIT = 4  # a piece without a digit may be a word, so it must be longer by so many
_BLOCK = 3  # every piece of 2 * _BLOCK - 1 characters contains a block at a multiple of _BLOCK of the text
# A run of backslashes is consumed at once: a pattern that may start in its middle takes quadratic time.
_ESCAPE = (
    r"\\+(?:u(?P<unicode>[0-9A-Fa-f]{4})|x(?P<byte>[0-9A-Fa-f]{2})|[nrt])?"
    r"|%(?:25)*(?P<url>[0-9A-Fa-f]{2})"
    r"|&\#(?:[xX](?P<hex>[0-9A-Fa-f]{1,6})|(?P<decimal>[0-9]{1,7}));"
)
_ESCAPES = re.compile(_ESCAPE)
_UNITS = re.compile(rf"(?P<letters>[0-9A-Za-z]+)|{_ESCAPE}")
_NO_LETTERS = bytes(byte for byte in range(256) if not chr(byte).isalnum() or byte > 127)
_PUBLIC_PREFIX = re.compile(r"[A-Za-z]{2,8}[-_](?:[A-Za-z0-9]{1,6}[-_])*")  # sk-ant-api03- is no secret
_MAX_PREFIX = 14


class _Form(NamedTuple):
    """One form of the key, in letters and digits."""

    text: str
    public: int  # leading characters that are no secret
    scale: float  # characters per character of the key
    plain: bool = False


class _Piece(NamedTuple):
    """A piece of a form that a text has: letters `first` to `last` of the text, `start` to `stop` of the form."""

    first: int
    last: int
    start: int
    stop: int
    form: _Form
    has_digit: bool

    @property
    def length(self) -> int:
        """Return how many of its characters are secret."""
        return self.stop - max(self.start, self.form.public)

    @property
    def secret(self) -> bool:
        """Return whether the piece cannot be a word, and is of the key itself."""
        return self.has_digit and self.form.plain

    def required(self, min_piece: int) -> int:
        """Return the length from which on the piece is removed; a whole form always is."""
        least = math.ceil(min_piece * self.form.scale) + (0 if self.has_digit else MORE_WITHOUT_DIGIT)
        return min(len(self.form.text) - self.form.public, least)


class _Unit(NamedTuple):
    """A run of letters and digits of a text, or one that an escape stands for."""

    text: str
    start: int
    end: int


class KeyRedactor:
    """Removes one key from texts; without a key it returns them unchanged."""

    def __init__(self, key: str | None) -> None:
        self._key = key or ""
        self._forms = _forms_of(key) if key and len(key) >= MIN_SECRET_LENGTH else []
        self._blocks: dict[str, list[tuple[_Form, int]]] = {}
        for form in self._forms:
            for index in range(len(form.text) - _BLOCK + 1):
                self._blocks.setdefault(form.text[index : index + _BLOCK], []).append((form, index))

    def redact(self, text: str, min_piece: int = MIN_PIECE) -> str:
        """Return `text` without the key, its encodings, and pieces of at least `min_piece` characters of it."""
        if not self._key:
            return text
        text = text.replace(self._key, REDACTED)
        return self._redact_forms(text, min_piece) if self._forms else text

    def redact_answer(self, text: str) -> str:
        """Return a model's answer without the key; a key that may be a placeholder is left alone."""
        return self.redact(text, MIN_PIECE_IN_ANSWER) if self._forms else text

    def redact_result(self, result: CallResult) -> CallResult:
        """Return a call's result without the key in anything that came from the server."""
        error_class, colon, words = (result.error or "").partition(": ")
        return replace(
            result,
            text=None if result.text is None else self.redact_answer(result.text),
            finish_reason=None if result.finish_reason is None else self.redact(result.finish_reason),
            error=error_class + colon + self.redact(words) if result.error else result.error,
            raw=None if result.raw is None else self.redact(result.raw),
        )

    def _redact_forms(self, text: str, min_piece: int) -> str:
        found = self._find(_letters_of(_ESCAPES.sub(_decode, text)), min_piece)
        if not found:
            return text
        units = list(_units_of(text))
        starts = [0]
        for unit in units:
            starts.append(starts[-1] + len(unit.text))
        kept, end = [], 0
        for piece in found:
            begin, stop = _position(units, starts, piece.first)[0], _position(units, starts, piece.last - 1)[1]
            kept.append(text[end:begin])
            end = stop
        return REDACTED.join([*kept, text[end:]])

    def _find(self, letters: str, min_piece: int) -> list[_Piece]:
        """Return what to remove from a text of letters and digits, in order."""
        pieces = list(self._pieces(letters))
        covered = {index for piece in pieces if piece.secret for index in range(piece.start, piece.stop)}
        plain = self._forms[0]
        if 2 * len(covered) >= len(plain.text) - plain.public:
            return pieces
        return [piece for piece in pieces if piece.length >= piece.required(min_piece)]

    def _pieces(self, letters: str) -> Iterator[_Piece]:
        """Yield the pieces of the key's forms in a text of letters and digits, in order, disjoint."""
        index = end = 0
        while index + _BLOCK <= len(letters):
            if hits := self._blocks.get(letters[index : index + _BLOCK]):
                found = [_extend(letters, index, form, position, end) for form, position in hits]
                best = max(found, key=lambda piece: piece.length)
                if best.length >= best.required(MIN_SHORT_PIECE):
                    yield best
                    end = best.last
            index = max(index + _BLOCK, end)


def _forms_of(key: str) -> list[_Form]:
    """Return the key itself and its encodings, as letters and digits."""
    data = key.encode("utf-8", "replace")
    prefix = _PUBLIC_PREFIX.match(key[:_MAX_PREFIX])
    public = len(_letters_of(prefix.group())) if prefix else 0
    plain = _letters_of(key)
    forms = {plain: _Form(plain, min(public, len(plain) // 3), 1.0, plain=True)}
    others = [(key[::-1], 1.0), (data.hex(), 2.0), (data.hex().upper(), 2.0)]
    others += [("".join(f"0x{byte:02x}" for byte in data), 4.0), ("".join(map(str, data)), 2.5)]
    # The bytes before the key decide at which of three places in a group of base64 it starts.
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + data).decode()
        others.append((encoded[math.ceil(before * 4 / 3) : (before + len(data)) * 8 // 6], 4 / 3))
    for text, scale in others:
        letters = _letters_of(text)
        forms.setdefault(letters, _Form(letters, 0, scale))
    return [form for form in forms.values() if form.plain or len(form.text) >= MIN_SECRET_LENGTH]


def _letters_of(text: str) -> str:
    return text.encode("ascii", "replace").translate(None, _NO_LETTERS).decode()


def _decode(escape: re.Match[str]) -> str:
    """Return the letter or digit that an escape stands for, or nothing."""
    code = escape["unicode"] or escape["byte"] or escape["url"] or escape["hex"]
    number = int(code, 16) if code else int(escape["decimal"] or 0)
    return chr(number) if number < 128 and chr(number).isalnum() else ""


def _units_of(text: str) -> Iterator[_Unit]:
    for match in _UNITS.finditer(text):
        if letters := match["letters"] or _decode(match):
            yield _Unit(letters, match.start(), match.end())


def _position(units: list[_Unit], starts: list[int], index: int) -> tuple[int, int]:
    """Return where the letter `index` of all units begins and ends in the text."""
    number = bisect_right(starts, index) - 1
    unit = units[number]
    if unit.end - unit.start != len(unit.text):  # an escape stands for one letter
        return unit.start, unit.end
    begin = unit.start + index - starts[number]
    return begin, begin + 1


def _extend(letters: str, index: int, form: _Form, position: int, floor: int) -> _Piece:
    """Return the longest common piece of a text and a form around a block that both have."""
    first, start = index, position
    while first > floor and start > 0 and letters[first - 1] == form.text[start - 1]:
        first, start = first - 1, start - 1
    last, stop = index + _BLOCK, position + _BLOCK
    while last < len(letters) and stop < len(form.text) and letters[last] == form.text[stop]:
        last, stop = last + 1, stop + 1
    has_digit = any(letter.isdigit() for letter in letters[first:last])
    return _Piece(first, last, start, stop, form, has_digit)
