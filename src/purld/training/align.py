"""Stage II: the policy samples, a scorer scores, and the signal moves the policy (section 3.3, Algorithm 1).

This module runs the stage from p_sft to the saved policy and says what to look at afterwards; the step itself is in
`purld.training.align_trainer`. No method but one that the teacher judges uses a network here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from purld import ranks
from purld.clients.base import Client
from purld.config.methods import AnchorRankDpo, StageTwoSettings
from purld.errors import UserError
from purld.methods.label_limits import UNIFORM_ENTROPY
from purld.model.load import load_roles, save_policy
from purld.model.vllm_sampler import NOTABLE_GAP, describe_gap
from purld.model.whole_weights import whole_weights
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows
from purld.training.align_trainer import AlignTrainer
from purld.training.checkpoints import resume_point
from purld.training.context import StageContext
from purld.training.first_score import describe_no_score
from purld.training.gain import GainFacts, final_gain
from purld.training.limits import (
    COLLAPSED_SPREAD,
    MOST_TRUNCATED,
    UNMOVED_KL,
    label_uniformity,
    loses_spread_by_success,
)
from purld.training.rollout import AnchoredPrompt
from purld.training.scoring import Scorer
from purld.training.validation import METRIC, UNSCORED, ValidationFacts, ValidationSet


@dataclass(frozen=True)
class AlignFacts:
    """The facts of Stage II that the manifest keeps."""

    prompts: int
    steps: int
    candidates: int
    truncated: int
    unscored: int
    thinking: int
    dropped_groups: int
    sharper_than_labels: float
    against_flattening: str
    label_entropy: float | None = None
    spread_kept: float | None = None
    kl: float | None = None
    validation: ValidationFacts | None = None
    engine_gap: float | None = None
    gain: GainFacts | None = None

    @property
    def warnings(self) -> list[str]:
        """Return what the user should look at, one sentence each."""
        warnings = []
        if self.validation is not None:
            warnings += self.validation.warnings
        if self.truncated > MOST_TRUNCATED * self.candidates:
            warnings.append(f"{self.truncated} of {self.candidates} candidates met the limit align.max_new_tokens.")
        if self.unscored:
            warnings.append(f"{self.unscored} of {self.candidates} candidates got no score.")
        if self.dropped_groups:
            warnings.append(f"{self.dropped_groups} groups were left out: their scores gave no signal to learn from.")
        if self.label_entropy is not None and self.label_entropy > UNIFORM_ENTROPY:
            warnings.append(
                f"the labels stayed uniform (entropy {self.label_entropy:.4f} of ln K), so Stage II had nothing to "
                "learn from; purld probe measures every scorer."
            )
        if self.spread_kept is not None and self.spread_kept < COLLAPSED_SPREAD:
            warnings.append(
                f"the candidates' scores collapsed: at the end they differ by {self.spread_kept:.0%} of what they did "
                "at the start."
            )
        # An estimate of a larger divergence may be below zero by chance.
        if self.kl is not None and abs(self.kl) < UNMOVED_KL:
            warnings.append(
                f"the policy hardly moved from p_sft: their divergence at the end is {abs(self.kl):.1e} nats per "
                "answer; raise align.learning_rate or align.steps."
            )
        if self.gain is not None and self.gain.warning is not None:
            warnings.append(self.gain.warning)
        if self.engine_gap is not None and self.engine_gap > NOTABLE_GAP:
            warnings.append(describe_gap(self.engine_gap))
        if self.sharper_than_labels > 0.5:
            warnings.append(
                f"in {self.sharper_than_labels:.0%} of the groups the policy was sharper than its labels, so the "
                f"update flattened it; {self.against_flattening}."
            )
        return warnings


def align(
    context: StageContext,
    settings: StageTwoSettings,
    examples: Sequence[tuple[Prompt, Anchor]],
    teacher: Client | None = None,
    change_scorer: Callable[[Scorer], Scorer] | None = None,
    margin_scale: float = 1.0,
    validation: ValidationSet | None = None,
) -> AlignFacts:
    """Align p_sft by the method of `settings` and save the policy to `run.align`; resume from the last checkpoint.

    The policy of the last step is saved, or that of the best one on `validation`.

    Args:
        context: the student, the run directory and the seed.
        settings: the method's section of the configuration.
        examples: the prompts of the stage with their anchors.
        teacher: the teacher's client, for a method that asks it about candidates.
        change_scorer: replaces the method's scorer by another, for experiments on scores.
        margin_scale: the factor of the margins; 1 is the paper's literal form.
        validation: the prompts that steps are compared on.

    Raises:
        UserError: there are no anchors, no group ever gave a signal, the first candidates all have no score, or a
            number is not finite.
    """
    if not examples:
        raise UserError("Stage II: there are no anchors to align with.")
    run, encoder = context.run, context.encoder
    checkpoint = resume_point(run, "align")
    roles = load_roles(context.student, run.sft, context.seed)
    questions = [AnchoredPrompt(p, a.text, encoder.encode_prompt(p), a.cut) for p, a in examples]
    trainer = AlignTrainer(
        context,
        settings,
        roles,
        questions,
        None,
        teacher=teacher,
        change_scorer=change_scorer,
        margin_scale=margin_scale,
        validation=validation,
    )
    trainer.train_from(checkpoint.path)
    trainer.check_policy()
    logged = ranks.on_first(lambda: [row for row in read_rows(run.metrics) if row["stage"] == "align"])
    rows = [row for row in logged if METRIC not in row and UNSCORED not in row]
    if not any("objective" in row for row in rows):
        raise UserError(_no_signal(rows, settings))
    trainer.remeasure()
    whole = whole_weights(roles.policy)
    ranks.on_first(lambda: save_policy(context.student, roles, run.sft, encoder, run.align, whole))
    facts = _facts(rows, settings, len(examples), trainer.kept_step)
    return facts if validation is None else replace(facts, validation=_validated(logged, validation, trainer.kept_step))


def _validated(rows: Sequence[dict[str, Any]], validation: ValidationSet, kept_step: int) -> ValidationFacts:
    measured = [row for row in rows if METRIC in row]
    steps, scores = ([row[key] for row in measured] for key in ("step", METRIC))
    unmeasured = [row["step"] for row in rows if UNSCORED in row and METRIC not in row]
    return ValidationFacts(validation.measure, len(validation.examples), kept_step, steps, scores, unmeasured)


def _no_signal(rows: Sequence[dict[str, Any]], settings: StageTwoSettings) -> str:
    if any("score" in row for row in rows):
        remedy = "lower align.margin" if isinstance(settings, AnchorRankDpo) else "use another align.score"
        return f"Stage II: no two candidates of a prompt ever had scores that differ enough; {remedy}."
    return describe_no_score(settings)


def _facts(rows: Sequence[dict[str, Any]], settings: StageTwoSettings, prompts: int, kept_step: int) -> AlignFacts:
    steps = rows[-1]["step"]
    kept = [row for row in rows if row["step"] <= kept_step]  # what leads to the policy that is saved
    return AlignFacts(
        prompts=prompts,
        steps=steps,
        candidates=settings.groups_drawn(prompts, steps) * settings.drawn,
        truncated=int(_total(rows, "truncated")),
        unscored=int(_total(rows, "unscored")),
        thinking=int(_total(rows, "thinking")),
        dropped_groups=int(_total(rows, "dropped_groups")),
        sharper_than_labels=_total(rows, "sharper_than_labels") / max(1, len(rows)),
        against_flattening=_advice(settings),
        label_entropy=_mean_label_entropy(rows, settings),
        spread_kept=_spread_kept(kept, settings),
        kl=_final_kl(kept),
        engine_gap=_engine_gap(rows),
        gain=final_gain(kept),
    )


def _mean_label_entropy(rows: Sequence[dict[str, Any]], settings: StageTwoSettings) -> float | None:
    """Return the mean entropy of the labels over that of uniform ones; None for a method without labels."""
    members = settings.drawn + settings.anchor_joins
    entropies = [share for row in rows if (share := label_uniformity(row, members)) is not None]
    return sum(entropies) / len(entropies) if entropies else None


def _spread_kept(rows: Sequence[dict[str, Any]], settings: StageTwoSettings) -> float | None:
    """Return the mean spread of scores in the last quarter of the steps over that in the first; None if unknown.

    It is not known either of scores that lose it by success.
    """
    if loses_spread_by_success(getattr(settings, "score", None)):
        return None
    spreads = [row["score_spread"] for row in rows if "score_spread" in row]
    quarter = len(spreads) // 4
    if quarter == 0 or sum(spreads[:quarter]) == 0:
        return None
    return float(sum(spreads[-quarter:]) / sum(spreads[:quarter]))


def _final_kl(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return KL(p_theta || p_sft), estimated in the last quarter of the steps; None if not measured.

    Before the first update it is 0 and says nothing.
    """
    measured = [row["kl"] for row in rows if "kl" in row and row["step"] > 1]
    last = measured[-max(1, len(measured) // 4) :]
    return float(sum(last) / len(last)) if last else None


def _engine_gap(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean difference of log-probs between engine and trainer; None where the trainer's model drew."""
    gaps = [row["engine_gap"] for row in rows if "engine_gap" in row]
    return sum(gaps) / len(gaps) if gaps else None


def _total(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(row.get(key, 0.0) for row in rows))


def _advice(settings: StageTwoSettings) -> str:
    """Say what helps a policy that is sharper than its labels.

    With `ratio` the sharpness is noise of the update; with the other forms it is what the policy knew before.
    """
    if getattr(settings, "q", None) == "ratio":
        return f"lower align.learning_rate{'' if settings.rate_falls else ' or let it decay (align.schedule)'}"
    return "raise align.gamma, lower align.tau, or use align.q=ratio"
