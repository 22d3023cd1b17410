"""A device that runs out of memory while it samples or scores: less is done at once, and the results are the same."""

import contextlib

import pytest
import torch

from purld.config.methods import LdlGrpo
from purld.config.schema import Student
from purld.errors import UserError
from purld.model import at_once, likelihood, sample, self_evaluation
from purld.model.load import Roles, load_encoder, load_model
from purld.model.sample import Decoding, GenerateSampler
from purld.records import Prompt
from purld.training.scoring import GroupToScore, ScorerContext, find_scorer

TEXTS = ["How many are 2 and 3?", "Name a number between seven and eleven.", "One?", "How many apples?", "Two?"]
GROUP = GroupToScore(Prompt.from_text(TEXTS[0]), "It is 5.", ["5.", "It is 6.", "Six", "7", "I do not know."])


@pytest.fixture(scope="module")
def encoder(random_student):
    return load_encoder(Student(model=str(random_student)))


@pytest.fixture(scope="module")
def model(random_student):
    return load_model(Student(model=str(random_student)), str(random_student)).eval()


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Leave the tests' own garbage alone, which takes a second a time to look through."""
    monkeypatch.setattr(at_once, "release_memory", lambda: None)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
ERRORS = [OUT_OF_MEMORY, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]


def limit(monkeypatch, owner, name, rows, room, error=OUT_OF_MEMORY):
    """Let a function run out of memory for more than `room` rows; return the numbers that it was called with."""
    tried, whole = [], getattr(owner, name)

    def limited(*args, **kwargs):
        tried.append(rows(*args, **kwargs))
        if tried[-1] > room:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)
    return tried


@pytest.mark.parametrize(("temperature", "error"), zip([0.0, 1.0], ERRORS, strict=True))
def test_answers_are_drawn_for_fewer_prompts(temperature, error, encoder, model, monkeypatch):
    prompts, seeds = [encoder.encode_prompt(Prompt.from_text(text)) for text in TEXTS], list(range(5))
    sampler = GenerateSampler(encoder, Decoding(temperature, 6))
    expected = sampler(model, prompts, 2, seeds)
    with monkeypatch.context() as patch:
        tried = limit(patch, sample, "generate_completions", lambda m, e, prompts, *_, **__: len(prompts), 1, error)
        with pytest.warns(UserWarning) as warned:
            assert sampler(model, prompts, 2, seeds) == expected
        assert [str(w.message) for w in warned] == [
            f"out of the device's memory: from here on answers are drawn for fewer prompts at once ({size})."
            for size in (2, 1)
        ]
        assert tried == [5, 2, *[1] * 5]
        assert sampler(model, prompts[:2], 2, seeds[:2]) == expected[:2]
        assert tried[7:] == [1, 1], "what was found stays"
    limit(monkeypatch, sample, "generate_completions", lambda *_, **__: 1, 0)
    with pytest.raises(UserError, match=r"too small to draw the answers to one prompt at once; lower align.candidates"):
        sampler(model, prompts, 2, seeds)


@pytest.mark.parametrize(
    ("score", "owner", "name"),
    [
        ("expected", self_evaluation, "plan_passes"),
        ("verbal", self_evaluation, "micro_batches"),
        ("in_context", likelihood, "group_log_probs"),
        ("reference", likelihood, "group_log_probs"),
    ],
)
def test_fewer_candidates_are_scored(score, owner, name, encoder, model, monkeypatch):
    settings = LdlGrpo(score=score, score_batch_size=8)
    context = ScorerContext(encoder, Roles(model, model), settings, True, contextlib.nullcontext)
    (expected,) = find_scorer(score).make(context)([GROUP])
    scorer = find_scorer(score).make(context)
    with monkeypatch.context() as patch:
        tried = limit(patch, owner, name, lambda *args, **_: args[-1], 1)  # the rows that it may work on at once
        with pytest.warns(UserWarning) as warned:
            (scores,) = scorer([GROUP])
    assert tried[:3] == [6, 3, 1] and set(tried[3:]) <= {1}
    assert [str(w.message) for w in warned if "of the device" in str(w.message)] == [
        f"out of the device's memory: from here on fewer candidates are scored at once ({size})." for size in (3, 1)
    ]
    for found, known in zip(scores.candidates, expected.candidates, strict=True):
        assert found == known if known is None else found == pytest.approx(known, abs=1e-5)
    limit(monkeypatch, owner, name, lambda *_, **__: 1, 0)
    with pytest.raises(UserError, match=r"too small to score one candidate at a time; lower student.max_prompt_tokens"):
        scorer([GROUP])


def test_another_error_is_not_tried_again(encoder, model, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    tried = limit(monkeypatch, sample, "generate_completions", lambda *_, **__: 1, 0, error)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        GenerateSampler(encoder, Decoding(1.0, 6))(model, [encoder.encode_prompt(GROUP.prompt)], 2, [1])
    assert tried == [1]
