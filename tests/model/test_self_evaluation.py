"""The score: read off the logits as defined, parsed strictly, unscored when there is none."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from purld.model import self_evaluation
from purld.model.encode import Encoder
from purld.model.sample import Completion
from purld.model.self_evaluation import VERBAL_TOKENS, GroupTexts, SelfEvaluator, parse_score
from purld.records import Prompt

PROMPT = Prompt.from_text("How many?")
CANDIDATES = ["It is 4.", "Five of them, I believe.", "", "4"]


@pytest.fixture(scope="module")
def model(random_student):
    return AutoModelForCausalLM.from_pretrained(random_student).eval()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, max_anchor_tokens=64)


def expected_by_hand(model, encoder, tokenizer, candidate):
    """Two plain forward passes over the whole text, no cache, no padding, digits one by one."""
    frame = encoder.evaluation_frame(PROMPT, "It is 4.")
    ids = frame.prefix.ids + encoder.encode_literal(candidate) + frame.suffix
    zero, one, point = (tokenizer.convert_tokens_to_ids(t) for t in ("0", "1", "."))
    with torch.no_grad():
        first = model(input_ids=torch.tensor([ids])).logits[0, -1]
        second = model(input_ids=torch.tensor([[*ids, zero, point]])).logits[0, -1]
    p_zero, p_one = first[[zero, one]].softmax(0).tolist()
    digits = second[tokenizer.convert_tokens_to_ids(list("0123456789"))].softmax(0)
    return p_one + p_zero * sum(digit / 10 * p.item() for digit, p in enumerate(digits))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_expected_score_is_its_definition(model, encoder, tokenizer, batch_size):
    scores = SelfEvaluator(encoder, "expected", batch_size).score(model, PROMPT, "It is 4.", CANDIDATES)
    actual = [scores.anchor, *scores.candidates]
    by_hand = [expected_by_hand(model, encoder, tokenizer, c) for c in ["It is 4.", *CANDIDATES]]
    assert actual == pytest.approx(by_hand, abs=1e-5)
    assert all(0 <= score <= 1 for score in actual)


@pytest.mark.parametrize("kind", ["expected", "verbal"])
def test_several_groups_have_the_scores_of_each_alone(model, encoder, kind):
    groups = [
        GroupTexts(PROMPT, "It is 4.", CANDIDATES),
        GroupTexts(Prompt.from_text("Is it?"), "Yes, it is.", ["No."]),
        GroupTexts(Prompt.from_text("How many are there?"), None, ["One.", "None at all, as it seems."]),
    ]
    together = SelfEvaluator(encoder, kind, 100).score_groups(model, groups)
    for scores, g in zip(together, groups, strict=True):
        alone = SelfEvaluator(encoder, kind, 1).score(model, g.prompt, g.anchor, g.candidates)
        assert (scores.anchor is None) == (g.anchor is None or kind == "verbal")
        assert scores.candidates == pytest.approx(alone.candidates, abs=1e-5)
        assert scores.anchor == pytest.approx(alone.anchor, abs=1e-5)


def test_a_token_that_opens_every_text_comes_before_the_score(model, encoder, tokenizer, monkeypatch):
    """As with Llama 2's tokenizer: the score is read behind it."""
    opener = tokenizer.convert_tokens_to_ids("7")
    plain = encoder.encode_literal
    monkeypatch.setattr(encoder, "encode_literal", lambda text: [opener, *plain(text)])
    actual = SelfEvaluator(encoder, "expected", 4).score(model, PROMPT, "It is 4.", ["It is 5."])
    frame = encoder.evaluation_frame(PROMPT, "It is 4.")
    ids = [*frame.prefix.ids, *encoder.encode_literal("It is 5."), *frame.suffix, opener]
    zero, one, point = (tokenizer.convert_tokens_to_ids(t) for t in ("0", "1", "."))
    with torch.no_grad():
        p_zero, p_one = model(input_ids=torch.tensor([ids])).logits[0, -1][[zero, one]].softmax(0).tolist()
        after = model(input_ids=torch.tensor([[*ids, zero, point]])).logits[0, -1]
    digits = after[tokenizer.convert_tokens_to_ids(list("0123456789"))].softmax(0)
    expected = p_one + p_zero * sum(digit / 10 * p.item() for digit, p in enumerate(digits))
    assert actual.candidates[0] == pytest.approx(expected, abs=1e-5)


def test_the_anchor_as_candidate_scores_like_the_anchor(model, encoder):
    scores = SelfEvaluator(encoder, "expected", 16).score(model, PROMPT, "It is 4.", ["It is 4."])
    assert scores.candidates[0] == pytest.approx(scores.anchor, abs=1e-6)


REPLIES = [
    ("0.95", 0.95),
    (" 1.00\n", 1.0),
    ("1", 1.0),
    ("0", 0.0),
    (".5 because", 0.5),
    ("0.85.", 0.85),
    ("0.8\n\n0.9", 0.8),
    ("0.8 - good", 0.8),
    ("0.8 / 1.0", 0.8),
    ("Score: 0.8", 0.8),
    ("Scalar Score:0.25", 0.25),
    ("**Score:** 0.8", 0.8),
    ("final rating = .7", 0.7),
    ("**0.85**", 0.85),
    ("`0.7`", 0.7),
    ("The score is 0.5", None),
    ("1.5", None),
    ("10", None),
    ("2", None),
    ("-0.5", None),
    ("8/10", None),
    ("1/10", None),
    ("**1**/10", None),
    ("Score: 1 out of 5", None),
    ("1 (of 5)", None),
    ("1%", None),
    ("0,85", None),
    ("0.8 or 0.9", None),
    ("Score: 0.8-0.9", None),
    ("I would give 0.8", None),
    ("I would give 0.8 or 0.9", None),
    ("Answer: 1", None),
    ("", None),
    ("1.", 1.0),
    ("**1**\n", 1.0),
    ("**0.**", 0.0),
    ("1/1", 1.0),
    ("1 out of 1.0", 1.0),
    ("0\n\nIt names another number.", 0.0),
    ("1.\nIt is as good.", 1.0),
    ("Score: 1. It is as good.", 1.0),
    ("Score: 0 because it is wrong", 0.0),
    ("1.0 because it is right", 1.0),
    ("1. The candidate answer is wrong.", None),
    ("1) The answer is incorrect", None),
    ("**1.** The candidate", None),
    ("1.\n2. Two reasons", None),
    ("1.\n\n**2.** Two reasons", None),
    ("1: The candidate is", None),
    ("1 star out of 5", None),
    ("1-star", None),
    ("1 on a scale of 1 to 10", None),
    ("1 (10 is best)", None),
    ("1 in 10", None),
    ("1 — 10", None),
    ("1st the", None),
    ("0 errors", None),
    ("0 mistakes found", None),
    ("1, because both give 4", 1.0),
    ("0 because both differ", 0.0),
    ("1 (perfect match)", 1.0),
    ("1 — the same", 1.0),
    ("1; the same", 1.0),
    ("1, 2 and 3", None),
    ("1e-3", None),
    ("0.5e-3", None),
    ("Score: 1e-3", None),
]


@pytest.mark.parametrize(("reply", "score"), REPLIES)
def test_verbal_reply_opens_with_a_number_or_is_unscored(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize("reply", [*(reply for reply, _ in REPLIES), "0.8 to 0.9", "**1** (out of 10)", "1 and .5"])
def test_a_reply_that_is_cut_anywhere_has_its_score_or_none(reply):
    assert {parse_score(reply[:end], cut=True) for end in range(len(reply))} <= {parse_score(reply), None}


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("0.85 because", 0.85),
        ("**0.85**\n", 0.85),
        ("Score: 1. It", 1.0),
        ("0.8 / 1.0\n", 0.8),
        ("0.8 / 1.0", None),
        ("0.8", None),
        ("**0.8**", None),
        ("1 out of 1", None),
        ("1", None),
        ("1.\n\n", None),
        ("1.\n\nIt", 1.0),
        ("Score: 1e", None),
        ("0.8 \ufffd", None),  # the first bytes of a dash
    ],
)
def test_a_cut_reply_has_a_score_once_nothing_can_change_it(reply, score):
    assert parse_score(reply, cut=True) == score


class Said:
    """In the place of the evaluator's decoding: it says one text, up to the limit that it is given."""

    def __init__(self, encoder, text):
        self.ids = encoder.encode_literal(text)

    def __call__(self, model, encoder, prompts, count, decoding, *_):
        limit = decoding.max_new_tokens
        return [[Completion(self.ids[:limit], len(self.ids) < limit)] for _ in prompts]


@pytest.mark.parametrize(
    ("reply", "score"), [("0.85", 0.85), ("1/10", None), ("1 out of 10", None), ("0.85 because it is so", 0.85)]
)
def test_no_score_is_read_off_a_number_that_the_limit_cuts(reply, score, model, encoder, monkeypatch):
    """The reply begins further to the right each time, until the limit leaves nothing of it."""
    found = []
    for before in range(VERBAL_TOKENS + 1):
        monkeypatch.setattr(self_evaluation, "generate_completions", Said(encoder, "\n" * before + reply))
        found += SelfEvaluator(encoder, "verbal", 4).score(model, PROMPT, None, ["It is 4."]).candidates
    assert found[0] == score and found[-1] is None
    assert set(found) == {score, None}


def test_a_label_in_emphasis_and_its_number_fit_the_limit(model, encoder, monkeypatch):
    monkeypatch.setattr(self_evaluation, "generate_completions", Said(encoder, "**Score:** 0.9"))
    assert SelfEvaluator(encoder, "verbal", 4).score(model, PROMPT, None, ["It is 4."]).candidates == [0.9]


def test_verbal_score_of_a_model_that_writes_none_is_none(model, encoder):
    scores = SelfEvaluator(encoder, "verbal", 16).score(model, PROMPT, "It is 4.", CANDIDATES)
    assert len(scores.candidates) == len(CANDIDATES)
    assert scores.candidates[0] is None


def test_the_shipped_student_says_what_it_thinks(shipped_student, encoder):
    """Both kinds agree that the same answer in other words is right and another number wrong."""
    student = AutoModelForCausalLM.from_pretrained(shipped_student).eval()
    from purld.testbed.world.world import generate_problems, is_right, teacher_answer

    problem = next(p for p in generate_problems("counting", "heldout", 20, 5) if "/" not in p.truth)
    anchor = teacher_answer(problem)
    wrong = anchor.replace(problem.truth, str(int(problem.truth) + 1))
    assert not is_right(problem, wrong)
    for kind in ("expected", "verbal"):
        scores = SelfEvaluator(encoder, kind, 16).score(
            student, Prompt.from_text(problem.question), anchor, [anchor, wrong]
        )
        assert scores.candidates[0] > 0.8
        assert scores.candidates[1] < 0.4


@pytest.mark.parametrize("kind", ["expected", "verbal"])
def test_without_an_anchor_every_candidate_is_rated_on_its_own(random_student, encoder, kind):
    student = AutoModelForCausalLM.from_pretrained(random_student).eval()
    evaluator, prompt = SelfEvaluator(encoder, kind, 2), Prompt.from_text("How many?")
    together = evaluator.score(student, prompt, None, ["4", "It is 5.", "none"])
    alone = [evaluator.score(student, prompt, None, [text]).candidates[0] for text in ("4", "It is 5.", "none")]
    assert together.anchor is None
    assert together.candidates == pytest.approx(alone, abs=1e-5) if kind == "expected" else together.candidates == alone
