"""Two processes train as one does: the same candidates, gradients to 1e-5, changes of the weights to 1e-4."""

import itertools
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from faulty_server import rate_by_length, running_server
from rank_processes import run_ranks

from purld import ranks
from purld.config.load import load_config
from purld.display.progress import Reporter
from purld.errors import PlainWarning
from purld.model.load import load_model
from purld.pipeline.pipeline import Pipeline
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.finite import FiniteGuard
from purld.training.group_update import GroupUpdate
from purld.training.scoring import SCORERS
from purld.training.validation import METRIC

LORA = "student.lora={r: 4, dropout: 0.0}"
SHARDED = "student.shard=fsdp"  # which one process alone takes for an ordinary run


class KilledError(Exception):
    """In the place of a SIGKILL."""


def keep_gradients(config, monkeypatch, folder):
    """Let rank 0 save the gradients of every step, as the optimiser gets them."""
    check = FiniteGuard.on_pre_optimizer_step

    def keeping(self, args, state, control, optimizer=None, **others):
        check(self, args, state, control, optimizer=optimizer, **others)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        if ranks.is_first():
            folder.mkdir(exist_ok=True)
            torch.save(gradients, folder / f"{self._stage}-{state.global_step}.pt")

    monkeypatch.setattr(FiniteGuard, "on_pre_optimizer_step", keeping)


def run_stages(config, path, stages, monkeypatch, count):
    """Run stages in one process or two and return the run with its gradients' folder."""
    run, gradients = RunDir(path), path.with_name(f"{path.name}-gradients")
    with monkeypatch.context() as patch:
        keep_gradients(config, patch, gradients)

        def work():
            Pipeline(config, run, Reporter()).execute(stages)

        if count == 1:
            work()
        else:
            assert run_ranks(work, count) == [None] * count
    return run, gradients


def assert_equal_gradients(one, two):
    names = sorted(path.name for path in one.iterdir())
    assert names and names == sorted(path.name for path in two.iterdir())
    for name in names:
        ours, theirs = torch.load(two / name), torch.load(one / name)
        assert [g is None for g in ours] == [g is None for g in theirs]
        ours, theirs = ([g.flatten() for g in gs if g is not None] for gs in (ours, theirs))
        if theirs:
            assert distance(torch.cat(ours), torch.cat(theirs)) < (1e-5 if name.endswith("-0.pt") else 1e-3), name


def distance(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def weights_of(config, folder):
    return torch.cat([p.detach().flatten() for p in load_model(config.student, folder).parameters()])


def assert_equal_change(config, one, two, stage, start):
    """AdamW moves a weight whose gradient is all rounding by up to the rate, so a few of them may move otherwise."""
    before = weights_of(config, start)
    ours, theirs = (weights_of(config, getattr(run, stage)) - before for run in (two, one))
    assert theirs.norm() > 0 and distance(ours, theirs) < 1e-3


def numbers(rows):
    """Rows without their numbers, and the numbers."""
    found = []

    def strip(value):
        if isinstance(value, float):
            found.append(value)
            return "number"
        if isinstance(value, dict):
            return {key: strip(part) for key, part in value.items()}
        return [strip(part) for part in value] if isinstance(value, list) else value

    return strip(rows), found


def assert_equal_rows(one, two, tolerance=2e-3):
    (ours, our_numbers), (theirs, their_numbers) = numbers(read_rows(two)), numbers(read_rows(one))
    assert theirs and ours == theirs
    assert our_numbers == pytest.approx(their_numbers, rel=tolerance, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [[], [LORA], [SHARDED], [SHARDED, LORA]],
    ids=["all weights", "LoRA", "sharded weights", "LoRA on sharded weights"],
)
def test_stage_one_and_the_answers_of_two_processes_are_those_of_one(extra, module_config, tmp_path, monkeypatch):
    """A batch of 5 divides into 2 and 3, and in micro-batches of 2; the last batch of an epoch has fewer."""
    overrides = [*extra, "sft.batch_size=5", "sft.micro_batch_size=2", "sft.epochs=2", "align.method=sft"]
    config = load_config(module_config, overrides)
    stages = ["anchors", "sft", "evaluate"]
    one, two = (run_stages(config, tmp_path / f"{n}", stages, monkeypatch, n) for n in (1, 2))
    assert_equal_gradients(one[1], two[1])
    assert_equal_change(config, one[0], two[0], "sft", config.student.model)
    assert_equal_rows(one[0].metrics, two[0].metrics)
    for name in ("base", "sft", "sft.greedy"):
        assert read_rows(two[0].generations(name)) == read_rows(one[0].generations(name))


@pytest.fixture(scope="module")
def teacher():
    with running_server() as server:
        server.default = rate_by_length
        yield server


@pytest.fixture(scope="module")
def after_stage_one(module_config, teacher, tmp_path_factory):
    """Makes runs whose anchors and p_sft are there already, with or without an adapter, weights divided or whole."""
    done, count = {}, itertools.count()

    def make(overrides):
        section = f"teacher={{kind: openai, base_url: '{teacher.url}', model: m, max_calls: 100}}"
        config = load_config(
            module_config,
            [
                section,
                "sft.epochs=1",
                "sft.validation_fraction=0.4",
                "align.steps=4",
                "align.warmup_ratio=0",
                *overrides,
            ],
        )
        kind = LORA in overrides, SHARDED in overrides
        if kind not in done:
            done[kind] = RunDir(tmp_path_factory.mktemp("runs") / "base")
            Pipeline(config, done[kind], Reporter()).execute(["anchors", "sft"])
        path = done[kind].path.with_name(f"alone{next(count)}") / "run"
        shutil.copytree(done[kind].path, path)
        return config, path

    return make


CASES = {
    "a step of 3": ["align.prompts_per_step=3"],
    "LoRA": [LORA, "align.prompts_per_step=3"],
    "several updates": ["align.method=anchor_grpo", "align.updates_per_rollout=2", "align.prompts_per_step=3"],
    "a critic": ["align.method=self_ppo", "align.updates_per_rollout=2", "align.prompts_per_step=3"],
    "fewer prompts than processes": ["align.prompts_per_step=1"],
    "a judging teacher": ["align.method=teacher_judge_grpo", "align.prompts_per_step=3"],
    "the best step, and the anchor in the group": [
        "align.prompts_per_step=3",
        "align.updates_per_rollout=2",
        "align.anchor_in_group=true",
        "align.validate_every=2",
        "align.patience=1",
    ],
    "no candidates": ["align.method=sft_sft", "align.prompts_per_step=3"],
    "sharded weights": [SHARDED, "align.prompts_per_step=3"],
    "sharded weights, LoRA": [SHARDED, LORA, "align.prompts_per_step=3"],
    "sharded weights, layers computed again": [SHARDED, "align.recompute=always", "align.micro_batch_size=2"],
    "sharded weights, a critic": [SHARDED, "align.method=self_ppo", "align.updates_per_rollout=2"],
    "sharded weights, a judging teacher": [SHARDED, "align.method=teacher_judge_grpo", "align.prompts_per_step=3"],
    "sharded weights, the best step, and the anchor in the group": [
        SHARDED,
        "align.prompts_per_step=3",
        "align.validate_every=2",
        "align.anchor_in_group=true",
    ],
}


def assert_equal_stage_two(overrides, after_stage_one, monkeypatch):
    one, two = (run_stages(*after_stage_one(overrides), ["align"], monkeypatch, n) for n in (1, 2))
    config = after_stage_one(overrides)[0]
    assert_equal_gradients(one[1], two[1])
    assert_equal_change(config, one[0], two[0], "align", one[0].sft)
    assert_equal_rows(one[0].metrics, two[0].metrics)
    if one[0].groups.exists():
        assert_equal_rows(one[0].groups, two[0].groups)
    assert one[0].revisited.exists() == two[0].revisited.exists()
    return one[0], two[0]


def test_a_step_of_two_processes_is_that_of_one(after_stage_one, monkeypatch):
    overrides = ["align.method=self_ppo", "align.prompts_per_step=3", "align.steps=1"]
    assert_equal_stage_two(overrides, after_stage_one, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_stage_two_of_two_processes_is_that_of_one(case, after_stage_one, teacher, monkeypatch):
    after_stage_one(CASES[case])  # its anchors are bought now
    before = len(teacher.arrived)
    one, _ = assert_equal_stage_two(CASES[case], after_stage_one, monkeypatch)
    assert any(METRIC in row for row in read_rows(one.metrics)) == ("validate" in str(CASES[case]))
    asked = len(teacher.arrived) - before
    # 4 steps of 3 prompts with 3 candidates, once in each of the two runs
    assert asked == (2 * 36 if "a judging teacher" in case else 0)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("left_out", ["some", "all of one process"])
def test_dropped_groups_leave_nobody_waiting(left_out, sharded, after_stage_one, monkeypatch):
    """Groups without scores are left out; here those of every second prompt, or all of process 0."""
    entry = SCORERS["expected"]

    def leaving_out(context):
        score = entry.make(context)

        def is_dropped(group):
            return int(group.prompt.id, 16) % 2 if left_out == "some" else ranks.count() > 1 and ranks.is_first()

        def scorer(groups):
            return [
                replace(scores, candidates=[None] * len(scores.candidates)) if is_dropped(group) else scores
                for group, scores in zip(groups, score(groups), strict=True)
            ]

        return scorer

    monkeypatch.setitem(SCORERS, "expected", replace(entry, make=leaving_out))
    overrides = ["align.method=anchor_grpo", "align.prompts_per_step=4", *([SHARDED] if sharded else [])]
    if left_out == "some":
        one, _ = assert_equal_stage_two(overrides, after_stage_one, monkeypatch)
        rows = [row for row in read_rows(one.metrics) if row["stage"] == "align"]
        assert 0 < sum(row["dropped_groups"] for row in rows) < 16
    else:
        run, _ = run_stages(*after_stage_one(overrides), ["align"], monkeypatch, 2)
        rows = [row for row in read_rows(run.metrics) if row["stage"] == "align"]
        assert [row["dropped_groups"] for row in rows] == [2.0] * 4


@pytest.mark.slow
def test_out_of_memory_in_one_process_alone_the_step_is_that_of_one(after_stage_one, monkeypatch, tmp_path):
    """Process 1 fails in its first backward passes, part of a gradient is there already, and others wait for it."""
    log_probs = GroupUpdate._log_probs

    def limited(update, prefix, ids):
        values = log_probs(update, prefix, ids)
        if torch.is_grad_enabled() and ranks.index() == 1 and (len(ids) > 1 or not update.recompute):
            values[0].sum().backward()
            (tmp_path / str(len(ids))).touch()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return values

    monkeypatch.setattr(GroupUpdate, "_log_probs", limited)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainWarning)
        assert_equal_stage_two(
            ["align.prompts_per_step=3", "align.updates_per_rollout=2"], after_stage_one, monkeypatch
        )
    assert (tmp_path / "3").exists()


def killed_at(config, path, step, monkeypatch, count):
    """Run Stage II until `step` is logged, and no further."""
    log = RunDir.log_metrics

    def kill(self, stage, at, values):
        log(self, stage, at, values)
        if stage == "align" and at == step:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "log_metrics", kill)
        outcomes = run_ranks(lambda: Pipeline(config, RunDir(path), Reporter()).execute(["align"]), count)
    assert isinstance(outcomes[0], KilledError) and isinstance(outcomes[1], ranks.PeerError)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("extra", [[], [SHARDED], [SHARDED, LORA]], ids=["", "sharded weights", "sharded, LoRA"])
def test_killed_two_processes_end_as_undisturbed_ones_and_one_goes_on_alone(extra, after_stage_one, monkeypatch):
    overrides = [*extra, "align.prompts_per_step=3", "align.validate_every=1"]
    (config, calm), (_, killed), (_, alone) = (after_stage_one(overrides) for _ in range(3))
    run_stages(config, calm, ["align"], monkeypatch, 2)
    for path, count in ((killed, 2), (alone, 1)):
        killed_at(config, path, 3, monkeypatch, 2)
        run_stages(config, path, ["align"], monkeypatch, count)
    calm, killed, alone = map(RunDir, (calm, killed, alone))
    if SHARDED in extra:  # the first update of a process sums divided gradients in another order than later ones
        assert_equal_rows(calm.groups, killed.groups)
        assert_equal_change(config, calm, killed, "align", calm.sft)
    else:
        for name in ("metrics", "groups", "revisited"):
            assert getattr(killed, name).read_bytes() == getattr(calm, name).read_bytes()
        (saved,) = calm.align.glob("*model.safetensors")
        assert (killed.align / saved.name).read_bytes() == saved.read_bytes()
    assert_equal_rows(calm.groups, alone.groups)
    assert_equal_change(config, calm, alone, "align", calm.sft)
