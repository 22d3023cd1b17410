"""Which option an answer chooses, and whether it is the right one.

The options of a prompt are `metadata["choices"]`; an answer, and the reference, may give one by its text, its
number from 0, as in "(2)", or its letter from A. An answer that names several options chooses none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from purld.records import Prompt

_STATED = re.compile(r"\banswer(?:\s+is)?\s*[:*\s]+", re.IGNORECASE)
_LABEL = re.compile(r"\W*(?:[Oo]ption\s+)?\(?(\d+|[A-Z])\)?(?:\s*[.:)](?!\d)|\s*$|(?<=\))\s)")


def is_correct(prompt: Prompt, answer: str) -> bool:
    """Whether an answer chooses the option that the reference does.

    Raises:
        ValueError: the prompt has no gold.
    """
    if not has_gold(prompt):
        raise ValueError(f"prompt {prompt.id} has no reference that is one of its choices")
    return chosen_option(answer, _options(prompt)) == chosen_option(prompt.reference or "", _options(prompt))


def has_gold(prompt: Prompt) -> bool:
    """Whether a prompt has options and a reference that is one of them."""
    return prompt.reference is not None and chosen_option(prompt.reference, _options(prompt)) is not None


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer chooses, or None if it chooses no single one."""
    stated = list(_STATED.finditer(answer))
    said = answer[stated[-1].end() :].strip() if stated else answer.strip()
    first_line = said.partition("\n")[0]
    plain = [_plain(option) for option in options]
    # An option that is itself a number or a letter is meant before the label that looks like it.
    text = _plain(first_line)
    if text and text in plain and not first_line.startswith("("):
        return plain.index(text)
    label = _label(first_line, len(options))
    return label if label is not None else _mentioned(text if stated else _plain(said), plain)


def _options(prompt: Prompt) -> list[str]:
    options = prompt.metadata.get("choices")
    return [str(option) for option in options] if isinstance(options, list | tuple) else []


def _label(text: str, count: int) -> int | None:
    found = _LABEL.match(text)
    if found is None:
        return None
    place = int(found[1]) if found[1].isdigit() else ord(found[1]) - ord("A")
    return place if place < count else None


def _mentioned(text: str, options: Sequence[str]) -> int | None:
    """The only option in the text; one inside a longer one that is there, too, is not meant."""
    spans = {}
    for place, option in enumerate(options):
        if option and (found := re.search(rf"\b{re.escape(option)}\b", text)):
            spans[place] = found.span()
    meant = [
        place
        for place, (start, end) in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans.values())
    ]
    return meant[0] if len(meant) == 1 else None


def _plain(text: str) -> str:
    """Letters and digits in lower case, single spaces between the words."""
    return " ".join(re.findall(r"\w+", text.casefold()))
