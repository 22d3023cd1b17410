"""A cache of tensors that is limited in bytes, for pixels of images and their vision features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class TensorLRU(Generic[T]):
    """A cache that drops the least recently used values when their tensors exceed its capacity.

    The last value is kept whatever its size.

    Args:
        capacity: in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `key`, made first if it is not in the cache."""
        if key not in self._held:
            value = make()
            size = tensor_bytes(value)
            self._held[key] = value, size
            self._size += size
        self._held.move_to_end(key)
        value = self._held[key][0]
        while self._size > self._capacity and len(self._held) > 1:
            _, (_, size) = self._held.popitem(last=False)
            self._size -= size
        return value


def tensor_bytes(value: object) -> int:
    """Return the bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return tensor_bytes(value.values())
    return sum(map(tensor_bytes, value)) if isinstance(value, Iterable) and not isinstance(value, str) else 0
