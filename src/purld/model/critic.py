"""The critic of PPO: a linear value head on the last hidden state of the frozen p_sft.

The trunk is the reference's, which is in memory anyway: the critic costs one vector of weights, its error never moves
the policy, and what it reads of a prefix does not drift while the policy does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purld.model.body_and_head import unwrap_adapters
from purld.model.encode import pad_right
from purld.model.vision import EncodedPrompt, vision_features


class ValueHead(nn.Module):
    """V(prefix) = w h + b, from 0: before its first update the critic expects nothing.

    Args:
        hidden_size: H, the size of the trunk's hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(K, C) values of (K, C, H) hidden states, float32."""
        values: Tensor = self.linear(states).squeeze(-1)
        return values


@torch.no_grad()
def states_before_tokens(model: Any, head: EncodedPrompt, completions: Sequence[Sequence[int]], pad: int) -> Tensor:
    """The last hidden state before each token of K completions: (K, C, H), float32, without gradients.

    Args:
        model: a causal language model.
        head: the prompt.
        completions: K completions as token ids.
        pad: a token id to pad with; states after a completion's end mean nothing.
    """
    device = next(model.parameters()).device
    ids, mask = pad_right([[*head.ids, *completion] for completion in completions], pad, device)
    # A token's value is that of the prefix before it, and nothing follows the last token.
    ids, mask = ids[:, :-1], mask[:, :-1]
    beside = vision_features(model, [head] * len(ids), ids)
    states: Tensor = unwrap_adapters(model).base_model(input_ids=ids, attention_mask=mask, **beside).last_hidden_state
    return states[:, len(head) - 1 :].float()


def model_hidden_size(model: Any) -> int:
    """H of the model's last hidden state."""
    return int(model.config.get_text_config().hidden_size)
