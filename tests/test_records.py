from hypothesis import given
from hypothesis import strategies as st

from purld.records import Message, Prompt, content_hash


def test_a_prompts_id_is_what_the_model_sees():
    prompt = Prompt.from_text("How many?", reference="4", metadata={"row": 1})
    assert prompt.id == Prompt.from_text("How many?").id
    assert prompt.id != Prompt.from_text("How many? ").id
    assert prompt.id != Prompt((Message("system", "How many?"),)).id
    assert prompt.id != Prompt.from_text("How many?", images=("a.png",)).id


@given(st.text(), st.text())
def test_prompts_round_trip(text, reference):
    prompt = Prompt.from_text(text, reference=reference, metadata={"k": text})
    again = Prompt.from_json(prompt.to_json())
    assert again == prompt
    assert again.metadata == prompt.metadata


def test_question_of_a_conversation_names_its_turns():
    prompt = Prompt((Message("system", "Be brief."), Message("user", "How many?")))
    assert prompt.question == "[system]\nBe brief.\n\n[user]\nHow many?"


def test_hash_is_canonical():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
