"""The models of a run side by side: with adapters on one copy of the base weights, else each loaded by itself.

This is for looking at models. An adapter that is applied beside the weights and one that is merged into them differ by
rounding; `purld.model.load` merges, and evaluation uses that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from purld.config.schema import Student
from purld.errors import UserError, reason_of
from purld.model.causal_lm import AdaptedCausalLM, CausalLM
from purld.model.load import load_model


class ModelVariants:
    """The base and what a run made of it, each usable for the length of a block.

    Args:
        student: says where the base is.
        folders: the directory of each trained model by name, adapters or whole weights.
        keep: hold whole weights in memory after their first use; adapters always stay.
    """

    BASE = "base"

    def __init__(self, student: Student, folders: Mapping[str, Path], keep: bool) -> None:
        self._student = student
        self._folders = dict(folders)
        self._keep = keep
        self._adapted: PeftModel | None = None
        self._whole: dict[str, CausalLM] = {}

    @property
    def names(self) -> list[str]:
        """Return the names of all models, the base first."""
        return [self.BASE, *self._folders]

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[CausalLM]:
        """Yield a model by its name.

        Raises:
            UserError: its weights or its adapter cannot be loaded.
            KeyError: there is no model of this name.
        """
        if name not in self.names:
            raise KeyError(f"there is no model {name!r}; there are {', '.join(self.names)}")
        if self._student.lora is None:
            yield from self._use_whole(name)
        elif name == self.BASE:
            model = self._with_adapters()
            with cast(AdaptedCausalLM, model).disable_adapter():
                yield model
        else:
            model = self._with_adapters()
            cast(PeftModel, model).set_adapter(name)
            yield model

    def _use_whole(self, name: str) -> Iterator[CausalLM]:
        if name not in self._whole:
            self._whole[name] = load_model(self._student, self._folders.get(name, self._student.model))
        yield self._whole[name]
        if not self._keep:
            del self._whole[name]

    def _with_adapters(self) -> CausalLM:
        """Return the base under every adapter, loaded once."""
        if self._adapted is None:
            base = cast(PreTrainedModel, load_model(self._student, self._student.model))
            (first, folder), *others = self._folders.items()
            try:
                adapted = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
                for name, path in others:
                    adapted.load_adapter(str(path), adapter_name=name)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise UserError(f"{folder.parent}: an adapter does not fit the base: {reason_of(error)}.") from None
            self._adapted = adapted.eval()
        return cast(CausalLM, self._adapted)
