"""Parse the option that an answer chooses, and check it against the reference.

The options of a prompt are `metadata["choices"]`. An answer or a reference names an option by its text, by its number
from 0, as in "(2)", or by its letter from A, with or without a box, emphasis or quotation marks around it. A box counts
before a statement ("The correct option is C"), and that before the rest of the answer; the last of each counts. An
answer that names several options chooses none. A letter inside a sentence is a word ("A dog").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from purld.records import Prompt
from purld.tasks.final_answer import boxed_answer, stated_answers, without_denials

_WRAPPERS = re.compile(r"\\(?:text(?:bf|rm)?|mathbf|mathrm)\b|\\[()\[\]]|[*_`$\"“”{}]|(?<!\w)['‘’]|['‘’](?!\w)|</?\w+>")
_REASON = r"(?:because|since|as)\b|and\s+the\b|[,;]|[–—-]\s"
# What may stand before a label in the languages that `final_answer` reads.
_BEFORE_LABEL = (
    r"(?:(?:the|la|el|il|die|der|das|a|het|l['’])\s*(?=\S+\s|[(\[]?[A-Z]))?(?:(?i:option|choice|letter|opción|opção|opzione|"
    r"alternativa|letra|lettre|lettera|buchstabe|вариант|буква|选项|選択肢|선택지)\s*)?"
)
_LABEL_PATTERN = (
    rf"\W*?{_BEFORE_LABEL}(?:"
    r"[(\[（]\s*(?P<enclosed>\d{1,3}|[A-Za-z])\s*[)\]）](?![a-zA-Z\d])"
    rf"|(?P<open>\d{{1,3}}|[A-Z])(?:\s*[.:)。：、，）](?!\d)|\s*\Z|,(?!\d)|\s+(?:{_REASON})%s)"
    r"|(?P<small>[a-z])(?:\)|\.?\s*\Z))"
)
_LABEL = re.compile(_LABEL_PATTERN % "")
# In a statement, a word of another script may follow, as in "C입니다", unless it denies: "Aではない".
_STATED_LABEL = re.compile(
    _LABEL_PATTERN % r"|(?!\s*(?:では|じゃ|不|非|[가이]\s*아|не\b|नहीं))\s*(?=[\u0370-\u1cff\u3040-\ud7af])"
)
_FURTHER_LABEL = re.compile(
    r"\s*(?:,|/|&|and\b|or\b)\s*(?:(?i:option)\s+)?[(\[]?([A-Z]|\d{1,3})[)\]]?(?![\w'’])(?=\W*\Z|\W*\s)"
)
_LETTER = r"(?:option\s+|choice\s+)?[(\[]?(?-i:([A-Z]|\d{1,3}))[)\]]?"
_CALLED_RIGHT = re.compile(
    rf"(?<![\w'’]){_LETTER}\s+(?:is|would\s+be)\s+(?:the\s+|my\s+)?(?:only\s+)?(?:correct|right|best|answer)\b"
    rf"|\b(?:choose|chose|pick|select|go\s+with|must\s+be|therefore|thus|hence|so)[,:]?\s+(?:it(?:['’]s|\s+is)\s+)?"
    rf"{_LETTER}(?=[.!)]*\s*(?:\n|\Z)|\s+(?:{_REASON}|over\b))",
    re.IGNORECASE,
)
_LAST_SENTENCE = re.compile(
    r"(?:\A|[.!?\n])\s*(?:[Ii]t(?:['’]s|\s+is)\s+)?(?:[Oo]ption\s+)?[(\[]?([A-Z]|\d{1,3})[)\]]?[.!]?\s*\Z"
)
_EMPHASISED = re.compile(r"(?:\*\*|__|[\"“'‘])[(\[]?([A-Z]|\d{1,3})[)\]]?(?:[.:)][^*\n]*)?(?:\*\*|__|[\"”'’])")
_DENIED_BEFORE = re.compile(r"(?:\bnot|\b(?:is|was|are)n t|\binstead of|\brather than)(?: the| an?)? \Z")


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
    plain = [_plain_words(option) for option in options]
    boxes = boxed_answer(answer)
    if boxes is not None:
        return _only({index for box in boxes for index in _named_options(box, plain)})
    for sentence in stated_answers(answer):
        if named := _named_options(sentence, plain):
            return _only(named)
    return _only(_named_in_text(without_denials(answer), plain))


def _options(prompt: Prompt) -> list[str]:
    options = prompt.metadata.get("choices")
    return [str(option) for option in options] if isinstance(options, list | tuple) else []


def _only(named: set[int]) -> int | None:
    return next(iter(named)) if len(named) == 1 else None


def _named_in_text(text: str, options: Sequence[str]) -> set[int]:
    """Return the options that an answer without a box and without a statement names."""
    if exact := _exact_option(text, options):
        return exact
    count = len(options)
    for pattern in (_LAST_SENTENCE, _CALLED_RIGHT):
        if labels := [label for match in pattern.finditer(_unwrapped(text)) if (label := _last_group(match))]:
            return _indices(labels[-1:], count)
    lines = [_unwrapped(line) for line in text.strip().splitlines()]
    labelled = [match for line in lines if (match := _LABEL.match(line)) and _label_index(match, count) is not None]
    if labelled:
        return set().union(*(_labelled_options(match, options) for match in labelled))
    emphasised = _indices((match[1] for match in _EMPHASISED.finditer(text)), count)
    return emphasised or _mentioned_options(_plain_words(text), options)


def _named_options(sentence: str, options: Sequence[str]) -> set[int]:
    """Return the options that a box or a statement names: by an option's text, by a label, or by a mention of texts."""
    if exact := _exact_option(sentence, options):
        return exact
    match = _STATED_LABEL.match(_unwrapped(sentence))
    if match is not None and _label_index(match, len(options)) is not None:
        return _labelled_options(match, options)
    first, _, rest = _unwrapped(sentence).partition(" ")
    label = _indices([first], len(options)) if re.fullmatch(r"[A-Z]|\d{1,3}", first) else set()
    if label and label == _exact_option(rest, options):  # "C Paris"
        return label
    return _mentioned_options(_plain_words(sentence), options)


def _exact_option(text: str, options: Sequence[str]) -> set[int]:
    """Return the option whose text this is; it takes precedence over a label of the same form, but "(2)" is a label."""
    text = _unwrapped(text)
    words = _plain_words(text)
    return {options.index(words)} if words and words in options and not text.startswith("(") else set()


def _labelled_options(match: re.Match[str], options: Sequence[str]) -> set[int]:
    """Return the option of a label, and those that the text after it names: another label or another option's text."""
    index, rest = _label_index(match, len(options)), match.string[match.end() :]
    assert index is not None
    further = re.match(_FURTHER_LABEL, match.string[match.start() :][len(match[0].rstrip(" ,")) :])
    return {index} | (_indices([further[1]], len(options)) if further else set()) | _exact_option(rest, options)


def _label_index(match: re.Match[str], count: int) -> int | None:
    label = _last_group(match)
    return next(iter(_indices([label], count)), None) if label else None


def _last_group(match: re.Match[str]) -> str | None:
    return next((group for group in match.groups() if group), None)


def _indices(labels: Iterable[str], count: int) -> set[int]:
    """Return the indices of labels, digits from 0 and letters from A, that are less than `count`."""
    indices = {int(label) if label.isdecimal() else ord(label.upper()) - ord("A") for label in labels}
    return {index for index in indices if index < count}


def _mentioned_options(text: str, options: Sequence[str]) -> set[int]:
    """Return the options that are mentioned and not denied, without those inside a longer mentioned option."""
    spans = {}
    for index, option in enumerate(options):
        for match in re.finditer(rf"\b{re.escape(option)}\b", text) if option else ():
            if not _DENIED_BEFORE.search(text, 0, match.start()):
                spans[index] = match.span()
                break
    return {
        index
        for index, (start, end) in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans.values())
    }


def _unwrapped(text: str) -> str:
    """Return a text without emphasis, quotation marks and LaTeX commands around its words."""
    return _WRAPPERS.sub("", text).strip()


def _plain_words(text: str) -> str:
    """Return the words of a text in lower case, separated by single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))
