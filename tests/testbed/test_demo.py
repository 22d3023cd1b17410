"""The setup of a demo: its files, its student, and the arguments that it refuses."""

from collections import Counter
from pathlib import Path

import pytest

from purld.errors import UserError
from purld.model.load import load_encoder
from purld.pipeline.prompt_pools import load_prompt_pools
from purld.testbed import demo
from purld.testbed.demo import prepare_demo
from purld.testbed.shipped import DEMOS, STUDENT_FOLDERS, demo_problems, students_of
from purld.testbed.world.world import to_prompt


@pytest.mark.parametrize("student", [None, "llava"])
def test_the_demo_of_scenes_asks_both_tasks_of_one_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str | None
) -> None:
    monkeypatch.setattr(demo, "TRAIN_PROMPTS", 24)  # a tenth of the pictures
    monkeypatch.setattr(demo, "HELD_OUT_PROMPTS", 20)
    with prepare_demo("scenes", tmp_path / "run", ["seed=3"], student) as (config, run):
        assert run.path == tmp_path / "run"
        assert Path(config.student.model) == STUDENT_FOLDERS[student or "qwen2_5_vl"]
        pools = load_prompt_pools(config, load_encoder(config.student), print)
        for pool, split, n in ((pools.train, "train", 24), (pools.held_out, "heldout", 20)):
            assert [p.id for p in pool] == [to_prompt(p).id for p in demo_problems("scenes", split, n, 3)]
            assert Counter(p.metadata["task"] for p in pool) == {"scenes-mc": n // 2, "scenes-rationale": n // 2}
            assert all(Path(image.path).parent == run.path / "demo" / "pictures" for p in pool for image in p.images)


def test_what_a_demo_refuses() -> None:
    for task, student, said in (
        ("chess", None, "--task chess: the testbed has counting, writing, scenes"),
        ("counting", "llava", "--student llava: of the testbed's students text can do counting"),
        ("scenes", "text", "--student text: of the testbed's students qwen2_5_vl and llava can do scenes"),
    ):
        with pytest.raises(UserError, match=said), prepare_demo(task, None, [], student):
            pass


def test_every_demo_has_students_and_every_student_a_folder() -> None:
    assert {student for demo in DEMOS for student in students_of(demo)} == set(STUDENT_FOLDERS)
    assert all((folder / "config.json").exists() for folder in STUDENT_FOLDERS.values())
