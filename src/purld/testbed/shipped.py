"""List the shipped students, the demos by name, and which student can do which demo."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from purld.testbed.world.world import SCENE_TASKS, TEXT_TASKS, Problem, Split, Task, generate_problems

_ASSETS = Path(str(files("purld.testbed") / "assets"))
STUDENT_FOLDERS = {
    name: _ASSETS / folder for name, folder in (("text", "student"), ("qwen2_5_vl",) * 2, ("llava",) * 2)
}
# Tasks by demo name.
DEMOS: dict[str, tuple[Task, ...]] = {
    **{task: (task,) for task in TEXT_TASKS},
    "scenes": SCENE_TASKS,
    **{task: (task,) for task in SCENE_TASKS},
}


def students_of(demo: str) -> tuple[str, ...]:
    """Return the students that can do a demo's tasks, the default one first."""
    return ("text",) if DEMOS[demo][0] in TEXT_TASKS else ("qwen2_5_vl", "llava")


def demo_problems(demo: str, split: Split, n: int, seed: int) -> list[Problem]:
    """Return `n` problems of a demo, alternating between its tasks."""
    tasks = DEMOS[demo]
    by_task = [generate_problems(task, split, -(-n // len(tasks)), seed) for task in tasks]
    return [problem for one_of_each in zip(*by_task) for problem in one_of_each][:n]
