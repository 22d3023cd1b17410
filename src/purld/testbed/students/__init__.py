"""For maintainers: train the shipped tiny students again from scratch. Running the demo does not need this package.

    from pathlib import Path

    from purld.testbed.students.build import build_student

    build_student(Path("student"), seed=0)  # about 24 minutes on one core; the same as `purld testbed build student`

`build` runs the curriculum, `corpus` and `scene_corpus` draw its lessons, `students` describes the architectures and
`card` measures the result.
"""
