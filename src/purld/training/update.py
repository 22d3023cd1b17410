"""One group's gradient: log-likelihoods, the objective's coefficients, and candidates backward in micro-batches.

The objective's gradient is sum_k c_k grad log p_theta(y_k|x), so no graph over the whole group is needed: the
result does not depend on the size of the micro-batches (Eq. 4 and 5; see `purld.method.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purld.method.losses import GroupObjective, QForm, group_objective
from purld.student.group import micro_batches, prefix_of
from purld.student.load import Roles
from purld.student.prefix import Prefix


@dataclass(frozen=True)
class GroupUpdate:
    """Adds a group's gradient to the policy's.

    Attributes:
        roles: whose frozen p_sft is the reference.
        form: how the policy is mapped onto the group.
        beta: weight of KL(p_theta || p_sft).
        micro_batch_size: candidates per forward and backward pass.
        pad: a token id to pad with.
        backward: sends a scalar backward.
        autocast: the precision to compute in, the same for policy and reference.
    """

    roles: Roles
    form: QForm
    beta: float
    micro_batch_size: int
    pad: int
    backward: Callable[[Tensor], None]
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(
        self,
        policy: Any,
        head: Sequence[int],
        completions: Sequence[Sequence[int]],
        log_labels: Tensor,
        share: float,
    ) -> GroupObjective:
        """Accumulate `share` times the gradient of Eq. 4 on one group.

        Args:
            policy: the model to differentiate.
            head: token ids of the prompt.
            completions: the K scored candidates' token ids.
            log_labels: (K,) log D.
            share: weight of the group in the batch.

        Returns:
            The objective at the policy as it is, with its (K,) coefficients.
        """
        with self.roles.frozen() as reference, self.autocast():
            frozen_prompt = prefix_of(reference, head, completions, self.pad)
            reference_log_probs = self._no_grad(frozen_prompt, completions)
        lengths = torch.tensor([len(c) for c in completions], device=reference_log_probs.device)

        def objective_at(log_probs: Tensor) -> GroupObjective:
            labels = log_labels.to(log_probs.device)
            return group_objective(labels, log_probs, reference_log_probs, lengths, form=self.form, beta=self.beta)

        with self.autocast():
            prompt = prefix_of(policy, head, completions, self.pad, cut=True)
        if len(completions) <= self.micro_batch_size:  # one pass gives both the coefficients and the graph
            log_probs = self._sums(prompt, completions)
            objective = objective_at(log_probs)
            self.backward((share * objective.coefficients * log_probs).sum())
        else:
            objective = objective_at(self._no_grad(prompt, completions))
            for rows in micro_batches(len(completions), self.micro_batch_size):
                log_probs = self._sums(prompt, completions[rows])
                self.backward((share * objective.coefficients[rows] * log_probs).sum())
        prompt.backward()
        return objective

    def _sums(self, prompt: Prefix, completions: Sequence[Sequence[int]]) -> Tensor:
        with self.autocast():
            return prompt.token_log_probs(completions)[0].sum(dim=1)

    @torch.no_grad()
    def _no_grad(self, prompt: Prefix, completions: Sequence[Sequence[int]]) -> Tensor:
        rows = micro_batches(len(completions), self.micro_batch_size)
        return torch.cat([self._sums(prompt, completions[r]) for r in rows])
