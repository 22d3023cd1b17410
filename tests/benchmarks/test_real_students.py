"""The comparison on real students: what is trained on, measured and compared, without running any of it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from real import finished_cells
from real_students.bench import Bench, right_answers
from real_students.figures import draw_figures, draw_gains
from real_students.page import best_on_validation, differences_from_p_sft, method_table, on_validation
from real_students.plan import CHOSEN, METHODS, QUICK, SEEDS, Cell, Size, choose_settings, chosen_cells, tuning_cells

from purld.config.load import load_config
from purld.errors import UserError
from purld.runs.files import read_rows, write_rows
from purld.runs.run_dir import RunDir

SIZE = Size(stage_one=60, stage_two=40, steps=4, measured=30, samples=2)


@pytest.fixture
def bench(tmp_path: Path, random_student: Path) -> Bench:
    problems, test = tmp_path / "problems.jsonl", tmp_path / "test.jsonl"
    write_rows(
        problems, [{"prompt": f"What is {n} + 1?", "reference": n + 1, "teacher": f"{n + 1}."} for n in range(400)]
    )
    write_rows(test, [{"prompt": f"What is {n} + 2?", "reference": n + 2} for n in range(50)])
    return Bench(tmp_path / "out", {"tiny": random_student}, problems, test, SIZE)


def test_every_cell_has_a_folder_of_its_own_and_p_sft_comes_first():
    cells = [*chosen_cells(["a", "b"], {}, SEEDS), *tuning_cells(["a", "b"])]
    assert len({cell.id for cell in cells}) == len(cells)
    assert [cell.method for cell in cells[:2]] == ["SFT", "SFT"]
    assert {cell.method for cell in cells} == METHODS.keys()
    assert all(cell.seed not in SEEDS and cell.split == "validation" for cell in tuning_cells(["a"]))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_nothing_is_measured_on_what_is_trained_on(bench: Bench, split: str):
    for seed in (0, 1):
        cell = next(c for c in chosen_cells(["tiny"], {}, [seed]) if c.method == "LDL-GRPO")
        path = bench.write_config(type(cell)(cell.student, seed, split, cell.method, cell.settings))
        config = load_config(path, [f"align.{key}={value}" for key, value in bench.align_settings(cell).items()])
        train, measured = (read_rows(Path(name)) for name in (config.data.prompts, config.data.eval_prompts))
        assert len(train) == 100 and config.data.sft_fraction == 0.6
        of_test = {row["prompt"] for row in bench.test_problems(split)}
        others = [row for row in measured if row["prompt"] not in of_test]
        assert others == bench.split_problems(seed)[1] and len(others) == 30
        assert len(of_test) == (30 if split == "test" else 0)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in measured}
        assert (config.align.method, config.align.steps, config.seed) == ("ldl_grpo", 4, seed)
        assert config.align.candidates == SIZE.candidates


def test_the_quick_slice_goes_on_without_a_signal(bench: Bench):
    cell = Cell("tiny", 0, "test", "LDL-GRPO")
    assert "weak_signal" not in bench.align_settings(cell)
    assert replace(bench, size=QUICK).align_settings(cell)["weak_signal"] == "continue"


def test_the_rows_of_the_project_can_be_read():
    for path in sorted((Path(__file__).parents[2] / "docs").glob("*.jsonl")):
        assert read_rows(path), path


def test_stage_two_may_have_stage_ones_problems(bench: Bench):
    cell = Cell("tiny", 0, "test", "LDL-GRPO", pool="same")
    config = load_config(bench.write_config(cell))
    assert config.data.sft_fraction is None and len(read_rows(Path(config.data.prompts))) == SIZE.stage_one
    assert cell.id != Cell("tiny", 0, "test", "LDL-GRPO").id


def test_validation_problems_are_the_same_for_all_seeds(bench: Bench):
    parts = [bench.split_problems(seed) for seed in (0, 1)]
    assert parts[0][1] == parts[1][1] and parts[0][0] != parts[1][0]


def test_answers_to_test_and_validation_problems_are_told_apart(tmp_path: Path):
    run = RunDir(tmp_path)
    for name, right in (("ldl_grpo", [True, False]), ("ldl_grpo.greedy", [True])):
        rows = [{"prompt_id": p, "prompt": p, "correct": p == "a" and r} for p in ("a", "b", "c") for r in right]
        run.generations(name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(run.generations(name), rows)
    shares = right_answers(run, "ldl_grpo", [{"prompt": "c"}, {"prompt": "a"}])
    assert shares == {"right": [0.0, 0.5], "greedy": [0.0, 1.0]}
    assert right_answers(run, "ldl_grpo", [{"prompt": "b"}]) == {"right": [0.0], "greedy": [0.0]}
    row = {"method": "SFT", "right": [1.0], "greedy": [1.0]}
    assert on_validation([row, row | {"validation": shares}]) == [row | {"validation": shares} | shares]


def test_the_table_has_paired_differences_over_problems_and_seeds():
    def row(method: str, seed: int, right: list[float], **changed: float):
        shared = {"student": "tiny", "split": "test", "pool": "other", "kl": None, "steps": 3, "prompts_per_step": 8}
        own = {"method": method, "seed": seed, "right": right, "changed": changed}
        return shared | own | {"greedy": [1.0, 0.0], "seconds": {"align": 36.0}}

    rows = [row("SFT", 0, [0.5, 0.0]), row("SFT", 1, [0.5, 0.5])]
    rows += [row("LDL-GRPO", 0, [1.0, 0.0], rate=0.1), row("LDL-GRPO", 1, [1.0, 0.5], rate=0.1)]
    lines = method_table(rows, "tiny", "test").splitlines()
    assert lines[2].split(" | ")[:4] == ["| SFT", "", "0.375", "0.500"]
    assert lines[3].startswith("| LDL-GRPO | rate=0.1 | 0.625 | 0.500 | +0.250 [")
    assert lines[3].endswith(" | +0.250, +0.250 |  | 2400 |")


def test_the_settings_with_most_right_answers_to_validation_problems_are_chosen():
    def row(method: str, rate: float, right: list[float], split: str = "validation", student: str = "a"):
        return {
            "student": student,
            "split": split,
            "method": method,
            "right": right,
            "changed": {"learning_rate": rate},
            "id": f"{student}/{method}/{rate}",
        }

    rows = [row("SFT", 0.0, [1.0]), row("LDL-GRPO", 0.1, [0.5]), row("LDL-GRPO", 0.2, [0.75]), row("RLPR", 0.1, [0.0])]
    rows += [row("LDL-GRPO", 0.3, [1.0], split="test"), row("LDL-GRPO", 0.1, [1.0], student="b")]
    chosen = choose_settings(rows)
    assert chosen["a"] == {"LDL-GRPO": {"learning_rate": 0.2}, "RLPR": {"learning_rate": 0.1}}
    cells = {cell.method: dict(cell.settings) for cell in chosen_cells(["b"], chosen, [0])}
    assert cells["LDL-GRPO"] == {"learning_rate": 0.1} and cells["RLPR"] == CHOSEN["RLPR"] and cells["SFT"] == {}


def test_settings_are_compared_by_all_seeds_on_validation_problems_alone():
    def row(rate: float, seed: int, validation: float, test: float):
        own = {"changed": {"learning_rate": rate}, "validation": {"right": [validation]}, "right": [test]}
        return {"method": "RLPR", "seed": seed} | own

    p_sft = {"method": "SFT", "seed": 0, "changed": {}, "validation": {"right": [0.9]}, "right": [0.9]}
    steady, lucky = [row(0.1, 0, 0.5, 0.1), row(0.1, 1, 0.6, 0.1)], [row(0.2, 0, 0.8, 1.0), row(0.2, 1, 0.2, 1.0)]
    assert best_on_validation([p_sft, *lucky, *steady, {"method": "RLPR"}]) == [p_sft, *steady]
    # Seed 2 is an easy one, and only the other rate was run on it.
    assert best_on_validation([*steady, row(0.2, 1, 0.5, 1.0), row(0.2, 2, 1.0, 1.0)]) == steady
    assert best_on_validation([*steady, row(0.2, 2, 1.0, 1.0)]) == steady


def test_differences_are_from_the_same_seeds_p_sft_and_tell_answers_and_problems_apart():
    def row(method: str, seed: int, test: tuple[float, float], validation: tuple[float, float]):
        keys = ("right", "greedy")
        own = {"validation": {key: [value, value] for key, value in zip(keys, validation, strict=True)}}
        shared = {"method": method, "seed": seed, "pool": "other", "changed": {}, "id": f"{method}{seed}"}
        return shared | own | {key: [value, value] for key, value in zip(keys, test, strict=True)}

    p_sft = [row("SFT", 0, (0.25, 0.5), (0.5, 0.5)), row("SFT", 1, (0.0, 1.0), (0.25, 0.0))]
    found = differences_from_p_sft([*p_sft, row("RLPR", 1, (0.5, 0.75), (1.0, 0.5))])
    assert {answers: difference.mean for answers, difference in found["RLPR"].items()} == {
        "validation problems, sampled": 0.75,
        "validation problems, greedy": 0.5,
        "test problems, sampled": 0.5,
        "test problems, greedy": -0.25,
    }
    with pytest.raises(ValueError, match="two cells of SFT"):
        differences_from_p_sft([*p_sft, p_sft[0]])


def test_the_figures_hold_what_was_measured_and_are_left_out_without_points(tmp_path: Path):
    def row(method: str, seed: int, right: list[float], **more: object):
        shared = {"student": "a", "split": "test", "pool": "other", "score_quality": None, "training_accuracy": None}
        return shared | {"method": method, "seed": seed, "right": right} | more

    rows = [row("SFT", 0, [0.5, 0.0])]
    assert draw_figures(rows, "a", tmp_path) == [] and not list(tmp_path.iterdir())
    steps = [{"step": n, "n": 8, "right": n / 10} for n in range(1, 4)]
    rows += [row("LDL-GRPO", 0, [1.0, 0.0], score_quality={"auc_within": 0.9}, training_accuracy=steps)]
    assert [path.name for path in draw_figures(rows, "a", tmp_path)] == [
        "results-real-a-updates.png",
        "results-real-a-auc.png",
    ]
    measured = {"changed": {}, "greedy": [0.0, 1.0], "validation": {"right": [0.5, 1.0], "greedy": [1.0, 1.0]}}
    figures = draw_figures([row | measured for row in rows], "a", tmp_path)
    assert [path.name for path in figures][2:] == ["results-real-a-differences.png"]


def test_the_figure_of_gains_needs_no_equally_long_runs(tmp_path: Path):
    long, short = ([0.01 * n for n in range(count)] for count in (12, 9))
    shared = {"method": "LDL-GRPO", "prompts_per_step": 8}
    curves = [shared | {"seed": n, "gain": curve, "kl": curve} for n, curve in enumerate((long, short))]
    draw_gains([*curves, shared | {"gain": [0.5], "kl": [0.5]}], tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_cells_of_another_size_are_not_taken_for_these(bench: Bench):
    write_rows(bench.rows, [{"id": "a", "size": asdict(SIZE)}])
    assert list(finished_cells(bench)) == ["a"]
    with pytest.raises(UserError, match="another size"):
        finished_cells(replace(bench, size=replace(SIZE, steps=5)))
