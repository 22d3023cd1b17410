"""For maintainers: train the tiny students that the demo ships, again from scratch. Users need none of this.

from pathlib import Path

from purld.testbed.students.build import build_student

build_student(Path("student"), seed=0)  # about a quarter of an hour on two cores
"""
