"""Stage II keeps the best step on prompts that no stage trains on, not the last one, also after a kill."""

import shutil

import pytest
import torch
import yaml
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from purld.config.load import load_config
from purld.config.methods import LdlGrpo
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.model.load import load_encoder, load_model
from purld.pipeline.pipeline import Pipeline
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.pipeline.stage_two_split import plan_split
from purld.pipeline.validation import make_validation_set, split_validation_part
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir
from purld.tasks.checks import find_check
from purld.training import align, checkpoints
from purld.training.best_step import BestStep
from purld.training.validation import METRIC, UNSCORED, ValidationFacts, Validator, validation_metrics

VALIDATED = ["align.validate_every=1", "align.steps=4", "align.checkpoint_steps=3", "align.method=sft_sft"]
BASE = ["sft.validation_fraction=0.4", "sft.epochs=1", "student.lora={r: 2}", "data.check=exact"]


class KilledError(BaseException):
    """In the place of a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def after_stage_one(module_config, tmp_path_factory):
    """Makes runs whose anchors and p_sft are there already."""
    folder = tmp_path_factory.mktemp("runs")
    base = RunDir(folder / "base")
    Pipeline(load_config(module_config, BASE), base, Reporter()).execute(["anchors", "sft"])

    def make(name, *overrides):
        run = RunDir(folder / name)
        shutil.copytree(base.path, run.path)
        return Pipeline(load_config(module_config, [*BASE, *overrides]), run, Reporter())

    return make


def row_of(value):
    """Return the row of a validation; None is one of which too few answers got a score."""
    return {UNSCORED: 9.0} if value is None else {UNSCORED: 0.0, METRIC: value}


@pytest.fixture
def measured_as(monkeypatch):
    """Lets validations measure given numbers, and keeps the weights that they saw."""

    def give(values):
        seen = {}

        def measure(self, policy):
            weights = get_peft_model_state_dict(policy)
            seen[len(seen)] = {name: weight.clone() for name, weight in weights.items()}
            return row_of(values[len(seen) - 1])

        monkeypatch.setattr(Validator, "__call__", measure)
        return seen

    return give


def saved(run):
    """Return Stage II's part of the saved adapter, which has Stage I's first."""
    weights = load_file(run.align / "adapter_model.safetensors")
    return {name: w[2:] if "lora_A" in name else w[:, 2:] for name, w in weights.items()}


@pytest.mark.parametrize(
    ("values", "kept", "steps"),
    [
        ([0.2, 0.9, 0.3, 0.9, 0.1], 3, 4),  # of equal ones the later
        ([0.2, 0.9, 0.2, "never"], 1, 2),  # patience
        ([0.2, 0.6, None, 0.5, None], 1, 4),
        ([0.2, 0.9, None, "never"], 1, 2),
        ([0.2, None, None, None, None], 4, 4),
    ],
)
def test_the_best_step_is_saved_and_the_record_says_which(values, kept, steps, after_stage_one, measured_as, capsys):
    seen = measured_as(values)
    name = "-".join(map(str, values))
    pipeline = after_stage_one(name, *VALIDATED, *(["align.patience=1"] if "never" in values else []))
    pipeline.execute(["align"])
    for key, weight in saved(pipeline.run).items():
        assert torch.equal(weight, seen[kept][key]), key
    facts = pipeline.run.finished_stages()["align"]
    assert (facts["validation"]["kept_step"], facts["steps"]) == (kept, steps)
    told = {step: value for step, value in enumerate(values[: steps + 1]) if value is not None}
    assert dict(zip(facts["validation"]["steps"], facts["validation"]["scores"], strict=True)) == told
    assert facts["validation"]["unmeasured"] == [step for step in range(steps + 1) if step not in told]
    said = capsys.readouterr().err
    if kept in told:
        assert f"Kept the policy of step {kept}: in_context {values[kept]:.3f}" in said
    else:
        assert "At no step of Stage II did half of the answers" in said
    assert ("under half of the answers" in said) == (None in values)
    assert not pipeline.run.checkpoints("align").exists()


@pytest.mark.parametrize("best", [8, 16])
def test_what_the_end_says_is_of_the_policy_that_is_kept(best):
    """The gain and the KL of the steps up to the kept one: what came after it is not saved."""
    rows = [
        {"step": step, "gain": 0.06 if step <= 8 else -0.04, "kl": 0.1 if step <= 8 else 3.0, "score_spread": 0.3}
        for step in range(1, 17)
    ]
    facts = align._facts(rows, LdlGrpo(), 8, best)
    assert facts.gain.gain == (0.06 if best == 8 else pytest.approx(-0.04)) and facts.kl == (0.1 if best == 8 else 3.0)


def test_killed_before_a_new_best_checkpoint_counts_the_older_ones_are_still_there(
    after_stage_one, measured_as, monkeypatch
):
    measured_as([0.2, 0.5, 0.4, 0.6])
    pipeline = after_stage_one("unmarked", *VALIDATED, "align.checkpoint_steps=1", "align.steps=3")
    mark = checkpoints.mark_complete

    def kill_at_the_third(run, path):
        if path.name == "checkpoint-3":
            raise KilledError
        mark(run, path)

    monkeypatch.setattr(checkpoints, "mark_complete", kill_at_the_third)
    with pytest.raises(KilledError):
        pipeline.execute(["align"])
    found = checkpoints.last_checkpoint(pipeline.run, pipeline.run.checkpoints("align"))
    assert (found.step, found.set_aside) == (2, None)


@pytest.mark.parametrize("at", [4, pytest.param("end", marks=pytest.mark.slow)])
def test_killed_a_run_keeps_the_same_step_and_ends_with_the_same_bits(at, after_stage_one, monkeypatch):
    overrides = [*VALIDATED, "align.patience=2", "align.steps=6"]
    calm, killed = (after_stage_one(f"{name}{at}", *overrides) for name in ("calm", "killed"))
    scores = iter([0.5, 0.5, 0.1, 0.7, 0.2, 0.6])
    by_weights = {}

    def measure(self, policy):
        """Give a number per set of weights, so that a step measured again has the same."""
        weights = str([p.double().sum().item() for p in policy.parameters() if p.requires_grad])
        if weights not in by_weights:
            by_weights[weights] = next(scores)
        return row_of(by_weights[weights])

    def kill(*_, **__):
        raise KilledError

    monkeypatch.setattr(Validator, "__call__", measure)
    calm.execute(["align"])
    with monkeypatch.context() as patch:
        if at == "end":
            patch.setattr("purld.training.align.save_policy", kill)
        else:
            log = RunDir.log_metrics
            patch.setattr(
                RunDir,
                "log_metrics",
                lambda self, stage, step, row: kill() if step == at else log(self, stage, step, row),
            )
        with pytest.raises(KilledError):
            killed.execute(["align"])
    Pipeline(killed.config, killed.run, Reporter()).execute(["align"])
    facts, again = (p.run.finished_stages()["align"] | {"seconds": 0} for p in (calm, killed))
    assert facts == again and facts["validation"]["kept_step"] == 3 and facts["steps"] == 5
    assert read_rows(calm.run.metrics) == read_rows(killed.run.metrics)
    weights = [(p.run.align / "adapter_model.safetensors").read_bytes() for p in (calm, killed)]
    assert weights[0] == weights[1]


def test_validation_prompts_are_trained_on_by_no_stage_and_the_results_say_what_was_kept(after_stage_one):
    ldl = ["align.method=ldl_grpo", "align.candidates=2", "align.steps=2", "evaluate.samples=1"]
    pipeline = after_stage_one("whole", *VALIDATED, *ldl)
    config = pipeline.config
    pools = load_prompt_pools(config, pipeline.encoder, lambda line: None)
    split = plan_split(config, pools)
    chosen = {p.id for p in split.steps}
    assert len(chosen) >= 2 and not chosen & {p.id for p in split.training}
    pipeline.execute(["probe", "align", "evaluate"])
    assert not chosen & {row["prompt_id"] for row in read_rows(pipeline.run.groups)}
    found = read_json(pipeline.run.results)["validation"]
    rows = [r for r in read_rows(pipeline.run.metrics) if METRIC in r]
    assert [row["step"] for row in rows] == found["steps"] == [0, 1, 2]
    assert [row[METRIC] for row in rows] == found["scores"] and all(row[UNSCORED] == 0 for row in rows)
    best = max((1, 2), key=lambda step: (found["scores"][step], step))
    assert (found["kept_step"], found["prompts"], found["measure"]) == (best, len(chosen), "expected")


def test_models_are_not_compared_on_the_prompts_that_chose_the_step(after_stage_one):
    pipeline = after_stage_one("halves", *VALIDATED)
    pools = load_prompt_pools(pipeline.config, pipeline.encoder, lambda line: None)
    steps, models = split_validation_part(pipeline.config, pools, compares=True)
    assert len(steps) >= 2 and len(models) >= len(steps)
    assert not {p.id for p in steps} & {p.id for p in models}


@pytest.mark.parametrize(
    "measure", ["gold", *(pytest.param(name, marks=pytest.mark.slow) for name in ("agreement", "in_context"))]
)
def test_what_is_measured_is_the_mean_over_greedy_answers(measure, after_stage_one):
    by = "score" if measure == "in_context" else measure
    pipeline = after_stage_one(f"by-{measure}", *VALIDATED, "align.steps=2", f"align.validate_by={by}")
    config, encoder = pipeline.config, pipeline.encoder
    context = pipeline._context(load_prompt_pools(config, encoder, lambda line: None))
    split = plan_split(config, context.pools)
    found = make_validation_set(context, split.steps, split.answer_tokens)
    assert found.measure == measure
    pipeline.execute(["align"])
    facts = pipeline.run.finished_stages()["align"]["validation"]
    assert facts["prompts"] == len(found.examples)
    if measure == "gold":
        from purld.model.sample import Decoding
        from purld.model.samplers import make_sampler

        model, check = load_model(config.student, pipeline.run.align), find_check(config.data)
        sampler = make_sampler(
            config.student, encoder, pipeline.run.engine_files, Decoding(0.0, config.evaluate.max_new_tokens)
        )
        drawn = sampler(model, [encoder.encode_prompt(p) for p, _ in found.examples], 1, [0] * len(found.examples))
        right = [check(p, encoder.read_reply(c[0].ids).answer) for (p, _), c in zip(found.examples, drawn)]
        assert facts["scores"][facts["steps"].index(facts["kept_step"])] == sum(right) / len(right)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["align.validate_every=null", "align.patience=3"], "align.patience counts validations"),
        (["align.validate_by=gold", "data.check=none"], "needs data.check and references"),
        (["align.validate_by=agreement"], "needs data.check=math"),
    ],
)
def test_a_measure_that_cannot_be_had_is_refused_before_anything_is_paid_for(overrides, message, tiny_config, tmp_path):
    with pytest.raises(UserError, match=message):
        Pipeline(load_config(tiny_config, overrides), RunDir(tmp_path / "run"), Reporter())


def test_off_or_no_longer_than_one_interval_the_last_step_is_kept_and_nothing_is_kept_out(tiny_config):
    for override in ("align.validate_every=null", "align.validate_every=6"):
        config = load_config(tiny_config, [override])
        pools = load_prompt_pools(config, load_encoder(config.student), lambda line: None)
        split = plan_split(config, pools)
        assert split.steps == [] and split.training == pools.align


def test_validations_come_between_rollouts(tiny_config):
    several = ["align.method=anchor_grpo", "align.updates_per_rollout=4", "align.checkpoint_steps=4", "align.steps=20"]
    assert load_config(tiny_config, [*several, "align.validate_every=5"]).align.validation_steps == 8


def test_a_run_that_was_in_stage_two_before_steps_were_compared_goes_on_without(after_stage_one):
    pipeline = after_stage_one("older", "align.method=sft_sft", "align.steps=2")
    pipeline.execute(["align"])
    values = yaml.safe_load(pipeline.run.config.read_text())
    for name in ("validate_every", "validate_by", "patience"):
        del values["align"][name]
    pipeline.run.config.write_text(yaml.safe_dump(values, sort_keys=False))
    pipeline.run.record_file("config", pipeline.run.config)
    again = Pipeline(load_config(pipeline.run.config), pipeline.run, Reporter())
    assert again.config.align.validate_every is None
    again.execute(["align"])
    with pytest.raises(UserError, match=r"align.validate_every: None, and now it is 2"):
        explicit = load_config(pipeline.run.config, ["align.validate_every=2"])
        values["align"]["validate_every"] = None
        pipeline.run.config.write_text(yaml.safe_dump(values, sort_keys=False))
        pipeline.run.record_file("config", pipeline.run.config)
        Pipeline(explicit, pipeline.run, Reporter()).execute(["align"])


def test_patience_counts_from_the_best_step():
    best = BestStep(2, 2, dict)
    state = TrainerState(global_step=0, max_steps=100)
    for step, value, over in [(2, 0.5, False), (4, 0.4, False), (6, 0.6, False), (8, 0.6, False), (10, 0.1, True)]:
        state.global_step = step
        state.log_history.append({METRIC: value, "step": step})
        control = TrainerControl()
        best.decide(state, control, {METRIC: value})
        assert control.should_training_stop == over
    assert state.best_global_step == 8


def test_answers_without_a_score_are_counted_and_half_of_them_must_have_one():
    assert validation_metrics([0.9, None, 0.5]) == {UNSCORED: 1.0, METRIC: 0.7}
    assert validation_metrics([0.9, None]) == {UNSCORED: 1.0, METRIC: 0.9}
    assert validation_metrics([0.9] * 5 + [None] * 95) == {UNSCORED: 95.0}
    assert validation_metrics([None, None]) == {UNSCORED: 2.0}


def test_one_warning_tells_of_all_validations_that_could_not_be_compared():
    facts = ValidationFacts("verbal", 100, 50, [0, 50], [0.6, 0.66], [100, 150])
    (warning,) = facts.warnings
    assert "at 2 of 4 validations (first at step 100)" in warning and "align.score" in warning
    assert "none of these could be kept as the best" in warning
    lost = ValidationFacts("verbal", 100, 150, [0], [0.6], [50, 100, 150])
    (warning,) = lost.warnings  # none was measured, so none is worse than p_sft
    assert (
        "at 3 of 4 validations (first at step 50), and the last step, which could not be compared with p_sft" in warning
    )
    assert "is kept, and `purld export --stage sft` exports p_sft; use another align.score." in warning
    assert "none of these could be kept" not in warning
    assert ValidationFacts("verbal", 100, 50, [0, 50], [0.6, 0.66]).warnings == []
