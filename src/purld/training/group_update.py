"""Measure one group and add its gradient, for every objective.

An objective's gradient is sum_kt c_kt grad log p_theta(y_kt|x, y_k<t) (see `purld.methods.losses`), so no graph over
the whole group is needed: log-probs without a graph give the coefficients, then members go backward in micro-batches.
The result does not depend on their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from purld.methods.losses import GroupLoss, GroupTokens, loss_coefficients
from purld.model.causal_lm import CausalLM
from purld.model.critic import ValueHead, states_before_tokens
from purld.model.load import Roles
from purld.model.log_probs import make_prefix, micro_batches
from purld.model.prefix import Prefix
from purld.model.vision import EncodedPrompt


@dataclass(frozen=True)
class GroupMembers:
    """A group's members with what stays fixed while they are updated on; tensors are (K, C).

    Attributes:
        prompt: the prompt.
        ids: the K members' token ids.
        reference: log-probs under p_sft, in nats.
        mask: 1 on a member's tokens, 0 on padding.
        old: log-probs under the policy that drew the members; None if that is the policy of the update.
        states: (K, C, H) hidden states that the critic reads; None without a critic.
        old_values: the critic's values when the members were drawn.
        sampled: see `GroupTokens.sampled`.
    """

    prompt: EncodedPrompt
    ids: Sequence[Sequence[int]]
    reference: Tensor
    mask: Tensor
    old: Tensor | None = None
    states: Tensor | None = None
    old_values: Tensor | None = None
    sampled: Tensor | None = None

    def tokens(self, policy: Tensor, values: Tensor | None = None) -> GroupTokens:
        """Return the members as an objective sees them, given their (K, C) log-probs under the current policy."""
        old = policy.detach() if self.old is None else self.old
        return GroupTokens(policy, self.reference, old, self.mask, values, self.old_values, self.sampled)


@dataclass(frozen=True)
class GroupUpdate:
    """Measures groups, and adds a group's gradient to the policy's and the critic's.

    Attributes:
        roles: the policy and the frozen p_sft, which is the reference and the critic's trunk.
        micro_batch_size: members per forward and backward pass.
        pad: the token id to pad with.
        backward: runs the backward pass of a scalar.
        autocast: the precision to compute in, the same for policy and reference.
        critic: the value head, for a method that has one.
        importance_cap: the cap of importance weights, where another engine draws the members; None for no weights.
        recompute: compute layers again in the backward pass instead of keeping what is in them.
    """

    roles: Roles
    micro_batch_size: int
    pad: int
    backward: Callable[[Tensor], None]
    autocast: Callable[[], AbstractContextManager[Any]]
    critic: ValueHead | None = None
    importance_cap: float | None = None
    recompute: bool = False

    @torch.no_grad()
    def members(
        self,
        policy: CausalLM,
        prompt: EncodedPrompt,
        ids: Sequence[Sequence[int]],
        keep_old: bool,
        reference_prompt: EncodedPrompt | None = None,
        measured: Sequence[Tensor] | None = None,
    ) -> GroupMembers:
        """Measure a group.

        Args:
            policy: the policy that drew the members.
            prompt: the prompt.
            ids: the members' token ids.
            keep_old: measure them under the policy too, for several updates on one rollout.
            reference_prompt: what p_sft reads before a member; the prompt unless given.
            measured: the members' log-probs under p_sft, each (C_k,), if a scorer has computed them on that prompt.
        """
        with self.roles.frozen() as reference:
            if measured is None:
                log_probs, mask = self._measure(reference, reference_prompt or prompt, ids)
            else:
                log_probs, mask = _stack_rows(measured)
            states = None
            if self.critic is not None:
                with self.autocast():
                    states = states_before_tokens(reference, prompt, ids, self.pad)
        old = self._measure(policy, prompt, ids)[0] if keep_old else None
        values = None if self.critic is None or states is None else self.critic(states)
        return GroupMembers(prompt, ids, log_probs, mask, old, states, values)

    def __call__(
        self, policy: CausalLM, members: GroupMembers, objective: Callable[[GroupTokens], GroupLoss], share: float
    ) -> tuple[GroupLoss, GroupTokens]:
        """Accumulate `share` times the gradient of an objective on one group.

        Args:
            policy: the model to differentiate.
            members: the group, as `members` measured it.
            objective: the objective to minimise.
            share: the weight of the group in the step.

        Returns:
            The objective at the current policy, and the tokens it was computed on.
        """
        values = self._values(members)
        with self.autocast():
            prefix = make_prefix(policy, members.prompt, members.ids, self.pad, cut=True, recompute=self.recompute)
        one_pass = len(members.ids) <= self.micro_batch_size
        if one_pass:  # gives both the coefficients and the graph
            log_probs = self._log_probs(prefix, members.ids)[0]
            tokens = members.tokens(log_probs.detach(), values)
        else:
            tokens = members.tokens(self._without_graph(prefix, members.ids)[0], values)
        loss, coefficients, value_coefficients = loss_coefficients(objective, tokens, self.importance_cap)
        if one_pass:
            self.backward((share * coefficients * log_probs).sum())
        else:
            for rows in micro_batches(len(members.ids), self.micro_batch_size):
                log_probs = self._log_probs(prefix, members.ids[rows])[0]
                self.backward((share * coefficients[rows, : log_probs.shape[1]] * log_probs).sum())
        prefix.backward()
        if values is not None and value_coefficients is not None:
            self.backward((share * value_coefficients * values).sum())
        return loss, tokens

    @torch.no_grad()
    def tokens(self, policy: CausalLM, members: GroupMembers) -> GroupTokens:
        """Return a group as an objective sees it at the current policy, without a graph."""
        return members.tokens(self._measure(policy, members.prompt, members.ids)[0], self._values(members))

    def _values(self, members: GroupMembers) -> Tensor | None:
        """Return the (K, C) values of the current critic; None without one."""
        return None if self.critic is None or members.states is None else self.critic(members.states)

    def _measure(self, model: CausalLM, prompt: EncodedPrompt, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (K, C) log-probs of a group under a model, without a graph, and their mask."""
        with self.autocast():
            prefix = make_prefix(model, prompt, ids, self.pad)
        return self._without_graph(prefix, ids)

    def _log_probs(self, prefix: Prefix, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return prefix.token_log_probs(ids)

    @torch.no_grad()
    def _without_graph(self, prefix: Prefix, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (K, C) log-probs and their mask, computed in micro-batches."""
        parts = [self._log_probs(prefix, ids[rows]) for rows in micro_batches(len(ids), self.micro_batch_size)]
        width = max(map(len, ids))
        log_probs, masks = (torch.cat([_pad_columns(part, width) for part in column]) for column in zip(*parts))
        return log_probs, masks.float()


def _stack_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return K rows as (K, C), padded with zeros, and their (K, C) mask."""
    padded, mask = (pad_sequence(list(part), batch_first=True) for part in (rows, [torch.ones_like(r) for r in rows]))
    return padded, mask


def _pad_columns(rows: Tensor, width: int) -> Tensor:
    """Append zeros to (k, c) rows, up to (k, width)."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
