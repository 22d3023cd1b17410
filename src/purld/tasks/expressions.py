"""Read the final answer of a text as a mathematical expression, by math-verify, or as words.

math-verify finds formulas in texts, but takes every box of a text as one set, a denied number as an answer, and reads
neither plain "10^{6}" nor a minus sign of typography. So the final answer is found first (`final_answer`), written in
the form that math-verify reads, and parsed alone.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any

from purld.tasks.final_answer import boxed_answer, stated_answers, without_denials

Expressions = list[Any]
"""What math-verify's `parse` returns: sympy expressions, then the text that they were read from."""

_FEW_WORDS = 4  # "all real numbers"
_MAX_CHARACTERS = 5000  # no answer is longer, and parsing takes more than linear time
_WIDE_DIGITS = {chr(ord("０") + digit): str(digit) for digit in range(10)}
_CHARACTERS = str.maketrans(
    _WIDE_DIGITS | {"−": "-", "–": "-", "‒": "-", "⁄": "/", "\xa0": " ", "\u202f": " ", "\u2009": " "}
)
_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=[\d$.])", re.IGNORECASE)
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
           "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}  # fmt: skip
_SYMBOLS = {"×": r"\times ", "÷": r"\div ", "π": r"\pi ", "°": r"^\circ ", "∞": r"\infty ", "√": r"\sqrt "}

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)"
_PLAIN_NUMBER = re.compile(r"([-+]?)\s*\\?[$€£¥]?\s*([-+]?(?:\d{1,3}(?:[ ,]\d{3})+|\d+)?(?:\.\d+)?(?<=\d))\s*(\\?%)?")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d{1,2}|\d{4,})")  # outside a box, where it separates a set's elements
_PRICE = re.compile(r"\\?\$ ?(?=\d[\d,]*(?:\.\d+)?(?:[.,;:!?)*]*(?:\s+[A-Za-z]|\s*$)|[.,;:!?)*]+\s))")
_ITEM = rf"(?:[a-zA-Z]\s*=\s*)?{_NUMBER}(?:/\d+)?"
_LIST = re.compile(rf"{_ITEM}(?:\s*(?:,\s*(?:and|or)?|;|\band\b|\bor\b)\s*{_ITEM})+")
_FORMULA_IN_TEXT = r"(?:\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\])"
_FORMULAS = re.compile(rf"{_FORMULA_IN_TEXT}(?:\s*(?:,?\s*and|,?\s*or|,)\s*{_FORMULA_IN_TEXT})*", re.DOTALL)
_LEADING = re.compile(r"(?:(?:about|approximately|exactly|just|only)\s+)*", re.IGNORECASE)
_SYMBOLIC_RUN = re.compile(r"(?:[a-zA-Z]\s*=\s*)?(?:\\[a-zA-Z]+|\\.|[\d\s+\-*/^=().,:;%{}\[\]×÷π°∞√$€£¥])+")
_TRAILING = re.compile(r"(?:[\s.,:;*=+/^-]|\\[,;:! ])+\Z")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w+\}")
_STATEMENT = re.compile(r"\banswer\b", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z_]+>")
_NUMBER_IN_BRACKETS = re.compile(rf"\(\s*({_NUMBER})\s*\)(?=[^()]*\Z)")
_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathbf|mathrm|mbox)\s*\{([^{}]*)\}")


def parse_answer(text: str) -> Expressions:
    """Return the final answer of a text as math-verify's expressions; an empty list if it has none that can be read."""
    boxes = boxed_answer(text)
    if boxes is not None:
        return _parse_parts(boxes)
    text = _TAG.sub("\n", _plain_characters(text))
    for sentence in stated_answers(text):
        if expressions := _parse_sentence(sentence):
            return expressions
    text = _bare(without_denials(text))
    formula = _is_formula(text) and not _DECIMAL_COMMA.fullmatch(text)
    return _parse_formula(text) if formula else _parse_sentence(text)


def answer_in_words(text: str) -> list[str]:
    """Return the texts that may be the final answer of a text, as words in lower case: its box, statements, or all."""
    boxes = boxed_answer(text)
    found = boxes if boxes is not None else [*stated_answers(text), text]
    return [_words(_TEXT_COMMAND.sub(r"\1", part)) for part in found]


def gold_in_words(reference: str) -> str | None:
    """Return the words of a reference whose answer is a word ("\\text{Friday}"); None if it is not, or has no answer.

    Without a box or a text command only a few words are an answer: a sentence, such as a refusal, states none.
    """
    boxes = boxed_answer(reference)
    content = reference if boxes is None else boxes[-1] if boxes else ""
    named = _TEXT_COMMAND.sub(r"\1", content)
    if re.search(r"[\d\\$=^_+]", named) or not (_WORD.search(named) or named != content):
        return None
    if boxes is None and named == content and not _is_short(named):
        return None
    return _words(named) or None


def _is_short(text: str) -> bool:
    words = text.split()
    return len(words) == 1 or (len(words) <= _FEW_WORDS and words[-1][-1] not in ".!?")


def _parse_parts(parts: list[str]) -> Expressions:
    """Parse the contents of joined boxes: as a set, or as the last one if all are forms of one value."""
    from math_verify import verify

    parsed = [_parse_content(_plain_characters(part)) for part in parts]
    if len(parsed) < 2 or all(verify(a, b) for a, b in pairwise(parsed)):
        return parsed[-1] if parsed else []
    return _parse_formula(", ".join(parts))


def _parse_content(content: str) -> Expressions:
    """Parse what a box holds: a formula, or a number with words behind it."""
    plain = _TEXT_COMMAND.sub(r" \1 ", content).strip().strip("$").strip()
    if _STATEMENT.search(plain):
        return parse_answer(plain)
    if _PLAIN_NUMBER.fullmatch(plain) or (re.match(_NUMBER, plain) and _WORD.search(plain)):
        return _parse_sentence(plain)
    return _parse_formula(content)


def _parse_sentence(sentence: str) -> Expressions:
    """Parse the value that a sentence begins with, or else the last one that math-verify finds in it."""
    sentence = _bare(_PRICE.sub("", sentence))
    sentence = sentence[_LEADING.match(sentence).end() :]  # type: ignore[union-attr]  # it matches the empty text
    sentence = _DECIMAL_COMMA.sub(r"\1.\2", sentence) if _DECIMAL_COMMA.fullmatch(sentence) else sentence
    if formulas := _FORMULAS.match(sentence):
        return _parse_found(formulas[0])
    if _LIST.fullmatch(sentence):
        return _parse_formula(re.sub(r",?\s*\b(?:and|or)\b|;", ",", re.sub(r"[a-zA-Z]\s*=", "", sentence)))
    if value := _leading_value(sentence):
        return _parse_formula(value)
    return _parse_found(_NUMBER_IN_BRACKETS.sub(r" \1 ", re.sub(r"(?i)\banswers?\b", "", sentence)))


def _leading_value(sentence: str) -> str | None:
    """Return the numbers and symbols that a sentence begins with, or the right side of an equation; None without any.

    What follows a comma or stands in brackets behind the value explains it, unless the sentence has no words at all.
    """
    run = _SYMBOLIC_RUN.match(sentence)
    if run is None or not re.search(r"\d|\\[a-zA-Z]|π", run[0]):
        return None
    value = run[0]
    if value[0] not in "([":
        value = re.split(r"(?<!\\)[,;:]\s|\s\(" if run.end() < len(sentence) else r"(?<=\d)\s\(", value)[0]
    value = _TRAILING.sub("", value)
    return value.rpartition("=")[2].strip(" *:") or None


def _bare(text: str) -> str:
    """Return a text without emphasis, quotation marks and a comma or full stop around it."""
    return text.strip(" \t\r\n*_\"'`").rstrip(".,;:? \t\r\n").strip(" *_\"'`")


def _is_formula(text: str) -> bool:
    """Return whether a text is one formula without its dollar signs, as many gold columns have it."""
    return (
        bool(text)
        and len(text) <= 500
        and "$" not in text
        and "\n" not in text
        and not _WORD.search(_ENVIRONMENT.sub("", _TEXT_COMMAND.sub("", text)))
        and not re.fullmatch(rf"{_NUMBER}\s+[a-zA-Z].*", text)
    )


def _parse_formula(formula: str) -> Expressions:
    if number := _PLAIN_NUMBER.fullmatch(formula.strip()):
        return _parse_found("".join(part or "" for part in number.groups()).replace("\\", ""))
    return _parse_found(f"$\\boxed{{{_to_latex(formula)}}}$")


def _to_latex(formula: str) -> str:
    formula = re.sub(r"(?<=\d)(?:\{,\}|\\[,!;:]|\\ )+(?=\d{3}(?!\d))", "", formula)
    formula = re.sub(r"√\s*\(?([\d.]+)\)?", r"\\sqrt{\1}", formula)
    formula = re.sub(r"(?<![\d.])(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}", formula)
    formula = re.sub(r"(?<=\d)[eE]([-+]?\d+)(?!\d)", r"\\cdot 10^{\1}", formula)
    formula = re.sub(r"(?<![\\\d])\$(?=\d)", "", formula)
    return "".join(_SYMBOLS.get(character, character) for character in formula)


@lru_cache(maxsize=4096)
def _parse_cached(text: str) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return tuple(parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]))


def _parse_found(text: str) -> Expressions:
    return list(_parse_cached(text)) if len(text) <= _MAX_CHARACTERS else []


def _plain_characters(text: str) -> str:
    """Return a text with the minus signs, fractions, digits and spaces of typography in their ASCII form."""
    for character, fraction in _VULGAR.items():
        if character in text:
            text = re.sub(rf"(?<=\d)\s*{character}", f" {fraction}", text).replace(character, fraction)
    return _MINUS.sub("-", text.translate(_CHARACTERS))


def _words(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
