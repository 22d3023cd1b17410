"""One group's passes and its gradient, for every objective.

An objective's gradient is sum_kt c_kt grad log p_theta(y_kt|x, y_k<t) (see `purld.methods.losses`), so no graph over
the whole group is needed: log-probabilities without one give the coefficients, then members go backward in
micro-batches, and the result does not depend on their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purld.methods.losses import GroupLoss, GroupTokens, loss_coefficients
from purld.model.critic import ValueHead, states_before_tokens
from purld.model.load import Roles
from purld.model.log_probs import make_prefix, micro_batches
from purld.model.prefix import Prefix
from purld.model.vision import EncodedPrompt


@dataclass(frozen=True)
class GroupMembers:
    """A group's members and what does not change while they are updated on; tensors are (K, C).

    Attributes:
        head: the prompt.
        ids: the K members' token ids.
        reference: log-probabilities under p_sft.
        mask: 1 on a member's tokens.
        old: log-probabilities under the policy that drew them; None if that is the policy of the update.
        states: (K, C, H) what the critic reads; None without a critic.
        old_values: the critic's values when the members were drawn.
    """

    head: EncodedPrompt
    ids: Sequence[Sequence[int]]
    reference: Tensor
    mask: Tensor
    old: Tensor | None = None
    states: Tensor | None = None
    old_values: Tensor | None = None

    def tokens(self, policy: Tensor, values: Tensor | None = None) -> GroupTokens:
        """The members as an objective sees them, with (K, C) log-probabilities under the policy as it is."""
        old = policy.detach() if self.old is None else self.old
        return GroupTokens(policy, self.reference, old, self.mask, values, self.old_values)


@dataclass(frozen=True)
class GroupUpdate:
    """Measures groups, and adds a group's gradient to the policy's and the critic's.

    Attributes:
        roles: whose frozen p_sft is the reference, and the critic's trunk.
        micro_batch_size: members per forward and backward pass.
        pad: a token id to pad with.
        backward: sends a scalar backward.
        autocast: the precision to compute in, the same for policy and reference.
        critic: the value head, for a method that has one.
    """

    roles: Roles
    micro_batch_size: int
    pad: int
    backward: Callable[[Tensor], None]
    autocast: Callable[[], AbstractContextManager[Any]]
    critic: ValueHead | None = None

    @torch.no_grad()
    def members(self, policy: Any, head: EncodedPrompt, ids: Sequence[Sequence[int]], keep_old: bool) -> GroupMembers:
        """Measure a group; `keep_old` if it will be updated on by another policy than the one that drew it."""
        with self.roles.frozen() as reference:
            log_probs, mask = self._measured(reference, head, ids)
            states = None
            if self.critic is not None:
                with self.autocast():
                    states = states_before_tokens(reference, head, ids, self.pad)
        old = self._measured(policy, head, ids)[0] if keep_old else None
        values = None if self.critic is None or states is None else self.critic(states)
        return GroupMembers(head, ids, log_probs, mask, old, states, values)

    def __call__(
        self, policy: Any, members: GroupMembers, objective: Callable[[GroupTokens], GroupLoss], share: float
    ) -> tuple[GroupLoss, GroupTokens]:
        """Accumulate `share` times the gradient of an objective on one group.

        Args:
            policy: the model to differentiate.
            members: the group, see `members`.
            objective: what to minimise.
            share: weight of the group in the step.

        Returns:
            The objective at the policy as it is, and the tokens it was taken at.
        """
        values = self._values(members)
        with self.autocast():
            prompt = make_prefix(policy, members.head, members.ids, self.pad, cut=True)
        one_pass = len(members.ids) <= self.micro_batch_size
        if one_pass:  # gives both the coefficients and the graph
            log_probs = self._log_probs(prompt, members.ids)[0]
            tokens = members.tokens(log_probs.detach(), values)
        else:
            tokens = members.tokens(self._without_graph(prompt, members.ids)[0], values)
        loss, coefficients, value_coefficients = loss_coefficients(objective, tokens)
        if one_pass:
            self.backward((share * coefficients * log_probs).sum())
        else:
            for rows in micro_batches(len(members.ids), self.micro_batch_size):
                log_probs = self._log_probs(prompt, members.ids[rows])[0]
                self.backward((share * coefficients[rows, : log_probs.shape[1]] * log_probs).sum())
        prompt.backward()
        if values is not None and value_coefficients is not None:
            self.backward((share * value_coefficients * values).sum())
        return loss, tokens

    @torch.no_grad()
    def tokens(self, policy: Any, members: GroupMembers) -> GroupTokens:
        """A group as an objective sees it at the policy as it is, without a graph."""
        return members.tokens(self._measured(policy, members.head, members.ids)[0], self._values(members))

    def _values(self, members: GroupMembers) -> Tensor | None:
        """(K, C) values by the critic as it is; None without one."""
        return None if self.critic is None or members.states is None else self.critic(members.states)

    def _measured(self, model: Any, head: EncodedPrompt, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(K, C) log-probabilities of a group under a model, without a graph, and their mask."""
        with self.autocast():
            prompt = make_prefix(model, head, ids, self.pad)
        return self._without_graph(prompt, ids)

    def _log_probs(self, prompt: Prefix, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return prompt.token_log_probs(ids)

    @torch.no_grad()
    def _without_graph(self, prompt: Prefix, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(K, C) log-probabilities and their mask, in micro-batches."""
        parts = [self._log_probs(prompt, ids[rows]) for rows in micro_batches(len(ids), self.micro_batch_size)]
        width = max(map(len, ids))
        log_probs, masks = (torch.cat([_widened(part, width) for part in column]) for column in zip(*parts))
        return log_probs, masks.float()


def _widened(rows: Tensor, width: int) -> Tensor:
    """(k, c) rows with zeros appended to (k, width)."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
