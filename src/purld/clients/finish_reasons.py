"""What the finish reasons of the providers mean: which answers are whole, refused or cut.

Only a reason that is known to be good makes an answer whole. Names are compared without case and punctuation, so
`MAX_TOKENS`, `max_tokens` and `FinishReason.MAX_TOKENS` are one.
"""

from __future__ import annotations

import re
from enum import Enum


class FinishKind(Enum):
    """What a finish reason says about an answer."""

    WHOLE = "whole"
    REFUSED = "refused"
    CUT = "cut at the token limit"
    CONTEXT = "cut at the end of the model's context"
    OTHER = "cut for another reason, or unknown"


_NAMES = {
    FinishKind.WHOLE: (
        "stop stop_sequence stop_string stop_token stop_word end_turn end_of_turn eos eos_token end_of_sequence end "
        "end_of_text complete completed finished done normal"
    ),
    FinishKind.REFUSED: (
        "content_filter content_filtered refusal refused sensitive safety image_safety recitation blocklist spii "
        "prohibited_content guardrail_intervened guardrail moderation blocked error_toxic"
    ),
    FinishKind.CUT: "length max_length max_tokens max_output_tokens max_completion_tokens max_new_tokens token_limit",
    FinishKind.CONTEXT: (
        "model_length context_length context_length_exceeded context_window_exceeded model_context_window_exceeded "
        "max_context_length max_model_len error_limit"
    ),
}


def _squash(name: str) -> str:
    return re.sub(r"[^0-9a-z]+", "", name.lower())


_KINDS = {_squash(name): kind for kind, names in _NAMES.items() for name in names.split()}


def finish_kind(reason: str | None) -> FinishKind:
    """Return what a finish reason means; None, of a server that names no reasons, counts as whole."""
    if reason is None:
        return FinishKind.WHOLE
    return _KINDS.get(_squash(reason).removeprefix("finishreason"), FinishKind.OTHER)
