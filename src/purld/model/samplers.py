"""The samplers by name: which engine draws completions from the student.

Everything that draws from the student, in training and in evaluation, asks `make_sampler`. To add an engine: write a
`Sampler`, put its factory into `SAMPLERS` and its section into `purld.config.engines.Engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from purld.config.engines import VllmEngine
from purld.config.schema import Student
from purld.model.encode import Encoder
from purld.model.sample import Decoding, GenerateSampler, Sampler

SamplerFactory = Callable[[Student, Encoder, Path, Decoding], Sampler]


def _make_generate_sampler(student: Student, encoder: Encoder, folder: Path, decoding: Decoding) -> Sampler:
    return GenerateSampler(encoder, decoding)


def _make_vllm_sampler(student: Student, encoder: Encoder, folder: Path, decoding: Decoding) -> Sampler:
    from purld.model.vllm_sampler import VllmSampler

    assert isinstance(student.engine, VllmEngine)
    return VllmSampler(student.engine, student.model, encoder, decoding, folder)


SAMPLERS: dict[str, SamplerFactory] = {"generate": _make_generate_sampler, "vllm": _make_vllm_sampler}
"""How the sampler of each engine is made, by `student.engine.kind`."""


def make_sampler(student: Student, encoder: Encoder, folder: Path, decoding: Decoding) -> Sampler:
    """Make the sampler of the student's engine.

    Args:
        student: `student` of the configuration.
        encoder: the run's encoder.
        folder: where an engine may write files that live as long as a stage; made when it is needed.
        decoding: the settings of sampling.

    Raises:
        KeyError: there is no sampler for this kind of engine.
    """
    kind = student.engine.kind
    if kind not in SAMPLERS:
        raise KeyError(f"there is no sampler {kind!r}; there are {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[kind](student, encoder, folder, decoding)
