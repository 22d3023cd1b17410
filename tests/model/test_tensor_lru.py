"""Values are kept while their tensors fit into the capacity; the least recently used go first."""

import torch

from purld.model.tensor_lru import TensorLRU, tensor_bytes


def test_what_was_not_used_for_longest_goes_first():
    made = []
    cache = TensorLRU(capacity=3 * 40)

    def get(key):
        return cache.get(key, lambda: made.append(key) or {"pixels": [torch.zeros(10)]})

    for key in ("a", "b", "c", "a", "d", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "d", "b"]


def test_one_value_is_kept_however_large():
    cache = TensorLRU(capacity=1)
    value = torch.zeros(10)
    assert cache.get("a", lambda: value) is cache.get("a", lambda: None) is value


def test_sizes_are_of_all_tensors():
    assert tensor_bytes({"a": torch.zeros(2, 3), "b": [torch.zeros(1, dtype=torch.int64), ("text", 5, None)]}) == 32
