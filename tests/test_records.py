import pytest

from purld.records import IMAGE, Image, Message, Prompt, content_hash


def test_a_prompts_id_is_what_the_model_sees():
    prompt = Prompt.from_text("How many?", reference="4", metadata={"row": 1})
    assert prompt.id == Prompt.from_text("How many?").id
    assert prompt.id != Prompt.from_text("How many? ").id
    assert prompt.id != Prompt((Message("system", "How many?"),)).id
    assert prompt.id != Prompt.from_text(f"{IMAGE}How many?", images=(Image("a1", (8, 8)),)).id


def test_an_image_is_known_by_its_content_and_not_by_where_it_lies():
    first, second = (Image("a1", (8, 8), path=path) for path in ("a.png", "b.png"))
    assert first == second
    asked = [Prompt.from_text(f"{IMAGE}How many?", images=(image,), location=image.path) for image in (first, second)]
    assert asked[0].id == asked[1].id and asked[0] == asked[1]
    other = Prompt.from_text(f"{IMAGE}How many?", images=(Image("b2", (8, 8)),))
    moved = Prompt.from_text(f"How many?{IMAGE}", images=(first,))
    assert len({asked[0].id, other.id, moved.id}) == 3


@pytest.mark.parametrize("text", ["How many?", f"{IMAGE} and {IMAGE}"])
def test_every_image_has_its_place(text):
    with pytest.raises(ValueError, match=r"a prompt with 1 images has \d IMAGE marks"):
        Prompt.from_text(text, images=(Image("a1", (8, 8)),))


def test_question_of_a_conversation_names_its_turns():
    prompt = Prompt((Message("system", "Be brief."), Message("user", "How many?")))
    assert prompt.question == "[system]\nBe brief.\n\n[user]\nHow many?"


def test_hash_is_canonical():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
