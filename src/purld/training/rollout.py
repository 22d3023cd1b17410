"""From prompts to groups that can be updated on: candidates, scores, members, signals (Algorithm 1, lines 4 to 15)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from purld.config.methods import StageTwoSettings as Settings
from purld.methods.table import GroupEvidence, StageTwoMethod
from purld.model.encode import Encoder
from purld.model.sample import Completion
from purld.model.self_evaluation import GroupScores
from purld.model.vision import EncodedPrompt
from purld.records import Prompt
from purld.training.group_update import GroupMembers, GroupUpdate
from purld.training.scoring import GroupToScore, Scorer


@dataclass(frozen=True)
class AnchoredPrompt:
    """A prompt with its anchor, tokenised once for the whole stage."""

    prompt: Prompt
    anchor: str
    head: EncodedPrompt


@dataclass(frozen=True)
class Rollout:
    """One prompt's group.

    Attributes:
        question: the prompt.
        completions: the candidates drawn, none for a method that draws none.
        texts: their texts.
        scores: theirs, and the anchor's.
        members: what the objective is about; None if the group is left out.
        places: of each member that is a candidate, which candidate.
        signal: what the objective is told; None if the group is left out.
    """

    question: AnchoredPrompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    scores: GroupScores
    members: GroupMembers | None = None
    places: Sequence[int] = ()
    signal: Any = None

    @property
    def usable(self) -> bool:
        """Whether the group takes part in the update."""
        return self.members is not None and self.signal is not None


@dataclass(frozen=True)
class RolloutMaker:
    """Draws groups as a method's row and settings say.

    Attributes:
        method: the row of the table.
        settings: its section of the configuration.
        encoder: the run's encoder.
        sample: (policy, heads, count, seed) -> completions.
        scoring: who scores.
        update: measures the members.
    """

    method: StageTwoMethod[Any]
    settings: Settings
    encoder: Encoder
    sample: Callable[[Any, Sequence[EncodedPrompt], int, int], list[list[Completion]]]
    scoring: Scorer
    update: GroupUpdate

    def __call__(self, policy: Any, questions: Sequence[AnchoredPrompt], seed: int) -> list[Rollout]:
        """One group per question."""
        drawn: list[list[Completion]] = [[] for _ in questions]
        if self.settings.drawn:
            drawn = self.sample(policy, [q.head for q in questions], self.settings.drawn, seed)
        texts = [[self.encoder.text(c.ids) for c in completions] for completions in drawn]
        scores = self.scoring([GroupToScore(q.prompt, q.anchor, t) for q, t in zip(questions, texts)])
        rollouts = [
            self.with_signal(policy, Rollout(*parts)) for parts in zip(questions, drawn, texts, scores, strict=True)
        ]
        return self._across(rollouts)

    def with_signal(self, policy: Any, rollout: Rollout) -> Rollout:
        """A group that was drawn and scored, with its members and what the method makes of its scores, if anything."""
        places = list(range(len(rollout.completions)))
        if self.method.scorer is not None:
            places = [place for place in places if rollout.scores.candidates[place] is not None]
        scores = [s for s in rollout.scores.candidates if s is not None]
        ids = [list(rollout.completions[place].ids) for place in places]
        if self.method.anchor_member:
            ids.insert(0, self.encoder.answer(rollout.question.anchor).ids)
        device = next(policy.parameters()).device
        evidence = GroupEvidence(torch.tensor(scores, device=device), rollout.scores.anchor)
        members = None
        if self.method.critic and ids:
            members = self._measured(policy, rollout, ids)
            assert members.old is not None
            evidence = replace(evidence, tokens=members.tokens(members.old))
        signal = self.method.signal(evidence, self.settings)
        if signal is None:
            return rollout
        return replace(
            rollout, members=members or self._measured(policy, rollout, ids), places=tuple(places), signal=signal
        )

    def _measured(self, policy: Any, rollout: Rollout, ids: Sequence[Sequence[int]]) -> GroupMembers:
        keep_old = self.method.critic or self.settings.updates > 1
        return self.update.members(policy, rollout.question.head, ids, keep_old)

    def _across(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Let the prompts of a step change each other's signals, where the method says so."""
        used = [place for place, rollout in enumerate(rollouts) if rollout.usable]
        if self.method.across is None or not used:
            return rollouts
        masks = [members.mask for place in used if (members := rollouts[place].members)]
        signals = self.method.across([rollouts[place].signal for place in used], masks)
        for place, signal in zip(used, signals, strict=True):
            rollouts[place] = replace(rollouts[place], signal=signal)
        return rollouts
