"""Parse the option that an answer chooses, and check it against the reference.

The options of a prompt are `metadata["choices"]`. An answer or a reference names an option by its text, by its number
from 0, as in "(2)", or by its letter from A. An answer that names several options chooses none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from purld.records import Prompt

_STATEMENT = re.compile(r"\banswer(?:\s+is)?\s*[:*\s]+", re.IGNORECASE)
_LABEL = re.compile(r"\W*(?:[Oo]ption\s+)?\(?(\d+|[A-Z])\)?(?:\s*[.:)](?!\d)|\s*$|(?<=\))\s)")


def is_correct(prompt: Prompt, answer: str) -> bool:
    """Return whether an answer chooses the same option as the reference.

    Raises:
        ValueError: the prompt has no reference that is one of its options.
    """
    if not has_gold(prompt):
        raise ValueError(f"prompt {prompt.id} has no reference that is one of its choices")
    return chosen_option(answer, _options(prompt)) == chosen_option(prompt.reference or "", _options(prompt))


def has_gold(prompt: Prompt) -> bool:
    """Return whether a prompt has options and a reference that is one of them."""
    return prompt.reference is not None and chosen_option(prompt.reference, _options(prompt)) is not None


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that an answer chooses, or None if it chooses none or several."""
    statements = list(_STATEMENT.finditer(answer))
    choice = answer[statements[-1].end() :].strip() if statements else answer.strip()
    first_line = choice.partition("\n")[0]
    plain_options = [_plain_words(option) for option in options]
    # An option whose text is a number or a letter takes precedence over the label of the same form.
    text = _plain_words(first_line)
    if text and text in plain_options and not first_line.startswith("("):
        return plain_options.index(text)
    label = _parse_label(first_line, len(options))
    return label if label is not None else _find_mention(text if statements else _plain_words(choice), plain_options)


def _options(prompt: Prompt) -> list[str]:
    options = prompt.metadata.get("choices")
    return [str(option) for option in options] if isinstance(options, list | tuple) else []


def _parse_label(text: str, count: int) -> int | None:
    match = _LABEL.match(text)
    if match is None:
        return None
    index = int(match[1]) if match[1].isdigit() else ord(match[1]) - ord("A")
    return index if index < count else None


def _find_mention(text: str, options: Sequence[str]) -> int | None:
    """Return the index of the only option mentioned, ignoring options inside a longer option that is mentioned too."""
    spans = {}
    for index, option in enumerate(options):
        if option and (match := re.search(rf"\b{re.escape(option)}\b", text)):
            spans[index] = match.span()
    mentioned = [
        index
        for index, (start, end) in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans.values())
    ]
    return mentioned[0] if len(mentioned) == 1 else None


def _plain_words(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))
