"""The base of every section of the configuration, and the types of its values."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Above these bounds a number is a slip of the pen, and libraries fail on it hours later.
_MOST = 10**12
Positive = Annotated[float, Field(gt=0, le=_MOST)]
NonNegative = Annotated[float, Field(ge=0, le=_MOST)]
LearningRate = Annotated[float, Field(gt=0)]  # training itself stops at numbers that are not finite
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=_MOST)]
Retries = Annotated[int, Field(ge=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _sampled_or_greedy(temperature: float) -> float:
    # Logits are divided by it in float32, where a smaller one overflows.
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"a temperature is 0, which is greedy, or at least {LEAST_TEMPERATURE}")
    return temperature


LEAST_TEMPERATURE = 0.001
SamplingTemperature = Annotated[float, Field(ge=LEAST_TEMPERATURE, le=1000)]
Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(_sampled_or_greedy)]

MAY_BE_SECRET = "may_be_secret"
"""The type of an error whose message must not repeat the value."""
_VARIABLE = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
# Many keys have the form of a variable's name: capitals with digits, small letters with digits, or both sizes.
_LOOKS_LIKE_KEY = re.compile(
    r"(?=.*\d)[A-Z0-9]{16,}|(?=.*\d)(?=.*[a-z])\w{24,}|(?=.*[a-z])(?=.*[A-Z])\w{20,}", re.ASCII
)


def key_variable(name: str) -> str:
    """Return the name of the environment variable that holds a key.

    Raises:
        PydanticCustomError: it is no name of a variable, or looks like a key itself; the message does not repeat it.
    """
    if name in os.environ or (_VARIABLE.fullmatch(name) and not _LOOKS_LIKE_KEY.fullmatch(name)):
        return name
    raise PydanticCustomError(
        MAY_BE_SECRET,
        "the name of the environment variable that holds the key is wanted, such as TEACHER_API_KEY, and never the key "
        "itself",
    )


KeyVariable = Annotated[str, AfterValidator(key_variable)]

FormatName = Literal[
    "auto", "columns", "alpaca", "messages", "sharegpt", "jsonl", "json", "csv", "tsv", "text", "parquet", "dataset"
]
"""How the rows of a file hold a prompt and its answer, or the kind of the file."""


class Section(BaseModel):
    """A part of the configuration: frozen, closed to unknown keys, and without infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def union_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in a type annotation, which may be a union of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in union_sections(part)]


def section_tags(section: type[BaseModel]) -> list[str]:
    """Return the values of `kind` or `method` that select a section of a union."""
    for name in ("kind", "method"):
        if name in section.model_fields:
            return [str(value) for value in get_args(section.model_fields[name].annotation)]
    return []
