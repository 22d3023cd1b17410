"""Images in a group's prompt: the numbers of full sequences, with features computed once, for both architectures."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import ARCHITECTURES, picture, write_model
from torch.nn.utils.rnn import pad_sequence

from purld.config.schema import Lora, Sft, Student
from purld.data.images import open_image
from purld.errors import UserError
from purld.model.critic import states_before_tokens
from purld.model.encode import Encoder, training_batch
from purld.model.load import load_encoder, load_model, load_roles, make_trainable, save_model
from purld.model.prefix import FullSequences, SharedPrefixes
from purld.model.processor import read_processor
from purld.model.sample import Decoding, GenerateSampler, generate_completions
from purld.model.self_check import can_share_prefix
from purld.model.self_evaluation import SelfEvaluator
from purld.model.vision import vision_features, vision_modules
from purld.records import IMAGE, Anchor, Message, Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.training.context import StageContext
from purld.training.sft import fine_tune, in_validation_part

PROMPTS = {
    "one": Prompt.from_text(f"{IMAGE}How many?", images=(picture(40, 24),)),
    "two, apart": Prompt(
        (Message("system", "Be brief."), Message("user", f"Is {IMAGE} like"), Message("user", f"this {IMAGE} here?")),
        (picture(33, 21, 1), picture(16, 48, 2)),
    ),
    "none": Prompt.from_text("How many are there?"),
}
COMPLETIONS = [[5, 6, 7, 8], [9], [4, 5, 6, 6, 7]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def student(request, shipped_student, tmp_path_factory):
    return Student(model=str(write_model(request.param, shipped_student, tmp_path_factory.mktemp("vlm") / "model")))


@pytest.fixture(scope="module")
def encoder(student):
    return load_encoder(student)


@pytest.fixture
def model(student):
    return load_model(student, student.model)


def gradients(model, values):
    model.zero_grad()
    weights = torch.arange(1.0, 1.0 + values.numel()).reshape(values.shape).sin()
    (weights * values).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_shared_prefix_gives_the_numbers_and_gradients_of_full_sequences(model, encoder, name):
    encoded = encoder.encode_prompt(PROMPTS[name])
    plain = FullSequences(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0]
    expected = gradients(model, plain)
    shared = SharedPrefixes(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0]
    actual = gradients(model, shared)
    assert torch.allclose(shared, plain, atol=1e-5)
    assert expected.keys() == actual.keys()
    vision = {f"model.{part}." for part in vision_modules(model)}
    assert bool(PROMPTS[name].images) == any(n.startswith(tuple(vision)) for n in actual)
    whole, other = (torch.cat([g[n].flatten() for n in sorted(expected)]) for g in (expected, actual))
    assert (whole - other).norm() / whole.norm() < 1e-5
    if PROMPTS[name].images:  # those of the vision are small compared with the rest
        seen, other = (
            torch.cat([g[n].flatten() for n in actual if n.startswith(tuple(vision))]) for g in (expected, actual)
        )
        assert (seen - other).norm() / seen.norm() < 1e-5
        assert seen.norm() > 1e-3


@pytest.mark.parametrize("name", PROMPTS)
def test_full_sequences_are_what_the_models_own_processor_makes_of_the_chat(model, encoder, name):
    """The reference of the test above against transformers alone: its template, its processor, its forward."""
    prompt = PROMPTS[name]
    turns = [{"role": m.role, "content": encoder._chat._content(m.content)} for m in prompt.messages]
    text = encoder.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    given = encoder.processor(
        text=[text],
        images=[open_image(i) for i in prompt.images] or None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    encoded = encoder.encode_prompt(prompt)
    assert given["input_ids"][0].tolist() == encoded.ids
    batch = training_batch([(encoded, [5, 6, 7])], encoder.pad)
    assert all(torch.equal(given[key], batch[key]) for key in given if key.startswith(("pixel", "image")))
    with torch.no_grad():
        expected = model(**given).logits[0, -1].log_softmax(-1)[[5, 6, 7]]
        actual = FullSequences(model, [encoded], encoder.pad).token_log_probs([[5], [6], [7]])[0][:, 0]
    assert torch.allclose(actual, expected, atol=1e-5)


def test_a_batch_to_learn_from_gives_the_loss_of_its_rows(model, encoder):
    rows = [(encoder.encode_prompt(prompt), [5, 6, 7, 8][:n]) for prompt, n in zip(PROMPTS.values(), (4, 2, 3))]
    with torch.no_grad():
        loss = model(**training_batch(rows, encoder.pad)).loss
        alone = [
            FullSequences(model, [encoded], encoder.pad).token_log_probs([answer])[0].sum() for encoded, answer in rows
        ]
    assert torch.allclose(loss, -sum(alone) / 9, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_held_at_the_prefix_reach_the_vision_in_one_go(model, encoder, recompute):
    encoded = encoder.encode_prompt(PROMPTS["one"])
    expected = gradients(
        model, SharedPrefixes(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0].sum(dim=1)
    )
    model.zero_grad()
    prefix = SharedPrefixes(model, [encoded], encoder.pad, cut=True, recompute=recompute)
    weights = torch.arange(1.0, 4.0).sin()
    for row in range(3):
        (weights[row] * prefix.token_log_probs(COMPLETIONS[row : row + 1])[0].sum()).backward()
    prefix.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == actual.keys()
    assert all(torch.allclose(expected[n], actual[n], rtol=1e-4, atol=1e-4) for n in expected)


def test_a_prompt_does_not_get_the_position_shift_of_the_last_one(model, encoder):
    """Some models keep the position shift of their last images."""
    encoded_prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS.values()]
    with torch.no_grad():
        prefixes = [SharedPrefixes(model, [encoded], encoder.pad) for encoded in encoded_prompts]
        actual = [prefix.token_log_probs(COMPLETIONS)[0] for prefix in prefixes]
        for encoded, values in zip(encoded_prompts, actual):
            assert torch.allclose(
                values, FullSequences(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0], atol=1e-5
            )


def test_the_model_passes_the_trial_of_sharing(model, encoder, recwarn):
    assert can_share_prefix(model, encoder.encode_prompt(PROMPTS["one"]), COMPLETIONS, encoder.pad)
    assert can_share_prefix(model, encoder.encode_prompt(PROMPTS["none"]), COMPLETIONS, encoder.pad)


def test_scores_read_the_question_with_its_pictures(model, encoder):
    """Once per group, and the numbers of full sequences; another image gives another score."""
    prompt, other = PROMPTS["one"], Prompt.from_text(f"{IMAGE}How many?", images=(picture(40, 24, 9),))
    evaluator = SelfEvaluator(encoder, "expected", 8)
    actual = evaluator.score(model, prompt, "Four.", ["Four.", "Five."])
    frame = encoder.evaluation_frame(prompt, "Four.")
    assert frame.prefix.images == prompt.images
    tail = encoder.encode_literal("Five.") + frame.suffix + encoder.encode_literal("0.")
    with torch.no_grad():
        logits = FullSequences(model, [frame.prefix], encoder.pad).closing_logits([tail], 3)
    assert actual.candidates[1] == pytest.approx(evaluator._reader.expected_scores(logits).item(), abs=1e-5)
    assert actual != evaluator.score(model, other, "Four.", ["Four.", "Five."])
    verbal = SelfEvaluator(encoder, "verbal", 8).score(model, prompt, "Four.", ["Four.", "Five."])
    assert len(verbal.candidates) == 2


def test_prompts_with_and_without_pictures_are_drawn_from_together(model, encoder, monkeypatch):
    """Image features computed once, or for every candidate: the same draws."""
    from purld.model import sample

    encoded_prompts = [encoder.encode_prompt(prompt) for prompt in PROMPTS.values()]
    sampler = GenerateSampler(encoder, Decoding(1.0, 8))
    with_one = sampler(model, encoded_prompts, 3, seeds=range(len(encoded_prompts)))
    monkeypatch.setattr(sample, "can_share_prefix", lambda *_: False)
    assert sampler(model, encoded_prompts, 3, seeds=range(len(encoded_prompts))) == with_one


def test_a_greedy_answer_is_the_likeliest_under_full_sequences(model, encoder):
    encoded = encoder.encode_prompt(PROMPTS["two, apart"])
    ((greedy,),) = generate_completions(model, encoder, [encoded], 1, Decoding(0.0, 4))
    with torch.no_grad():
        logits = model(**training_batch([(encoded, greedy.ids)], encoder.pad)).logits[0, len(encoded) - 1 : -1]
    logits[:, encoder.placeholders] = -torch.inf
    assert logits.argmax(-1).tolist() == list(greedy.ids)


def test_a_placeholder_is_never_drawn(model, encoder):
    """A placeholder in a candidate would make the next forward pass fail."""
    assert encoder.placeholders
    with torch.no_grad():
        model.lm_head.weight[encoder.placeholders] *= 50
    encoded_prompts = [encoder.encode_prompt(PROMPTS["one"])]
    drawn = generate_completions(model, encoder, encoded_prompts, 8, Decoding(1.0, 16), seeds=[0])
    assert not {token for completion in drawn[0] for token in completion.ids} & set(encoder.placeholders)


def test_somebodys_text_cannot_pass_for_a_picture(encoder):
    mark = encoder.processor.image_token
    frame = encoder.evaluation_frame(PROMPTS["one"], f"It is {mark}.")
    tokens = [t for t in frame.prefix.ids if t in encoder.placeholders]
    plain = [t for t in encoder.evaluation_frame(PROMPTS["one"], "It is.").prefix.ids if t in encoder.placeholders]
    assert tokens == plain
    with_mark, without = (
        encoder.encode_prompt(Prompt.from_text(f"{IMAGE}What is {text}?", images=(picture(8, 8),)))
        for text in (mark, "this")
    )
    assert len(with_mark) > len(without)
    counts = [sum(token in encoder.placeholders for token in prompt.ids) for prompt in (with_mark, without)]
    assert counts[0] == counts[1]


def test_a_text_model_says_that_it_reads_no_pictures(shipped_student):
    encoder = load_encoder(Student(model=str(shipped_student)))
    with pytest.raises(UserError, match=r"pool.jsonl, line 3: the prompt has images, and .* reads none"):
        encoder.encode_prompt(Prompt.from_text(IMAGE, images=(picture(8, 8),), location="pool.jsonl, line 3"))


def test_large_pictures_are_made_smaller(student):
    """Qwen takes tokens by size: 64 x 64 at patches of 8 x 8 is 64 tokens, a quarter of the pixels 16."""
    prompt = Prompt.from_text(IMAGE, images=(picture(64, 64),))
    whole, small = (load_encoder(student.model_copy(update={"max_image_pixels": n})) for n in (None, 32 * 32))
    counts = [sum(t in e.placeholders for t in e.encode_prompt(prompt).ids) for e in (whole, small)]
    assert counts in ([64, 16], [16, 16])  # LLaVA takes as many for all
    batch = training_batch([(small.encode_prompt(prompt), [5])], 0)
    assert load_model(student, student.model)(**batch).loss > 0


def count_looks(model):
    looks = []
    first = next(iter(vision_modules(model).values()))
    first.register_forward_hook(lambda *_: looks.append(1))
    return looks


def test_frozen_vision_looks_at_a_picture_once_for_all_roles(student, encoder, tmp_path):
    settings = student.model_copy(update={"train_vision": False})
    save_model(settings, load_model(settings, settings.model), encoder, tmp_path)
    roles = load_roles(settings, tmp_path)
    looks = count_looks(roles.policy)
    encoded = encoder.encode_prompt(PROMPTS["one"])
    generate_completions(
        roles.policy, encoder, [encoded, encoder.encode_prompt(PROMPTS["none"])], 2, Decoding(1.0, 2), seeds=[0, 1]
    )
    with roles.frozen() as frozen:
        SelfEvaluator(encoder, "expected", 8).score(frozen, PROMPTS["one"], "Four.", ["Four.", "Five."])
        reference = SharedPrefixes(frozen, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0]
        states_before_tokens(frozen, [encoded] * len(COMPLETIONS), COMPLETIONS, encoder.pad)
    policy = SharedPrefixes(roles.policy, [encoded], encoder.pad, cut=True).token_log_probs(COMPLETIONS)[0]
    # The full sequences of the checks (prompts with and without images, two roles) compute features themselves.
    trials = len(looks) - 1
    assert torch.allclose(reference, policy, atol=1e-6)
    looks.clear()
    SharedPrefixes(roles.policy, [encoded], encoder.pad).token_log_probs(COMPLETIONS)
    assert not looks
    assert trials <= 4
    policy.sum().backward()
    assert not any(
        p.requires_grad or p.grad is not None for m in vision_modules(roles.policy).values() for p in m.parameters()
    )


def test_trained_vision_looks_anew(student, encoder, model):
    looks = count_looks(model)
    encoded = encoder.encode_prompt(PROMPTS["one"])
    for _ in range(2):
        SharedPrefixes(model, [encoded], encoder.pad)
    assert len(looks) == 2


def test_roles_share_a_vision_that_is_frozen(student, encoder, tmp_path):
    save_model(student, load_model(student, student.model), encoder, tmp_path)
    apart, together = (load_roles(student.model_copy(update={"train_vision": v}), tmp_path) for v in (True, False))
    for roles, shared in ((apart, False), (together, True)):
        with roles.frozen() as frozen:
            for name, module in vision_modules(roles.policy).items():
                assert (vision_modules(frozen)[name] is module) == shared


@pytest.mark.parametrize(("train_vision", "adapted"), [(None, False), (True, True)])
def test_an_adapter_leaves_the_vision_alone_unless_told(student, train_vision, adapted):
    settings = student.model_copy(update={"lora": Lora(r=2), "train_vision": train_vision})
    policy = make_trainable(settings, load_model(settings, settings.model))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    parts = tuple(f"base_model.model.model.{part}." for part in vision_modules(policy))
    assert any(name.startswith(parts) for name in trained) == adapted
    assert any("language_model" in name for name in trained)


def test_the_critic_reads_states_of_full_sequences(model, encoder):
    encoded = encoder.encode_prompt(PROMPTS["two, apart"])
    states = pad_sequence(states_before_tokens(model, [encoded] * len(COMPLETIONS), COMPLETIONS, encoder.pad), True)
    with torch.no_grad():
        predicted = model.lm_head(states).log_softmax(-1)
        expected, _ = FullSequences(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)
    for row, completion in enumerate(COMPLETIONS):
        chosen = predicted[row, range(len(completion)), completion]
        assert torch.allclose(chosen, expected[row, : len(completion)], atol=1e-5)


def test_a_processor_is_saved_as_it_was(student, encoder, model, tmp_path):
    save_model(student, model, encoder, tmp_path)
    again = read_processor(str(tmp_path))
    assert type(again).__name__ == type(encoder.processor).__name__
    there = load_encoder(Student(model=str(tmp_path)))
    for prompt in PROMPTS.values():
        assert there.encode_prompt(prompt).ids == encoder.encode_prompt(prompt).ids
    pixels = [e.encode_prompt(PROMPTS["one"]).preparer.pixels(PROMPTS["one"].images) for e in (there, encoder)]
    assert all(torch.equal(pixels[0][key], pixels[1][key]) for key in pixels[0])


def test_features_of_several_prompts_are_those_of_each(model, encoder):
    model.requires_grad_(False)
    encoded_prompts = [encoder.encode_prompt(PROMPTS[name]) for name in ("one", "none", "two, apart")]
    ids = torch.zeros(3, 1, dtype=torch.long)
    joined = vision_features(model, encoded_prompts, ids)["mm_encoder_outputs"]["image"].pooler_output
    alone = [
        f
        for h in (encoded_prompts[0], encoded_prompts[2])
        for f in vision_features(model, [h], ids)["mm_encoder_outputs"]["image"].pooler_output
    ]
    assert len(joined) == len(alone) == 3
    assert all(torch.equal(a, b) for a, b in zip(joined, alone))


def test_the_trial_finds_out_a_vision_that_is_cut_off_from_its_gradient(model, encoder, monkeypatch):
    from purld.model import prefix

    features = prefix.vision_features
    monkeypatch.setattr(prefix, "vision_features", torch.no_grad()(lambda *args: features(*args)))
    with pytest.warns(UserWarning, match="gradients of its vision weights"):
        assert not can_share_prefix(model, encoder.encode_prompt(PROMPTS["one"]), COMPLETIONS, encoder.pad)


def test_stage_one_is_the_same_in_every_micro_batch(student, encoder, tmp_path):
    """One answer of many tokens among short ones: all tokens count alike, however they are spread over passes."""
    prompts = [Prompt.from_text(f"{IMAGE}{n}?", images=(picture(24, 24, n),)) for n in range(4)]
    answers = ["It is this and that and those and these and all the others.", "No.", "No.", "No."]
    examples = [(p, Anchor(p.id, text)) for p, text in zip(prompts, answers)]
    norms = []
    for size in (4, 1):
        run = RunDir(tmp_path / str(size))
        settings = Sft(epochs=1, batch_size=4, micro_batch_size=size, validation_fraction=0)
        fine_tune(StageContext(student, encoder, run, 0, lambda *_: None), settings, examples)
        norms.append(next(row["grad_norm"] for row in read_rows(run.metrics)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_best_model_of_stage_one_is_the_one_that_is_saved(student, encoder, tmp_path):
    """Published files name the weights of some of these models otherwise than the models do."""
    prompts = [Prompt.from_text(f"{IMAGE}{n}?", images=(picture(24, 24, n),)) for n in range(24)]
    examples = [(p, Anchor(p.id, f"a{n * 7 % 5} b{n * 3 % 7}")) for n, p in enumerate(prompts)]
    run = RunDir(tmp_path)
    steps = {"epochs": 12, "batch_size": 4, "micro_batch_size": 4, "checkpoint_steps": 6}
    settings = Sft(learning_rate=3e-2, validation_fraction=0.3, **steps)
    facts = fine_tune(StageContext(student, encoder, run, 0, lambda *_: None), settings, examples)
    assert facts.best_step < facts.steps
    held_out = [(p, a) for p, a in examples if in_validation_part(p, 0.3)]
    batch = training_batch(
        [(encoder.encode_prompt(p), encoder.encode_answer(a.text).ids) for p, a in held_out], encoder.pad
    )
    with torch.no_grad():
        loss = load_model(student, run.sft)(**batch).loss.item()
    assert loss == pytest.approx(
        min(row["eval_loss"] for row in read_rows(run.metrics) if "eval_loss" in row), rel=1e-4
    )


def test_a_processors_opening_token_is_there_once(shipped_student, tmp_path):
    """LLaVA-1.5's template writes no BOS; its processor puts one before the rendered chat, and so do we."""
    from tokenizers.processors import TemplateProcessing

    path = write_model("llava", shipped_student, tmp_path / "model")
    processor = read_processor(str(path))
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    opening = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer._tokenizer.post_processor = opening
    encoder = Encoder(processor, 32)
    for prompt in PROMPTS.values():
        turns = [{"role": m.role, "content": encoder._chat._content(m.content)} for m in prompt.messages]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        images = [open_image(image) for image in prompt.images] or None
        expected = processor(text=[text], images=images)["input_ids"][0]
        assert expected[0] == tokenizer.bos_token_id
        assert encoder.encode_prompt(prompt).ids == list(expected)
    frame = encoder.evaluation_frame(PROMPTS["one"], "Four.")
    assert frame.prefix.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in frame.suffix


def test_a_vision_that_cannot_be_told_apart_cannot_be_left_alone(student, model, monkeypatch):
    monkeypatch.setattr("purld.model.load.vision_modules", lambda _: {})
    with pytest.raises(UserError, match=r"the vision modules of a \w+ cannot be identified"):
        make_trainable(student.model_copy(update={"train_vision": False}), model)
    make_trainable(student.model_copy(update={"train_vision": True}), model)


def test_another_preparation_of_a_picture_is_looked_at_anew(student, encoder, model):
    """The cached features of a frozen vision are those of pixels, not of a file."""
    model.requires_grad_(False)
    small = load_encoder(student.model_copy(update={"max_image_pixels": 64}))
    actual = []
    for one in (encoder, small):
        encoded = one.encode_prompt(PROMPTS["one"])
        actual.append(SharedPrefixes(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0])
        assert torch.allclose(
            actual[-1], FullSequences(model, [encoded], encoder.pad).token_log_probs(COMPLETIONS)[0], atol=1e-5
        )
    assert not torch.allclose(*actual, atol=1e-4)
