"""The domain of images: what is rendered is recognised, and every statement is checked against the pixels."""

import base64
import io
import json
import random
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from purld import templates
from purld.config.schema import Data
from purld.data.files import FileRow
from purld.data.images import open_image, read_image
from purld.data.prompts import parse_prompt
from purld.records import IMAGE, Prompt
from purld.tasks.checks import find_check
from purld.testbed.server import JUDGE, TEACHER, UNKNOWN_QUESTION, TestbedServer
from purld.testbed.students.scene_corpus import draw_base_answer, draw_near_miss
from purld.testbed.world import scene_image, seeing, world
from purld.testbed.world.claims import parse_claims
from purld.testbed.world.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, draw_scene
from purld.testbed.world.world import SCENE_TASKS, Problem

SEEDS = st.integers(0, 2**32)
RED, BLUE, GREEN = Thing("red", "circle", "top left"), Thing("blue", "ring", "middle center"), None
SCENE = Scene((RED, BLUE, Thing("red", "cross", "bottom right")))
MC = "Question: What colour is the ring?\nOptions: (0) red (1) blue (2) green (3) black"


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem of either task and split."""
    return world.draw_problem(draw(st.sampled_from(SCENE_TASKS)), random.Random(draw(SEEDS)))


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_what_is_drawn_is_read_after_any_lossless_encoding(form: str) -> None:
    rng = random.Random(form)
    for _ in range(150):
        scene = draw_scene(rng)
        buffer = io.BytesIO()
        scene_image.render_scene(scene, rng).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
        assert scene_image.recognise_scene(Pil.open(buffer)) == scene


def test_every_shape_is_read_in_every_colour_size_and_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for size in scene_image._SIZES:
        monkeypatch.setattr(scene_image, "_SIZES", [size])
        for number, shape in enumerate(SHAPES):
            things = [Thing(COLOURS[(i + number) % len(COLOURS)], shape, place) for i, place in enumerate(PLACES)]
            assert scene_image.recognise_scene(scene_image.render_scene(Scene(tuple(things)), rng)) == Scene(
                tuple(things)
            )


def test_what_is_no_scene_is_not_read() -> None:
    drawn = scene_image.render_scene(SCENE, random.Random(0))
    blurred = io.BytesIO()
    drawn.save(blurred, "JPEG", quality=60)
    dotted = drawn.copy()
    dotted.putpixel((90, 30), (1, 2, 3))
    others = [
        drawn.resize((96, 96)),
        drawn.rotate(45),
        Pil.open(blurred),
        dotted,
        scene_image.render_scene(Scene(()), random.Random(0)),
        Pil.new("L", drawn.size),
    ]
    assert [scene_image.recognise_scene(other) for other in others] == [None] * len(others)


# --- what sentences claim ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("There is a red circle at the top left.", [(RED,)]),
        ("The circle at the top left is red. I also see a blue ring at the middle center.", [(RED,), (BLUE,)]),
        ("It is a circle, because the red shape at the top left is a circle.", [(RED,)]),
        ("I see a red circle at the top left and a blue ring at the middle center.", [(RED, BLUE)]),
    ],
)
def test_claims_are_read_word_for_word(text: str, things: list[tuple[Thing, ...]]) -> None:
    claims = parse_claims(text)
    assert claims is not None
    assert [claim.things for claim in claims] == things


@pytest.mark.parametrize("text", ["", "Red.", "The circle is nice.", "There is a red circle at the top left"])
def test_what_cannot_be_checked_is_no_claim(text: str) -> None:
    assert parse_claims(text) is None


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        ("Where is the blue ring?", "The blue ring is at the middle center.", True),
        ("Where is the blue ring?", "The blue ring is at the middle left.", False),
        ("Where is the blue ring?", "There is a red circle at the top left.", False),
        ("Where is the blue ring?", "It is at the top left, because the blue ring is at the middle center.", False),
        ("What colour is the ring?", "There is a blue ring at the middle center.", True),
        (
            "What colour is the ring?",
            "There is a blue ring at the middle center. I also see a red cross at the bottom right.",
            True,
        ),
        (
            "What colour is the ring?",
            "There is a blue ring at the middle center. I also see a red ring at the bottom right.",
            False,
        ),
        (
            "How many red shapes are there?",
            "I count two red shapes: a red circle at the top left and a red cross at the bottom right.",
            True,
        ),
        ("How many red shapes are there?", "There is one red shape, a red circle at the top left.", False),
        (
            "How many red shapes are there?",
            "There are two red shapes, a red circle at the top left and a red circle at the top left.",
            False,
        ),
        ("How many red shapes are there?", "There is a red circle at the top left.", False),
    ],
)
def test_a_rationale_is_right_if_all_it_says_is_true_and_it_says_what_was_asked(
    question: str, answer: str, right: bool
) -> None:
    asked = seeing.parse_question(f"Question: {question}", SCENE)
    assert asked is not None
    assert seeing.is_right(asked, answer) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The answer is blue.", True),
        ("the answer is (1) blue", True),
        ("Blue.", True),
        ("The ring is blue, so the answer is blue.", True),
        ("The ring is blue, so the answer is red.", False),
        ("The answer is purple.", False),
        ("Red or blue.", False),
        ("I do not know.", False),
        ("The answer is blue or red.", False),
    ],
)
def test_a_choice_is_what_an_answer_commits_itself_to(answer: str, right: bool) -> None:
    asked = seeing.parse_question(MC, SCENE)
    assert asked is not None
    assert seeing.is_right(asked, answer) == right


@pytest.mark.parametrize(
    "question",
    [
        "Question: What colour is the square?",  # there is none
        "Question: Which shape is red?",  # there are two
        "Question: What is at the top right?",  # nothing is
        "Question: Who are you?",
        "What colour is the ring?",
        "Question: What colour is the ring?\nOptions: (0) red (1) green",  # the right one is missing
    ],
)
def test_what_has_no_one_answer_is_no_question(question: str) -> None:
    assert seeing.parse_question(question, SCENE) is None


# --- the world's promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", SCENE_TASKS)
def test_splits_are_disjoint_distinct_and_repeatable(task: world.Task) -> None:
    def content(problem: Problem) -> tuple:
        return problem.question, problem.scene

    train = [content(p) for p in world.generate_problems(task, "train", 800, 1)]
    held_out = [content(p) for p in world.generate_problems(task, "heldout", 300, 2)]
    assert len(set(train)) == 800
    assert not set(train) & set(held_out)
    assert train == [content(p) for p in world.generate_problems(task, "train", 800, 1)]


def test_every_family_occurs() -> None:
    for task in SCENE_TASKS:
        found = {p.family for p in world.generate_problems(task, "heldout", 200, 0)}
        assert found == {*seeing.FAMILIES, seeing.COUNT}


@given(problems())
def test_a_question_reads_back_and_its_teacher_is_right(problem: Problem) -> None:
    prompt = world.to_prompt(problem)
    assert scene_image.recognise_scene(open_image(prompt.images[0])) == problem.scene
    assert world.recognise_problem(problem.question, problem.scene) == problem
    answer = world.teacher_answer(problem)
    assert answer == world.teacher_answer(problem)
    assert world.check_answer(prompt, answer)
    assert world.answer_quality(problem, answer) >= 1


@given(problems(), SEEDS)
def test_every_right_wording_passes_and_every_mistake_fails(problem: Problem, seed: int) -> None:
    rng = random.Random(seed)
    for text in seeing.list_phrasings(problem.scene_question()):
        assert world.is_right(problem, text)
    assert world.is_right(problem, world.right_answer(problem, rng))
    miss = draw_near_miss(problem, rng)
    assert not world.is_right(problem, miss)
    assert world.answer_quality(problem, miss) == 0
    if problem.scene_question().options:
        assert problem.truth in problem.scene_question().options


def test_the_base_errs_as_often_as_it_shall() -> None:
    rng = random.Random(0)
    for task in SCENE_TASKS:
        problems = world.generate_problems(task, "train", 600, 0)
        assert 0.5 < sum(world.is_right(p, draw_base_answer(p, rng)) for p in problems) / 600 < 0.7
        assert all(world.is_right(p, draw_base_answer(p, rng, errors=0.0)) for p in problems[:50])


def test_the_check_knows_its_prompts_by_their_pixels() -> None:
    """The same question about another image has another answer, and none if the image does not fit it."""
    check = find_check(Data(prompts="x", check="testbed"))
    assert check is not None
    other = Scene((Thing("green", "ring", "top left"),))
    for scene, right in ((SCENE, True), (other, False)):
        shown = read_image(scene_image.encode_png(scene_image.render_scene(scene, random.Random(3))), Path())
        prompt = Prompt.from_text(f"{IMAGE}Question: Where is the blue ring?", images=(shown,))
        if right:
            assert check(prompt, "The blue ring is at the middle center.")
        else:
            with pytest.raises(world.UserError, match="not a question of the testbed's world"):
                check(prompt, "The blue ring is at the middle center.")


def test_written_prompts_load_as_they_are_asked(tmp_path: Path) -> None:
    problems = [p for task in SCENE_TASKS for p in world.generate_problems(task, "train", 5, 0)]
    world.write_prompts(tmp_path / "prompts.jsonl", problems)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    for problem, line in zip(problems, lines, strict=True):
        prompt = parse_prompt(FileRow("here", json.loads(line)), Data(prompts="x").columns, tmp_path)
        assert prompt.id == world.to_prompt(problem).id
        assert prompt.reference == problem.truth
        assert prompt.metadata == {"task": problem.task, "family": problem.family}


# --- teacher and judge -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    with (
        TestbedServer(api_key="secret") as server,
        openai.OpenAI(base_url=server.base_url, api_key="secret", max_retries=0) as opened,
    ):
        yield opened


def url_of(scene: Scene, form: str = "png") -> str:
    buffer = io.BytesIO()
    scene_image.render_scene(scene, random.Random(1)).save(buffer, form)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(client: openai.OpenAI, model: str, text: str, *urls: str) -> str | None:
    """Return the reply to a message whose images are at its IMAGE marks."""
    first, *rest = text.split(IMAGE)
    parts: list = [{"type": "text", "text": first}]
    for url, words in zip(urls, rest, strict=True):
        parts += [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(model=model, messages=messages).choices[0].message.content


def test_the_teacher_reads_the_image_it_is_sent(client) -> None:
    said = ask(client, TEACHER, IMAGE + MC, url_of(SCENE))
    problem = world.recognise_problem(IMAGE + MC, SCENE)
    assert problem is not None and said == world.teacher_answer(problem)
    assert "blue" in said


@pytest.mark.parametrize(
    "url",
    [
        url_of(SCENE, "jpeg"),
        "data:image/png;base64,AAAA",
        "data:image/png;base64,?",
        "https://example.com/picture.png",
        "/etc/passwd",
    ],
)
def test_an_image_that_cannot_be_read_is_no_question(client, url: str) -> None:
    assert ask(client, TEACHER, IMAGE + MC, url) == UNKNOWN_QUESTION


def test_no_image_and_two_images_are_no_question(client) -> None:
    assert ask(client, TEACHER, MC) == UNKNOWN_QUESTION
    assert ask(client, TEACHER, IMAGE + IMAGE + MC, url_of(SCENE), url_of(SCENE)) == UNKNOWN_QUESTION


def test_the_judge_prefers_what_the_image_bears_out(client) -> None:
    question = f"{IMAGE}Question: Where is the blue ring?"
    right, wrong = "The blue ring is at the middle center.", "The blue ring is at the top left."
    because = "It is at the middle center, because the blue ring is at the middle center."
    for a, b, verdict in ((right, wrong, "A"), (wrong, right, "B"), (wrong, wrong, "T"), (right, because, "B")):
        assert ask(client, JUDGE, templates.judge_turn(question, "middle center", a, b), url_of(SCENE)) == verdict
    moved = Scene((Thing("blue", "ring", "top left"),))
    assert ask(client, JUDGE, templates.judge_turn(question, "", right, wrong), url_of(moved)) == "B"


def test_the_teacher_scores_an_answer_about_an_image(client) -> None:
    question = f"{IMAGE}Question: Where is the blue ring?"
    for answer, score in (("The blue ring is at the middle center.", "0.50"), ("The blue ring is red.", "0.00")):
        assert ask(client, TEACHER, templates.rating_turn(question, answer), url_of(SCENE)) == score
