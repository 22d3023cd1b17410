"""Near-copies: what counts as one, in any order of the prompts and in linear time."""

import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purld.data.near_duplicates import near_copies
from purld.data.prompts import load_prompts, split_pool
from purld.records import Image, Message, Prompt

REAL = Path(os.environ.get("PURLD_SHARED_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
COPIES = [
    "What is the capital of France?",
    "what is the capital of france",
    "What is the  capital, of France?!",
    "**What is the capital of France?**",
    "Please, what is the capital of France?",
]
OTHERS = ["What is the capital of Spain?", "What is the capital of Italy?", "Which river runs through Paris?"]


def prompts_of(*texts):
    return [Prompt.from_text(text) for text in texts]


def test_copies_are_one_group_and_other_questions_are_not_in_it():
    assert near_copies(prompts_of(*OTHERS, *COPIES)) == [[3, 4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        ("How many apples are 2 and 3?", "How many apples are 2 and 4?", False),
        ("How many apples are 2 and 3?", "how many apples are 2 and 3", True),
        ("What is 2+2?", "What is 2 + 2 ?", True),
        ("What is 2+2?", "What is 2-2?", False),
        ("What is 2*2?", "What is 2 / 2?", False),
        ("What is the chemical symbol for gold?", "What is the chemical symbol for iron?", False),
        ("Explain in a few words how photosynthesis works.", "Explain in a few words how photosynthesys works", True),
        ("What is shown?", "What is shown on page 3?", False),
        ("!!!", "???", False),
        ("法国的首都是哪里", "法国的首都是哪里？", True),
    ],
)  # fmt: skip
def test_pairs(a, b, near):
    assert (near_copies(prompts_of(a, b)) == [[0, 1]]) is near


def test_images_roles_and_system_turns():
    def seen(digest):
        return Prompt.from_text("\ufffcWhat is this?", images=(Image(digest, (1, 1)),))

    assert near_copies([seen("a"), seen("b")]) == []
    system = Message("system", "You are a helpful assistant. " * 20)
    chats = [Prompt((system, Message("user", text))) for text in ("Name a river.", "Add two numbers.", "name a river")]
    assert near_copies(chats) == [[0, 2]]
    longer = Prompt((Message("user", "Name a"), Message("assistant", "river."), Message("user", "?")))
    assert near_copies([*chats[:2], Prompt.from_text("Name a river."), longer]) == [[0, 2]]  # one has a system turn


@settings(max_examples=8)
@given(rng=st.randoms(), fraction=st.floats(0.1, 0.9), seed=st.integers(0, 5))
def test_no_group_is_on_both_sides_of_a_split_whatever_the_order(rng, fraction, seed):
    pool = prompts_of(*COPIES, *OTHERS, *(f"question {n} of many" for n in range(20)))
    shuffled = rng.sample(pool, len(pool))
    sides = []
    for prompts in (pool, shuffled):
        groups = [[prompts[index] for index in group] for group in near_copies(prompts)]
        sides.append({p.id for p in split_pool(prompts, fraction, seed, groups)[1]})
    assert sides[0] == sides[1]
    assert len({Prompt.from_text(text).id in sides[0] for text in COPIES}) == 1


def test_thousands_of_prompts_from_one_template_take_linear_time():
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefghij", k=9)) for _ in range(400)]
    template = "Please write a short and friendly description of this product for our web shop: "
    pool = prompts_of(*(template + name for name in names), *(template.upper() + name for name in names[:20]))
    started = time.process_time()
    assert len(near_copies(pool)) == 20
    assert time.process_time() - started < 10


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_real_instructions_have_no_copies_and_word_problems_have_some():
    assert near_copies(load_prompts(REAL / "instructions_gpt4o.jsonl").prompts) == []
    problems = load_prompts(REAL / "word_problems.jsonl").prompts
    groups = near_copies(problems)
    assert 100 < len(groups) < 200 and max(map(len, groups)) < 10
