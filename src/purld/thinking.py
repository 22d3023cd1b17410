"""Split a reply into the thinking that a model wrote down and its answer.

Reasoning models think before they answer, between tags such as `<think>` and `</think>`. A thought is no part of the
answer: it is neither compared, judged, scored nor quoted. This is the only module that knows the tags; whether thoughts
are trained on is decided by `student.thinking` and `anchors.thinking`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ThinkingPolicy = Literal["strip", "keep", "fail"]


@dataclass(frozen=True)
class ThinkingTags:
    """The texts between which a family of models thinks."""

    opening: str
    closing: str


_CHANNELS = ThinkingTags("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")

THINK = ThinkingTags("<think>", "</think>")

TAGS: tuple[ThinkingTags, ...] = (
    THINK,
    *(
        ThinkingTags(f"<{name}>", f"</{name}>")
        for name in (
            *("thinking", "thought", "thoughts", "reasoning", "scratchpad"),
            *("seed:think", "longcat_think"),
        )
    ),
    ThinkingTags("[THINK]", "[/THINK]"),  # Magistral
    ThinkingTags("◁think▷", "◁/think▷"),  # Kimi
    ThinkingTags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A, Command R7B
    ThinkingTags("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ThinkingTags("<|channel>thought", "<channel|>"),  # Gemma 4
    ThinkingTags("<unused94>thought", "<unused95>"),  # MedGemma
    ThinkingTags("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    _CHANNELS,  # gpt-oss
)

_CLOSING_OF = {tags.opening.lower(): re.compile(re.escape(tags.closing), re.IGNORECASE) for tags in TAGS}
# A tag that an answer quotes in backticks is text. A fence is tried once, so that many backticks cost linear time.
_CODE = r"(?P<code>(?<!`)(?P<fence>`++).+?(?<!`)(?P=fence)(?!`))"
_OPENINGS = "|".join(re.escape(tags.opening) for tags in TAGS)
_CLOSINGS = "|".join(re.escape(tags.closing) for tags in TAGS)
_OPENING_OR_CODE = re.compile(rf"{_CODE}|(?P<tag>{_OPENINGS})", re.IGNORECASE | re.DOTALL)
_CLOSING_OR_CODE = re.compile(rf"{_CODE}|(?P<tag>{_CLOSINGS})", re.IGNORECASE | re.DOTALL)
# What some families put around the answer once they have thought.
_WRAPPED = re.compile(
    r"\A\s*(?:<(answer|response)>(?P<plain>.*)</\1>|<\|START_RESPONSE\|>(?P<marked>.*?)(?:<\|END_RESPONSE\|>)?"
    r"|<\|begin_of_solution\|>(?P<solution>.*?)(?:<\|end_of_solution\|>)?)\s*\Z",
    re.DOTALL,
)
# gpt-oss thinks and answers in channels. Some servers drop the special tokens between them.
_CHANNELED = (
    re.compile(
        r"\A(?P<thought>.*)<\|channel\|>final<\|message\|>(?P<answer>.*?)(?:<\|(?:return|end)\|>)?\Z", re.DOTALL
    ),
    re.compile(r"(?s)\Aanalysis(?P<thought>.*?)assistantfinal(?P<answer>.*)\Z"),
)
_NOT_BLANK = re.compile(r"\S")
_CHANNEL_MARKS = re.compile(r"<\|channel\|>\w*(?:<\|message\|>)?|<\|start\|>assistant|<\|\w+\|>")


@dataclass(frozen=True)
class SplitReply:
    """A reply in two parts.

    Attributes:
        thinking: what the model thought, without its tags; empty if it wrote no thought down.
        answer: the rest.
        found: whether the reply has a thinking block, even an empty one.
    """

    thinking: str
    answer: str
    found: bool


def split_thinking(reply: str) -> SplitReply:
    """Return the thinking and the answer of a reply.

    A reply has any number of blocks, of any of `TAGS`. A block that is never closed reaches to the end: the answer was
    not begun. A closing tag without an opening one ends a block that the prompt had opened, so all before it is
    thought. Tags inside backticks, and an unclosed tag inside a line, are text. The answer loses the white space around
    it only if there was a block.
    """
    for channels in _CHANNELED:
        if match := channels.match(reply):
            thinking = _CHANNEL_MARKS.sub("", match["thought"]).strip()
            return SplitReply(thinking, match["answer"].strip(), found=bool(thinking))
    thoughts, rest = _take_blocks(reply)
    before, rest = _take_orphan(rest)
    thoughts += before
    if not thoughts:
        return SplitReply("", reply, found=False)
    thinking = "\n\n".join(stripped for thought in thoughts if (stripped := thought.strip()))
    return SplitReply(thinking, _unwrap(rest), found=True)


def opened_block(rendered: str) -> ThinkingTags | None:
    """Return the tags of the block that a rendered prompt ends in, or None if the model would begin with its answer."""
    end = rendered.rstrip().lower()
    return next((tags for tags in TAGS if end.endswith(tags.opening.lower())), None)


def tags_in(texts: Iterable[str]) -> ThinkingTags | None:
    """Return the first tags of `TAGS` that occur in one of the texts, such as a chat template; None if none do."""
    joined = "\0".join(texts).lower()
    return next((t for t in TAGS if t.opening.lower() in joined or t.closing.lower() in joined), None)


def _take_blocks(reply: str) -> tuple[list[str], str]:
    """Return the thoughts of all blocks that are opened in the reply, and the rest of it."""
    thoughts: list[str] = []
    kept: list[str] = []
    never_closed: set[str] = set()  # from here on; a reply that repeats its opening tag costs linear time
    position = start = 0
    while match := _OPENING_OR_CODE.search(reply, position):
        position = match.end()
        if match["tag"] is None:
            continue
        tag = match["tag"].lower()
        closing = None if tag in never_closed else _find_closing(reply, tag, position)
        if closing is None:
            never_closed.add(tag)
            if _NOT_BLANK.search(reply, reply.rfind("\n", 0, match.start()) + 1, match.start()):
                continue  # mentioned within a line, and not closed
        kept.append(reply[start : match.start()])
        end, position = closing or (len(reply), len(reply))
        thoughts.append(reply[match.end() : end])
        start = position
    return thoughts, "".join(kept) + reply[start:]


def _find_closing(reply: str, opening: str, position: int) -> tuple[int, int] | None:
    """Return where the block ends that a tag opens: at its own closing tag, or else at that of another family."""
    if own := _CLOSING_OF[opening].search(reply, position):
        return own.span()
    others = (match.span() for match in _CLOSING_OR_CODE.finditer(reply, position) if match["tag"] is not None)
    return next(others, None)


def _take_orphan(reply: str) -> tuple[list[str], str]:
    """Return what comes before the last closing tag that nothing opened, and the rest."""
    closings = [match for match in _CLOSING_OR_CODE.finditer(reply) if match["tag"] is not None]
    if not closings:
        return [], reply
    return [reply[: closings[-1].start()]], reply[closings[-1].end() :]


def _unwrap(answer: str) -> str:
    wrapped = _WRAPPED.match(answer)
    return (answer if wrapped is None else wrapped["plain"] or wrapped["marked"] or wrapped["solution"] or "").strip()
