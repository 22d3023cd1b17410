"""Work on less at once where a device has run out of memory; what comes out depends on the size only by rounding."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from purld.errors import PlainWarning, UserError
from purld.model.out_of_memory import is_out_of_memory
from purld.model.shard_units import end_broken_passes

T = TypeVar("T")


class AtOnce:
    """A number of things that are worked on at once, halved for good wherever the device's memory is too small for it.

    Args:
        size: the number to begin with; None for all that there are.
        change: what a smaller number means, a clause.
        too_large: what does not fit even one at a time, a clause that says what to do.
    """

    def __init__(self, size: int | None, change: str, too_large: str) -> None:
        self._size = size
        self._change = change
        self._too_large = too_large

    def __call__(self, work: Callable[[int], T], wanted: int) -> T:
        """Return what `work` returns for `wanted` things, called with how many of them it may work on at once.

        Raises:
            UserError: the memory is too small for one at a time.
        """
        while True:
            size = max(1, wanted if self._size is None else min(self._size, wanted))
            try:
                return work(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # What the failed attempt holds is freed once its traceback is.
            release_memory()
            if size == 1:
                raise UserError(f"The device's memory is too small {self._too_large}.")
            self._size = size // 2
            told = f"out of the device's memory: from here on {self._change} ({self._size})."
            warnings.warn(told, PlainWarning, stacklevel=2)


def release_memory() -> None:
    """Give memory that nothing uses back to the device; what a failed pass left gathered of sharded models goes too."""
    end_broken_passes()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
