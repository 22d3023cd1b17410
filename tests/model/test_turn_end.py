"""A token that a base model has never learned ends greedy answers, and no sampled ones."""

import pytest
import torch

from purld.config.schema import Student
from purld.model.load import load_encoder, load_model
from purld.model.sample import end_tokens
from purld.model.turn_end import TurnEnd, measure_turn_end
from purld.records import Prompt


@pytest.fixture(scope="module")
def student(random_student):
    return Student(model=str(random_student), max_prompt_tokens=256, max_anchor_tokens=128)


@pytest.fixture(scope="module")
def encoder(student):
    return load_encoder(student)


@pytest.fixture(scope="module")
def examples(encoder):
    texts = (("What is 2 + 3?", "2 + 3 = 5."), ("And 4 + 4?", "8"))
    return [(encoder.encode_prompt(Prompt.from_text(x)), encoder.encode_answer(y).ids) for x, y in texts]


def test_what_follows_answers_is_measured_where_an_end_is_likeliest(student, encoder, examples):
    """The head is turned toward the end after the first answer only."""
    model = load_model(student, student.model)
    prompt, answer = examples[0]
    before = torch.tensor([[*prompt.ids, *answer[:-1]]])
    with torch.no_grad():
        state = model.base_model(before).last_hidden_state[0, -1]
        head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
        head.weight.copy_(model.lm_head.weight)
        head.weight[encoder.end] = 3 * state
        model.lm_head = head
        expected = model(before).logits[0, -1].softmax(-1)
    found = measure_turn_end(model, encoder, examples)
    assert found.token == encoder.tokenizer.convert_ids_to_tokens(encoder.end) and found.answers == 2
    assert found.probabilities[0] == pytest.approx(
        sum(expected[t].item() for t in end_tokens(model, encoder)), rel=1e-4
    )


def test_answers_that_were_cut_or_are_empty_say_nothing(student, encoder, examples):
    model, (prompt, answer) = load_model(student, student.model), examples[0]
    nothing = [(prompt, answer[:-1]), (prompt, answer[-1:])]
    assert measure_turn_end(model, encoder, nothing) is None
    assert measure_turn_end(model, encoder, [*nothing * 20, examples[1]]).answers == 1


def test_an_end_that_others_share_is_told_where_greedy_answers_end(student, encoder, examples):
    """The head's rows of many tokens are nearly those of the end: they share its probability, and it is still first."""
    model = load_model(student, student.model)
    with torch.no_grad():
        states = [
            model.base_model(torch.tensor([[*p.ids, *answer[:-1]]])).last_hidden_state[0, -1] for p, answer in examples
        ]
        head = model.get_output_embeddings().weight
        head.zero_()
        head[: head.shape[0] // 2] = sum(states)
        head[encoder.end] = 1.001 * sum(states)
    found = measure_turn_end(model, encoder, examples)
    assert len(found.probabilities) == 2 and max(found.probabilities) < 0.1
    assert "after 2 of 2 anchors '<|im_end|>' is" in found.warning and "student.chat_template" in found.warning


@pytest.mark.parametrize("probabilities", [[0.9, 0.9, 0.8, 0.9], [0.05], [0.3, 0.3, 0.3], [0.39, 0.39], []])
def test_an_end_that_is_learned_or_is_not_greedy_either_is_not_warned_of(probabilities):
    assert TurnEnd("<eos>", probabilities, answers=4).warning is None
