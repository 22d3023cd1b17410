"""What was made last, kept as long as there is room for it: pixels of pictures, and what a vision made of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorLRU(Generic[T]):
    """Values by key; what was least recently used goes first when the tensors in them need more than the room.

    Args:
        room: in bytes.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._held: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made if it is not there."""
        if key not in self._held:
            value = make()
            size = tensor_bytes(value)
            self._held[key] = value, size
            self._size += size
        self._held.move_to_end(key)
        found = self._held[key][0]
        while self._size > self._room and len(self._held) > 1:
            _, (_, size) = self._held.popitem(last=False)
            self._size -= size
        return found


def tensor_bytes(value: Any) -> int:
    """The bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return tensor_bytes(value.values())
    return sum(map(tensor_bytes, value)) if isinstance(value, Iterable) and not isinstance(value, str) else 0
