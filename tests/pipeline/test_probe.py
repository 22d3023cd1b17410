"""The probe: it measures, it stops a student that cannot evaluate itself, and it lets one pass that can.

Stand-ins: a random student has no signal in any score; one whose scorer is a rule that knows the truth has.
"""

import contextlib
import json
import math
import random

import pytest
import torch

from purld.config.load import load_config
from purld.config.methods import LdlGrpo
from purld.config.schema import Student
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.methods.labels import distribution_entropy, pu_labels
from purld.model.load import Roles, load_encoder, load_model
from purld.model.sample import Completion
from purld.model.self_evaluation import GroupScores
from purld.pipeline import probe as module
from purld.pipeline.pipeline import Pipeline
from purld.records import Prompt
from purld.runs.files import read_json, read_rows, write_json
from purld.runs.run_dir import RunDir
from purld.testbed.world.world import generate_problems, teacher_answer
from purld.training import scoring
from purld.training.context import StageContext
from purld.training.rollout import AnchoredPrompt, candidates_to_score
from purld.training.scoring import ScorerContext, ScorerEntry

STOP = ["align.weak_signal=stop", "align.margin_scale=calibrated"]


def overlap(groups):
    """A student that can evaluate itself: the share of the anchor's words that a candidate has, and of its own."""

    def score(text, anchor):
        ours, theirs = text.split(), anchor.split()
        right = sum(a == b for a, b in zip(ours, theirs))
        return right / max(len(ours), len(theirs), 1) + 0.001 * len(set(ours)) / (1 + len(ours))

    return [GroupScores(score(g.anchor, g.anchor), [score(t, g.anchor) for t in g.candidates]) for g in groups]


def constant(groups):
    """A student that gives everything the same score."""
    return [GroupScores(0.97, [0.97] * len(g.candidates)) for g in groups]


def nothing(groups):
    """A student whose scores cannot be read."""
    return [GroupScores(None, [None] * len(g.candidates)) for g in groups]


@pytest.fixture
def scorers(monkeypatch):
    """Puts stand-ins in the place of all scorers."""

    def put(**rules):
        entries = {name: ScorerEntry(lambda context, rule=rule: rule) for name, rule in rules.items()}
        monkeypatch.setattr(scoring, "SCORERS", entries)
        monkeypatch.setattr(module, "SCORERS", entries)

    return put


def pipeline(config, run, *overrides):
    return Pipeline(load_config(config, [*STOP, "align.steps=2", *overrides]), run, Reporter())


@pytest.fixture
def run(tiny_config, tmp_path):
    run = RunDir(tmp_path / "run")
    pipeline(tiny_config, run).execute(["anchors", "sft"])
    return run


def test_a_student_that_can_evaluate_itself_goes_on_and_its_scale_is_kept(tiny_config, run, scorers):
    scorers(expected=constant, in_context=overlap)
    pipeline(tiny_config, run, "align.score=in_context").execute(["align"])
    finished = run.finished_stages()
    facts = finished["probe"]
    (measured,) = facts["scorers"]
    assert facts["chosen"] == measured["name"] == "in_context" and "weakness" not in measured
    assert measured["agreement"]["ci"][0] > 0.5
    assert finished["align"]["margin_scale"] == pytest.approx(0.3 / measured["spread"])
    assert facts["verdict"].startswith("in_context tells candidates apart (spread ")
    groups = read_rows(run.groups)
    assert groups and all(group["anchor_score"] != 0.97 for group in groups)
    assert read_json(run.probe) == {key: facts[key] for key in read_json(run.probe)}


def test_the_literal_form_keeps_the_unit_of_the_scores(tiny_config, run, scorers):
    scorers(expected=overlap)
    pipeline(tiny_config, run, "align.margin_scale=literal", "align.weak_signal=continue").execute(["align"])
    assert run.finished_stages()["align"]["margin_scale"] == 1.0


def test_scores_that_differ_by_a_thousandth_are_uniform_labels(tiny_config, run, scorers):
    """What a real small student gave: 0.97 to everything, margins of a thousandth, which Eq. 2 cannot see."""

    def nearly_constant(groups):
        return [GroupScores(0.97, [0.97 + 0.001 * (len(t) % 3 - 1) for t in g.candidates]) for g in groups]

    scorers(expected=nearly_constant)
    with pytest.raises(UserError, match=r"the labels are uniform \(entropy (1\.0000|0\.999\d) of ln K\)"):
        pipeline(tiny_config, run, "align.margin_scale=literal").execute(["align"])


@pytest.mark.parametrize(
    ("rule", "words"), [(constant, "all have the same score"), (nothing, "100% of the answers got no score")]
)
def test_a_student_that_cannot_evaluate_itself_is_stopped_before_stage_two(tiny_config, run, scorers, rule, words):
    scorers(expected=rule)
    with pytest.raises(UserError, match="Stage II was not started: expected carries no signal") as stopped:
        pipeline(tiny_config, run).execute(["align"])
    assert words in str(stopped.value) and "teacher_judge_grpo" in str(stopped.value)
    assert "align" not in run.finished_stages() and not run.groups.exists()
    # The probe is not repeated, and the user may insist.
    if rule is constant:
        pipeline(tiny_config, run, "align.weak_signal=continue").execute(["align"])
        warnings = run.finished_stages()["align"]["warnings"]
        assert "expected carries no signal with this student" in warnings[0]
        assert any("labels stayed uniform" in warning for warning in warnings)


def test_the_command_names_scorers_that_tell_candidates_apart(tiny_config, run, scorers):
    scorers(expected=constant, in_context=overlap)
    probe = pipeline(tiny_config, run).probe()
    assert probe["verdict"].endswith("all have the same score. These tell candidates apart: in_context.")
    with pytest.raises(UserError, match="expected carries no signal"):
        pipeline(tiny_config, run).execute(["align"])
    # Another score is another probe: the run goes on with it.
    pipeline(tiny_config, run, "align.score=in_context").execute(["align"])
    assert run.finished_stages()["probe"]["chosen"] == "in_context"


def test_the_same_probe_gives_the_same_measures(tiny_config, run, scorers):
    scorers(expected=overlap)
    first, second = (pipeline(tiny_config, run).probe() for _ in range(2))
    for probe in (first, second):
        for row in probe["scorers"]:
            del row["seconds_per_group"]
    assert first == second


def test_the_command_measures_every_scorer_of_a_random_student(tiny_config, tmp_path, capsys, monkeypatch):
    """Real scorers; gold is there, so the AUC is reported. Before anchors, one sentence."""
    from purld.cli import main

    arguments = [str(tiny_config), "align.candidates=3", "--run-dir", str(tmp_path / "run")]

    def purld(command):
        monkeypatch.setattr("sys.argv", ["purld", command, *arguments])
        try:
            main()
        except SystemExit as ended:
            return ended.code
        return 0

    assert purld("probe") == 2
    assert "the probe needs anchors; run `purld anchors` first" in capsys.readouterr().err
    assert purld("anchors") in (0, None)
    assert purld("probe") in (0, None)
    printed = capsys.readouterr().out
    for name in ("expected", "verbal", "in_context", "reference"):
        assert name in printed
    probe = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert probe["model"] == "base" and probe["prompts"] == 8
    assert {row["name"] for row in probe["scorers"]} == {"expected", "verbal", "in_context", "reference"}
    assert all(0 <= row["label_entropy"] <= 1.0001 for row in probe["scorers"])


def test_a_spread_that_is_rounding_is_not_scaled_up_to_that_of_a_signal(tiny_config, run, scorers):
    """Scores that change by as much as they differ when they are computed again."""
    draws = random.Random(0)

    def rounding(groups):
        return [GroupScores(0.5, [0.5 + 3e-8 * draws.random() for _ in g.candidates]) for g in groups]

    scorers(in_context=rounding)
    with pytest.raises(UserError, match="which is rounding"):
        pipeline(tiny_config, run, "align.score=in_context").execute(["align"])
    pipeline(tiny_config, run, "align.score=in_context", "align.weak_signal=continue").execute(["align"])
    finished = run.finished_stages()
    assert finished["align"]["margin_scale"] == 1.0
    assert finished["probe"]["scorers"][0]["label_entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize("rows", ["auto", 1])
@pytest.mark.parametrize("name", ["expected", "in_context", "reference"])
def test_noise_is_of_the_size_of_the_rounding(name, rows, tmp_path, shipped_student):
    """The truth is what the same weights give in float32."""
    problems = generate_problems("counting", "train", 8, 0)
    texts = [teacher_answer(problem) for problem in problems]
    scores, noise = {}, {}
    for dtype in ("bfloat16", "float32"):
        student = Student(model=str(shipped_student), dtype=dtype)
        encoder, model = load_encoder(student), load_model(student, student.model)
        drawn = [Completion(encoder.encode_answer(text).ids, True) for text in texts]
        groups = []
        for problem, text in zip(problems[:4], texts):
            prompt = Prompt.from_text(problem.question)
            question = AnchoredPrompt(prompt, text, encoder.encode_prompt(prompt))
            groups.append(module.ProbeGroup(question, drawn, texts, {}))
        settings = LdlGrpo(score=name, score_batch_size=rows)
        scored = ScorerContext(encoder, Roles(model, model), settings, True, contextlib.nullcontext)
        scorer = scoring.SCORERS[name].make(scored)
        context = StageContext(student, encoder, RunDir(tmp_path), 0, lambda *_: None)
        noise[dtype] = module.measure_scorer(name, scorer, model, groups, context, settings).noise
        scores[dtype] = torch.tensor(
            [scorer([candidates_to_score(encoder, g.question, drawn)])[0].candidates for g in groups]
        )
    error = (scores["bfloat16"] - scores["float32"]).square().mean().sqrt().item()
    assert error / 3 < noise["bfloat16"] < 3 * error
    assert noise["float32"] < 1e-5


class KilledError(BaseException):
    """In the place of a SIGKILL: nothing catches it."""


@pytest.fixture
def in_stage_two(tiny_config, run, scorers, monkeypatch):
    """Returns a run that was killed when its Stage II had begun, and what goes on with it."""

    def kill(*_, **__):
        raise KilledError

    scorers(in_context=overlap)
    stage_two = pipeline(tiny_config, run, "align.score=in_context", "align.weak_signal=continue")
    with monkeypatch.context() as patch:
        patch.setattr("purld.training.align.align", kill)
        with pytest.raises(KilledError):
            stage_two.execute(["align"])
    return run, stage_two


def test_stage_two_keeps_the_scale_that_it_began_with(in_stage_two, monkeypatch):
    run, stage_two = in_stage_two
    begun = run.begin_facts("align")["margin_scale"]
    assert begun == pytest.approx(0.3 / run.finished_stages()["probe"]["scorers"][0]["spread"])
    monkeypatch.setattr(module, "labels_scale", lambda *_: 7.0)  # the rule of another version
    stage_two.execute(["align"])
    assert run.finished_stages()["align"]["margin_scale"] == begun


def test_a_stage_two_that_an_older_version_began_keeps_the_scale_of_a_spread_that_is_rounding(in_stage_two):
    run, stage_two = in_stage_two
    manifest = {key: value for key, value in read_json(run.manifest).items() if key != "hash"}
    measured = manifest["finished"]["probe"]["scorers"][0]
    measured |= {"spread": 0.003, "noise": 0.002}
    del manifest["begun"]["align"]["margin_scale"]
    write_json(run.manifest, manifest)
    stage_two.execute(["align"])
    assert run.finished_stages()["align"]["margin_scale"] == pytest.approx(100.0)


def test_the_scale_is_the_probes_where_the_spread_is_more_than_rounding():
    settings = LdlGrpo(margin_scale="calibrated")
    assert module.labels_scale(settings, "expected", 0.03, 0.0099) == pytest.approx(10.0)
    assert module.labels_scale(settings, "expected", 0.03, 0.01) == 1.0


def test_what_the_labels_depend_on_asks_for_another_probe(tiny_config):
    def fingerprint(*overrides):
        return module.probe_fingerprint(load_config(tiny_config, ["align.method=ldl_grpo", *overrides]))

    assert fingerprint("align.anchor_in_group=true") != fingerprint()
    assert fingerprint("align.gamma=7") != fingerprint()
    assert fingerprint("align.learning_rate=1e-3") == fingerprint()


@pytest.mark.parametrize("joins", [False, True])
def test_labels_are_those_that_stage_two_makes_the_anchors_own_among_them(joins):
    settings = LdlGrpo(anchor_in_group=joins, margin_scale="literal")
    found = module._label_entropy("expected", [[0.2, 0.5]], [0.9], settings)
    scores = torch.tensor([0.9, 0.2, 0.5] if joins else [0.2, 0.5])
    labels = pu_labels(scores, 0.9, settings.gamma, settings.tau).log_distribution
    assert found == pytest.approx(distribution_entropy(labels).item() / math.log(len(scores)))
