"""The samplers by name: which engine draws completions from the student.

Everything that draws from the student, in training and in evaluation, asks `make_sampler`. To add an engine: write a
`Sampler`, put its factory into `SAMPLERS` and its section into `purld.config.schema.Engine`.
"""

from __future__ import annotations

from collections.abc import Callable

from purld.config.schema import Engine
from purld.model.encode import Encoder
from purld.model.sample import Decoding, GenerateSampler, Sampler

SamplerFactory = Callable[[Engine, Encoder, Decoding], Sampler]


def _make_generate_sampler(engine: Engine, encoder: Encoder, decoding: Decoding) -> Sampler:
    return GenerateSampler(encoder, decoding)


SAMPLERS: dict[str, SamplerFactory] = {"generate": _make_generate_sampler}
"""How the sampler of each engine is made, by `student.engine.kind`."""


def make_sampler(engine: Engine, encoder: Encoder, decoding: Decoding) -> Sampler:
    """Make the sampler of an engine.

    Raises:
        KeyError: there is no sampler for this kind of engine.
    """
    if engine.kind not in SAMPLERS:
        raise KeyError(f"there is no sampler {engine.kind!r}; there are {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[engine.kind](engine, encoder, decoding)
