"""Every method through the real pipeline with a tiny student: same prompts and updates, the same bits after a kill."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from faulty_server import completion, rate_by_length, running_server
from log_prob_sums import sequence_log_probs

from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.display.titles import model_title
from purld.errors import UserError
from purld.evaluation.diagnostics import mean_label_divergence
from purld.methods.table import METHODS
from purld.model.load import load_model
from purld.model.self_evaluation import GroupScores
from purld.pipeline.pipeline import Pipeline
from purld.records import Prompt
from purld.report.answer_browser import answer_browser
from purld.report.run_data import read_run
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir
from purld.training.align_trainer import AlignTrainer, RepeatedBatches
from purld.training.scoring import SCORERS

pytestmark = pytest.mark.usefixtures("short_probe")

AGAIN = ("label_divergence", "completions")
SECOND_STAGE = [name for name, method in METHODS.items() if method.stage_two]
RECORDED = {  # what a group has in its record, where not all have it
    "ldl_grpo": {"scores", "margins", "confidences", "labels", "policy_before", *AGAIN},
    "anchorrank_dpo": {"scores", "margins"},
    "anchor_grpo": {"scores", "margins", "advantages"},
    "self_ppo": {"scores", "advantages"},
    "self_distillation": set(),
    "singlepair_dpo": set(),
    "teacher_judge_grpo": {"scores", "advantages"},
}
SEVERAL_UPDATES = [f"{name}+2" for name in ("anchor_grpo", "self_ppo", "ldl_grpo")]


class KilledError(BaseException):
    """In the place of a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def teacher():
    with running_server() as server:
        server.default = rate_by_length
        yield server


@pytest.fixture(scope="module")
def after_stage_one(module_config, teacher, tmp_path_factory):
    """Makes runs of four steps whose anchors and p_sft are there already; `method+2` makes two updates per rollout."""
    teacher_section = f"teacher={{kind: openai, base_url: '{teacher.url}', model: m, max_calls: 100}}"

    def pipeline(run, method, *overrides):
        name, _, updates = method.partition("+")
        chosen = [teacher_section, "align.steps=4", f"align.method={name}", *overrides]
        chosen += [f"align.updates_per_rollout={updates}"] if updates else []
        return Pipeline(load_config(module_config, chosen), run, Reporter())

    base = RunDir(tmp_path_factory.mktemp("runs") / "base")
    pipeline(base, "ldl_grpo").execute(["anchors", "sft"])
    count = itertools.count()

    def make(method, *overrides):
        run = RunDir(base.path.with_name(f"alone{next(count)}") / "run")  # runs in one folder share what they buy
        shutil.copytree(base.path, run.path)
        return pipeline(run, method, *overrides)

    return make


def outcome(run):
    """What two equal Stage II runs share: weights, metrics, groups, and what was measured of them at the end."""
    weights = (run.align / "model.safetensors").read_bytes()
    return weights, read_rows(run.metrics), read_rows(run.groups), read_rows(run.revisited)


def killed_at(pipeline, step, monkeypatch):
    """Run Stage II until `step` is logged, and no further."""
    log = RunDir.log_metrics

    def kill(self, stage, at, values):
        log(self, stage, at, values)
        if stage == "align" and at == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log_metrics", kill)
        with pytest.raises(KilledError):
            pipeline.execute(["align"])


@pytest.mark.parametrize("method", [*SECOND_STAGE, *SEVERAL_UPDATES])
def test_killed_in_stage_two_a_run_ends_with_the_same_bits(method, teacher, after_stage_one, monkeypatch):
    calm, killed = after_stage_one(method), after_stage_one(method)
    before = len(teacher.arrived)
    calm.execute(["align"])
    bought = len(teacher.arrived) - before
    killed_at(killed, 3, monkeypatch)
    Pipeline(killed.config, killed.run, Reporter()).execute(["align"])
    assert outcome(killed.run) == outcome(calm.run)
    # What was scored before the kill is not paid for again, and nobody but the judged method pays.
    assert len(teacher.arrived) - before == 2 * bought
    assert (bought > 0) == (method == "teacher_judge_grpo")
    check_groups(read_rows(calm.run.groups), method)
    assert calm.run.revisited.exists() == method.startswith("ldl_grpo")


@pytest.mark.parametrize(
    ("method", "changed", "measured"),
    [
        ("ldl_grpo", (), {"kl": [1, 2, 3, 4], "gain": [1, 2, 3, 4]}),
        ("ldl_grpo+2", (), {"kl": [1, 3], "gain": [1, 3]}),  # the others' candidates are an older policy's
        ("ldl_grpo", ("align.temperature=0.7",), {"kl": [], "gain": []}),
        ("anchorrank_dpo", ("align.margin=0.01",), {"kl": [1, 2, 3, 4], "gain": []}),  # leaves small differences out
        ("self_ppo+2", (), {"kl": [1, 3], "gain": []}),
    ],
)
def test_what_is_an_expectation_over_the_policy_is_measured_on_its_own_draws_alone(
    method, changed, measured, after_stage_one
):
    pipeline = after_stage_one(method, *changed)
    pipeline.execute(["align"])
    steps = [row for row in read_rows(pipeline.run.metrics) if row["stage"] == "align" and "objective" in row]
    assert len(steps) == 4
    assert {key: [row["step"] for row in steps if key in row] for key in measured} == measured


def test_killed_after_its_last_step_a_run_takes_no_other_and_measures_again(after_stage_one, monkeypatch):
    def kill(*_):
        raise KilledError

    calm, killed = after_stage_one("ldl_grpo"), after_stage_one("ldl_grpo")
    calm.execute(["align"])
    with monkeypatch.context() as patch:
        patch.setattr("purld.training.align.save_policy", kill)
        with pytest.raises(KilledError):
            killed.execute(["align"])
    assert killed.run.revisited.exists()
    Pipeline(killed.config, killed.run, Reporter()).execute(["align"])
    assert outcome(killed.run) == outcome(calm.run)


def test_q_after_is_that_of_the_saved_model(after_stage_one):
    """Of the ids as drawn, against p_sft."""
    pipeline = after_stage_one("ldl_grpo")
    pipeline.execute(["align"])
    run, encoder, student = pipeline.run, pipeline.encoder, pipeline.config.student
    policy, frozen = (load_model(student, path) for path in (run.align, run.sft))
    groups, again = read_rows(run.groups), read_rows(run.revisited)
    assert [(g["step"], g["prompt_id"]) for g in groups] == [(r["step"], r["prompt_id"]) for r in again]
    for group, row in zip(groups, again):
        head, ids = encoder.encode_prompt(Prompt.from_text(group["prompt"])), [c["ids"] for c in group["completions"]]
        with torch.no_grad():
            ours, theirs = (sequence_log_probs(model, head, ids, encoder.pad) for model in (policy, frozen))
        assert row["policy_after"] == pytest.approx((ours - theirs).softmax(0).tolist(), abs=1e-5)
        assert row["policy_after"] != pytest.approx(group["policy_before"], abs=1e-5)
    found = mean_label_divergence(groups, again)
    assert found["groups"] == 8 and found["after"] != found["before"]


def test_grpo_on_the_reference_score_from_the_probe_to_the_policy(after_stage_one):
    pipeline = after_stage_one("anchor_grpo", "align.score=reference", "align.steps=1")
    pipeline.execute(["align"])
    assert pipeline.run.finished_stages()["probe"]["chosen"] == "reference"
    for group in read_rows(pipeline.run.groups):
        scores = torch.tensor(group["scores"])
        assert all(0 < score < 1 for score in group["scores"])
        advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
        assert group["advantages"] == pytest.approx(advantages.tolist(), abs=1e-4)


def check_groups(groups, method):
    name, _, updates = method.partition("+")
    drawn = {"sft_sft": 0, "singlepair_dpo": 1, "self_ppo": 1}.get(name, 3)
    assert len(groups) == (2 * 4 // int(updates or 1) if drawn else 0)
    optional = set().union(*RECORDED.values())
    for group in groups:
        assert {column for column in optional if group[column] is not None} == RECORDED[name]
        assert len(group["candidates"]) == drawn


def test_all_methods_see_the_same_prompts_in_the_same_order(after_stage_one):
    """Nothing that only one of them has may move the state that the order is drawn from."""
    seen = {}
    for method in ("ldl_grpo", "self_ppo", "sft_sft"):
        seen[method] = prompts_seen(after_stage_one(method, "align.steps=3"))
    assert seen["ldl_grpo"] == seen["self_ppo"] == seen["sft_sft"]
    assert len(set(seen["ldl_grpo"])) == 6


def prompts_seen(pipeline):
    """Run Stage II and give the places of the prompts of every step."""
    seen = []
    step = AlignTrainer.training_step

    def noting(self, model, inputs, num_items_in_batch=None):
        seen.extend(inputs["questions"])
        return step(self, model, inputs, num_items_in_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignTrainer, "training_step", noting)
        pipeline.execute(["align"])
    return seen


@pytest.mark.parametrize("method", ["sft_sft", "singlepair_dpo", "self_distillation", "teacher_judge_grpo"])
def test_results_and_report_cope_with_every_method(method, after_stage_one):
    pipeline = after_stage_one(method, "align.steps=2", "evaluate.samples=1")
    pipeline.execute()
    results = read_json(pipeline.run.results)
    assert list(results["models"]) == ["base", "sft", method]
    assert results["method"] == method
    assert model_title(method) in pipeline.run.report.read_text()
    asked = results["teacher"]["calls"] - 16
    assert 0 < asked <= 2 * 2 * 3 if method == "teacher_judge_grpo" else asked == 0


def test_a_cap_that_cannot_cover_the_judging_is_refused_before_anything_is_bought(after_stage_one, teacher):
    """16 anchors and 4 steps of 2 prompts and 3 candidates are 40 calls."""
    before = len(teacher.arrived)
    with pytest.raises(UserError, match=r"16 prompts and about 24 candidates, and teacher.max_calls is 39"):
        after_stage_one("teacher_judge_grpo", "teacher.max_calls=39").execute(["align"])
    assert len(teacher.arrived) == before
    after_stage_one("teacher_judge_grpo", "teacher.max_calls=40").execute(["align"])


def test_a_cap_that_is_reached_ends_the_run_and_a_higher_one_goes_on_from_there(after_stage_one, teacher):
    run = after_stage_one("teacher_judge_grpo", "teacher.max_tokens=1000")
    before = len(teacher.arrived)
    with pytest.raises(UserError, match=r"teacher.max_tokens \(1000\) is reached with \d+ candidates"):
        run.execute(["align"])
    bought = len(teacher.arrived) - before
    assert 0 < bought < 24
    more = load_config(run.run.config, ["teacher.max_tokens=100000"])
    Pipeline(more, run.run, Reporter()).execute(["align"])
    assert "align" in run.run.finished_stages()
    assert len(teacher.arrived) - before <= 24


def test_a_teacher_that_gives_no_score_leaves_candidates_unscored(after_stage_one, teacher):
    teacher.default, usual = lambda handler: handler.reply(completion("Quite good.")), teacher.default
    try:
        with pytest.raises(UserError, match="no candidate got a score from the teacher"):
            after_stage_one("teacher_judge_grpo", "align.steps=2", "seed=0").execute(["align"])
    finally:
        teacher.default = usual


def test_a_teacher_that_is_never_understood_is_not_paid_for_the_whole_stage(after_stage_one, teacher, monkeypatch):
    """Of 20 steps of 6 candidates the sixth is the last, in a run that was killed too, and its replies stay bought."""
    run = after_stage_one("teacher_judge_grpo", "align.steps=20", "teacher.max_calls=200")
    before = len(teacher.arrived)
    teacher.default, usual = lambda handler: handler.reply(completion("I would give 8/10.")), teacher.default
    try:
        killed_at(run, 3, monkeypatch)
        for _ in range(2):
            with pytest.raises(UserError, match="no candidate got a score from the teacher"):
                Pipeline(run.config, run.run, Reporter()).execute(["align"])
            assert len(teacher.arrived) - before == 6 * 6
    finally:
        teacher.default = usual
    assert max(row["step"] for row in read_rows(run.run.metrics) if row["stage"] == "align") == 5


def test_pairs_that_never_differ_enough_are_told(after_stage_one):
    with pytest.raises(UserError, match=r"lower align\.margin"):
        after_stage_one("anchorrank_dpo", "align.margin=1.0", "align.steps=1").execute(["align"])


def test_a_group_that_is_left_out_is_recorded_counted_and_not_measured_again(after_stage_one, monkeypatch):
    entry = SCORERS["expected"]

    def is_left_out(prompt_id):
        return int(prompt_id, 16) % 2 == 0

    def make(context):
        def score(groups):
            alike = GroupScores(0.9, [0.5, 0.5, 0.5])
            return [
                alike if is_left_out(group.prompt.id) else scores
                for group, scores in zip(groups, entry.make(context)(groups), strict=True)
            ]

        return score

    monkeypatch.setitem(SCORERS, "expected", replace(entry, make=make))
    pipeline = after_stage_one("ldl_grpo", "align.skip_equal_scores=true")
    pipeline.execute(["align", "evaluate"])
    run, results = pipeline.run, read_json(pipeline.run.results)
    groups = read_rows(run.groups)
    assert [group["left_out"] for group in groups] == [is_left_out(group["prompt_id"]) for group in groups]
    learned, left_out = ([g for g in groups if g["left_out"] is told] for told in (False, True))
    assert len(learned) + len(left_out) == 8 and learned and left_out
    for group in left_out:
        optional = set().union(*RECORDED.values())
        assert {column for column in optional if group[column] is not None} == {"scores", "margins"}
        assert len(group["candidates"]) == 3
    again = [(row["step"], row["prompt_id"]) for row in read_rows(run.revisited)]
    assert again == [(group["step"], group["prompt_id"]) for group in learned]
    assert [step["n"] for step in results["training_accuracy"]] == [6, 6, 6, 6]
    assert results["score_quality"]["n"] == 24 and results["label_divergence"]["groups"] == len(learned)
    entries = json.loads(answer_browser([read_run(run)]).json)["entries"]
    shown = {entry["id"]: entry["group"].get("left_out", False) for entry in entries if "group" in entry}
    assert shown == {group["prompt_id"]: group["left_out"] for group in groups}


def test_repeated_batches_are_whole_and_follow_the_epoch():
    sampler = RepeatedBatches(count=7, batch=3, times=2, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler) == 12
    assert first[:3] == first[3:6] and first[6:9] == first[9:]
    assert len(set(first)) == 6
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = RepeatedBatches(count=7, batch=3, times=2, seed=0)
    again.set_epoch(1)
    assert list(again) == second
