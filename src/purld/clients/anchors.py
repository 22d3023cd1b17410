"""Collect the anchors of a pool of prompts: ask once per prompt, and apply the anchor policy to incomplete answers.

Independent of the kind of client and of how progress is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from purld.clients.base import Client, Reply, ReplyState
from purld.config.clients import AnchorPolicy
from purld.errors import UserError
from purld.records import Anchor, Prompt
from purld.thinking import ThinkingPolicy, split_thinking

MAX_REASONS = 8  # that are shown; a server may word each error differently
OnProgress = Callable[[Counter[ReplyState]], None]


@dataclass(frozen=True)
class CollectedAnchors:
    """The usable anchors, in the order of their prompts, and the counts of all replies."""

    anchors: list[Anchor]
    counts: dict[ReplyState, int]  # every state, zeros included; sums to the number of prompts
    reasons: dict[str, int]  # the details of replies with their counts, most frequent first
    thinking: int = 0  # replies with thinking before the answer
    thinking_policy: ThinkingPolicy = "strip"
    capped: Mapping[str, int] = field(default_factory=dict)  # the prompts that each cap left unasked, by its key

    @property
    def dropped(self) -> int:
        """Return the number of prompts without an anchor."""
        return sum(self.counts.values()) - len(self.anchors)

    def summary(self) -> str:
        """Return one line for the user: the counts of all states, and the reasons for missing anchors."""
        states = ", ".join(f"{count:,} {state}" for state, count in self.counts.items() if count)
        shown = [f"{count:,} × {reason}" for reason, count in self.reasons.items()]
        if len(shown) > MAX_REASONS:
            rest = sum(self.reasons.values()) - sum(list(self.reasons.values())[:MAX_REASONS])
            shown[MAX_REASONS:] = [f"{rest:,} × other reasons"]
        reasons = "; ".join(shown)
        done = "taken out" if self.thinking_policy == "strip" else "kept"
        thinking = f"; {self.thinking:,} with thinking, {done} (anchors.thinking)" if self.thinking else ""
        return f"{states}; {self.dropped:,} dropped" + (f" ({reasons})" if reasons else "") + thinking


def collect_anchors(
    prompts: Sequence[Prompt],
    client: Client,
    policy: AnchorPolicy | None = None,
    on_progress: OnProgress | None = None,
) -> CollectedAnchors:
    """Ask `client` once per prompt; `on_progress` receives the count of each state after every reply.

    Raises:
        UserError: no prompt got a usable answer, the policy fails the run on a reply, or the client cannot ask at all.
    """
    policy = policy or AnchorPolicy()
    counts: Counter[ReplyState] = Counter()

    def count(_: int, reply: Reply) -> None:
        counts[apply_thinking_policy(reply, policy).state] += 1
        if on_progress:
            on_progress(counts)

    given = client.ask(prompts, count)
    thinking = [reply.text is not None and split_thinking(reply.text).found for reply in given]
    if policy.thinking == "fail" and any(thinking):
        first = prompts[thinking.index(True)]
        raise UserError(
            f"{sum(thinking)} of {len(prompts)} answers come with thinking, which anchors.thinking: fail does not "
            f"accept; the first is to {first.location or f'prompt {first.id}'}."
        )
    replies = [apply_thinking_policy(reply, policy) for reply in given]
    _check_policy(prompts, replies, policy)
    anchors = [
        Anchor(prompt.id, reply.text, cut=reply.state == "truncated")
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.text is not None and _action(reply, policy) == "keep"
    ]
    reasons = Counter(reply.detail for reply in replies if reply.detail)
    capped = Counter(reply.cap for reply in replies if reply.cap)
    if not anchors:
        raise UserError(_describe_no_anchors(len(prompts), reasons, capped))
    ordered = {state: counts[state] for state in get_args(ReplyState)}
    return CollectedAnchors(anchors, ordered, dict(reasons.most_common()), sum(thinking), policy.thinking, capped)


def apply_thinking_policy(reply: Reply, policy: AnchorPolicy) -> Reply:
    """Return a reply as the policy wants its thinking: taken out of the text, or kept.

    A reply that holds nothing but thinking is no answer, whatever the policy: it has no text.
    """
    if reply.text is None or not (split := split_thinking(reply.text)).found:
        return reply
    if not split.answer:
        state: ReplyState = "failed" if reply.state == "answered" else reply.state
        return replace(reply, state=state, text=None, detail=reply.detail or "the reply has thinking and no answer")
    return replace(reply, text=split.answer) if policy.thinking == "strip" else reply


def _action(reply: Reply, policy: AnchorPolicy) -> str:
    """Return what the policy does with a reply: "keep", "drop" or "fail"."""
    match reply.state:
        case "answered":
            return "keep"
        case "refused":
            return policy.refused
        case "truncated":
            return policy.truncated
        case _:
            return policy.failed


def _check_policy(prompts: Sequence[Prompt], replies: Sequence[Reply], policy: AnchorPolicy) -> None:
    failing = [index for index, reply in enumerate(replies) if _action(reply, policy) == "fail"]
    if failing:
        first = replies[failing[0]]
        raise UserError(
            f"{len(failing)} of {len(replies)} prompts got no answer that the anchor policy accepts;"
            f" the first is prompt {prompts[failing[0]].id}, {first.state}: {first.detail}."
        )


def _describe_no_anchors(asked: int, reasons: Counter[str], capped: Counter[str]) -> str:
    if not asked:
        return "there are no prompts to ask about."
    [(reason, count)] = reasons.most_common(1) or [("no reason was given", asked)]
    said = f"none of the {asked} prompts got a usable answer; the most common reason ({count} times): {reason}"
    raised = "".join(f"; raise teacher.{cap} and run the same command again" for cap in list(capped)[:1])
    return f"{said}{raised}."
