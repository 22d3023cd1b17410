"""A device that runs out of memory makes a step slower, and its gradient no other one."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from saved_bytes import counting_saved_bytes
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from purld import ranks
from purld.config.load import load_config
from purld.config.methods import LdlGrpo
from purld.config.schema import Student
from purld.display.progress import Reporter
from purld.errors import UserError
from purld.model.load import Roles, load_encoder, load_model
from purld.model.memory import DecoderShape, MemoryNeed, estimate_memory
from purld.model.sample import Completion
from purld.model.vision import EncodedPrompt
from purld.pipeline.pipeline import Pipeline
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training import memory, sft
from purld.training.group_update import GroupUpdate
from purld.training.memory import UpdateForm, choose_form, fit_fine_tuning, form_of_update, update_sizes
from purld.training.rollout import AnchoredPrompt
from purld.training.scoring import ScorerContext
from purld.training.validation import ValidationSet, Validator

STEPS = ["align.steps=2", "sft.epochs=1", "align.candidates=4", "align.temperature=0.5"]


class SmallDevice:
    """A device that has no room for the backward pass of more members than `room`, or of layers that are kept."""

    def __init__(self, monkeypatch, room, keeps_layers=False):
        self.tried = []
        log_probs = GroupUpdate._log_probs

        def limited(update, whole, rows):
            values = log_probs(update, whole, rows)
            if torch.is_grad_enabled():
                self.tried.append((update.recompute, len(rows)))
                if len(rows) > room or not (update.recompute or keeps_layers):
                    values.sum().backward()  # a failed backward pass has left a part of a gradient
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return values

        monkeypatch.setattr(GroupUpdate, "_log_probs", limited)


@pytest.fixture(scope="module")
def runs(module_config, tmp_path_factory):
    """Make runs of Stage II; all have the same anchors and p_sft."""
    folder = tmp_path_factory.mktemp("runs")
    base = RunDir(folder / "base")
    Pipeline(load_config(module_config, STEPS), base, Reporter()).execute(["anchors", "sft"])

    def make(name, *overrides):
        run = RunDir(folder / name)
        shutil.copytree(base.path, run.path)
        Pipeline(load_config(module_config, [*STEPS, *overrides]), run, Reporter()).execute(["align"])
        return run

    return make


@pytest.fixture(scope="module")
def calm(runs):
    return runs("calm")


def assert_same_stage_two(run, calm):
    weights, others = (load_file(r.align / "model.safetensors") for r in (run, calm))
    for name, other in others.items():
        # AdamW makes a whole step of a gradient that is nothing but rounding.
        moved = ~torch.isclose(weights[name], other, rtol=1e-4, atol=1e-6)
        assert moved.sum() <= max(1, moved.numel() // 1000)
    rows, other_rows = (read_rows(r.groups) for r in (run, calm))
    assert [row["candidates"] for row in rows] == [row["candidates"] for row in other_rows]
    metrics, other = ([m for m in read_rows(r.metrics) if m.pop("stage") == "align"] for r in (run, calm))
    for row, known in zip(metrics, other, strict=True):
        assert row == pytest.approx(known, rel=1e-3, abs=1e-5)


def test_out_of_memory_layers_are_computed_again_and_then_micro_batches_halved(runs, calm, monkeypatch):
    device = SmallDevice(monkeypatch, room=1)
    with pytest.warns(UserWarning) as warned:
        run = runs("small", "align.micro_batch_size=4")
    told = [str(w.message) for w in warned if "out of the device's memory" in str(w.message)]
    assert len(told) == 3
    assert "computes layers again" in told[0] and "micro_batch_size=2" in told[1] and "micro_batch_size=1" in told[2]
    assert device.tried[:4] == [(False, 4), (True, 4), (True, 2), (True, 1)]
    assert set(device.tried[3:]) == {(True, 1)}  # what was found stays
    assert_same_stage_two(run, calm)


def test_groups_that_are_measured_again_after_the_last_step_take_smaller_micro_batches_too(runs, calm, monkeypatch):
    measure = GroupUpdate.tokens

    def limited(update, policy, members):
        if update.micro_batch_size > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return measure(update, policy, members)

    monkeypatch.setattr(GroupUpdate, "tokens", limited)
    with pytest.warns(UserWarning, match=r"^Stage II, step 2: out of the device's memory; .* align.micro_batch_size=1"):
        run = runs("remeasured", "align.micro_batch_size=4")
    (found, known) = (read_rows(r.revisited) for r in (run, calm))
    assert len(known) == 4 and [row["prompt_id"] for row in found] == [row["prompt_id"] for row in known]
    for ours, theirs in zip(found, known):
        assert ours["policy_after"] == pytest.approx(theirs["policy_after"], abs=1e-4)


def test_a_model_without_layers_that_can_be_computed_again_gets_smaller_micro_batches():
    update = GroupUpdate(Roles(torch.nn.Linear(2, 2), None), 4, 0, None, contextlib.nullcontext)
    with pytest.warns(UserWarning, match=r"goes on with align.micro_batch_size=2"):
        assert not memory.use_less_memory(update, 1, with_graph=True).recompute


def test_without_a_graph_micro_batches_are_halved_at_once():
    update = GroupUpdate(None, 4, 0, None, contextlib.nullcontext)
    with pytest.warns(UserWarning, match=r"align.micro_batch_size=2"):
        smaller = memory.use_less_memory(update, 1, with_graph=False)
    assert (smaller.micro_batch_size, smaller.recompute) == (2, False)


def test_without_room_for_one_member_a_run_says_what_to_lower(runs, monkeypatch):
    SmallDevice(monkeypatch, room=0)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"Stage II, step 1: .* lower align.max_new_tokens"):
        runs("none", "align.micro_batch_size=2")


@pytest.mark.parametrize(
    ("recompute", "device", "expected"), [("auto", 10**12, False), ("auto", 1000, True), ("never", 1000, False)]
)
def test_layers_are_computed_again_where_memory_asks_for_it(recompute, device, expected, random_student, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: device)
    student = Student(model=str(random_student))
    roles = Roles(load_model(student, student.model), load_model(student, student.model))
    questions = [AnchoredPrompt(Prompt.from_text("One?"), "One.", EncodedPrompt([1] * 30))]
    form = form_of_update(LdlGrpo(recompute=recompute), student, roles, questions, half=False)
    assert form.recompute == expected


@pytest.mark.parametrize(
    ("gpu", "gib", "settings", "expected"),
    [
        (False, 100, {}, 8),
        (True, 100, {}, 5 * 8),  # the whole step
        (True, 1, {}, 2 * 8),  # as many groups as half of the memory holds
        (True, 0.4, {}, 8),
        (True, 100, {"max_new_tokens": 1000}, 2 * 8),  # as many as fill a pass
        (True, 100, {"micro_batch_size": 3}, 3),
    ],
)
def test_on_a_gpu_groups_share_a_pass_by_default_as_far_as_half_of_its_memory_allows(
    gpu, gib, settings, expected, monkeypatch
):
    """A group of this student takes 0.21 GiB: 4 layers, 8 answers of 50 tokens, 1,024 wide."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    align = LdlGrpo(**({"prompts_per_step": 5, "candidates": 8, "max_new_tokens": 50} | settings))
    sizes = update_sizes(align, Student(model="m"), longest_prompt=30)
    shape = DecoderShape(4, 1024, 1024, 1024, 4096, 1000)

    def need(form):
        return estimate_memory(shape, sizes, 0, 0, form.micro_batch, form.recompute, width=4)

    assert settings or 0.2 < need(UpdateForm(8, False)).total / 2**30 < 0.22
    assert choose_form(align, sizes, need, int(gib * 2**30)).micro_batch == expected


@pytest.mark.parametrize(("processes", "engine", "drawn"), [(1, {}, 40), (4, {}, 16), (1, {"kind": "vllm"}, 0)])
def test_caches_are_those_of_the_candidates_that_this_process_draws(
    processes, engine, drawn, random_student, monkeypatch
):
    monkeypatch.setattr(ranks, "count", lambda: processes)
    student = Student(model=str(random_student), lora={"r": 2}, engine={"kind": "generate"} | engine)
    assert update_sizes(LdlGrpo(prompts_per_step=5, candidates=8), student, longest_prompt=30).drawn == drawn


@pytest.mark.parametrize(("processes", "batches"), [(1, [8, 8, 4]), (4, [4, 1])])
def test_a_validation_draws_no_more_at_once_than_a_step_and_every_process_has_its_part(
    processes, batches, random_student, monkeypatch
):
    encoder, drawn = load_encoder(Student(model=str(random_student))), []

    def sampler(policy, prompts, count, seeds):
        drawn.append(len(prompts))
        return [[Completion([33], True)] for _ in prompts]

    monkeypatch.setattr(ranks, "count", lambda: processes)
    monkeypatch.setattr(ranks, "index", lambda: processes - 1)
    prompts = [Prompt.from_text(f"How many are {n} and 1?") for n in range(20)]
    chosen = ValidationSet([(p, Anchor(p.id, "1.")) for p in prompts], "gold", lambda prompt, text: True)
    settings = LdlGrpo(prompts_per_step=4, candidates=2 if processes == 1 else 4)
    context = ScorerContext(encoder, None, settings, True, contextlib.nullcontext)
    assert Validator(chosen, settings, context, lambda decoding: sampler)(None)["eval_score"] == 1.0
    assert drawn == batches


def test_stage_one_that_runs_out_of_memory_halves_its_micro_batches_and_keeps_its_result(
    module_config, tmp_path, monkeypatch
):
    def losses(name):
        run = RunDir(tmp_path / name)
        shutil.copytree(base.path, run.path)
        Pipeline(load_config(module_config, settings), run, Reporter()).execute(["sft"])
        return [row["eval_loss"] for row in read_rows(run.metrics) if "eval_loss" in row], run

    settings = [*STEPS, "sft.batch_size=4", "sft.micro_batch_size=2"]
    base = RunDir(tmp_path / "base")
    Pipeline(load_config(module_config, settings), base, Reporter()).execute(["anchors"])
    calm, known = losses("calm")
    make_batch, sizes = sft.training_batch, []

    def limited(examples, pad):
        sizes.append(len(examples))
        if len(sizes) > 1 and len(examples) > 1:  # the first micro-batch has left its gradient
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return make_batch(examples, pad)

    monkeypatch.setattr(sft, "training_batch", limited)
    with pytest.warns(UserWarning, match=r"Stage I's micro-batches are smaller \(1\)"):
        found, run = losses("small")
    assert sizes[:4] == [2, 2, 1, 1] and set(sizes[4:-1]) == {1}
    assert calm and found == pytest.approx(calm, rel=1e-5)
    weights, others = (load_file(r.sft / "model.safetensors") for r in (run, known))
    assert all(torch.allclose(weights[name], others[name], rtol=1e-4, atol=1e-6) for name in weights)


@pytest.mark.parametrize(
    ("size", "memory_of_an_answer", "expected"),
    [
        ("auto", 1, (12, False)),
        ("auto", 20, (4, False)),  # 5 answers fit
        ("auto", 60, (12, True)),  # one fits, or ten times as many that are computed again
        ("auto", 1000, (1, True)),
        (8, 1, (8, False)),
        (8, 60, (8, True)),
    ],
)
def test_stage_one_computes_layers_again_only_where_a_few_answers_would_not_fit(size, memory_of_an_answer, expected):
    def need(form):
        of_all = form.micro_batch * memory_of_an_answer
        return MemoryNeed(0, 0, 0, of_all // 10 if form.recompute else of_all, 0, 0)

    assert fit_fine_tuning(size, 12, need, device=112) == UpdateForm(*expected)


def test_stage_one_needs_what_its_loss_keeps_for_the_backward_pass_and_a_tile_of_logits():
    config = AutoConfig.for_model(
        "llama", vocab_size=20_000, hidden_size=64, num_attention_heads=4, intermediate_size=128, num_hidden_layers=3
    )
    model, (rows, length) = AutoModelForCausalLM.from_config(config), (4, 100)
    need, again, half = (
        memory.fine_tuning_need(model, length, half)(UpdateForm(rows, recompute))
        for half, recompute in ((False, False), (False, True), (True, False))
    )
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    ids = torch.randint(20_000, (rows, length))
    with counting_saved_bytes(*model.parameters()) as kept:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
        assert 0.7 * need.activations <= kept() <= 1.1 * need.activations
    assert need.logits == 2 * half.logits == 4 * rows * length * 32_768
    assert again.activations < need.activations
    assert need.weights == sum(p.nbytes for p in model.parameters())
    assert memory.fine_tuning_need(model, 10_000, False)(UpdateForm(rows, False)).logits == 4 * 4_096 * 32_768


def test_stage_one_counts_its_own_part_of_weights_that_are_divided(random_student, monkeypatch):
    model = load_model(Student(model=str(random_student)), str(random_student))
    whole = memory.fine_tuning_need(model, 100, half=False)(UpdateForm(1, False))
    monkeypatch.setattr(ranks, "local_part", lambda weight: weight.flatten()[: weight.numel() // 2].clone())
    part = memory.fine_tuning_need(model, 100, half=False)(UpdateForm(1, False))
    gathered = 4 * DecoderShape.of(model.config).gathered_weights
    assert part.weights == pytest.approx(whole.weights / 2 + gathered, rel=1e-3)
    assert part.training == pytest.approx(whole.training / 2, rel=1e-3)


def test_stage_one_whose_ranks_divide_gradients_ends_where_one_runs_out_of_memory():
    def fail(size):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = SimpleNamespace(_divides_gradients=False, state=SimpleNamespace(global_step=3))
    assert sft._SftTrainer._begun_again(trainer, fail) is fail  # whole gradients: `AtOnce` begins again
    trainer._divides_gradients = True
    with pytest.raises(UserError, match=r"^Stage I, step 4: .* lower sft.micro_batch_size, or start more processes"):
        sft._SftTrainer._begun_again(trainer, fail)(8)
