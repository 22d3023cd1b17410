"""Turn prompts into groups to update on: candidates, scores, members, signals (Algorithm 1, lines 4 to 15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from purld import ranks
from purld.config.methods import StageTwoSettings
from purld.methods.table import GroupEvidence, StageTwoMethod
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.sample import Completion, Sampler, seed_from_content
from purld.model.self_evaluation import GroupScores
from purld.model.vision import EncodedPrompt
from purld.records import Prompt
from purld.training.group_update import GroupMembers, GroupUpdate, UnmeasuredGroup
from purld.training.scoring import GroupToScore, Scorer


@dataclass(frozen=True)
class AnchoredPrompt:
    """A prompt with its anchor, tokenised once for the whole stage; `anchor_cut` is the anchor's `cut`."""

    prompt: Prompt
    anchor: str
    encoded: EncodedPrompt
    anchor_cut: bool = False


@dataclass(frozen=True)
class Rollout:
    """One prompt's group.

    Attributes:
        question: the prompt and its anchor.
        completions: the K candidates drawn; empty for a method that draws none.
        texts: their texts.
        scores: the candidates' scores and the anchor's.
        members: what the objective is computed on; None if the group is left out.
        member_candidates: for each member that is a candidate, the candidate's index.
        signal: what the objective learns from; None if the group is left out.
        thinking: the number of candidates with thinking before their answer.
    """

    question: AnchoredPrompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    scores: GroupScores
    members: GroupMembers | None = None
    member_candidates: Sequence[int] = ()
    signal: Any = None
    thinking: int = 0

    @property
    def usable(self) -> bool:
        """Return whether the group takes part in the update."""
        return self.members is not None and self.signal is not None


@dataclass(frozen=True)
class _ChosenMembers:
    """The indices of the candidates that are members, and the token ids of all members, the anchor's first if any."""

    candidates: tuple[int, ...]
    ids: list[list[int]]


def candidates_to_score(encoder: Encoder, question: AnchoredPrompt, completions: Sequence[Completion]) -> GroupToScore:
    """Return drawn candidates as they are scored: by their answers, without what the student thought before them."""
    replies = [encoder.read_reply(completion.ids) for completion in completions]
    ids = [
        encoder.encode_drawn_answer(reply.answer, completion.finished) if reply.found else completion.ids
        for reply, completion in zip(replies, completions, strict=True)
    ]
    texts, thinking = [reply.answer for reply in replies], sum(bool(reply.thinking) for reply in replies)
    return GroupToScore(question.prompt, question.anchor, texts, ids, thinking, question.anchor_cut)


def engine_log_probs(drawn: Sequence[Completion], mask: torch.Tensor) -> torch.Tensor | None:
    """Return the log-probs that an engine gave to the drawn members, which come last, as `GroupTokens.sampled`.

    Args:
        drawn: the members that were drawn.
        mask: (K, C), the mask of all members.
    """
    rows = torch.full_like(mask, torch.nan)
    for row, completion in zip(rows[len(rows) - len(drawn) :], drawn, strict=True):
        if completion.log_probs is None:
            return None
        row[: len(completion.ids)] = torch.tensor(completion.log_probs)
    return rows if drawn else None


@dataclass(frozen=True)
class RolloutMaker:
    """Makes the groups of a step: samples, scores, and measures them as a method needs.

    Attributes:
        method: the method's row in the table.
        settings: the method's section of the configuration.
        encoder: the run's encoder.
        sampler: draws candidates.
        scorer: scores them.
        update: measures log-probs of the members.
        margin_scale: the factor of the margins, fixed for the run.
    """

    method: StageTwoMethod[Any]
    settings: StageTwoSettings
    encoder: Encoder
    sampler: Sampler
    scorer: Scorer
    update: GroupUpdate
    margin_scale: float = 1.0

    @property
    def anchor_first(self) -> bool:
        """Return whether the anchor is a group's first member."""
        return self.method.anchor_member or self.settings.anchor_joins

    def __call__(self, policy: CausalLM, questions: Sequence[AnchoredPrompt], seed: int) -> list[Rollout]:
        """Make one group per question; a question's candidates depend on the seed and on the question alone."""
        drawn: list[list[Completion]] = [[] for _ in questions]
        if self.settings.drawn and questions:
            seeds = [seed_from_content(seed, q.prompt.id) for q in questions]
            drawn = self.sampler(policy, [q.encoded for q in questions], self.settings.drawn, seeds)
        groups = [candidates_to_score(self.encoder, q, completions) for q, completions in zip(questions, drawn)]
        scored = [self._scored_rollout(*p) for p in zip(questions, drawn, groups, self.scorer(groups), strict=True)]
        return self._combine_prompts(self.add_signals(policy, scored))

    def _scored_rollout(
        self, question: AnchoredPrompt, completions: Sequence[Completion], group: GroupToScore, scores: GroupScores
    ) -> Rollout:
        """Return a group with its scores; log-probs of other tokens than those drawn, or after another prompt, go."""
        as_drawn = [list(ids) for ids in group.ids] == [list(c.ids) for c in completions]
        if not as_drawn or self.encoder.keeps_thinking:
            scores = replace(scores, log_probs=None)
        return Rollout(question, completions, group.candidates, scores, thinking=group.thinking)

    def add_signals(self, policy: CausalLM, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Add members and signals to scored groups; one comes back unchanged if its scores give no signal."""
        chosen = [self._choose_members(rollout) for rollout in rollouts]
        measured: dict[int, GroupMembers] = {}
        if self.method.critic:  # its signal is made of log-probs and values
            measured = self._measure(policy, rollouts, chosen, [i for i, members in enumerate(chosen) if members.ids])
        device = next(policy.parameters()).device
        signals = []
        for index, rollout in enumerate(rollouts):
            scores = [s for s in rollout.scores.candidates if s is not None]
            tokens = None
            if index in measured and (old := measured[index].old) is not None:
                tokens = measured[index].tokens(old)
            evidence = GroupEvidence(
                torch.tensor(scores, device=device), rollout.scores.anchor, tokens, margin_scale=self.margin_scale
            )
            signals.append(self.method.signal(evidence, self.settings))
        used = [index for index, signal in enumerate(signals) if signal is not None]
        measured |= self._measure(policy, rollouts, chosen, [index for index in used if index not in measured])
        return [
            rollout
            if signal is None
            else replace(rollout, members=measured[i], member_candidates=chosen[i].candidates, signal=signal)
            for i, (rollout, signal) in enumerate(zip(rollouts, signals, strict=True))
        ]

    def _choose_members(self, rollout: Rollout) -> _ChosenMembers:
        """Return the members of a group: the anchor if it is one, and the candidates that have the score they need."""
        indices = list(range(len(rollout.completions)))
        if self.method.scorer is not None:
            indices = [index for index in indices if rollout.scores.candidates[index] is not None]
        ids = [list(rollout.completions[index].ids) for index in indices]
        if self.anchor_first:
            question = rollout.question
            ids.insert(0, self.encoder.encode_target(question.anchor, question.anchor_cut).ids)
        return _ChosenMembers(tuple(indices), ids)

    def _measure(
        self,
        policy: CausalLM,
        rollouts: Sequence[Rollout],
        chosen: Sequence[_ChosenMembers],
        indices: Sequence[int],
    ) -> dict[int, GroupMembers]:
        """Measure the members of the groups with these indices."""
        keep_old = self.method.critic or self.settings.updates > 1
        groups = [self._unmeasured(rollouts[index], chosen[index]) for index in indices]
        found = {}
        for index, members in zip(indices, self.update.members(policy, groups, keep_old), strict=True):
            drawn = [rollouts[index].completions[candidate] for candidate in chosen[index].candidates]
            found[index] = replace(members, sampled=engine_log_probs(drawn, members.mask))
        return found

    def _unmeasured(self, rollout: Rollout, chosen: _ChosenMembers) -> UnmeasuredGroup:
        question, known = rollout.question, rollout.scores.log_probs
        anchored = measured = None
        if self.method.anchored_reference:
            # Where the policy thinks before it answers, p_sft reads what it thought as well.
            anchored = self.encoder.encode_anchored_prompt(question.prompt, question.anchor, direct=False)
        elif known is not None and not self.anchor_first:
            measured = [known[index] for index in chosen.candidates]
        return UnmeasuredGroup(question.encoded, chosen.ids, anchored, measured)

    def _combine_prompts(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Let the signals of a step's prompts, those of all ranks, change each other, for a method that does so."""
        if self.method.across is None:
            return rollouts
        used = [index for index, rollout in enumerate(rollouts) if rollout.usable]
        own = [(rollouts[i].signal, members.mask) for i in used if (members := rollouts[i].members)]
        offset, every = ranks.gather_with_offset(own)
        signals = self.method.across([signal for signal, _ in every], [mask for _, mask in every]) if every else []
        for index, signal in zip(used, signals[offset : offset + len(own)], strict=True):
            rollouts[index] = replace(rollouts[index], signal=signal)
        return rollouts
