"""Competition Math in its published forms, and its check of answers as expressions."""

import builtins
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
from answer_phrasings import RIGHT, WRONG

from purld.errors import UserError
from purld.records import Prompt
from purld.tasks.competition_math import is_correct, require_math_verify
from purld.tasks.registry import load_task

REAL = Path(os.environ.get("PURLD_SHARED_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
COUNT, GEOMETRY = "Counting & Probability", "Geometry"


def problem(text, problem_type=COUNT, answer="1"):
    return {"problem": text, "level": "Level 2", "type": problem_type, "solution": rf"So $\boxed{{{answer}}}$."}


@pytest.fixture
def folders(tmp_path):
    """Write the original layout: split/type/number.json, one problem per file."""
    for split, texts in {"train": ["a", "b", "a"], "test": ["c", "a"]}.items():
        for problem_type in (COUNT, GEOMETRY):
            folder = tmp_path / "MATH" / split / problem_type.lower().replace(" & ", "_and_")
            folder.mkdir(parents=True)
            for number, text in enumerate(texts):
                row = problem(text + problem_type[0], problem_type)
                (folder / f"{number}.json").write_text(json.dumps(row, indent=2))
    return tmp_path / "MATH"


@pytest.fixture
def flat(tmp_path):
    """Write the flat form: one row per problem, one file per split."""
    for split, texts in {"train": "ab", "test": "c"}.items():
        rows = [problem(text + problem_type[0], problem_type) for text in texts for problem_type in (COUNT, GEOMETRY)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_original_folders(folders):
    pool, held_out = load_task("competition_math_counting", str(folders))
    assert [p.question for p in pool.prompts] == [
        "Solve the following competition math problem: aC",
        "Solve the following competition math problem: bC",
    ]
    assert (pool.rows, pool.duplicates, len(held_out.prompts)) == (3, 1, 2)
    first = pool.prompts[0]
    assert first.reference == r"So $\boxed{1}$."
    assert first.metadata == {"id": "train/counting_and_probability/0", "type": COUNT, "level": "Level 2"}
    assert len(load_task("competition_math", str(folders))[0].prompts) == 4


def test_the_flat_form(flat):
    pool, held_out = load_task("competition_math_geometry", str(flat))
    assert [p.question[-2:] for p in pool.prompts + held_out.prompts] == ["aG", "bG", "cG"]
    pool, held_out = load_task("competition_math", str(flat / "train.jsonl"))
    assert (len(pool.prompts), held_out) == (4, None)


def test_parquet_and_the_name_subject(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = problem("a")
    row["subject"] = row.pop("type")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test.parquet")
    assert len(load_task("competition_math_counting", str(tmp_path))[0].prompts) == 1


def test_a_hub_data_set_is_loaded_configuration_by_configuration(tmp_path, monkeypatch):
    import datasets
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, card = tmp_path / "math", ["---", "configs:"]
    for config, row in {"counting": problem("a"), "geometry": problem("b", GEOMETRY)}.items():
        (folder / config).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            file = f"{config}/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / file)
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---"]))
    pool, held_out = load_task("competition_math", str(folder))
    assert len(pool.prompts) == len(held_out.prompts) == 2
    torn = tmp_path / "torn" / "data" / "train-00000-of-00001.parquet"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    with pytest.raises(UserError, match="torn: cannot be loaded as a data set of the hub"):
        load_task("competition_math", str(tmp_path / "torn"))


def test_a_hub_data_set_that_is_not_here_is_not_downloaded():
    with pytest.raises(UserError, match=r"^owner/math: is neither .* purld downloads nothing; fetch it before"):
        load_task("competition_math", "owner/math")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"0\.json: is not valid JSON"),
        ("[]", r"0\.json: is not one JSON object"),
        (json.dumps(problem("")), r"0\.json: the problem is empty"),
        (json.dumps(problem("a") | {"solution": None}), r"0\.json: the solution is missing or null"),
        (json.dumps({"problem": "a", "solution": "b"}), r"0\.json: has no type"),
    ],
)
def test_a_bad_problem(folders, content, words):
    (folders / "train" / "counting_and_probability" / "0.json").write_text(content)
    with pytest.raises(UserError, match=words):
        load_task("competition_math_counting", str(folders))
    assert load_task("competition_math_counting", str(folders), "skip")[0].skipped == 1


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        load_task("competition_math", str(tmp_path))
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(problem("a")) + "\n")
    with pytest.raises(UserError, match="has the splits dev, train; train and one of test or validation are needed"):
        load_task("competition_math", str(tmp_path))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{9}{20}", "Multiplying gives 9/20.", True),
        (r"\frac{9}{20}", r"\boxed{0.45}", True),
        (r"\frac{9}{20}", r"The answer is 9/10, no: \boxed{\frac{9}{20}}", True),
        (r"\frac{9}{20}", r"It is $\frac{9}{20}$ at first, but finally \boxed{\frac{1}{2}}", False),
        (r"\frac{\sqrt{6}}{2}", r"$\boxed{\sqrt{\frac{3}{2}}}$", True),
        (r"2,\!000", "There are 2000 of them.", True),
        (r"\text{Friday}", r"\boxed{Friday}", True),
        (r"(3, 4)", r"\boxed{(4, 3)}", False),
        ("7", "", False),
        ("7", "I do not know.", False),
    ],
)
def test_answers_are_compared_as_mathematics(gold, answer, right):
    prompt = Prompt.from_text("q", reference=rf"First $3$, then $\boxed{{{gold}}}$ after $5$ steps.")
    assert is_correct(prompt, answer) is right


@pytest.mark.parametrize(
    ("gold", "answers", "right"),
    [(gold, answers, True) for gold, answers in RIGHT.items()]
    + [(gold, answers, False) for gold, answers in WRONG.items()],
)
def test_phrasings_of_an_answer(gold, answers, right):
    """The gold answer stands alone, and as the box of a solution."""
    references = [gold] if "boxed" in gold else [gold, rf"First $3$, then $\boxed{{{gold}}}$."]
    for reference in references:
        prompt = Prompt.from_text("q", reference=reference)
        assert {answer: is_correct(prompt, answer) for answer in answers} == dict.fromkeys(answers, right)


@pytest.mark.parametrize(
    ("solution", "right", "wrong"),
    [
        (r"We get $\boxed{5}$. Another way gives $2 + 3 = \boxed{5}.$", ["5"], ["2", "3"]),
        (r"At first $\boxed{5}$. Corrected: $\boxed{7}$.", ["7"], ["5", r"\boxed{5, 7}"]),
        (r"It is $\boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}$ inches.", ["639/40"], ["15"]),
        (r"The roots are $\boxed{5}$ and $\boxed{7}$.", [r"\boxed{7, 5}", r"\boxed{5} and \boxed{7}"], ["7", "5"]),
        (r"The roots are $\boxed{5, 7}$.", ["5 and 7", r"\boxed{7,5}"], ["5", "7"]),
    ],
)
def test_of_several_boxes_the_last_counts_unless_they_are_one_list(solution, right, wrong):
    prompt = Prompt.from_text("q", reference=solution)
    assert all(is_correct(prompt, answer) for answer in right)
    assert not any(is_correct(prompt, answer) for answer in wrong)


@pytest.mark.parametrize("text", ["the answer is ", "1,", "not 5 ", r"\boxed{5} and ", r"\boxed{", "1 ", "$", "(", " "])
def test_a_text_that_repeats_itself_is_read_in_linear_time(text):
    started = time.monotonic()
    is_correct(Prompt.from_text("q", reference="7"), text * (40_000 // len(text)))
    assert time.monotonic() - started < 10


def test_without_a_reference_an_answer_is_not_wrong_but_unscored():
    with pytest.raises(ValueError, match="has no reference"):
        is_correct(Prompt.from_text("q"), "7")


def test_without_math_verify_there_is_one_sentence(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    require_math_verify()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"install purld\[math\], or set data\.check=none\.$"):
        require_math_verify()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not on this machine")
def test_real_problems_and_their_gold():
    pool, held_out = load_task("competition_math", str(REAL / "competition_math.jsonl"))
    assert held_out is None
    assert len(pool.prompts) == 250
    sample = pool.prompts[::5]
    assert all(is_correct(p, p.reference) for p in sample)
    assert sum(is_correct(p, q.reference) for p, q in pairwise(sample)) <= 5
    with pytest.raises(UserError, match=r"line 1: has no type, which is needed to select the Geometry problems"):
        load_task("competition_math_geometry", str(REAL / "competition_math.jsonl"))
