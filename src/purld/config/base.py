"""The base of every section of the configuration, and the types of its values."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
