"""A preallocated cache holds what transformers' own would."""

import torch
from transformers.cache_utils import DynamicCache

from purld.model.cache import repeat_with_capacity


def tokens(count, rows):
    return torch.arange(float(rows * 2 * count * 3)).view(rows, 2, count, 3) + 100 * count


def test_rows_are_repeated_in_order_and_new_tokens_follow_the_old():
    """Two rows are repeated three times in the order of `repeat_interleave`: 0, 0, 0, 1, 1, 1."""
    plain, roomy = DynamicCache(), DynamicCache()
    for cache in (plain, roomy):
        cache.update(tokens(5, 2), -tokens(5, 2), 0)
    plain.batch_repeat_interleave(3)
    roomy = repeat_with_capacity(roomy, 3, capacity=4)
    for count in (1, 2, 1):
        new = tokens(count, 6)
        expected, actual = (cache.update(new, -new, 0) for cache in (plain, roomy))
        assert all(torch.equal(a, b) for a, b in zip(expected, actual))
        assert roomy.get_seq_length() == plain.get_seq_length()


def test_what_is_cropped_is_written_over():
    cache = DynamicCache()
    cache.update(tokens(5, 1), tokens(5, 1), 0)
    cache = repeat_with_capacity(cache, 1, capacity=3)
    cache.update(tokens(2, 1), tokens(2, 1), 0)
    cache.crop(-2)
    keys, _ = cache.update(tokens(1, 1), tokens(1, 1), 0)
    assert torch.equal(keys, torch.cat([tokens(5, 1), tokens(1, 1)], dim=2))
