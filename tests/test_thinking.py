"""Thinking and answer of a reply, for the tags of many families of models."""

import time

import pytest

from purld.thinking import TAGS, opened_block, split_thinking, tags_in

CHANNELS = "<|channel|>analysis<|message|>We add.<|end|><|start|>assistant<|channel|>final<|message|>It is 4."


@pytest.mark.parametrize(
    ("reply", "thinking", "answer"),
    [
        ("<think>\nI add.\n</think>\n\nIt is 4.", "I add.", "It is 4."),
        ("<think>\n\n</think>\n\nIt is 4.", "", "It is 4."),
        ("I add.\n</think>\n\nIt is 4.", "I add.", "It is 4."),  # the prompt opened the block
        ("<think>I add.</think><think>Again.</think>It is 4.", "I add.\n\nAgain.", "It is 4."),
        ("<think>a</think>It is\n<think>b</think>\n4.", "a\n\nb", "It is\n\n4."),
        ("<think>a <think> b </think> c </think>It is 4.", "a <think> b\n\nc", "It is 4."),
        ("<think>I add and add", "I add and add", ""),
        ("It is 4.\n<think>\nIs it?", "Is it?", "It is 4."),
        ("<THINKING>I add.</Thinking>It is 4.", "I add.", "It is 4."),
        ("<think>I add.</think>\n<answer>It is 4.</answer>", "I add.", "It is 4."),
        ("<|START_THINKING|>I add.<|END_THINKING|><|START_RESPONSE|>It is 4.<|END_RESPONSE|>", "I add.", "It is 4."),
        ("<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>It is 4.<|end_of_solution|>", "a", "It is 4."),
        ("<think>I add.</thinking>It is 4.", "I add.", "It is 4."),  # closed by another family's tag
        ("<think>I write `</thinking>` and", "I write `</thinking>` and", ""),
        (CHANNELS, "We add.", "It is 4."),
        (f"{CHANNELS}<|return|>", "We add.", "It is 4."),
        ("analysisWe add.assistantfinalIt is 4.", "We add.", "It is 4."),
        ("<|channel|>analysis<|message|>We add", "We add", ""),
        ("İkİ<think>İkİ İle İkİ</think>It is 4.", "İkİ İle İkİ", "İkİIt is 4."),  # longer in lower case
        *((f"{tags.opening}I add.{tags.closing}It is 4.", "I add.", "It is 4.") for tags in TAGS),
    ],
)
def test_thinking_is_told_from_the_answer(reply, thinking, answer):
    split = split_thinking(reply)
    assert (split.thinking, split.answer, split.found) == (thinking, answer, True)


@pytest.mark.parametrize(
    "reply",
    [
        "  It is 4.\n",
        "",
        "Write `<think>` before and `</think>` after it.",
        "```xml\n<reasoning>…</reasoning>\n```",
        "The tag <think> begins a thought.",
        "I think 4 < 5 and 5 > 4.",
        "analysis of the final answer",
    ],
)
def test_an_answer_without_thinking_stays_as_it_is(reply):
    split = split_thinking(reply)
    assert (split.answer, split.found) == (reply, False)


def test_the_block_that_a_prompt_leaves_open_is_the_last_one():
    assert opened_block("<|im_start|>assistant\n<think>\n").opening == "<think>"
    assert opened_block("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert opened_block("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n") is None


def test_the_tags_of_a_model_are_found_in_its_template():
    assert tags_in(["{{ '<|im_start|>' }}", "[THINK]"]).closing == "[/THINK]"
    assert tags_in(["{{ message.content }}"]) is None


@pytest.mark.parametrize("piece", ["`", "<think>", "x <think>", "</think>", "<think>\n", "` <think> `` "])
def test_an_answer_that_loops_takes_linear_time(piece):
    started = time.process_time()
    split_thinking("x " + piece * 20_000)
    assert time.process_time() - started < 2
