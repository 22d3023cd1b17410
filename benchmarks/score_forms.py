"""Compare forms of the in-context score on real groups: word problems with gold, and open-ended answers with verdicts.

    python benchmarks/score_forms.py problems STUDENT RUN/sft PROBLEMS.jsonl OUT/problems.jsonl --groups 60
    python benchmarks/score_forms.py judged STUDENT JUDGED.jsonl OUT/judged.jsonl --groups 30
    python benchmarks/score_forms.py table OUT/problems.jsonl OUT/judged.jsonl

The first two store per-token log-probs of every answer with and without the anchor in its context, under several
templates; stopped, they continue. The third makes every form of them, in seconds. PROBLEMS has rows of prompt,
reference (a number) and teacher (the anchor); JUDGED has rows of prompt, anchor and answers, each with text and wins,
the probability that a judge prefers it to a fixed opponent. A pair counts if its verdicts differ by more than 0.3.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from purld.config.schema import Lora, Student
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.likelihood import reference_scores
from purld.model.load import load_encoder, load_model
from purld.model.log_probs import token_log_probs
from purld.model.sample import Decoding, GenerateSampler, seed_from_content
from purld.model.self_evaluation import SelfEvaluator
from purld.records import Prompt

TEMPLATES = {
    "own words": "{q}\n\nHere is an answer to this:\n{a}\n\nWrite the same answer in your own words.",
    "correct is": "{q}\n\n(The correct answer is: {a})",
    "reference": "{q}\n\nReference answer:\n{a}\n\nAnswer the question in agreement with the reference answer.",
}
CANDIDATES = 8
JUDGED_TOKENS = 120  # answers are cut here, so that they are of nearly equal length
ANCHOR_TOKENS = 300
MIN_VERDICT_GAP = 0.3
Row = dict[str, Any]
Form = Callable[[np.ndarray, np.ndarray], float]


# --- measuring -----------------------------------------------------------------------------------------------


def measure_answers(model: CausalLM, encoder: Encoder, question: str, anchor: str, rows: list[list[int]]) -> Row:
    """Return the log-probs of every token in each context, and the scores that need no form; row 0 is the anchor."""
    contexts = {"bare": question} | {name: text.format(q=question, a=anchor) for name, text in TEMPLATES.items()}
    log_probs = {}
    for name, text in contexts.items():
        values, _ = token_log_probs(model, encoder.encode_prompt(Prompt.from_text(text)), rows, encoder.pad)
        log_probs[name] = [[round(v, 4) for v in line[: len(row)]] for line, row in zip(values.tolist(), rows)]
    prompt = Prompt.from_text(question)
    expected = SelfEvaluator(encoder, "expected", 16).score(
        model, prompt, anchor, [encoder.decode_text(r) for r in rows]
    )
    reference = reference_scores(model, encoder, prompt, anchor, rows, 16)
    return {"log_probs": log_probs, "expected": expected.candidates, "reference": reference}


def measure_problems(args: argparse.Namespace) -> None:
    """Sample groups of word problems from p_sft until enough hold right and wrong answers, and measure these."""
    student, encoder = open_student(args.student)
    model = load_model(student, args.sft)
    sampler = GenerateSampler(encoder, Decoding(1.0, 48))
    done = read_rows(args.out)
    mixed = sum("log_probs" in row for row in done)
    for problem in read_rows(args.problems)[len(done) :]:
        if mixed >= args.groups:
            return
        prompt = Prompt.from_text(problem["prompt"])
        (drawn,) = sampler(model, [encoder.encode_prompt(prompt)], CANDIDATES, seed_from_content("forms", prompt.id))
        ids = [c.ids for c in drawn]
        right = [last_number(encoder.decode_text(i)) == float(problem["reference"]) for i in ids]
        row: Row = {"id": prompt.id, "right": right, "tokens": [len(i) for i in ids]}
        if any(right) and not all(right):
            mixed += 1
            anchor = encoder.encode_answer(problem["teacher"]).ids
            row |= measure_answers(model, encoder, problem["prompt"], problem["teacher"], [anchor, *ids])
        append_row(args.out, row)
        print(f"{mixed} of {args.groups} groups with right and wrong answers", flush=True)


def measure_judged(args: argparse.Namespace) -> None:
    """Measure judged answers with the student's own weights."""
    student, encoder = open_student(args.student)
    model = load_model(student, args.student)
    done = {row["id"] for row in read_rows(args.out)}
    for item in read_rows(args.judged)[: args.groups]:
        if item["id"] in done:
            continue
        anchor_ids = encoder.encode_literal(item["anchor"])
        anchor = encoder.decode_text(anchor_ids[:ANCHOR_TOKENS])
        rows = [cut_answer(encoder, text) for text in (item["anchor"], *(a["text"] for a in item["answers"]))]
        row = {"id": item["id"], "wins": [a["wins"] for a in item["answers"]], "tokens": [len(r) for r in rows[1:]]}
        append_row(args.out, row | measure_answers(model, encoder, item["prompt"], anchor, rows))
        print(f"{item['id']} measured", flush=True)


def open_student(folder: str) -> tuple[Student, Encoder]:
    """Return the student's section, with the adapter settings of a LoRA run, and its encoder."""
    student = Student(model=folder, lora=Lora(r=16), max_prompt_tokens=2048, max_anchor_tokens=1024)
    return student, load_encoder(student)


def cut_answer(encoder: Encoder, text: str) -> list[int]:
    """Return an answer's token ids up to the limit, with the end of turn if it is whole."""
    ids = encoder.encode_literal(text)
    return ids[:JUDGED_TOKENS] if len(ids) >= JUDGED_TOKENS else [*ids, encoder.end]


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
    bare = [np.array(values) for values in row["log_probs"]["bare"]]
    yield "expected", np.array(row["expected"], dtype=float)[1:]
    yield "reference (RLPR)", np.array(row["reference"])[1:]
    yield "bare, mean", np.array([b.mean() for b in bare])[1:]
    for template in TEMPLATES:
        context = [np.array(values) for values in row["log_probs"][template]]
        for name, form in FORMS.items():
            yield f"{template}: {name}", np.array([form(c, b) for c, b in zip(context, bare)])[1:]


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
            wins = [np.sign(scores[i] - scores[j]) / 2 + 0.5 for i, j in pairs]
            shares.setdefault(name, []).append((float(np.mean(wins)), half))
    return {name: np.array(values) for name, values in shares.items()}


def print_table(args: argparse.Namespace) -> None:
    """Print every form with its agreement on problems and on judged answers, all groups and by halves."""
    problems, judged = agreement(read_rows(args.problems)), agreement(read_rows(args.judged))
    rng = np.random.default_rng(0)

    def cell(values: np.ndarray) -> str:
        shares, halves = values[:, 0], values[:, 1]
        means = shares[rng.integers(len(shares), size=(2000, len(shares)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        parts = "/".join(f"{shares[halves == h].mean():.2f}" for h in (0, 1))
        return f"{shares.mean():.3f} [{low:.2f}, {high:.2f}] ({parts})"

    any_form = next(iter(problems))
    print(f"| score | {len(problems[any_form])} groups of problems | {len(judged[any_form])} judged instructions |")
    print("|---|---|---|")
    for name in sorted(problems, key=lambda n: -min(problems[n][:, 0].mean(), judged[n][:, 0].mean())):
        print(f"| {name} | {cell(problems[name])} | {cell(judged[name])} |")


def main() -> None:
    """Measure or print, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, places, run in (
        ("problems", ("student", "sft", "problems", "out"), measure_problems),
        ("judged", ("student", "judged", "out"), measure_judged),
        ("table", ("problems", "judged"), print_table),
    ):
        command = commands.add_parser(name)
        for place in places:
            command.add_argument(place)
        if name != "table":
            command.add_argument("--groups", type=int, default=60)
        command.set_defaults(run=run)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    args.run(args)


if __name__ == "__main__":
    main()
