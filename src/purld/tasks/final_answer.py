"""Find the final answer in a text: the last box, or else what the last "the answer is" states.

Pure text. An answer that is taken back does not count: of several boxes the last one does, and "not 5 but 7" states 7.
What the found text means, as mathematics or as a choice, is decided by the checks.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_STATEMENTS, _STATEMENT_CHARACTERS = 20, 2000  # looked at, so that a text that repeats itself costs linear time
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_UNBRACED = re.compile(r"[^$\s{}]+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PERCENT = re.compile(r"\s*\$?\s*(?:\\?%|per ?cent\b)", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(r"[\s${}]|\\[()\[\],;]|\\(?:text|mbox|quad)\b|[a-zA-Z]\s*=")
_CONJUNCTIONS = ("and", "or", ",", ";", ",and", ",or")

_VALUE = (  # a number, a formula, or the capital letter of a choice
    r"(?:\$[^$\n]+\$|\\\(.+?\\\)|[(\[]?[-+]?[$€£¥]?\d[\d,]*(?:[./]\d+)*%?[)\]]?|(?-i:[*\"'(]*[A-Z][*\"')]*(?!\w)))"
)
_DENIED = re.compile(
    rf"\b(?:(?:is|was|are|were)\s+not|(?:is|was|are|were)n['’]t|not|instead\s+of|rather\s+than)\s+"
    rf"(?:equal(?:\s+to)?\s+|be\s+|just\s+|option\s+)?{_VALUE}(?P<but>\s*,?\s*but(?:\s+rather)?\b|\s*[,;–—-]+\s*(?:it|that)(?:['’]s|\s+is)\b(?!\s+not\b))?",
    re.IGNORECASE,
)
# "The answer is" in other languages: nouns, what may stand behind them, and what links them to the answer.
_NOUNS = (
    "respuesta|solución|antwort|lösung|réponse|reponse|resposta|solução|risposta|soluzione|ответ|відповідь"
    "|odpowiedź|odpověď|antwoord|svaret|svar|vastaus|cevap|yanıt|jawaban(?:nya)?|đáp án|câu trả lời|उत्तर|जवाब|উত্তর"
    "|الإجابة|الجواب|התשובה|απάντηση|คำตอบ"
)
_ADJECTIVES = r"correct\w*|corret\w*|final\w*|richtig\w*|juste|exacte|đúng|الصحيحة|الصحيح|النهائية"
_COPULAS = "es|ist|lautet|est|é|è|is|это|—|–|to|je|är|er|on|adalah|ialah|là|है|هي|هو|היא|είναι|คือ"
_ELSEWHERE = (
    rf"(?<!\w)(?:{_NOUNS})(?:\s+(?:{_ADJECTIVES}))?[*_]*(?:\s*[:：=]|\s+(?:{_COPULAS})(?!\w)"
    r"|(?=\s+[(\[*]*(?-i:[A-Z])[)\]*]*[.!]*\s*$))"
    r"|(?:答案|选项|選項|结果|結果)(?:应该|应当|应|應)?(?:是|为|為|选|選|[:：])|[选選]择?[:：]?(?=\s*[（(]?[A-Z])"
    r"|而是|(?:正解|答え|答|回答|解答|正しいの)(?:は|[:：])|選択肢(?=[A-Z]が正)|(?:정답|답)(?:은|[:：])"
)
_LINK = r"(?:['’]s\b|\s+(?:is|was|are|were|should\s+be|must\s+be|would\s+be|equals)\b)"
_STATED = re.compile(
    rf"####|^A:|^ans[.:]|\bcorrect\s*[:=]|{_ELSEWHERE}"
    rf"|\b(?:answers?|option|choice|result|response|select(?:ed|ion)|(?:correct|right)\s+(?:one|letter))\b[*_\"']*(?:{_LINK}|\s*[:=])[\s*_:]*"
    r"|\banswers?\b"
    rf"|\b(?:but|no|wait|actually|instead|rather)\b[\s,.:;!–—-]+(?:it|that|this|they){_LINK}"
    r"|\b(?:no|wait|actually|correction|corrected)\b[,.:;!–—-]+",
    re.IGNORECASE | re.MULTILINE,
)
_OPENING = re.compile(r"\A(?:[\s*_\"':=]|(?:it|that)(?:\s+is|['’]s)\s)+", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;]+[*_\"')]*(?=\s|\Z)|[。！？；]|\n")
_LABEL_ONLY = re.compile(r"[(\[*\"']*(?:[A-Za-z]|\d+)")


class _Box(NamedTuple):
    start: int
    end: int
    content: str | None  # None: the box is never closed


def boxed_answer(text: str) -> list[str] | None:
    """Return what the last `\\boxed{}` of a text holds, or None if the text has no box.

    Boxes that only "and", "or" or a comma separate, as in "$\\boxed{5}$ and $\\boxed{7}$", are one answer in parts, and
    the list holds each part. It is empty if the last box is never closed: the answer was cut in it.
    """
    boxes = _find_boxes(text)
    if not boxes:
        return None
    parts: list[str] = []
    for box, following in zip(reversed(boxes), [None, *reversed(boxes)]):
        if box.content is None or (following and not _are_joined(text[box.end : following.start])):
            break
        parts.insert(0, box.content)
    return parts


def stated_answers(text: str) -> list[str]:
    """Return what the statements of an answer in a text state, the last one first: "The answer is 7." states "7".

    Denied values do not count: "The answer is not 5 but 7." states "7".
    """
    text = without_denials(text)
    ends = [match.end() for match in _STATED.finditer(text)][-_STATEMENTS:]
    tails = (_OPENING.sub("", text[end : end + _STATEMENT_CHARACTERS]) for end in ends)
    return [sentence for tail in tails if (sentence := first_sentence(tail))][::-1]


def without_denials(text: str) -> str:
    """Remove the values and letters of choices that a text denies: "not 5", "isn't C", "rather than $7$".

    What "but" sets against a denied value becomes a statement of the answer.
    """
    return _DENIED.sub(lambda match: " the answer is " if match["but"] else " ", text)


def first_sentence(text: str) -> str:
    """Return the first sentence or line of a text without its end; the dot of a label such as "C." does not end it."""
    for match in _SENTENCE_END.finditer(text):
        sentence = text[: match.start()].strip()
        ends_text = match[0] == "\n" or not text[match.end() :].strip()
        if sentence and (ends_text or not _LABEL_ONLY.fullmatch(sentence)):
            return sentence
    return text.strip()


def _are_joined(between: str) -> bool:
    return _BETWEEN_BOXES.sub("", between).lower() in _CONJUNCTIONS


def _find_boxes(text: str) -> list[_Box]:
    boxes: list[_Box] = []
    position = 0
    while match := _BOX.search(text, position):
        box = _read_box(text, match)
        if box.content is not None and (percent := _PERCENT.match(text, box.end)):
            box = _Box(box.start, percent.end(), rf"{box.content}\%")
        boxes.append(box)
        position = box.end
    return boxes


def _read_box(text: str, match: re.Match[str]) -> _Box:
    if not text.startswith("{", match.end()):  # "\boxed 7", as some published solutions have it
        unbraced = _UNBRACED.match(text, match.end())
        return _Box(match.start(), unbraced.end() if unbraced else match.end(), unbraced[0] if unbraced else "")
    start = match.end() + 1
    end = _closing_brace(text, start)
    return _Box(match.start(), len(text), None) if end is None else _Box(match.start(), end, text[start : end - 1])


def _closing_brace(text: str, start: int) -> int | None:
    """Return the position after the brace that closes the one before `start`, or None."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.end()
    return None
