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
        # Values with and without autocast are compared, and bfloat16's rounding would pass for a change of the critic.
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.linear(states.float()).squeeze(-1)
        return values


@torch.no_grad()
def states_before_tokens(
    model: CausalLM, prompts: Sequence[EncodedPrompt], completions: Sequence[Sequence[int]], pad: int
) -> list[Tensor]:
    """Return the last hidden states before each token of B completions, (C, H) each, float32, without gradients.

    Args:
        model: a causal language model.
        prompts: the completions' B prompts.
        completions: B completions as token ids.
        pad: a token id to pad with.
    """
    rows = [[*prompt.ids, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    ids, mask = pad_right(rows, pad, model_device(model))
    # A token's value is that of the prefix before it, and nothing follows the last token.
    ids, mask = ids[:, :-1], mask[:, :-1]
    extra_inputs = vision_features(model, prompts, ids)
    output = unwrap_adapters(model).base_model(input_ids=ids, attention_mask=mask, **extra_inputs)
    states: Tensor = output.last_hidden_state.float()
    starts = [len(prompt) - 1 for prompt in prompts]
    return [line[start : start + len(c)] for line, start, c in zip(states, starts, completions, strict=True)]


def model_hidden_size(model: CausalLM) -> int:
    """Return H, the size of the model's last hidden state."""
    return int(model.config.get_text_config().hidden_size)
