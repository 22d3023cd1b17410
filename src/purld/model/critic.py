"""The critic of PPO: a linear value head on the last hidden state of the frozen p_sft.

The reference policy is in memory anyway, so the critic costs one vector of weights, its error never moves the policy,
and the hidden states that it reads do not drift while the policy does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from purld.model.causal_lm import CausalLM, model_device, unwrap_adapters
from purld.model.encode import pad_right
from purld.model.vision import EncodedPrompt, vision_features


class ValueHead(nn.Module):
    """A value head V(prefix) = w h + b that starts at 0.

    Args:
        hidden_size: H, the size of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return (K, C) float32 values of (K, C, H) hidden states."""
        values: Tensor = self.linear(states).squeeze(-1)
        return values


@torch.no_grad()
def states_before_tokens(
    model: CausalLM, prompt: EncodedPrompt, completions: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Return the last hidden state before each token of K completions: (K, C, H), float32, without gradients.

    Args:
        model: a causal language model.
        prompt: the prompt.
        completions: K completions as token ids.
        pad: a token id to pad with; states after the end of a completion are meaningless.
    """
    ids, mask = pad_right([[*prompt.ids, *completion] for completion in completions], pad, model_device(model))
    # A token's value is that of the prefix before it, and nothing follows the last token.
    ids, mask = ids[:, :-1], mask[:, :-1]
    extra_inputs = vision_features(model, [prompt] * len(ids), ids)
    output = unwrap_adapters(model).base_model(input_ids=ids, attention_mask=mask, **extra_inputs)
    states: Tensor = output.last_hidden_state
    return states[:, len(prompt) - 1 :].float()


def model_hidden_size(model: CausalLM) -> int:
    """Return H, the size of the model's last hidden state."""
    return int(model.config.get_text_config().hidden_size)
