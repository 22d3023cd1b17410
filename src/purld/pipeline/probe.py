"""The probe: measure, without gold, how well the student evaluates itself on a run's prompts, before Stage II.

Candidates are drawn as Stage II would draw them. Every scorer scores them, next to answers of which it is known that
one is worse than another (`purld.evaluation.known_pairs`); `purld.evaluation.signal` turns the scores into measures and
a verdict. Known pairs and gold, where there is any, are only reported: nothing is decided by them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from purld import ranks
from purld.config.methods import Align, GroupSettings, LdlGrpo, SamplingSettings, SelfScoringSettings, StageTwoSettings
from purld.config.schema import Config
from purld.errors import UserError
from purld.evaluation.known_pairs import spoil_answer
from purld.evaluation.score_quality import CheckedGroup, score_quality
from purld.evaluation.signal import (
    NOISE_FACTOR,
    ScorerMeasures,
    mean_length_correlation,
    measures_as_results,
    pair_rate,
    pooled_spread,
    weakness,
)
from purld.methods.labels import distribution_entropy, margin_scale, pu_labels
from purld.methods.table import METHODS
from purld.model.causal_lm import CausalLM
from purld.model.load import Roles, load_model
from purld.model.rounding import rounded_otherwise
from purld.model.sample import Completion, Decoding, seed_from_content
from purld.model.samplers import make_sampler
from purld.pipeline.context import RunContext, examples_of_pool
from purld.records import Anchor, Prompt, content_hash
from purld.runs.files import write_json
from purld.tasks.checks import Check, find_comparison, gold_check, result_check
from purld.training.checkpoints import device_autocast
from purld.training.context import StageContext
from purld.training.rollout import AnchoredPrompt, candidates_to_score
from purld.training.scoring import SCORERS, GroupToScore, Scorer, ScorerContext, find_scorer

MAX_PROMPTS, MIN_PROMPTS = 64, 8
_NOISE_GROUPS = 4  # groups scored twice, rounded otherwise the second time
_BATCH = 8  # prompts sampled together


@dataclass(frozen=True)
class ProbeGroup:
    """One prompt with its candidates and with answers that are known to be worse.

    Attributes:
        question: the prompt and its anchor.
        completions: the K candidates.
        texts: their texts.
        worse: texts by name. `other/anchor` is another prompt's anchor, `other/candidate` another prompt's candidate;
            `anchor/number` is the anchor with a number changed, `candidate/number` the first candidate so, and so on.
    """

    question: AnchoredPrompt
    completions: Sequence[Completion]
    texts: Sequence[str]
    worse: Mapping[str, str]


def draw_probe_groups(
    context: StageContext,
    settings: SamplingSettings,
    policy: CausalLM,
    examples: Sequence[tuple[Prompt, Anchor]],
) -> list[ProbeGroup]:
    """Draw the candidates of the probe from the policy, and make the answers that are known to be worse.

    Args:
        context: the student, the run directory and the seed.
        settings: the method's settings of Stage II; the probe samples as they say, at least 4 candidates.
        policy: the model to sample from.
        examples: prompts with anchors, at least 2.
    """
    encoder = context.encoder
    decoding = Decoding(settings.temperature, settings.max_new_tokens, settings.top_p)
    sampler = make_sampler(context.student, encoder, context.run.engine_files, decoding)
    questions = [AnchoredPrompt(p, a.text, encoder.encode_prompt(p), a.cut) for p, a in examples]
    count = max(4, settings.candidates if isinstance(settings, GroupSettings) else 0)
    drawn: list[list[Completion]] = []
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        seeds = [seed_from_content("probe", context.seed, q.prompt.id) for q in batch]
        drawn += sampler(policy, [q.encoded for q in batch], count, seeds)
        context.progress(min(start + _BATCH, len(questions)), len(questions), "candidates drawn")
    texts = [[encoder.decode_text(c.ids) for c in completions] for completions in drawn]
    groups = []
    for index, question in enumerate(questions):
        other = (index + 1) % len(questions)
        worse = {"other/anchor": questions[other].anchor, "other/candidate": texts[other][0]}
        for source, text in (("anchor", question.anchor), ("candidate", texts[index][0])):
            spoiled = spoil_answer(text, f"{context.seed}/{question.prompt.id}/{source}")
            worse |= {f"{source}/{name}": changed for name, changed in spoiled.items()}
        groups.append(ProbeGroup(question, drawn[index], texts[index], worse))
    return groups


def measure_scorer(
    name: str,
    scorer: Scorer,
    model: CausalLM,
    groups: Sequence[ProbeGroup],
    context: StageContext,
    settings: StageTwoSettings,
    gold: Check | None = None,
) -> ScorerMeasures:
    """Score the probe's groups by one scorer and measure what its scores are worth.

    Args:
        name: the scorer's name.
        scorer: the scorer.
        model: the model that it scores with, if it does with one.
        groups: the probe's groups.
        context: the student, the run directory, the seed, and the comparison with anchors.
        settings: the method's settings, for the labels.
        gold: the check of answers against gold, for the AUC that is only reported.
    """
    started = time.monotonic()
    scored = []
    for index, group in enumerate(groups):
        scored += scorer([_group_to_score(group, context)])
        context.progress(index + 1, len(groups), name)
    seconds = (time.monotonic() - started) / len(groups)
    drawn = [scores.candidates[: len(group.texts)] for group, scores in zip(groups, scored, strict=True)]
    everything = [s for scores in scored for s in scores.candidates]
    pairs: dict[str, tuple[list[float | None], list[float | None]]] = {}
    for group, scores in zip(groups, scored, strict=True):
        for kind, worse in zip(group.worse, scores.candidates[len(group.texts) :], strict=True):
            of_anchor = kind.startswith("anchor/") or kind == "other/anchor"
            better = scores.anchor if of_anchor else scores.candidates[0]
            pairs.setdefault(kind, ([], []))[0].append(better)
            pairs[kind][1].append(worse)
    rates = {kind: rate for kind, (better, worse) in pairs.items() if (rate := pair_rate(better, worse))}
    noise = _noise(scorer, model, groups[:_NOISE_GROUPS], [s.candidates for s in scored], context)
    return ScorerMeasures(
        name=name,
        pairs=rates,
        spread=pooled_spread(drawn),
        noise=noise,
        label_entropy=_label_entropy(name, drawn, [scores.anchor for scores in scored], settings, noise),
        length_correlation=mean_length_correlation(drawn, [[len(c.ids) for c in g.completions] for g in groups]),
        unscored=sum(s is None for s in everything) / len(everything),
        seconds=seconds,
        anchor_auc=_auc_within(groups, drawn, _by_anchor, context.check, context.seed),
        gold_auc=_auc_within(groups, drawn, _by_gold, gold, context.seed),
    )


def _group_to_score(group: ProbeGroup, context: StageContext) -> GroupToScore:
    drawn = candidates_to_score(context.encoder, group.question, group.completions)
    # A copy of a cut anchor has no end of turn either, by which it would differ from it.
    cut = {name: name.startswith("anchor/") and group.question.anchor_cut for name in group.worse}
    worse = [context.encoder.encode_answer(text, cut[name]).ids for name, text in group.worse.items()]
    return replace(drawn, candidates=[*drawn.candidates, *group.worse.values()], ids=[*drawn.ids, *worse])


def _noise(
    scorer: Scorer,
    model: CausalLM,
    groups: Sequence[ProbeGroup],
    scores: Sequence[Sequence[float | None]],
    context: StageContext,
) -> float:
    """Return the root mean square change of scores when everything that the model computes is rounded otherwise.

    Scoring a group in another order or in other batches changes few bits or none: most sums stay as they are.
    """
    squares = []
    with rounded_otherwise(model):
        for group, before in zip(groups, scores):
            (after,) = scorer([_group_to_score(group, context)])
            pairs = zip(before, after.candidates, strict=True)
            squares += [(a - b) ** 2 for a, b in pairs if a is not None and b is not None]
    return float((sum(squares) / len(squares)) ** 0.5) if squares else 0.0


AnswerJudge = Callable[[str], bool]
"""Returns whether a text is a right answer."""


def _by_gold(group: ProbeGroup, check: Check) -> AnswerJudge | None:
    return gold_check(check, group.question.prompt)


def _by_anchor(group: ProbeGroup, check: Check) -> AnswerJudge | None:
    return result_check(check, group.question.prompt, group.question.anchor)


def _auc_within(
    groups: Sequence[ProbeGroup],
    scores: Sequence[Sequence[float | None]],
    judge_of: Callable[[ProbeGroup, Check], AnswerJudge | None],
    check: Check | None,
    seed: int,
) -> tuple[float, float, float] | None:
    """Return the AUC within prompts of right answers over wrong ones, with its interval.

    None where nothing can be judged or no group holds right and wrong answers.
    """
    if check is None:
        return None
    checked = []
    for group, drawn in zip(groups, scores, strict=True):
        judge = judge_of(group, check)
        if judge is not None:
            right = [judge(text) for text in group.texts]
            checked.append(CheckedGroup(group.question.prompt.id, 0, drawn, right))
    if not any(s is not None for group in checked for s in group.scores):
        return None
    quality = score_quality(checked, seed)
    if quality.auc_within is None or quality.auc_within_ci is None:
        return None
    return (quality.auc_within, *quality.auc_within_ci)


def _label_entropy(
    scorer: str,
    groups: Sequence[Sequence[float | None]],
    anchors: Sequence[float | None],
    settings: StageTwoSettings,
    noise: float = 0.0,
) -> float:
    """Return the mean entropy of D over ln K, with LDL-GRPO's default gamma and tau for another method."""
    labels = settings if isinstance(settings, LdlGrpo) else LdlGrpo()
    scale = labels_scale(labels, scorer, pooled_spread(groups), noise)
    ratios = []
    for group, anchor in zip(groups, anchors, strict=True):
        scores = torch.tensor([s for s in group if s is not None], dtype=torch.float64)
        if anchor is not None and len(scores) > 1:
            members = torch.cat([scores.new_tensor([anchor]), scores]) if labels.anchor_joins else scores
            made = pu_labels(members, anchor, labels.gamma, labels.tau, scale)
            ratios.append(distribution_entropy(made.log_distribution).item() / math.log(len(members)))
    return sum(ratios) / len(ratios) if ratios else 1.0


def labels_scale(settings: LdlGrpo, scorer: str, spread: float, noise: float) -> float:
    """Return the factor of the margins for a scorer of this name and spread, as `align.margin_scale` says.

    A spread that is rounding is left as it is: brought to the spread of a signal, it would be learned like one.
    """
    calibrated = settings.margin_scale == "calibrated"
    if settings.margin_scale == "auto":
        calibrated = find_scorer(scorer).has_own_unit
    return margin_scale(spread) if calibrated and spread > NOISE_FACTOR * noise else 1.0


# --- the stage -----------------------------------------------------------------------------------------------


def takes_probe(settings: Align) -> bool:
    """Return whether a method learns from self-evaluation against the anchor, which the probe measures."""
    row = METHODS[settings.method].stage_two
    return row is not None and row.scorer == "anchored"


def run_probe(context: RunContext, every_scorer: bool = False) -> dict[str, Any]:
    """Measure the scorers on the run's prompts and write probe.json.

    Args:
        context: the run. Without a finished Stage I the student's own weights are measured.
        every_scorer: measure all of them; else only the one that `align.score` names.

    Raises:
        UserError: fewer than two prompts have anchors.
    """
    config, run, reporter = context.config, context.run, context.reporter
    settings = config.align
    assert isinstance(settings, SelfScoringSettings) and isinstance(settings, SamplingSettings)
    examples = _probe_examples(context, settings)
    # Every rank measures all of it: the probe is short, and nothing of it depends on their number.
    after_stage_one = ranks.on_first(lambda: "sft" in run.finished_stages())
    folder: str | Path = run.sft if after_stage_one else config.student.model
    model = load_model(config.student, folder)
    roles = Roles(model, model)
    measured = []
    with reporter.progress("probe") as progress:
        comparison = find_comparison(config.data)
        training = StageContext(config.student, context.encoder, run, config.seed, progress, check=comparison)
        groups = draw_probe_groups(training, settings, model, examples)
        for name in _scorers_to_measure(settings, every_scorer):
            entry = find_scorer(name)
            try:
                if entry.check is not None:
                    entry.check(context.encoder, comparison)
            except UserError as error:
                reporter.say(f"{name} is left out: {error}")
                continue
            named = settings.model_copy(update={"score": name})
            scorer = entry.make(ScorerContext(context.encoder, roles, named, True, device_autocast, check=comparison))
            measured.append(measure_scorer(name, scorer, model, groups, training, settings, context.check))
    facts = {
        "prompts": len(groups),
        "model": "sft" if folder == run.sft else "base",
        "scorers": [measures_as_results(m) for m in measured],
        "chosen": settings.score,
        "verdict": _verdict(measured, settings.score),
        "fingerprint": probe_fingerprint(config),
    }
    if ranks.is_first():
        write_json(run.probe, facts)
    return facts


def probe_fingerprint(config: Config) -> str:
    """Return a hash of the settings that the probe depends on; other settings may change without a new probe."""
    drawing = ("method", "score", "candidates", "temperature", "top_p", "max_new_tokens")
    kept = (*drawing, "gamma", "tau", "margin_scale", "anchor_in_group")
    return content_hash({key: getattr(config.align, key, None) for key in kept})


def chosen_measures(probe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the measures of the scorer that the probe chose."""
    measures: Mapping[str, Any] = next(row for row in probe["scorers"] if row["name"] == probe["chosen"])
    return measures


def weak_signal_warnings(probe: Mapping[str, Any] | None) -> list[str]:
    """Return the probe's verdict as a warning if its scorer carries no signal and Stage II ran all the same."""
    weak = probe is not None and "weakness" in chosen_measures(probe)
    return [probe["verdict"]] if probe is not None and weak else []


def check_signal(settings: StageTwoSettings, probe: Mapping[str, Any] | None) -> None:
    """Check that Stage II may start on the probe's verdict.

    Args:
        settings: the method's settings.
        probe: the facts of the run's probe; None for a method that needs none.

    Raises:
        UserError: the scorer carries no signal, and `align.weak_signal` is `stop`.
    """
    if probe is None or not isinstance(settings, SelfScoringSettings):
        return
    if "weakness" in chosen_measures(probe) and settings.weak_signal == "stop":
        raise UserError(
            f"Stage II was not started: {probe['verdict']} Use another scorer (purld probe measures all; "
            "align.score=in_context asks for no number), a larger student or more "
            f"of Stage I; or let the teacher score, with up to {settings.most_groups * settings.drawn:,} more calls "
            "(align.method=teacher_judge_grpo). align.weak_signal=continue starts Stage II all the same."
        )


def probed_scale(settings: StageTwoSettings, probe: Mapping[str, Any] | None, spares_rounding: bool = True) -> float:
    """Return the factor of the margins for the run's scorer, from the spread that the probe measured; 1 without one.

    Args:
        settings: the method's settings.
        probe: the facts of the run's probe.
        spares_rounding: whether a spread that is rounding is left as it is; see `labels_scale`.
    """
    if probe is None or not isinstance(settings, LdlGrpo):
        return 1.0
    measures = chosen_measures(probe)
    return labels_scale(settings, probe["chosen"], measures["spread"], measures["noise"] if spares_rounding else 0.0)


def begun_scale(settings: StageTwoSettings, probe: Mapping[str, Any] | None, begun: Mapping[str, Any]) -> float:
    """Return the factor of the margins that Stage II began with, so that it does not change midway.

    An older version recorded none when it began, and scaled up any spread.

    Args:
        settings: the method's settings.
        probe: the facts of the run's probe; None without one.
        begun: what the manifest holds of Stage II's beginning; see `RunDir.begin_facts`.
    """
    recorded: float | None = begun.get("margin_scale")
    return probed_scale(settings, probe, spares_rounding=False) if recorded is None else recorded


def _scorers_to_measure(settings: SelfScoringSettings, every_scorer: bool) -> list[str]:
    return [name for name in SCORERS if name != "teacher"] if every_scorer else [settings.score]


def _probe_examples(context: RunContext, settings: SamplingSettings) -> list[tuple[Prompt, Anchor]]:
    """Pick the probe's prompts by the hash of their content: about a twentieth of Stage II's, 8 to 64."""
    examples = examples_of_pool(context.run, context.pools.align)
    if len(examples) < 2:
        raise UserError("The probe needs at least two prompts with anchors.")
    count = min(MAX_PROMPTS, max(MIN_PROMPTS, settings.most_groups // 20))
    return sorted(examples, key=lambda example: content_hash(["probe", context.config.seed, example[0].id]))[:count]


def _verdict(measured: Sequence[ScorerMeasures], chosen: str) -> str:
    """Say in one sentence whether Stage II can learn from the chosen scorer, and which other one it could."""
    by_name = {m.name: m for m in measured}
    problem = weakness(by_name[chosen])
    if problem is None:
        spread, entropy = by_name[chosen].spread, by_name[chosen].label_entropy
        return f"{chosen} tells candidates apart (spread {spread:.3g}, entropy of the labels {entropy:.3f} of ln K)."
    others = [m.name for m in measured if weakness(m) is None]
    hint = f" These tell candidates apart: {', '.join(others)}." if others else ""
    return f"{chosen} carries no signal with this student: {problem}.{hint}"
