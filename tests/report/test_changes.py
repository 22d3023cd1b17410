"""Test the pictures of what training changed: their counts, their sentences, and what they leave out."""

from __future__ import annotations

from collections import Counter

from matplotlib.patches import Rectangle
from synthetic import Build

from purld.report.changes import changes_section, describe_flow, draw_changes, draw_flow
from purld.report.run_data import RunData, read_run
from purld.runs.files import read_rows, write_rows

FLOW = {
    "base": {"a": "wrong", "b": "wrong", "c": "right", "d": "right"},
    "sft": {"a": "right", "b": "wrong", "c": "wrong", "d": "right"},
    "ldl_grpo": {"a": "right", "b": "right", "c": "right", "d": "wrong"},
}


def heights(flow: dict[str, dict[str, str]]) -> list[float]:
    """Return the heights of the parts of all columns, column by column, the best state first."""
    return [patch.get_height() for patch in draw_flow(flow).axes[0].patches if isinstance(patch, Rectangle)]


def test_a_column_is_split_by_its_states_and_changes_are_coloured() -> None:
    assert heights(FLOW) == [0.5, 0.5, 0.5, 0.5, 0.75, 0.25]
    ribbons = [patch for patch in draw_flow(FLOW).axes[0].patches if not isinstance(patch, Rectangle)]
    # Base to SFT: one each way, one right and one wrong stayed; SFT to LDL-GRPO: two became right, one wrong.
    assert Counter(patch.get_zorder() for patch in ribbons) == {1: 3, 1.5: 4}


def test_the_sentence_counts_both_ways() -> None:
    assert describe_flow(FLOW) == (
        "Base to SFT: 1 of 4 prompts better, 1 worse. SFT to LDL-GRPO: 2 of 4 prompts better, 1 worse."
    )


def test_several_answers_to_a_prompt_have_a_state_between(build: Build) -> None:
    run = build(held_out=6, groups=0, logged=False)
    for model in ("base", "sft", "ldl_grpo"):
        rows = read_rows(run.generations(model))
        write_rows(run.generations(model), [row | {"sample": n, "correct": n == 0} for row in rows for n in range(2)])
    greedy, sampled, outcomes = draw_changes(read_run(run), "run")
    assert "some right" not in greedy.svg
    assert "some right" in sampled.svg and "none right" in sampled.svg
    assert sampled.caption.endswith("SFT to LDL-GRPO: 0 of 6 prompts better, 0 worse.")
    assert "win" in outcomes.svg and "tie" in outcomes.svg


def test_what_was_not_checked_or_judged_is_not_drawn(build: Build) -> None:
    run = read_run(build(held_out=3, groups=0, logged=False))
    bare = {m: [{k: v for k, v in row.items() if k != "correct"} for row in rows] for m, rows in run.answers.items()}
    unchecked = RunData(**(vars(run) | {"answers": bare, "greedy": {}}))
    (outcomes,) = draw_changes(unchecked, "run")
    assert outcomes.heading == "Wins, ties and losses"
    assert changes_section([RunData(**(vars(unchecked) | {"verdicts": {}}))]).body == ""


def test_an_answer_that_wins_in_one_order_only_is_a_tie(build: Build) -> None:
    run = build(held_out=4, groups=0, logged=False)
    path = run.verdicts("ldl_grpo")
    write_rows(path, [r | {"outcome": "win" if r["model_is_a"] else "loss", "raw": "A"} for r in read_rows(path)])
    outcomes = draw_changes(read_run(run), "run")[-1]
    assert "100%" in outcomes.svg
