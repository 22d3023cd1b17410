"""A token that a base model has never learned ends greedy answers, and no sampled ones."""

import pytest
import torch

from purld.config.schema import Student
from purld.model.load import load_encoder, load_model
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


def test_what_follows_answers_is_measured_by_the_logits_there(student, encoder, examples):
    model = load_model(student, student.model)
    found = measure_turn_end(model, encoder, examples)
    expected = []
    for prompt, answer in examples:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt.ids, *answer[:-1]]])).logits[0, -1]
        expected.append((logits.argmax() == encoder.end, logits.softmax(-1)[encoder.end]))
    likeliest, probabilities = zip(*expected)
    assert found.token == encoder.tokenizer.convert_ids_to_tokens(encoder.end)
    assert found.likeliest == pytest.approx(sum(likeliest) / 2)
    assert found.probability == pytest.approx(sum(probabilities).item() / 2, rel=1e-4)


def test_answers_that_were_cut_or_are_empty_say_nothing(student, encoder, examples):
    prompt, answer = examples[0]
    assert (
        measure_turn_end(load_model(student, student.model), encoder, [(prompt, answer[:-1]), (prompt, [answer[-1]])])
        is None
    )


def test_an_end_that_others_share_is_told_where_greedy_answers_end(student, encoder, examples):
    """The head's rows of many tokens are those of the end: all get its probability, and the end is still the first."""
    model = load_model(student, student.model)
    head = model.get_output_embeddings().weight
    states = []
    model.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state[0, -1].detach()))
    measure_turn_end(model, encoder, examples)
    with torch.no_grad():
        head.zero_()
        head[: head.shape[0] // 2] = sum(states)
        head[encoder.end] = 1.001 * sum(states)
    found = measure_turn_end(model, encoder, examples)
    assert found.likeliest == 1 and found.probability < 0.1
    assert "after an anchor <|im_end|> is mostly" in found.warning and "student.chat_template" in found.warning


@pytest.mark.parametrize(("likeliest", "probability"), [(1.0, 0.9), (0.4, 0.05), (0.9, 0.3)])
def test_an_end_that_is_learned_or_is_not_greedy_either_is_not_warned_of(likeliest, probability):
    assert TurnEnd("<eos>", likeliest, probability).warning is None
