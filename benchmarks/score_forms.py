"""Compare forms of the in-context score on real groups: word problems with gold, and open-ended answers with verdicts.

    python benchmarks/score_forms.py problems STUDENT RUN/sft PROBLEMS.jsonl OUT/problems.jsonl --groups 60
    python benchmarks/score_forms.py again STUDENT OUT/problems.jsonl OUT/before.jsonl
    python benchmarks/score_forms.py judged STUDENT JUDGED.jsonl OUT/judged.jsonl --groups 30
    python benchmarks/score_forms.py judged STUDENT JUDGED.jsonl OUT/whole.jsonl --groups 30 --tokens 1500 --forms-only
    python benchmarks/score_forms.py table OUT/problems.jsonl OUT/before.jsonl OUT/judged.jsonl

The first and the third store per-token log-probs of every answer in several contexts: without the anchor, with it under
several templates, and with another prompt's anchor; and of the anchor with each answer in its context. `again` measures
the same answers with the student's own weights, before Stage I. Stopped, all three continue. The last makes every form
of what they stored, in seconds. PROBLEMS has rows of prompt, reference (a number) and teacher (the anchor); JUDGED has
rows of prompt, anchor and answers, each with text and wins, the probability that a judge prefers it to a fixed
opponent. A pair counts if its verdicts differ by more than 0.3. Judged answers are cut at 120 tokens, so that they are
of nearly equal length, or where `--tokens` says; `--forms-only` leaves out what takes passes of its own and is no form,
so that whole answers take minutes instead of hours.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from purld.config.schema import Lora, Student
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.likelihood import AnchoredRows, reference_scores
from purld.model.load import load_encoder, load_model
from purld.model.log_probs import token_log_probs
from purld.model.sample import Decoding, GenerateSampler, seed_from_content
from purld.model.self_evaluation import SelfEvaluator
from purld.records import Prompt

TEMPLATES = {
    "own words": "{q}\n\nHere is an answer to this:\n{a}\n\nWrite the same answer in your own words.",
    "reference": "{q}\n\nReference answer:\n{a}\n\nAnswer the question in agreement with the reference answer.",
}
RATINGS: tuple[Literal["expected", "verbal"], ...] = ("expected", "verbal")
CANDIDATES = 8
ANCHOR_TOKENS = 300
MIN_VERDICT_GAP = 0.3
Row = dict[str, Any]
Form = Callable[[np.ndarray, np.ndarray], float]


# --- measuring -----------------------------------------------------------------------------------------------


def measure_answers(
    model: CausalLM,
    encoder: Encoder,
    question: str,
    anchor: str,
    other: str,
    rows: list[list[int]],
    forms_only: bool = False,
) -> Row:
    """Return the log-probs of every token in each context, and the scores that need no form; row 0 is the anchor.

    `other` is another prompt's anchor. "reversed" holds the anchor's log-probs with each answer in its context.
    """
    texts = [encoder.decode_text(r) for r in rows]
    own_words = TEMPLATES["own words"]
    contexts = {"bare": question, "other": own_words.format(q=question, a=other)}
    contexts |= {name: text.format(q=question, a=anchor) for name, text in TEMPLATES.items()}
    log_probs = {name: answer_log_probs(model, encoder, text, rows) for name, text in contexts.items()}
    if forms_only:
        return {"log_probs": log_probs}
    log_probs["reversed"] = [
        answer_log_probs(model, encoder, own_words.format(q=question, a=text), rows[:1])[0] for text in texts
    ]
    prompt = Prompt.from_text(question)
    ratings = {
        kind: SelfEvaluator(encoder, kind, 16).score(model, prompt, anchor, texts).candidates for kind in RATINGS
    }
    (reference,) = reference_scores(model, encoder, [AnchoredRows(prompt, anchor, rows[1:])], 16)
    return {
        "log_probs": log_probs,
        **ratings,
        "reference": [reference.anchor, *reference.candidates],
    }


def answer_log_probs(model: CausalLM, encoder: Encoder, context: str, rows: list[list[int]]) -> list[list[float]]:
    """Return the log-probs of the rows' tokens after a user's turn."""
    values, _ = token_log_probs(model, encoder.encode_prompt(Prompt.from_text(context)), rows, encoder.pad)
    return [[round(v, 4) for v in line[: len(row)]] for line, row in zip(values.tolist(), rows)]


def measure_problems(args: argparse.Namespace) -> None:
    """Sample groups of word problems from p_sft until enough hold right and wrong answers, and measure these."""
    student, encoder = open_student(args.student)
    model = load_model(student, args.sft)
    sampler = GenerateSampler(encoder, Decoding(1.0, 48))
    done = read_rows(args.out)
    mixed = sum("log_probs" in row for row in done)
    problems = read_rows(args.problems)
    for index in range(len(done), len(problems)):
        if mixed >= args.groups:
            return
        problem, other = problems[index], problems[index - 1]["teacher"]
        prompt = Prompt.from_text(problem["prompt"])
        (drawn,) = sampler(model, [encoder.encode_prompt(prompt)], CANDIDATES, [seed_from_content("forms", prompt.id)])
        ids = [c.ids for c in drawn]
        right = [last_number(encoder.decode_text(i)) == float(problem["reference"]) for i in ids]
        row: Row = {"id": prompt.id, "right": right, "tokens": [len(i) for i in ids]}
        if any(right) and not all(right):
            mixed += 1
            question, anchor = problem["prompt"], problem["teacher"]
            rows = [encoder.encode_answer(anchor).ids, *ids]
            row |= {"question": question, "anchor": anchor, "other": other, "rows": rows}
            row |= measure_answers(model, encoder, question, anchor, other, rows)
        append_row(args.out, row)
        print(f"{mixed} of {args.groups} groups with right and wrong answers", flush=True)


def measure_again(args: argparse.Namespace) -> None:
    """Measure the same answers to the same problems with the student's own weights."""
    student, encoder = open_student(args.student)
    model = load_model(student, args.student)
    done = {row["id"] for row in read_rows(args.out)}
    for row in read_rows(args.problems):
        if "log_probs" not in row or row["id"] in done:
            continue
        measured = measure_answers(model, encoder, row["question"], row["anchor"], row["other"], row["rows"])
        append_row(args.out, {name: row[name] for name in ("id", "right", "tokens")} | measured)
        print(f"{row['id']} measured", flush=True)


def measure_judged(args: argparse.Namespace) -> None:
    """Measure judged answers with the student's own weights."""
    student, encoder = open_student(args.student)
    model = load_model(student, args.student)
    done = {row["id"] for row in read_rows(args.out)}
    items = read_rows(args.judged)
    for index, item in enumerate(items[: args.groups]):
        if item["id"] in done:
            continue
        anchor, other = (
            encoder.decode_text(encoder.encode_literal(i["anchor"])[:ANCHOR_TOKENS]) for i in (item, items[index - 1])
        )
        texts = (item["anchor"], *(a["text"] for a in item["answers"]))
        rows = [cut_answer(encoder, text, args.tokens) for text in texts]
        row = {"id": item["id"], "wins": [a["wins"] for a in item["answers"]], "tokens": [len(r) for r in rows[1:]]}
        measured = measure_answers(model, encoder, item["prompt"], anchor, other, rows, args.forms_only)
        append_row(args.out, row | measured)
        print(f"{item['id']} measured", flush=True)


def open_student(folder: str) -> tuple[Student, Encoder]:
    """Return the student's section, with the adapter settings of a LoRA run, and its encoder."""
    student = Student(model=folder, lora=Lora(r=16), max_prompt_tokens=2048, max_anchor_tokens=1024)
    return student, load_encoder(student)


def cut_answer(encoder: Encoder, text: str, limit: int) -> list[int]:
    """Return an answer's token ids up to the limit, with the end of turn if it is whole."""
    ids = encoder.encode_literal(text)
    return ids[:limit] if len(ids) >= limit else [*ids, encoder.end]


def last_number(text: str) -> float | None:
    """Return the last number in a text."""
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return float(numbers[-1].replace(",", "").rstrip(".")) if numbers else None


def read_rows(path: str) -> list[Row]:
    """Read a JSONL file; none is there yet if it does not exist."""
    return [json.loads(line) for line in Path(path).open(encoding="utf-8")] if Path(path).exists() else []


def append_row(path: str, row: Row) -> None:
    """Append a row to a JSONL file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# --- forms ---------------------------------------------------------------------------------------------------

FORMS: dict[str, Form] = {  # of (log-probs with the anchor, log-probs without), each (tokens,)
    "with anchor, mean": lambda c, b: c.mean(),
    "minus 0.5 bare": lambda c, b: (c - 0.5 * b).mean(),
    "minus bare": lambda c, b: (c - b).mean(),
    "minus bare, sum": lambda c, b: (c - b).sum(),
    "minus bare, clipped at 0.5": lambda c, b: (c - b).clip(-0.5, 0.5).mean(),
    "minus bare, clipped at 1": lambda c, b: (c - b).clip(-1, 1).mean(),
    "minus bare, clipped at 2": lambda c, b: (c - b).clip(-2, 2).mean(),
    "minus bare, clipped at 3": lambda c, b: (c - b).clip(-3, 3).mean(),
    "of probabilities": lambda c, b: (np.exp(c) - np.exp(b)).mean(),
    "minimum": lambda c, b: c.min(),
    "lowest tenth": lambda c, b: np.sort(c)[: max(1, len(c) // 10)].mean(),
    "lowest tenth, minus bare": lambda c, b: np.sort(c - b)[: max(1, len(c) // 10)].mean(),
}


def scores_of(row: Row) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the scores of a group's answers, without the anchor, in every form."""
    contexts = {name: [np.array(v) for v in rows] for name, rows in row["log_probs"].items()}
    bare, other, own = contexts["bare"], contexts["other"], contexts["own words"]
    for name in (*RATINGS, "reference"):
        if name in row:
            yield name, np.array(row[name], dtype=float)[1:]
    yield "bare, mean", np.array([b.mean() for b in bare])[1:]
    for template in TEMPLATES.keys() & contexts.keys():
        for name, form in FORMS.items():
            yield f"{template}: {name}", np.array([form(c, b) for c, b in zip(contexts[template], bare)])[1:]
    yield (
        "own words: minus another anchor, clipped at 2",
        np.array([(c - o).clip(-2, 2).mean() for c, o in zip(own, other)])[1:],
    )
    yield (
        "own words: minus the greater of both, clipped at 2",
        np.array([(c - np.maximum(b, o)).clip(-2, 2).mean() for c, b, o in zip(own, bare, other)])[1:],
    )
    if "reversed" in contexts:
        gains = [(r - bare[0]).clip(-2, 2).mean() for r in contexts["reversed"]]
        yield "the anchor's gain by the answer, clipped at 2", np.array(gains)[1:]


def pairs_of(row: Row) -> list[tuple[int, int]]:
    """Return the pairs of answers (better, worse) of a group, by gold or by verdict."""
    if "right" in row:
        right = row["right"]
        return [(i, j) for i, j in itertools.permutations(range(len(right)), 2) if right[i] and not right[j]]
    wins = row["wins"]
    return [(i, j) for i, j in itertools.permutations(range(len(wins)), 2) if wins[i] - wins[j] > MIN_VERDICT_GAP]


def agreement(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return for every form the share of pairs ranked right in each group that has pairs, (groups, 2) with the half."""
    shares: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        pairs = pairs_of(row) if "log_probs" in row else []
        half = hashlib.sha256(str(row["id"]).encode()).digest()[0] % 2
        for name, scores in scores_of(row) if pairs else ():
            wins = [np.nan_to_num(np.sign(scores[i] - scores[j])) / 2 + 0.5 for i, j in pairs]  # unscored: a tie
            shares.setdefault(name, []).append((float(np.mean(wins)), half))
    return {name: np.array(values) for name, values in shares.items()}


def print_table(args: argparse.Namespace) -> None:
    """Print every form with its agreement on every file, the mean over groups with its 95% interval, and by halves."""
    measured = {Path(path).stem: agreement(read_rows(path)) for path in args.measured}
    rng = np.random.default_rng(0)

    def cell(values: np.ndarray | None) -> str:
        if values is None:
            return "–"
        shares, halves = values[:, 0], values[:, 1]
        means = shares[rng.integers(len(shares), size=(2000, len(shares)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        parts = "/".join(f"{shares[halves == h].mean():.2f}" for h in (0, 1))
        return f"{shares.mean():.3f} [{low:.2f}, {high:.2f}] ({parts})"

    counts = [len(next(iter(forms.values()))) for forms in measured.values()]
    print("| score | " + " | ".join(f"{name} ({n} groups)" for name, n in zip(measured, counts)) + " |")
    print("|---" * (len(measured) + 1) + "|")
    for name in {name: None for forms in measured.values() for name in forms}:
        print(f"| {name} | " + " | ".join(cell(forms.get(name)) for forms in measured.values()) + " |")


def main() -> None:
    """Measure or print, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, places, run in (
        ("problems", ("student", "sft", "problems", "out"), measure_problems),
        ("again", ("student", "problems", "out"), measure_again),
        ("judged", ("student", "judged", "out"), measure_judged),
        ("table", (), print_table),
    ):
        command = commands.add_parser(name)
        for place in places:
            command.add_argument(place)
        if name in ("problems", "judged"):
            command.add_argument("--groups", type=int, default=60)
        if name == "judged":
            command.add_argument("--tokens", type=int, default=120)
            command.add_argument("--forms-only", action="store_true")
        if name == "table":
            command.add_argument("measured", nargs="+")
        command.set_defaults(run=run)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    args.run(args)


if __name__ == "__main__":
    main()
