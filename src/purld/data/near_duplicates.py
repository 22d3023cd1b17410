"""Find prompts that are near-copies of each other: another case or punctuation, a word more, a typing error.

Two prompts are near-copies if their texts share most of their shingles (overlapping pieces of five bytes) and
differ in no word but by leaving it out or misspelling it. Their numbers, operators and images are the same: "2 + 3" and
"2 + 4" are two questions, and so are two that ask for different things in the same words.

Shingles are compared by MinHash (Broder 1997) with locality-sensitive hashing, so that time grows
with the number of prompts and not with that of pairs. Everything is seeded and independent of the order of the prompts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from purld.data.chat import readable_text
from purld.records import Prompt

SIMILARITY = 0.7  # share of common shingles from which texts may be near-copies
_SHINGLE = 5  # bytes
_BANDS, _ROWS = 20, 5  # finds 97% of the pairs with a share of 0.7, and 99.9% with 0.8
_SAMPLE = 512  # shingles of a long text that count
_NEIGHBOURS = 5  # compared with each prompt in a bucket, so that many similar prompts take linear time
_TOKEN = re.compile(r"[^\W\d_]+|(?P<exact>\d+(?:[.,]\d+)*|[+=<>×÷%√]|(?<=[\d)])\s*[*/^]\s*(?=[\d(])|-\s*(?=\d))")

Signature = NDArray[np.uint64]


@dataclass(frozen=True)
class _Text:
    """A prompt's words, and what has to be the same in a near-copy."""

    words: str
    exact: tuple[object, ...]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Return the distinct words."""
        return frozenset(self.words.split())


def near_copies(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the groups of prompts that are near-copies of each other, as indices into `prompts`, in order."""
    texts = [_read(prompt) for prompt in prompts]
    same: dict[_Text, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        same[text].append(index)
    parents = list(range(len(prompts)))
    for indices in same.values():
        _join(parents, indices)
    distinct = sorted((indices[0] for indices in same.values()), key=lambda index: prompts[index].id)
    signatures = dict(zip(distinct, _signatures([texts[index].words for index in distinct])))
    for a, b in _candidates(distinct, texts, signatures):
        if _root(parents, a) != _root(parents, b) and _are_near(texts[a], texts[b], signatures[a], signatures[b]):
            _join(parents, (a, b))
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(prompts)):
        groups[_root(parents, index)].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _read(prompt: Prompt) -> _Text:
    """Return the text of a prompt without its system turn, which whole pools share, or only one of two files has."""
    turns = [m.content for m in prompt.messages if m.role != "system"]
    content = " ".join(map(readable_text, turns)).casefold()
    words: list[str] = []
    exact: list[str] = []
    for match in _TOKEN.finditer(content):
        (words if match["exact"] is None else exact).append(match[0].strip())
    images = tuple(image.digest for image in prompt.images)
    if not words and not exact:  # only signs: nothing is known of what they mean
        exact = [content]
    return _Text(" ".join(words), (*exact, *images, len(turns)))


def _signatures(texts: Iterable[str]) -> Iterator[Signature]:
    """Yield the MinHash of each text, (bands · rows,)."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 2**63, size=(_BANDS * _ROWS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 2**63, size=(_BANDS * _ROWS, 1), dtype=np.uint64)
    for text in texts:
        shingles = _shingles(text)[None, :]
        # The high bits of a product modulo 2^64 depend on all bits of the shingle, the low ones do not.
        yield ((shingles * factors + offsets) >> np.uint64(20)).min(axis=1)


def _shingles(text: str) -> Signature:
    """Return the hashes of the distinct shingles of a text; of a long text a sample that depends on them alone."""
    data = np.frombuffer(f" {text} ".encode().ljust(_SHINGLE), dtype=np.uint8).astype(np.uint64)
    count = len(data) - _SHINGLE + 1
    packed = np.zeros(count, dtype=np.uint64)
    for offset in range(_SHINGLE):
        packed = (packed << np.uint64(8)) | data[offset : offset + count]
    mixed = packed * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed * np.uint64(0xBF58476D1CE4E5B9))[:_SAMPLE]


def _candidates(
    indices: Sequence[int], texts: Sequence[_Text], signatures: dict[int, Signature]
) -> Iterator[tuple[int, int]]:
    """Yield pairs that share a band of their signatures and all that has to be the same, each pair once."""
    seen: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        part = slice(band * _ROWS, (band + 1) * _ROWS)
        buckets: dict[tuple[object, bytes], list[int]] = defaultdict(list)
        for index in indices:
            buckets[texts[index].exact, signatures[index][part].tobytes()].append(index)
        pairs = {pair for bucket in buckets.values() for pair in _neighbours(bucket, texts)} - seen
        seen |= pairs
        yield from sorted(pairs)


def _neighbours(bucket: Sequence[int], texts: Sequence[_Text]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of a bucket; of a large one, neighbours when sorted by beginnings or by ends."""
    if len(bucket) < 2:
        return
    for step in (1, -1):
        ordered = sorted(bucket, key=lambda index: texts[index].words[::step])
        for position, a in enumerate(ordered):
            yield from ((min(a, b), max(a, b)) for b in ordered[position + 1 : position + 1 + _NEIGHBOURS])


def _are_near(a: _Text, b: _Text, signature_a: Signature, signature_b: Signature) -> bool:
    if np.count_nonzero(signature_a == signature_b) < SIMILARITY * len(signature_a):
        return False
    only_a, only_b = a.vocabulary - b.vocabulary, b.vocabulary - a.vocabulary
    fewer, more = (only_a, only_b) if len(only_a) <= len(only_b) else (only_b, only_a)
    return all(any(_are_spelt_alike(word, other) for other in more) for word in fewer)


def _are_spelt_alike(a: str, b: str) -> bool:
    """Return whether words of four letters or more differ by one letter, or by two neighbours that changed places."""
    if min(len(a), len(b)) < 4 or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    return (
        rest_a[1:] == rest_b[1:]
        or rest_a[1:] == rest_b
        or rest_a == rest_b[1:]
        or (rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:])
    )


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


def _join(parents: list[int], indices: Sequence[int]) -> None:
    """Put prompts into one group, whose root is its first prompt."""
    roots = [_root(parents, index) for index in indices]
    for root in roots:
        parents[root] = min(roots)
