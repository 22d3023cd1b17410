"""The students that ship with purld, what each can do, and what a demo asks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from purld.testbed.world.world import SCENE_TASKS, TEXT_TASKS, Problem, Split, Task, generate_problems

_ASSETS = Path(str(files("purld.testbed") / "assets"))
STUDENTS = {name: _ASSETS / folder for name, folder in (("text", "student"), ("qwen2_5_vl",) * 2, ("llava",) * 2)}
# The tasks of a demo by its name.
DEMOS: dict[str, tuple[Task, ...]] = {
    **{task: (task,) for task in TEXT_TASKS},
    "scenes": SCENE_TASKS,
    **{task: (task,) for task in SCENE_TASKS},
}


def students_of(demo: str) -> tuple[str, ...]:
    """The students that can do a demo's tasks, the usual one first."""
    return ("text",) if DEMOS[demo][0] in TEXT_TASKS else ("qwen2_5_vl", "llava")


def demo_problems(demo: str, split: Split, n: int, seed: int) -> list[Problem]:
    """`n` problems of a demo, in turn from each of its tasks."""
    tasks = DEMOS[demo]
    drawn = [generate_problems(task, split, -(-n // len(tasks)), seed) for task in tasks]
    return [problem for together in zip(*drawn) for problem in together][:n]
