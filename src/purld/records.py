"""Frozen records that all packages share: prompts, anchors, generations, groups and verdicts.

Ids are hashes of content. Nothing here reads files, depends on a model or imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Outcome = Literal["win", "loss", "tie", "unjudged"]

# Marks the position of an image in a message: Unicode's object replacement character, which plain text does not use.
IMAGE = "\ufffc"


def content_hash(value: object) -> str:
    """Return the first 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    canonical = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Image:
    """An image of a prompt, identified by its content and stored as a file (`path`) or as encoded bytes (`data`).

    `digest` is a hash of the encoded bytes. `size` is (width, height) in pixels, after rotation to upright.
    """

    digest: str
    size: tuple[int, int] = field(compare=False)
    path: str | None = field(default=None, compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Message:
    """One turn of a chat; each IMAGE in `content` marks the position of the next of the prompt's images."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A prompt for the student and the teacher.

    `images` lists the images of all messages, in the order of their IMAGE marks. `reference` is the gold answer, which
    only the evaluation may read. `metadata` holds the other columns of the row, and `location` names the row
    ("pool.jsonl, line 7").

    Raises:
        ValueError: the number of IMAGE marks differs from the number of images.
    """

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    location: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        marks = sum(m.content.count(IMAGE) for m in self.messages)
        if marks != len(self.images):
            raise ValueError(f"a prompt with {len(self.images)} images has {marks} IMAGE marks")

    @cached_property
    def id(self) -> str:
        """Return a hash of what the model is shown; the reference, metadata and file names do not change it."""
        return content_hash([[[m.role, m.content] for m in self.messages], [i.digest for i in self.images]])

    @property
    def question(self) -> str:
        """Return the conversation as one text for templates; several turns are labelled, IMAGE marks are kept."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"[{m.role}]\n{m.content}" for m in self.messages)

    @classmethod
    def from_text(cls, text: str, **fields: Any) -> Prompt:
        """Create a prompt of one user turn."""
        return cls(messages=(Message("user", text),), **fields)


@dataclass(frozen=True)
class Anchor:
    """The teacher's single answer to a prompt: the positive seed of section 3.3.

    `cut` says that the teacher's reply broke off and was kept; it is then not taught or scored as one that ends.
    """

    prompt_id: str
    text: str
    cut: bool = False

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Anchor:
        """Make an anchor of its row in a file; rows of older versions do not say that one is cut."""
        return cls(row["prompt_id"], row["text"], row.get("cut", False))

    def to_row(self) -> dict[str, Any]:
        """Return the anchor as a row of a file, with `cut` only where it is, so that other files keep their bytes."""
        return {"prompt_id": self.prompt_id, "text": self.text} | ({"cut": True} if self.cut else {})


@dataclass(frozen=True)
class Generation:
    """One answer of one model to a held-out prompt.

    `finished` is False if it was cut at the length limit. `thinking` is what the model thought before it answered; it
    is no part of `text`.
    """

    prompt_id: str
    sample: int
    text: str
    tokens: int
    finished: bool
    thinking: str | None = None


@dataclass(frozen=True)
class GroupRecord:
    """One prompt's K candidates in Stage II with all inputs of the update, for logs and the report.

    Every list has length K; an item that is `None` belongs to a candidate without a score. A field that the method does
    not use (labels, in a method that learns from advantages) is `None`. `label_divergence` is KL(D || q) of the group.
    `completions` holds the candidates as token ids, only for groups that are measured again at the end. `left_out` says
    that no update learned from the group, because its scores gave no signal.
    """

    step: int
    prompt_id: str
    anchor: str
    candidates: Sequence[str]
    lengths: Sequence[int]
    scores: Sequence[float | None] | None = None
    anchor_score: float | None = None
    margins: Sequence[float | None] | None = None
    confidences: Sequence[float | None] | None = None
    labels: Sequence[float | None] | None = None
    policy_before: Sequence[float | None] | None = None
    advantages: Sequence[float | None] | None = None
    label_divergence: float | None = None
    completions: Sequence[Mapping[str, Any]] | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one answer against the opponent's, with the judge's raw reply.

    `asked` counts the questions to the judge: 0 if there was nothing to compare, more than 1 if its first reply was not
    a verdict; `raw` then holds all its replies. `reason` says why an answer is unjudged: `no_opponent` (there is no
    answer to compare it with), `no_verdict` (the judge replied something else), `no_reply` (the call failed or was
    lost), or the key of the cap that left the judge unasked, such as `max_calls`; empty where it is judged.
    """

    prompt_id: str
    sample: int
    outcome: Outcome
    raw: str
    model_is_a: bool
    asked: int = 1
    reason: str = ""
