"""Let ranks that share one model's weights run different passes, however many each of them needs.

A model whose weights are sharded gathers those of a layer whenever it runs it, and every rank must take part. But ranks
work on other prompts: one runs a layer's backward pass while another draws a token, and a third is done. So before
each such collective the ranks tell each other what they need, and all of them take part in whatever any of them needs:
those that do not need it lend their shards and add zeros to the sum. A rank that is done does so until all are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

_DONE = -1
_BEGIN, _GATHER, _REDUCE = range(3)


class Unit(Protocol):
    """Weights that are gathered together, such as those of a layer."""

    def lend(self) -> None:
        """Take part in gathering the weights, which this rank does not need."""
        ...

    def add_gradients(self) -> None:
        """Take part in summing the gradients of other ranks' passes, and add this rank's shard of them to its own."""
        ...


class LockStep:
    """The meeting of the ranks before each collective; every rank makes its units in the same order.

    Args:
        exchange: tells the other ranks a number and returns that of every rank.
    """

    def __init__(self, exchange: Callable[[int], list[int]]) -> None:
        self._exchange = exchange
        self._units: list[weakref.ref[Unit]] = []

    def add_unit(self, unit: Unit) -> int:
        """Return the number of a unit; its owner keeps it alive."""
        self._units.append(weakref.ref(unit))
        return len(self._units) - 1

    def gather(self, unit: int, work: Callable[[], None], begins_pass: bool = False) -> None:
        """Call `work`, which gathers a unit's weights, together with the other ranks.

        Passes begin together: ranks that then run the same layers gather each of them once for all.
        """
        self._meet(3 * unit + (_BEGIN if begins_pass else _GATHER), work)

    def reduce(self, unit: int, work: Callable[[], None]) -> None:
        """Call `work`, which sums the gradients of a unit's weights, together with the other ranks."""
        self._meet(3 * unit + _REDUCE, work)

    def settle(self) -> None:
        """Take part in what the others need until no rank needs anything; every rank calls this before they meet."""
        while self._units and (requests := self._ask(_DONE)):
            for request in requests:
                self._serve(request)

    def _meet(self, mine: int, work: Callable[[], None]) -> None:
        met = False
        while not met:
            for request in self._ask(mine):
                if request == mine:
                    work()
                    met = True
                else:
                    self._serve(request)

    def _ask(self, mine: int) -> list[int]:
        """Return what is done now, in the same order in every rank: what passes under way need before new passes."""
        requests = sorted(set(self._exchange(mine)) - {_DONE})
        return [request for request in requests if request % 3 != _BEGIN] or requests

    def _serve(self, request: int) -> None:
        unit = self._units[request // 3]()
        if unit is None:
            raise RuntimeError("another process of this job runs a model that this one has let go")
        if request % 3 == _REDUCE:
            unit.add_gradients()
        else:
            unit.lend()
