"""Measure groups and add their gradient, for every objective.

An objective's gradient is sum_kt c_kt grad log p_theta(y_kt|x, y_k<t) (see `purld.methods.losses`), so no graph over
the whole group is needed: log-probs without a graph give the coefficients, then members go backward in micro-batches.
Small groups share a pass instead. The result depends on neither.
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
from purld.model.log_probs import GroupPass, RowGroup, group_log_probs, micro_batches, plan_passes
from purld.model.vision import EncodedPrompt

Objective = Callable[[GroupTokens], GroupLoss]


@dataclass(frozen=True)
class UnmeasuredGroup:
    """A group before it is measured.

    Attributes:
        prompt: the prompt.
        ids: the members' token ids.
        reference_prompt: what p_sft reads before a member; the prompt unless given.
        measured: the members' log-probs under p_sft, each (C_k,), if a scorer has computed them on that prompt.
    """

    prompt: EncodedPrompt
    ids: Sequence[Sequence[int]]
    reference_prompt: EncodedPrompt | None = None
    measured: Sequence[Tensor] | None = None


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
    """Measures groups, and adds their gradient to the policy's and the critic's.

    Attributes:
        roles: the policy and the frozen p_sft, which is the reference and the critic's trunk.
        micro_batch_size: members per forward and backward pass: several small groups, or a part of a large one.
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
    def members(self, policy: CausalLM, groups: Sequence[UnmeasuredGroup], keep_old: bool) -> list[GroupMembers]:
        """Measure groups.

        Args:
            policy: the policy that drew the members.
            groups: the groups.
            keep_old: measure them under the policy too, for several updates on one rollout.
        """
        with self.roles.frozen() as model:
            unknown = [group for group in groups if group.measured is None]
            found = iter(self._measure(model, [RowGroup(g.reference_prompt or g.prompt, g.ids) for g in unknown]))
            references = [next(found) if g.measured is None else stack_rows(g.measured) for g in groups]
            states = self._states(model, groups)
        rows = [RowGroup(group.prompt, group.ids) for group in groups]
        old: Sequence[Tensor | None] = self._measure(policy, rows) if keep_old else [None] * len(groups)
        return [self._group_members(*parts) for parts in zip(groups, references, old, states, strict=True)]

    def __call__(
        self, policy: CausalLM, groups: Sequence[GroupMembers], objectives: Sequence[Objective], share: float
    ) -> list[tuple[GroupLoss, GroupTokens]]:
        """Accumulate `share` times the gradient of each group's objective.

        Args:
            policy: the model to differentiate.
            groups: the groups, as `members` measured them.
            objectives: each group's objective to minimise.
            share: the weight of a group in the step.

        Returns:
            Each group's objective at the current policy, and the tokens it was computed on.
        """
        found: list[tuple[GroupLoss, GroupTokens]] = []
        rows = [RowGroup(group.prompt, group.ids) for group in groups]
        with self.autocast():
            passes = list(plan_passes(policy, rows, self.pad, self.micro_batch_size))
        for together in passes:
            these = slice(len(found), len(found) + len(together))
            found += self._update_together(policy, together, groups[these], objectives[these], share)
        return found

    def _update_together(
        self,
        policy: CausalLM,
        rows: Sequence[RowGroup],
        groups: Sequence[GroupMembers],
        objectives: Sequence[Objective],
        share: float,
    ) -> list[tuple[GroupLoss, GroupTokens]]:
        """See `__call__`; these groups share a pass over their prompts."""
        with self.autocast():
            whole = GroupPass(policy, rows, self.pad, self.micro_batch_size, cut=True, recompute=self.recompute)
        with_graph = self._log_probs(whole, whole.parts[0]) if len(whole.parts) == 1 else None  # gives both
        every = self._without_graph(whole) if with_graph is None else with_graph.detach()
        values = [self._values(group) for group in groups]
        tokens = [
            group.tokens(every[own, : group.mask.shape[1]], of_group)
            for group, own, of_group in zip(groups, whole.slices, values, strict=True)
        ]
        losses, coefficients, of_values = zip(
            *(loss_coefficients(o, t, self.importance_cap) for o, t in zip(objectives, tokens, strict=True))
        )
        weights = torch.cat([pad_columns(rows, every.shape[1]) for rows in coefficients])
        for part in whole.parts:
            log_probs = self._log_probs(whole, part) if with_graph is None else with_graph
            self.backward((share * weights[part.start : part.stop, : log_probs.shape[1]] * log_probs).sum())
        whole.backward()
        for of_group, weight in zip(values, of_values):
            if of_group is not None and weight is not None:
                self.backward((share * weight * of_group).sum())
        return list(zip(losses, tokens))

    def _group_members(
        self, group: UnmeasuredGroup, reference: Tensor, old: Tensor | None, states: Tensor | None
    ) -> GroupMembers:
        values = None if self.critic is None or states is None else self.critic(states)
        mask = mask_rows(group.ids, reference.device)
        return GroupMembers(group.prompt, group.ids, reference, mask, old, states, values)

    @torch.no_grad()
    def tokens(self, policy: CausalLM, groups: Sequence[GroupMembers]) -> list[GroupTokens]:
        """Return groups as an objective sees them at the current policy, without a graph."""
        measured = self._measure(policy, [RowGroup(group.prompt, group.ids) for group in groups])
        return [group.tokens(rows, self._values(group)) for group, rows in zip(groups, measured, strict=True)]

    def _values(self, members: GroupMembers) -> Tensor | None:
        """Return the (K, C) values of the current critic; None without one."""
        return None if self.critic is None or members.states is None else self.critic(members.states)

    def _states(self, model: CausalLM, groups: Sequence[UnmeasuredGroup]) -> Sequence[Tensor | None]:
        """Return the (K, C, H) states that the critic reads, for each group; None without one."""
        if self.critic is None:
            return [None] * len(groups)
        prompts = [group.prompt for group in groups for _ in group.ids]
        rows = [ids for group in groups for ids in group.ids]
        with self.autocast():
            found = [
                states
                for part in micro_batches(len(rows), self.micro_batch_size)
                for states in states_before_tokens(model, prompts[part], rows[part], self.pad)
            ]
        remaining = iter(found)
        return [stack_rows([next(remaining) for _ in group.ids]) for group in groups]

    def _measure(self, model: CausalLM, groups: Sequence[RowGroup]) -> list[Tensor]:
        """Return (K, C) log-probs of each group under a model, without a graph."""
        with self.autocast():
            return [stack_rows(rows) for rows in group_log_probs(model, groups, self.pad, self.micro_batch_size)]

    def _log_probs(self, whole: GroupPass, part: Sequence[int]) -> Tensor:
        with self.autocast():
            return whole.log_probs(part)

    @torch.no_grad()
    def _without_graph(self, whole: GroupPass) -> Tensor:
        """Return (B, C) log-probs of all rows, computed in micro-batches."""
        width = max(map(len, whole.rows))
        return torch.cat([pad_columns(self._log_probs(whole, part), width) for part in whole.parts])


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return K rows (C_k, ...) as (K, C, ...), padded with zeros."""
    return pad_sequence(list(rows), batch_first=True)


def mask_rows(ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the (K, C) mask of padded rows, float32: 1 on their tokens."""
    lengths = torch.tensor([len(row) for row in ids], device=device)
    return (torch.arange(max(map(len, ids)), device=device) < lengths.unsqueeze(1)).float()


def pad_columns(rows: Tensor, width: int) -> Tensor:
    """Append zeros to (k, c) rows, up to (k, width)."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
