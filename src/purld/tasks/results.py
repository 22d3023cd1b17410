"""Tell whether a gold answer is a number, or a text that ends in one, so that answers can be compared with it."""

from __future__ import annotations

import re

from purld.tasks.final_answer import boxed_answer, stated_answers

# A number as people write one: with a sign, separators, a fraction, a unit or a currency, in dollars of LaTeX or not.
_NUMBER = re.compile(
    r"\$?\s*[-+−]?\s*[$€£¥]?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?\s*(?:\\?%|°)?\s*(?:[a-z]+\.?)?\s*\$?\.?",
    re.I,
)
_LONGEST = 40  # characters of a bare number with its unit


def names_number(reference: str) -> bool:
    """Return whether a gold answer is a number with or without a unit, or states or boxes a result."""
    text = reference.strip()
    if len(text) <= _LONGEST and _NUMBER.fullmatch(text):
        return True
    if boxed_answer(text):
        return True
    stated = stated_answers(text)
    return bool(stated) and len(stated[0]) <= _LONGEST and _NUMBER.fullmatch(stated[0]) is not None
