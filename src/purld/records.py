"""What travels between the rooms: frozen records whose ids are hashes of their content.

Nothing here reads files, knows a model or imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Outcome = Literal["win", "loss", "tie", "unjudged"]

# Where an image stands in a message: Unicode's object replacement character, which no text has a use for.
IMAGE = "\ufffc"


def content_hash(value: object) -> str:
    """The first 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    canonical = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Image:
    """A picture of a prompt, known by its content: the file `path`, or the encoded bytes `data` where there is none.

    `digest` is of the encoded bytes. `size` is (width, height) in pixels, upright.
    """

    digest: str
    size: tuple[int, int] = field(compare=False)
    path: str | None = field(default=None, compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Message:
    """One turn of a chat; each IMAGE in `content` stands for the next of the prompt's images."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A question to the student and the teacher.

    `images` are those of all its messages, in the order of their marks. `reference` is gold that only the evaluation
    may read. `metadata` is whatever else the row held, and `place` says where the row is ("pool.jsonl, line 7").

    Raises:
        ValueError: the messages do not have one IMAGE for each image.
    """

    messages: tuple[Message, ...]
    images: tuple[Image, ...] = ()
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        marks = sum(m.content.count(IMAGE) for m in self.messages)
        if marks != len(self.images):
            raise ValueError(f"a prompt of {len(self.images)} images has {marks} places for them")

    @cached_property
    def id(self) -> str:
        """A hash of what the model is shown; gold, metadata and the names of files do not change it."""
        return content_hash([[[m.role, m.content] for m in self.messages], [i.digest for i in self.images]])

    @property
    def question(self) -> str:
        """The conversation as one text, IMAGE marks included, for templates that quote it: turns are labelled."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"[{m.role}]\n{m.content}" for m in self.messages)

    @classmethod
    def from_text(cls, text: str, **fields: Any) -> Prompt:
        """A prompt of one user turn."""
        return cls(messages=(Message("user", text),), **fields)


@dataclass(frozen=True)
class Anchor:
    """The teacher's one answer to a prompt: the positive seed of section 3.3."""

    prompt_id: str
    text: str


@dataclass(frozen=True)
class Generation:
    """One answer of one model to an evaluation prompt; `finished` is False if it met the length limit."""

    prompt_id: str
    sample: int
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class GroupRecord:
    """One prompt's K candidates in Stage II with everything the update saw, for logs and the report.

    Every list is of length K; in it, `None` marks a candidate without a score. What a method does not have, such as
    labels in one that learns from advantages, is `None` as a whole. `label_divergence` is KL(D || q) of the group, and
    `completions` the candidates as token ids, for the groups that are measured again at the end.
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


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one answer against the opponent's, with the judge's raw words.

    `asked` is how often the judge was asked: 0 where there was nothing to ask, more than 1 where its first reply
    was no verdict; `raw` then holds all its replies.
    """

    prompt_id: str
    sample: int
    outcome: Outcome
    raw: str
    model_is_a: bool
    asked: int = 1
