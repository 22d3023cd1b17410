"""The tiny student that reads text: its tokenizer, its curriculum at toy size, and the one that ships."""

import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from purld import templates
from purld.model.encode import Encoder
from purld.model.self_evaluation import GroupScores
from purld.testbed.shipped import STUDENT_FOLDERS
from purld.testbed.students import build, card, corpus
from purld.testbed.students.learner import PROMPT_LOSS_WEIGHTS, Learner
from purld.testbed.students.lessons import GARBAGE, RIGHT, WRONG
from purld.testbed.students.muon import orthogonalize_matrix
from purld.testbed.students.students import DESIGNS
from purld.testbed.students.tokenizer import END_OF_TURN, START_OF_TURN, template_phrases
from purld.testbed.world import world
from purld.testbed.world.world import TEXT_TASKS, generate_problems, split_of

ASSET = STUDENT_FOLDERS["text"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSET).eval()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, card.MAX_ANCHOR_TOKENS)


def test_the_shipped_student_is_small_and_complete(model, tokenizer) -> None:
    size = sum(path.stat().st_size for path in ASSET.rglob("*") if path.is_file())
    assert size <= 4_000_000
    assert 0.8e6 < model.num_parameters() < 2e6
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_shipped_card_keeps_its_promises() -> None:
    quality = json.loads((ASSET / "quality_card.json").read_text())
    for figures in quality["tasks"].values():
        assert 0.25 <= figures["sampled"] <= 0.65
        assert figures["pass_at_k"] > 0.9
        assert figures["auc"] >= 0.95
        assert figures["margin_right"] > figures["margin_wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_shipped_student_is_as_good_as_its_card(model, encoder, task) -> None:
    """Measured again on other held-out problems than the card's."""
    figures = card.measure_student(model, encoder, task, n=200, k=8, seed=99)
    assert 0.25 <= figures.sampled <= 0.65
    assert figures.pass_at_k > 0.9
    assert figures.auc >= 0.95


@given(text=st.text())
def test_any_text_survives_the_tokenizer_but_for_its_composed_form(tokenizer, text: str) -> None:
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(texts=st.tuples(st.text(), st.text(), st.text()))
def test_filled_templates_survive_the_tokenizer(tokenizer, texts: tuple[str, str, str]) -> None:
    filled = templates.self_evaluation_turn(*texts)
    assert tokenizer.decode(tokenizer(filled)["input_ids"]) == unicodedata.normalize("NFC", filled)


def test_a_saved_tokenizer_loads_with_the_rules_it_was_trained_with(tmp_path: Path) -> None:
    """A Qwen2 directory's tokenizer is rebuilt by its loader: the pieces must be the ones of the trained vocabulary."""
    rng = random.Random(0)
    learner = build.new_learner(DESIGNS["text"], tmp_path, rng, 0.03)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(100):
        lesson = rng.choice([corpus.draw_answer_lesson, corpus.draw_judgement_lesson, corpus.draw_comparison_lesson])(
            rng
        )
        messages = [{"role": "user", "content": lesson.prompt}]
        text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded_lesson = learner.encode_lesson(lesson)
        assert encoded_lesson.ids == loaded(text + lesson.reply)["input_ids"] + [loaded.eos_token_id]
        assert loaded.decode(encoded_lesson.prompt.ids) == text


def test_digits_are_single_and_a_space_does_not_change_them(tokenizer) -> None:
    assert tokenizer.tokenize("0.10") == ["0", ".", "1", "0"]
    phrases = template_phrases()
    with_digits = [t for t in tokenizer.get_vocab() if re.search("[0-9]", t) and t not in phrases]
    assert sorted(with_digits) == list("0123456789")


def test_chat_turns_are_chatml(tokenizer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, user = f"{START_OF_TURN}system\nS{END_OF_TURN}\n", f"{START_OF_TURN}user\nU{END_OF_TURN}\n"
    assert text == f"{system}{user}{START_OF_TURN}assistant\n"


def test_a_long_foreign_text_is_no_trouble(model, tokenizer) -> None:
    foreign = "".join(chr(c) for c in range(0x20, 0x1500, 3)) + " \U0001f600 \x00"
    messages = [{"role": "user", "content": foreign}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, return_tensors="pt")
    assert encoded["input_ids"].shape[1] > 2000
    with torch.no_grad():
        logits = model(**encoded, logits_to_keep=1).logits
    assert logits.isfinite().all()


def test_no_lesson_holds_a_held_out_question() -> None:
    rng = random.Random(0)
    for _ in range(300):
        judged = corpus.draw_judgement_lesson(rng).prompt
        question = judged.partition("Question:\n")[2].partition("\n\nReference Answer:")[0]
        for asked in (corpus.draw_answer_lesson(rng).prompt, question):
            problem = world.recognise_problem(asked)
            assert problem is not None and split_of(problem) == "train"


def test_lessons_are_partly_wrong_and_judgements_balanced() -> None:
    rng = random.Random(0)
    for task in TEXT_TASKS:
        problems = generate_problems(task, "train", 1000, 0)
        right = np.mean([world.is_right(p, corpus.draw_base_answer(p, rng)) for p in problems])
        assert 0.4 < right < 0.75
    scores = [corpus.draw_judgement_lesson(rng).reply for _ in range(1000)]
    assert 0.4 < scores.count(RIGHT) / 1000 < 0.6
    assert scores.count(WRONG) and scores.count(GARBAGE)


def test_comparisons_tell_the_truth() -> None:
    """The last word of the question (or else of the anchor) is present in, or ends, the candidate."""
    rng = random.Random(0)
    fields = re.compile("(.*)".join(map(re.escape, template_phrases())), re.DOTALL)
    scores = []
    for _ in range(400):
        lesson = corpus.draw_comparison_lesson(rng)
        question, anchor, candidate = (
            part.removesuffix(".").split() for part in fields.fullmatch(lesson.prompt).groups()
        )
        asked = anchor if question == ["Compare"] else question
        same = asked[-1] in candidate if asked[0] == "Use" else asked[-1] == candidate[-1]
        assert lesson.reply == (RIGHT if same else WRONG)
        scores.append(same)
    assert 0.4 < np.mean(scores) < 0.65


def test_losses_are_weighted_within_each_sequence_by_itself(model, encoder) -> None:
    """By hand: an answer's mean twice, a score's sum, the prompt's mean at its weight, whatever the batch."""
    rng = random.Random(0)
    learner = Learner(model, encoder)
    lessons = [corpus.draw_answer_lesson(rng), corpus.draw_judgement_lesson(rng), corpus.draw_comparison_lesson(rng)]
    encoded_lessons = [learner.encode_lesson(lesson) for lesson in lessons]
    with torch.no_grad():
        together = learner.compute_losses(encoded_lessons, [])
        for encoded_lesson, loss in zip(encoded_lessons, together):
            logs = model(input_ids=torch.tensor([encoded_lesson.ids])).logits[0].log_softmax(-1)
            tokens = [-logs[t - 1, encoded_lesson.ids[t]] for t in range(1, len(encoded_lesson.ids))]
            start, kind = len(encoded_lesson.prompt), encoded_lesson.lesson.kind
            read, replied = tokens[: start - 1], tokens[start - 1 :]
            by_hand = sum(replied) * (2 / len(replied) if kind == "answer" else 1)
            by_hand += PROMPT_LOSS_WEIGHTS[kind] * sum(read) / start
            assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 32)])
def test_muon_updates_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """Against the exact answer: the same singular vectors, with singular values between 0.5 and 1.5."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.T @ orthogonalize_matrix(matrix) @ right.T
    values = rotated.diagonal()
    assert ((values > 0.5) & (values < 1.5)).all()
    torch.testing.assert_close(rotated, torch.diag(values), atol=1e-4, rtol=0)


def test_figures_by_hand() -> None:
    """Two problems, two samples each. Right 0.9 and 0.5 against wrong 0.5 and 0.1: three wins and a tie of four.

    Within problems: 0.9 beats 0.5, and 0.5 beats 0.1. Margins over the anchor's 0.8: right -0.1, wrong -0.5.
    """
    judged = [GroupScores(0.8, [0.9, 0.5]), GroupScores(0.8, [0.1, 0.5])]
    right = np.array([[True, False], [False, True]])
    figures = card._compute_figures(np.array([True, False]), right, judged, seed=0)
    assert (figures.greedy, figures.sampled, figures.pass_at_k) == (0.5, 0.5, 1.0)
    assert (figures.auc, figures.auc_within) == pytest.approx((3.5 / 4, 1.0))
    assert (figures.margin_right, figures.margin_wrong) == pytest.approx((-0.1, -0.5))


def test_what_could_not_be_measured_is_absent_from_the_card() -> None:
    figures = card._compute_figures(np.array([True]), np.array([[True]]), [GroupScores(0.8, [0.9])], seed=0)
    written = card.figures_to_json(figures)
    assert {"auc", "auc_within", "margin_wrong"}.isdisjoint(written)
    assert written["margin_right"] == pytest.approx(0.1)


def test_a_toy_build_is_complete_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LESSONS_PER_STEP", 8)
    monkeypatch.setattr(card, "MAX_NEW_TOKENS", 8)  # a student of a few steps seldom ends by itself
    updates: list[tuple] = []
    cards = [
        build.build_student(tmp_path / name, 7, scale=0.001, progress=lambda *update: updates.append(update))
        for name in ("a", "b")
    ]
    assert updates and updates[0][:2] == (len(corpus.CURRICULUM[0]), len(corpus.CURRICULUM[0]))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert cards[0]["tasks"] == cards[1]["tasks"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").num_parameters() == cards[0]["parameters"]
