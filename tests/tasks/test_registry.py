"""The table of tasks, and loading files with arbitrary bytes."""

from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from purld.config.schema import TaskName
from purld.errors import UserError
from purld.tasks.registry import TASKS, load_task


def test_every_name_that_a_configuration_may_say_is_a_task():
    assert list(TASKS) == list(get_args(TaskName))
    assert {name for name, task in TASKS.items() if task.check == "math"} == {n for n in TASKS if "math" in n}


ROW = '{"problem": "p", "solution": "s", "type": "Geometry", "level": "Level 1"}'
LINES = st.lists(st.sampled_from(["[ CW ] a", "b", ROW, "[", "\0", "\ufeff", ""]) | st.text(max_size=6), max_size=4)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, noise=st.binary(max_size=3), name=st.sampled_from(list(TASKS)))
def test_any_file_gives_prompts_or_one_sentence(tmp_path_factory, lines, noise, name):
    folder = tmp_path_factory.mktemp("any")
    content = "\n".join(lines).encode("utf-8", "surrogatepass") + noise
    (folder / "train2017").mkdir()
    problems = folder / "math" / "train" / "geometry"
    problems.mkdir(parents=True)
    for path in (
        *(folder / f"train.{kind}" for kind in ("wp_source", "wp_target", "jsonl")),
        problems / "1.json",
        folder / "aokvqa_v1p0_train.json",
    ):
        path.write_bytes(content)
    for path in (folder, folder / "math"):
        for bad_rows in ("fail", "skip"):
            try:
                loaded, _ = load_task(name, str(path), bad_rows)
            except UserError as error:
                assert str(error).startswith(str(path)) and str(error).endswith(".")
            else:
                assert loaded.rows == len(loaded.prompts) + loaded.duplicates + loaded.skipped
