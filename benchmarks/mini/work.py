"""Run a cell: Stage I and Stage II by purld's own functions, answers by its own sampler, verdicts by the testbed.

The testbed's teacher and judge are pure functions of the text, so they are called directly, without a server. Teacher
calls of Stage II are counted here.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mini.cells import ANCHORS, Cell, Split
from purld.clients.base import OnReply, Reply
from purld.config.load import parse_config
from purld.config.methods import StageTwoSettings
from purld.config.schema import Config, Sft, Student
from purld.evaluation.answers import answer_prompts
from purld.evaluation.score_quality import CheckedGroup, check_groups, score_quality
from purld.model.encode import Encoder
from purld.model.load import Roles, load_encoder, load_model
from purld.model.sample import Decoding, GenerateSampler, seed_from_content
from purld.model.self_evaluation import GroupScores
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.testbed.server import TEACHER, ChatMessage, reply_as
from purld.testbed.world.world import (
    Problem,
    Task,
    answer_quality,
    check_answer,
    generate_problems,
    is_right,
    recognise_problem,
    teacher_answer,
)
from purld.training.align import align
from purld.training.context import StageContext
from purld.training.scoring import GroupToScore, Scorer, SelfScorer
from purld.training.sft import fine_tune

HELD_OUT = 200
SAMPLES: dict[Split, int] = {"validation": 4, "test": 8}  # answers per problem
VALIDATION_SEED = 777_000  # not a run's seed, so it draws other problems of the training split
STAGE_ONE_STEPS = 240  # at most, so more anchors get fewer epochs

Pairs = list[tuple[Prompt, Anchor]]


def testbed_student() -> Student:
    """Return the settings of the testbed's own student."""
    model = str(files("purld.testbed") / "assets" / "student")
    return Student(model=model, max_prompt_tokens=256, max_anchor_tokens=128)


@lru_cache
def testbed_encoder() -> Encoder:
    """Return the student's encoder, as in a run."""
    return load_encoder(testbed_student())


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell and return its row; its files are removed, except those of p_sft."""
    torch.set_num_threads(1)
    _silence_libraries()
    stage_one = RunDir(folder / "stage_one" / cell.stage_one_key)
    if cell.method == "sft":
        facts = _stage_one(cell, stage_one)
        return _row(cell, facts, _measure_cell(cell, stage_one.sft, folder))
    work = RunDir(folder / "work" / cell.id)
    shutil.rmtree(work.path, ignore_errors=True)  # left by a killed run
    try:
        facts = _stage_two(cell, stage_one, work)
        return _row(cell, facts, _measure_cell(cell, work.align, folder))
    finally:
        shutil.rmtree(work.path, ignore_errors=True)


@contextmanager
def _measure_seconds() -> Iterator[list[float]]:
    """Yield a list that holds the seconds of the block once it has ended."""
    seconds, began = list[float](), time.monotonic()
    yield seconds
    seconds.append(time.monotonic() - began)


def _silence_libraries() -> None:
    """Turn off the progress bars and messages of other libraries."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _row(cell: Cell, facts: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    return {"id": cell.id, "cell": asdict(cell)} | facts | {"measured": measured}


def problems_trained_on(cell: Cell) -> list[Problem]:
    """Return problems of the training split: the first ones, or as many after them."""
    first = cell.anchors if cell.method != "sft" and cell.pool == "other" else 0
    return generate_problems(cell.task, "train", first + cell.anchors, cell.seed)[first:]


def anchored_prompts(cell: Cell) -> Pairs:
    """Return the prompts that a cell trains on with the teacher's answers."""
    problems = problems_trained_on(cell)
    prompts = [_prompt(problem) for problem in problems]
    return [(p, Anchor(p.id, teacher_answer(problem))) for p, problem in zip(prompts, problems)]


def problems_to_measure_on(task: Task, split: Split, seed: int) -> list[Problem]:
    """Return held-out problems; for validation, problems of the training split that tuning does not train on."""
    if split == "test":
        return generate_problems(task, "heldout", HELD_OUT, seed)
    asked = {p.question for p in generate_problems(task, "train", 2 * ANCHORS, seed)}
    others = generate_problems(task, "train", HELD_OUT + 2 * ANCHORS, VALIDATION_SEED + seed)
    return [p for p in others if p.question not in asked][:HELD_OUT]


def _prompt(problem: Problem) -> Prompt:
    return Prompt.from_text(problem.question, reference=problem.truth)


# --- training -------------------------------------------------------------------------------------------------


def stage_one_settings(anchors: int) -> Sft:
    """Return the demo's settings, with fewer epochs if there are more anchors."""
    batches = math.ceil(anchors * 0.9 / 16)
    return Sft(
        epochs=min(16.0, STAGE_ONE_STEPS / batches),
        learning_rate=3.0e-4,
        batch_size=16,
        micro_batch_size=16,
        checkpoint_steps=16,
    )


def _context(cell: Cell, run: RunDir) -> StageContext:
    return StageContext(testbed_student(), testbed_encoder(), run, cell.seed, _ignore_progress)


def _stage_one(cell: Cell, run: RunDir) -> dict[str, Any]:
    """Train p_sft unless it is finished, and return its facts."""
    with run.lock():
        if "sft" not in run.finished_stages():
            with _measure_seconds() as seconds:
                pairs = anchored_prompts(cell)
                settings = stage_one_settings(cell.anchors)
                facts = fine_tune(_context(cell, run), settings, pairs)
            run.finish("sft", seconds[0], **asdict(facts))
        finished = run.finished_stages()["sft"]
    curve = [{k: r[k] for k in ("step", "loss", "eval_loss") if k in r} for r in read_rows(run.metrics)]
    return {
        "seconds": finished["seconds"],
        "teacher_calls": cell.anchors,
        "best_step": finished["best_step"],
        "steps": finished["steps"],
        "curve": curve,
    }


def _stage_two(cell: Cell, stage_one: RunDir, run: RunDir) -> dict[str, Any]:
    """Align p_sft and return the facts of the stage."""
    if "sft" not in stage_one.finished_stages():
        raise RuntimeError(f"{cell.title}: its Stage I is missing")
    run.path.mkdir(parents=True)
    run.sft.symlink_to(stage_one.sft.resolve())
    pairs, settings, teacher = anchored_prompts(cell), _parse_settings(cell), TestbedTeacher()
    with _measure_seconds() as seconds:
        align(
            _context(cell, run),
            settings,
            pairs,
            teacher=teacher,
            change_scorer=lambda scorer: _change_scorer(scorer, cell),
        )
    return {
        "seconds": seconds[0],
        "teacher_calls": cell.anchors * (2 if cell.pool == "other" else 1) + teacher.calls,
        "curve": _curve(run),
        "score": _score_quality(run, [p for p, _ in pairs]),
    }


def _parse_settings(cell: Cell) -> StageTwoSettings:
    values = {
        "student": testbed_student().model_dump(),
        "data": {"prompts": "unused"},
        "teacher": {"kind": "local", "model": "unused"},
        "align": {"checkpoint_steps": 10_000, "score": "expected", "margin_scale": "literal"} | dict(cell.settings),
    }
    config: Config = parse_config(values, source=cell.title)
    assert isinstance(config.align, StageTwoSettings)
    return config.align


class TestbedTeacher:
    """The testbed's teacher without its server; it counts its calls."""

    __test__ = False  # pytest would collect the class by its name

    def __init__(self) -> None:
        self.calls = 0

    def ask(self, prompts: Sequence[Prompt], on_reply: OnReply | None = None) -> list[Reply]:
        """Answer prompts, see `purld.clients.base.Client`."""
        self.calls += len(prompts)
        return [Reply("answered", reply_as(TEACHER, ChatMessage("user", p.question)), "stop") for p in prompts]


def _change_scorer(scorer: Scorer, cell: Cell) -> Scorer:
    """Return the experiment's scorer: by the moving policy, or with noise added."""
    if cell.evaluator == "moving" and isinstance(scorer, SelfScorer):
        scorer = replace(scorer, roles=MovingEvaluator(scorer.roles.policy))
    return NoisyScorer(scorer, cell.noise, cell.seed) if cell.noise else scorer


class MovingEvaluator(Roles):
    """Roles in which the current policy evaluates instead of p_sft; the reference policy stays p_sft."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy, policy)


@dataclass(frozen=True)
class NoisyScorer:
    """A scorer that adds Gaussian noise which depends on prompt and text alone.

    An evaluator is a function: asked twice it errs in the same way, and equal candidates get equal scores. The anchor's
    own score gets noise too. Sums are not clipped to [0, 1], which would turn noise into ties.
    """

    scorer: Scorer
    deviation: float
    seed: int

    def __call__(self, groups: Sequence[GroupToScore]) -> list[GroupScores]:
        """Score groups, see `Scorer`."""
        noisy_scores = []
        for group, scores in zip(groups, self.scorer(groups), strict=True):
            anchor = None if scores.anchor is None else scores.anchor + self._noise(group, group.anchor)
            texts = zip(group.candidates, scores.candidates, strict=True)
            noisy_scores.append(
                GroupScores(anchor, [None if s is None else s + self._noise(group, t) for t, s in texts])
            )
        return noisy_scores

    def _noise(self, group: GroupToScore, text: str) -> float:
        generator = np.random.default_rng(seed_from_content("noise", self.seed, group.prompt.id, text))
        return float(self.deviation * generator.standard_normal())


_CURVE_KEYS = (
    "objective",
    "ldl",
    "kl",
    "entropy_labels",
    "entropy_policy",
    "sharper_than_labels",
    "length",
    "length_correlation",
    "score",
    "grad_norm",
    "dropped_groups",
)


def _curve(run: RunDir) -> list[dict[str, Any]]:
    """Return the logged values of each step, with the share of right candidates."""
    right: dict[int, list[bool]] = {}
    for row in read_rows(run.groups):
        problem = recognise_problem(row["prompt"])
        assert problem is not None
        right.setdefault(row["step"], []).extend(is_right(problem, text) for text in row["candidates"])
    rows = [row for row in read_rows(run.metrics) if row["stage"] == "align"]
    curve = []
    for row in rows:
        values = {key: round(row[key], 5) for key in _CURVE_KEYS if key in row}
        if row["step"] in right:
            values["right"] = round(float(np.mean(right[row["step"]])), 5)
        curve.append({"step": row["step"]} | values)
    return curve


def _score_quality(run: RunDir, prompts: Sequence[Prompt]) -> dict[str, Any] | None:
    """Measure how well the scores told right from wrong among the candidates."""
    groups = [_squash_scores(group) for group in check_groups(read_rows(run.groups), prompts, check_answer)]
    if not any(s is not None for group in groups for s in group.scores):
        return None
    quality = score_quality(groups)
    return {"n": quality.n, "right": quality.right, "auc": quality.auc, "auc_within": quality.auc_within}


def _squash_scores(group: CheckedGroup) -> CheckedGroup:
    """Map scores into (0, 1), which noise may have left, keeping their order."""
    return replace(group, scores=[None if s is None else 1 / (1 + math.exp(-s)) for s in group.scores])


def _ignore_progress(done: int, total: int, note: str) -> None:
    """Show no progress."""


# --- measuring ------------------------------------------------------------------------------------------------


def _measure_cell(cell: Cell, model: Path, folder: Path) -> dict[str, Any]:
    """Answer the split's problems and return the per-prompt values that the tables are made of."""
    problems = problems_to_measure_on(cell.task, cell.split, cell.seed)
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            loaded.append(load_model(testbed_student(), model))
        return loaded[0]

    with _measure_seconds() as seconds:
        samples = sample_answers(cell, problems, load, Decoding(1.0, 64), SAMPLES[cell.split], folder)
        greedy = (
            [] if cell.split == "validation" else sample_answers(cell, problems, load, Decoding(0.0, 64), 1, folder)
        )
    teacher = [teacher_answer(p) for p in problems]

    def right(problem: Problem, _: str, text: str) -> float:
        return float(is_right(problem, text))

    return {
        "seconds": seconds[0],
        "right": _per_prompt(problems, samples, right, teacher),
        "wins": _per_prompt(problems, samples, _wins, teacher),
        "length": _per_prompt(problems, samples, lambda _p, _t, text: float(len(text)), teacher),
        "teacher_length": [len(text) for text in teacher],
        "distinct": [round(len(set(texts)) / len(texts), 4) for texts in samples],
    } | ({"greedy_right": _per_prompt(problems, greedy, right, teacher)} if greedy else {})


def sample_answers(
    cell: Cell, problems: Sequence[Problem], load: Callable[[], Any], decoding: Decoding, samples: int, folder: Path
) -> list[list[str]]:
    """Sample texts by prompt and sample."""
    path = folder / "work" / f"answers-{cell.id}-{samples}.jsonl"
    path.unlink(missing_ok=True)
    prompts = [_prompt(p) for p in problems]
    generations = answer_prompts(
        load,
        prompts,
        testbed_encoder(),
        GenerateSampler(testbed_encoder(), decoding),
        samples,
        400,
        cell.seed,
        path,
        None,
        _ignore_progress,
    )
    path.unlink()
    return [[g.text for g in generations[i : i + samples]] for i in range(0, len(generations), samples)]


def _per_prompt(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    value: Callable[[Problem, str, str], float],
    teacher: Sequence[str],
) -> list[float]:
    """Return the mean of a value over each prompt's samples, shape (prompts,)."""
    rows = zip(problems, teacher, answers, strict=True)
    return [round(float(np.mean([value(p, t, text) for text in texts])), 5) for p, t, texts in rows]


def _wins(problem: Problem, teacher: str, text: str) -> float:
    """Return 1, 0.5 or 0: whether the judge prefers the answer to the teacher's. It weighs both orders alike."""
    ours, theirs = answer_quality(problem, text), answer_quality(problem, teacher)
    return 0.5 if ours == theirs else float(ours > theirs)
