"""The students that read images: their directories, their lessons, their curriculum at toy size, the shipped ones."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from purld.config.schema import Student
from purld.errors import UserError
from purld.model.encode import Encoder
from purld.model.load import load_encoder, load_model
from purld.model.processor import read_processor
from purld.model.vision import pixel_inputs
from purld.records import IMAGE, Prompt
from purld.runs.files import append_rows, read_rows
from purld.testbed.shipped import STUDENT_FOLDERS
from purld.testbed.students import build, card, scene_corpus
from purld.testbed.students.learner import PROMPT_LOSS_WEIGHTS, Learner, to_prompt_images
from purld.testbed.students.lessons import GARBAGE, RIGHT, WRONG, Phase
from purld.testbed.students.rounds import Rounds
from purld.testbed.students.students import DESIGNS
from purld.testbed.world import scene_image, world
from purld.testbed.world.scenes import draw_scene
from purld.testbed.world.world import SCENE_TASKS

SEEING = ("qwen2_5_vl", "llava")


@pytest.fixture(scope="module", params=SEEING)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def student(name: str) -> Student:
    return Student(model=str(STUDENT_FOLDERS[name]), max_anchor_tokens=card.MAX_ANCHOR_TOKENS)


@pytest.fixture(scope="module")
def encoder(student: Student) -> Encoder:
    return load_encoder(student)


@pytest.fixture(scope="module")
def model(student: Student):
    return load_model(student, student.model)


# --- shipped students ---------------------------------------------------------------------------------------------


def test_the_shipped_students_are_small_and_complete(model, encoder, name) -> None:
    assert 0.8e6 < model.num_parameters() < 1.1e6
    assert model.dtype == torch.float32
    assert AutoConfig.from_pretrained(STUDENT_FOLDERS[name]).model_type == name
    assert model.get_input_embeddings().num_embeddings == len(encoder.tokenizer)
    assert model.generation_config.eos_token_id == encoder.tokenizer.eos_token_id
    size = sum(path.stat().st_size for each in SEEING for path in STUDENT_FOLDERS[each].iterdir())
    assert size <= 8_000_000


def test_the_shipped_cards_keep_their_promises(name) -> None:
    quality = json.loads((STUDENT_FOLDERS[name] / "quality_card.json").read_text())
    assert quality["tasks"].keys() == set(SCENE_TASKS)
    for figures in quality["tasks"].values():
        assert 0.17 <= figures["sampled"] <= 0.6
        assert figures["sampled"] < figures["greedy"]
        assert figures["pass_at_k"] > 0.6
        assert figures["auc"] >= 0.95
        assert figures["auc_within"] >= 0.93
        assert figures["margin_right"] - figures["margin_wrong"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("task", SCENE_TASKS)
def test_the_shipped_student_is_as_good_as_its_card(model, encoder, task) -> None:
    """Measured again on other held-out problems than the card's."""
    figures = card.measure_student(model, encoder, task, n=200, k=8, seed=99)
    assert 0.12 <= figures.sampled <= 0.6
    assert figures.pass_at_k > 0.55
    assert figures.auc >= 0.9


def test_an_image_takes_a_token_a_cell_and_stands_where_the_chat_puts_it(encoder, name) -> None:
    """LLaVA puts a message's images before its text."""
    (image,) = to_prompt_images([scene_image.render_scene(draw_scene(random.Random(0)), random.Random(0))])
    encoded_prompt = encoder.encode_prompt(Prompt.from_text(f"Look: {IMAGE}What is at the top left?", images=(image,)))
    image_positions = [index for index, token in enumerate(encoded_prompt.ids) if token in encoder.placeholders]
    assert len(image_positions) == image_positions[-1] - image_positions[0] + 1 == 9
    before = encoder.tokenizer.decode(encoded_prompt.ids[: image_positions[0]])
    assert before.endswith("Look: <|vision_start|>" if name == "qwen2_5_vl" else "user\n")


def test_a_students_answers_depend_on_the_image(model, encoder) -> None:
    """The same question about two images: what is true of one is far more likely for that one."""
    scenes = [draw_scene(random.Random(seed)) for seed in range(2)]
    images = to_prompt_images([scene_image.render_scene(scene, random.Random(0)) for scene in scenes])
    likelihood = torch.zeros(2, 2)
    for row, image in enumerate(images):
        encoded_prompt = encoder.encode_prompt(Prompt.from_text(IMAGE + scene_corpus.CAPTION, images=(image,)))
        for column, scene in enumerate(scenes):
            reply = encoder.encode_literal(" ".join(f"There is a {t.name} at the {t.place}." for t in scene.things))
            ids = torch.tensor([[*encoded_prompt.ids, *reply]])
            with torch.no_grad():
                logs = model(input_ids=ids, **pixel_inputs([encoded_prompt], ids)).logits[0].log_softmax(-1)
            likelihood[row, column] = sum(logs[len(encoded_prompt) - 1 + n, token] for n, token in enumerate(reply))
    assert (likelihood.diag() > likelihood.flip(1).diag() + 5).all()


# --- lessons -----------------------------------------------------------------------------------------------------


def test_no_lesson_is_of_a_held_out_problem() -> None:
    rng = random.Random(0)
    for problem, image in scene_corpus.draw_problems(200, rng):
        assert world.split_of(problem) == "train"
        assert scene_image.recognise_scene(image) == problem.scene
    for _ in range(100):
        scene = draw_scene(rng)
        image = scene_image.render_scene(scene, rng)
        judged = scene_corpus.draw_judgement_lesson(scene, image, rng).prompt
        question = judged.partition("Question:\n")[2].partition("\n\nReference Answer:")[0]
        for asked in (scene_corpus.draw_answer_lesson(scene, image, 1.0, rng).prompt, question):
            problem = world.recognise_problem(asked, scene)
            assert problem is not None and world.split_of(problem) == "train"


def test_a_step_has_the_lessons_of_its_phase_and_few_images() -> None:
    rng = random.Random(0)
    for phase, expected in (
        (Phase("a", 1, judging=0.5, bare=1.0, captions=1.0), {"caption": 24, "comparison": 24}),
        (Phase("b", 1, judging=0.25), {"answer": 36, "judgement": 12}),
        (Phase("c", 1, judging=0.0, lookups=1.0), {"lookup": 48}),
    ):
        batch = scene_corpus.draw_lessons(phase, 48, [], rng)
        assert Counter(lesson.kind for lesson in batch) == expected
        assert len({id(lesson.image) for lesson in batch if lesson.image is not None}) == 12
        assert all((lesson.image is not None) == (IMAGE in lesson.prompt) for lesson in batch)


def test_judgements_and_comparisons_are_balanced_and_true() -> None:
    rng = random.Random(0)
    scores = {"judgement": [], "comparison": []}
    for _ in range(600):
        scene = draw_scene(rng)
        image = scene_image.render_scene(scene, rng)
        for lesson in (
            scene_corpus.draw_judgement_lesson(scene, image, rng),
            scene_corpus.draw_comparison_lesson(scene, image, rng),
        ):
            scores[lesson.kind].append(lesson.reply)
            candidate = lesson.prompt.partition("Candidate Answer:\n")[2].partition("\n\nScalar")[0]
            if f"{IMAGE}Look." in lesson.prompt:
                (claim,) = scene_corpus.seeing.parse_claims(candidate) or [None]
                assert claim is not None and lesson.reply == (RIGHT if claim.is_true_of(scene) else WRONG)
    for replies in scores.values():
        assert 0.4 < replies.count(RIGHT) / len(replies) < 0.65
    assert scores["judgement"].count(GARBAGE)


def test_losses_are_those_of_the_model_on_its_own_inputs(model, encoder) -> None:
    """By hand, with each lesson's image given to the model as pixels; placeholders are never predicted."""
    rng = random.Random(0)
    learner = Learner(model, encoder)
    scenes = [draw_scene(rng) for _ in range(2)]
    images = [scene_image.render_scene(scene, rng) for scene in scenes]
    lessons = [
        scene_corpus.draw_answer_lesson(scenes[0], images[0], 1.0, rng),
        scene_corpus.draw_judgement_lesson(scenes[1], images[1], rng),
        scene_corpus.draw_caption_lesson(scenes[0], images[0], rng),
    ]
    encoded_lessons = [learner.encode_lesson(lesson) for lesson in lessons]
    with torch.no_grad():
        features = learner.image_features(images)
        together = learner.compute_losses(
            encoded_lessons, [features[images.index(encoded_lesson.lesson.image)] for encoded_lesson in encoded_lessons]
        )
        for encoded_lesson, loss in zip(encoded_lessons, together):
            encoded_prompt = encoder.encode_prompt(
                Prompt.from_text(
                    encoded_lesson.lesson.prompt, images=tuple(to_prompt_images([encoded_lesson.lesson.image]))
                )
            )
            assert encoded_prompt.ids == encoded_lesson.prompt.ids
            ids = torch.tensor([encoded_lesson.ids])
            logs = model(input_ids=ids, **pixel_inputs([encoded_prompt], ids)).logits[0].log_softmax(-1)
            start, kind = len(encoded_prompt), encoded_lesson.lesson.kind
            read = [-logs[t - 1, i] for t, i in enumerate(encoded_prompt.ids) if t and i not in encoder.placeholders]
            replied = [-logs[t - 1, encoded_lesson.ids[t]] for t in range(start, len(encoded_lesson.ids))]
            by_hand = (
                sum(replied) * (1 if encoded_lesson.lesson.judging else 2 / len(replied))
                + PROMPT_LOSS_WEIGHTS[kind] * sum(read) / start
            )
            assert loss.item() == pytest.approx(by_hand.item(), rel=1e-3)


def test_the_gradient_of_a_batch_is_that_of_its_mean_loss(model, encoder) -> None:
    """The tower's too, although it is passed once for all parts."""
    rng = random.Random(1)
    learner = Learner(model, encoder)
    batch = scene_corpus.draw_lessons(Phase("x", 1, judging=0.5, bare=0.5, captions=0.3), 12, [], rng)
    model.zero_grad()
    learner.accumulate_gradients(batch, 3)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    encoded_lessons = [learner.encode_lesson(lesson) for lesson in batch]
    images = [
        encoded_lesson.lesson.image for encoded_lesson in encoded_lessons if encoded_lesson.lesson.image is not None
    ]
    learner.compute_losses(encoded_lessons, list(learner.image_features(images))).mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[parameter_name], parameter.grad, atol=2e-5, rtol=1e-3)
    model.zero_grad()


# --- building ----------------------------------------------------------------------------------------------------


# A quarter of a minute each; the second architecture differs in its configuration alone.
BOTH_BUILT = pytest.mark.parametrize(
    "name", ["qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow)], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def few_lessons() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_corpus, "LESSONS_PER_STEP", 12)
        patch.setattr(card, "MAX_NEW_TOKENS", 8)  # a student of a few steps seldom ends by itself
        yield


@pytest.fixture(scope="module")
def toy(name: str, few_lessons: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(name) / "toy"
    build.build_student(path, 7, scale=0.001, student=name)
    return path


@BOTH_BUILT
def test_a_toy_build_is_complete(toy: Path, name: str) -> None:
    assert [path.name for path in toy.parent.iterdir()] == ["toy"]
    assert {p.name for p in STUDENT_FOLDERS[name].iterdir()} == {p.name for p in toy.iterdir()} - {"build_log.jsonl"}
    rows = read_rows(toy / "build_log.jsonl")
    assert [row["phase"] for row in rows] == ["look", "find one of five", "settle", "settle again"]
    assert rows[-1]["step"] == rows[-1]["of"] and len({row["of"] for row in rows}) == 1
    model = AutoModelForImageTextToText.from_pretrained(toy)
    assert model.num_parameters() == json.loads((toy / "quality_card.json").read_text())["parameters"]
    marks = {"qwen2_5_vl": "<|image_pad|>", "llava": "<image>"}
    assert read_processor(str(toy)).image_token == marks[name]


@BOTH_BUILT
def test_a_build_is_repeatable_and_one_that_was_stopped_goes_on_after_its_last_round(
    toy: Path, name: str, tmp_path: Path
) -> None:
    """Stopped in the second round, then once more just before it is moved to `out`: the same files."""
    out, updates = tmp_path / "stopped", []

    def stop_at_settle(done: int, total: int, note: str) -> None:
        if note.startswith("settle:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build_student(out, 7, scale=0.001, student=name, progress=stop_at_settle)
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "publish_build", lambda self: stop_at_settle(0, 0, "settle:"))
        with pytest.raises(KeyboardInterrupt):
            build.build_student(out, 7, scale=0.001, student=name, progress=lambda *update: updates.append(update))
    assert [note.partition(":")[0] for _, _, note in updates] == ["settle", "settle again"]
    updates.clear()
    build.build_student(out, 7, scale=0.001, student=name, progress=lambda *update: updates.append(update))
    assert not updates
    for file_name in ("model.safetensors", "tokenizer.json"):
        assert (out / file_name).read_bytes() == (toy / file_name).read_bytes()
    cards = [json.loads((path / "quality_card.json").read_text()) for path in (out, toy)]
    assert cards[0]["tasks"] == cards[1]["tasks"] and cards[0]["steps"] == cards[1]["steps"]
    rows, expected = (read_rows(path / "build_log.jsonl") for path in (out, toy))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in toy.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]


def test_rounds_are_kept_with_the_rows_before_them(tmp_path: Path) -> None:
    rounds, model, again = Rounds(tmp_path / "out", "a" * 64), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    append_rows(rounds.log, [{"seconds": 3.0}])
    assert rounds.restore_weights(again) == 0 and rounds.elapsed_seconds() == 0.0
    append_rows(rounds.log, [{"seconds": 3.0}])
    rounds.save_weights(model, 1)
    append_rows(rounds.log, [{"seconds": 5.0}])
    assert rounds.restore_weights(again) == 1 and torch.equal(again.weight, model.weight)
    assert rounds.elapsed_seconds() == 3.0


def test_another_build_has_other_weights_and_one_builds_at_a_time(tmp_path: Path) -> None:
    hashes = {
        build.build_hash(*arguments)
        for arguments in (("llava", 0, 1.0), ("llava", 1, 1.0), ("llava", 0, 0.5), ("text", 0, 1.0))
    }
    assert len({Rounds(tmp_path / "out", each).folder for each in hashes}) == 4
    assert build.build_hash("llava", 0, 1.0) in hashes
    with Rounds(tmp_path / "out", "another").lock(), pytest.raises(UserError, match="another purld process"):
        build.build_student(tmp_path / "out", 0, 1.0)


def make_complete_build(out: Path, content: str) -> Rounds:
    rounds = Rounds(out, content * 64)
    with rounds.lock():
        append_rows(rounds.log, [{"seconds": 3.0}])
        rounds.save_weights(torch.nn.Linear(2, 2), 1)
    return rounds


@pytest.mark.parametrize("moves", [0, 1], ids=["before the old one is moved", "before the new one is"])
def test_a_complete_build_takes_the_place_of_the_old_one_whenever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out, sibling = tmp_path / "out", tmp_path / ".out.v2.build"
    sibling.mkdir()
    out.mkdir()
    (out / "old file").touch()
    make_complete_build(out, "b")  # another build, stopped earlier
    rounds, done = make_complete_build(out, "a"), []

    def replace(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        source.rename(target)

    with monkeypatch.context() as patch, rounds.lock(), pytest.raises(KeyboardInterrupt):
        patch.setattr("purld.testbed.students.rounds.os.replace", replace)
        rounds.publish_build()
    again = torch.nn.Linear(2, 2)
    with rounds.lock():
        assert [path.name for path in out.iterdir()] == ["old file"]
        assert rounds.restore_weights(again) == 1
        rounds.publish_build()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.v2.build", "out"]
    assert [path.name for path in out.iterdir()] == ["build_log.jsonl"]


def test_a_student_that_sees_starts_as_the_one_that_reads(name: str, tmp_path: Path) -> None:
    learner = build.new_learner(DESIGNS[name], tmp_path, random.Random(0), 0.1)
    reader = load_model(Student(model=str(STUDENT_FOLDERS["text"])), STUDENT_FOLDERS["text"])
    texts = load_encoder(Student(model=str(STUDENT_FOLDERS["text"])))
    layers = learner.model.get_decoder().layers.state_dict()
    assert all(torch.equal(value, layers[key]) for key, value in reader.model.layers.state_dict().items())
    (mine,), (theirs,) = (e.encode_literal("1") for e in (learner.encoder, texts))
    for embeddings in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(
            getattr(learner.model, embeddings)().weight[mine], getattr(reader, embeddings)().weight[theirs]
        )


def test_a_student_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="students are text, qwen2_5_vl, llava"):
        build.build_student(tmp_path / "out", student="bert")
    assert not list(tmp_path.iterdir())
