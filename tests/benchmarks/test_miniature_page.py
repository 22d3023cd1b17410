"""The plan of the miniature, its tables and its page, on rows made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mini import plan
from mini.cells import Cell, stage_two_cell
from mini.page import (
    PARTS,
    accuracy_table,
    claim_verdict,
    difference_table,
    finding_table,
    form_table,
    grid_table,
    noise_table,
    quick_table,
    replace_part,
    sweep_table,
    table_one,
    write_page,
)
from mini.results import Results, list_comparisons
from mini.stats import over_seeds

from purld.errors import UserError
from purld.runs.files import read_rows


def row(cell: Cell, wins: float, length: float = 40.0) -> dict:
    """Ten problems of which a share is won, one more right, and one more than that right in a greedy answer."""
    ahead = round(10 * wins)
    won, right, greedy = ([1.0] * n + [0.0] * (10 - n) for n in (ahead, ahead + 1, ahead + 2))
    measured = {
        "wins": won, "right": right, "greedy_right": greedy, "seconds": 2.0,
        "length": [length + 3 * i % 7 for i in range(10)], "teacher_length": [41] * 10,
    }  # fmt: skip
    curve = [{"step": s, "loss": 1.0, "eval_loss": 1.0, "objective": 0.5, "right": 0.5} for s in range(1, 7)]
    score = {"auc_within": 0.9}
    facts = {"seconds": 30.0, "teacher_calls": 256, "best_step": 3, "curve": curve, "score": score}
    return {"id": cell.id, "measured": measured} | facts


def tuned(best: int = 2) -> dict:
    """All grids done, with the setting of number `best` ahead everywhere."""
    rows = {}
    for task in plan.TASKS:
        p_sft = Cell(task, plan.TUNING_SEED, "validation", "sft")
        rows[p_sft.id] = row(p_sft, 0.3)
        for method in plan.TUNED:
            for index, setting in enumerate(plan.GRID):
                cell = stage_two_cell(task, plan.TUNING_SEED, "validation", method, setting)
                rows[cell.id] = row(cell, 0.5 if index == best else 0.3)
    return rows


def test_every_method_is_tuned_on_as_many_settings_and_none_of_them_twice():
    for method in plan.TUNED:
        cells = [stage_two_cell("writing", 0, "test", method, setting) for setting in plan.GRID]
        assert len({cell.id for cell in cells}) == len(plan.RATES) == 3


def test_tuning_has_a_seed_of_its_own_and_measures_on_validation():
    for cell in plan.tuning_cells():
        assert cell.split == "validation" and cell.seed not in plan.SEEDS


def test_an_edge_of_the_grid_is_looked_beyond():
    rates = {dict(cell.settings)["learning_rate"] for cell in plan.edge_cells(plan.choose_settings(tuned(best=0)))}
    assert rates == {plan.RATES_BEYOND[0]} and not plan.edge_cells(plan.choose_settings(tuned(best=1)))
    assert "| LDL-GRPO | learning_rate=0.00045, beyond the grid |" in grid_table(Results(with_everything()))
    assert "beyond" not in grid_table(Results(tuned()))


def test_later_cells_wait_for_the_choice_and_use_it():
    rows = tuned(best=2)
    last = plan.tuning_cells()[-1]
    assert plan.choose_settings({key: r for key, r in rows.items() if key != last.id}) is None
    assert plan.all_cells({}) == plan.tuning_cells()
    chosen = plan.choose_settings(rows)
    assert all(chosen[task][m] == dict(plan.GRID[2]) for task in plan.TASKS for m in plan.TUNED)
    cells = plan.all_cells(rows)
    assert len({cell.id for cell in cells}) == len(cells)
    main = plan.main_cells(chosen)
    assert {(c.task, c.seed, c.method) for c in main} == {
        (task, seed, method) for task in plan.TASKS for seed in plan.SEEDS for method in ("sft", *plan.METHODS)
    }
    assert dict(next(c for c in main if c.method == "anchor_grpo").settings)["learning_rate"] == plan.RATES[2]


def test_a_cell_is_known_by_all_that_it_depends_on():
    plain = stage_two_cell("writing", 0, "test", "ldl_grpo", {})
    others = [
        stage_two_cell("writing", 0, "test", "ldl_grpo", {"tau": 0.9}),
        stage_two_cell("writing", 0, "test", "ldl_grpo", {}, noise=0.5),
        stage_two_cell("writing", 0, "test", "ldl_grpo", {}, evaluator="moving"),
        stage_two_cell("writing", 0, "test", "ldl_grpo", {}, anchors=50),
        stage_two_cell("writing", 1, "test", "ldl_grpo", {}),
    ]
    assert len({cell.id for cell in [plain, *others]}) == 6
    assert plain.id == stage_two_cell("writing", 0, "test", "ldl_grpo", {"tau": 1.2}).id


def with_tables(ldl: float, others: float) -> dict:
    """LDL-GRPO has a tenth more on odd seeds."""
    rows = tuned()
    for cell in plan.main_cells(plan.choose_settings(rows)):
        rows[cell.id] = row(cell, ldl + 0.1 * (cell.seed % 2) if cell.method == "ldl_grpo" else others)
    return rows


def test_table_one_has_the_figures_of_the_rows():
    text = table_one(Results(with_tables(ldl=0.6, others=0.4)))
    raw, right, if_right = "0.640 [0.572, 0.708]", "0.740 [0.672, 0.808]", "0.864 [0.852, 0.876]"
    for line in [line for line in text.splitlines() if "| **LDL-GRPO** |" in line]:
        _, name, *cells = (cell.strip() for cell in line.split("|"))
        assert [name, cells[0], *cells[2:5]] == ["**LDL-GRPO**", raw, right, if_right, "0.840"]
    assert text.count("| SFT | 0.400 [0.400, 0.400] |") == len(plan.TASKS)
    assert "| 256 | 30 | 5 |" in text


def test_rates_chosen_by_accuracy_have_a_table_of_their_own():
    """The judge likes the first rate best, and the third has the most right answers."""
    rows = tuned(best=0)
    for task in plan.TASKS:
        for method in plan.TUNED:
            rows[stage_two_cell(task, plan.TUNING_SEED, "validation", method, plan.GRID[2]).id]["measured"]["right"] = [
                1.0
            ]
    by_accuracy = plan.choose_settings(rows, "right")
    cells = plan.accuracy_cells(by_accuracy)
    assert {dict(cell.settings)["learning_rate"] for cell in cells} == {plan.RATES[2]}
    assert set(cells) <= set(plan.all_cells(rows)) and len(cells) == len(plan.TASKS) * len(plan.SEEDS) * len(plan.TUNED)
    for cell in cells:
        rows[cell.id], rows[cell.stage_one.id] = row(cell, 0.6), row(cell.stage_one, 0.4)
    text = accuracy_table(Results(rows))
    assert (
        f"| LDL-GRPO | learning_rate={plan.RATES[2]:g} | 0.700 [0.700, 0.700] | +0.200 [+0.200, +0.200] (5/5) |" in text
    )
    assert "learning_rate=1.5e-05" not in text


def test_differences_are_paired_by_seed():
    """0.2, 0.3, 0.2, 0.3, 0.2: a mean of 0.24, a standard error of 0.0245, and 2.776 of them on both sides."""
    assert "| LDL-GRPO | +0.240 [+0.172, +0.308] (5/5) |" in difference_table(Results(with_tables(0.6, 0.4)))


def test_a_claim_of_two_findings_is_one_test():
    """t = 0.24 / 0.0245 = 9.8, p = 0.0006, the smallest of as many tests as there are different ones."""
    results = Results(with_tables(0.6, 0.4))
    text = finding_table(results)
    claims = [line for line in text.splitlines() if "| LDL-GRPO > SFT, Raw |" in line]
    tests = {
        claim.test
        for claim in list_comparisons(
            {task: "sft_sft" for task in plan.TASKS},
            {task: "sft_sft" for task in plan.TASKS},
        )
    }
    assert len(claims) == 2 and len(tests) == 24
    assert all("| 0.001 | " in line and "reproduced" in line for line in claims)
    assert "LDL-GRPO > SFT, LC" in text


def test_a_table_shows_what_is_done_and_no_more():
    rows = with_tables(0.6, 0.4)
    chosen = plan.choose_settings(rows)
    for cell in plan.main_cells(chosen, seeds=plan.SEEDS[1:]):
        del rows[cell.id]
    assert "| 256 | 30 | 1 |" in table_one(Results(rows))
    assert "one seed" in finding_table(Results(rows))


@pytest.mark.parametrize(
    ("values", "adjusted", "expected"),
    [
        ([0.1, 0.11, 0.12], 0.01, "reproduced"),
        ([0.1, 0.11, 0.12], 0.2, "reproduced, alone"),
        ([-0.1, -0.11, -0.12], 0.01, "reversed"),
        ([-0.1, -0.11, -0.12], 0.2, "reversed, alone"),
        ([0.1, -0.11, 0.12], 1.0, "not reproduced"),
        ([0.1], None, "one seed"),
    ],
)
def test_a_verdict_is_by_the_interval_and_says_if_it_stands_alone(values, adjusted, expected):
    assert claim_verdict(over_seeds(values), adjusted) == expected


def test_quick_table_pairs_a_method_with_its_own_p_sft():
    cells = [Cell("writing", 0, "test", "sft"), stage_two_cell("writing", 0, "test", "ldl_grpo", {})]
    text = quick_table({cells[0].id: row(cells[0], 0.4), cells[1].id: row(cells[1], 0.6)}, cells)
    assert "| writing | LDL-GRPO | 0.600 |" in text and "+0.200 [" in text


def page() -> str:
    parts = [f"<!-- {name}: made by benchmarks/miniature.py -->\nold\n<!-- end of {name} -->" for name in PARTS]
    return "By hand.\n\n" + "\n\nMore by hand.\n\n".join(parts) + "\n"


def test_the_page_of_the_project_has_a_place_for_every_part():
    text = (Path(__file__).parents[2] / "docs" / "miniature.md").read_text(encoding="utf-8")
    for name in PARTS:
        assert "new" in replace_part(text, name, "new", "docs/miniature.md")


@pytest.mark.parametrize("rows", [{}, tuned(), with_tables(0.6, 0.4)], ids=["nothing", "tuned", "tables"])
def test_the_page_is_written_at_every_stage_and_prose_stays(rows, tmp_path, monkeypatch):
    (tmp_path / "miniature.md").write_text(page())
    write_page(rows, tmp_path, tmp_path / "chosen.json")
    text = (tmp_path / "miniature.md").read_text()
    assert text.count("More by hand.") == len(PARTS) - 1 and "\nold\n" not in text
    assert (tmp_path / "chosen.json").exists() == bool(rows)
    summary = read_rows(tmp_path / "miniature.jsonl")
    assert len(summary) == len(rows) and all(r["raw"] in (0.3, 0.4, 0.5, 0.6, 0.7) and "lc" in r for r in summary)
    monkeypatch.setattr("mini.figures.draw_figures", lambda *_: None)  # they are drawn once
    write_page(rows, tmp_path)
    assert (tmp_path / "miniature.md").read_text() == text


def with_everything() -> dict:
    """Every cell of the plan."""
    rows = with_tables(0.6, 0.4)
    for number, cell in enumerate(plan.all_cells(rows)):
        rows.setdefault(cell.id, row(cell, 0.1 + 0.1 * (number % 7)))
    return rows


def test_every_planned_cell_is_shown():
    results = Results(with_everything())
    points = plan.sweep_points(results.chosen["writing"], "writing")
    assert len({point.cell(0) for point in points}) == len(points) - 6  # seven keys have the tables' own cell

    def lines(text: str) -> int:
        return len(text.splitlines()) - 2

    assert lines(sweep_table(results)) == len(plan.TASKS) * len(points)
    assert sweep_table(results).count("(the tables')") == len(plan.TASKS) * 7
    assert lines(noise_table(results)) == len(plan.TASKS) * (1 + len(plan.NOISE))
    assert lines(form_table(results)) == len(plan.TASKS) * 3


def test_figures_are_drawn(tmp_path):
    (tmp_path / "miniature.md").write_text(page())
    write_page(with_everything(), tmp_path)
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == [f"miniature-{name}.png" for name in ("auc", "convergence", "noise", "sensitivity")]


def test_raw_among_right_answers_is_what_accuracy_leaves_of_raw():
    cell = Cell("writing", 0, "test", "sft")
    made = row(cell, 0.4)
    made["measured"]["right"], made["measured"]["wins"] = [1.0, 0.5, 0.0, 0.5], [0.5, 0.5, 0.0, 0.0]
    assert Results({cell.id: made}).figure(cell, "raw_if_right") == 0.5


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(UserError, match=r"page\.md: needs the markers"):
        replace_part("no markers", "table 1", "new", "page.md")


def test_figures_are_those_of_the_library():
    """LC by the library's own length model, from one mean per problem."""
    from purld.evaluation.winrate import summarize

    cell = Cell("writing", 0, "test", "sft")
    made = row(cell, 0.4)
    expected = summarize(made["measured"]["wins"], made["measured"]["teacher_length"], made["measured"]["length"])
    results = Results({cell.id: made})
    assert results.figure(cell, "lc") == expected.lc_win_rate
    assert results.figure(cell, "raw") == pytest.approx(np.mean(made["measured"]["wins"]))
