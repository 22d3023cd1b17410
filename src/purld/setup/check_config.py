"""Look at what a configuration names: the student, the data, the memory and disk that training takes, the endpoints.

Everything is read as a run would read it, so that `ok` here means that a run reads it too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from purld.config.clients import AnswerFile, OpenAIEndpoint
from purld.config.schema import Config
from purld.errors import UserError
from purld.model.encode import Encoder
from purld.model.student_check import StudentSizes
from purld.pipeline.chosen_score import with_chosen_score
from purld.pipeline.context import anchors_in_file
from purld.pipeline.plan_machine import plan_machine, plan_update, training_bytes
from purld.pipeline.plan_sheet import Plan
from purld.pipeline.preflight import check_before_spending
from purld.pipeline.prompt_pools import PromptPools, load_prompt_pools
from purld.pipeline.stage_two_split import longest_prompt
from purld.records import Prompt
from purld.runs.run_dir import RunDir
from purld.setup.check_endpoint import check_endpoint
from purld.setup.check_machine import check_memory
from purld.setup.finding import Finding
from purld.tasks.registry import load_data


def check_config(config: Config, run: RunDir) -> Iterator[Finding]:
    """Yield what is found about the student, the data, the memory and disk that training takes, and the endpoints."""
    config = with_chosen_score(config)
    student = yield from _check_student(config, run)
    pools = yield from _check_data(config, student[0] if student else None)
    if student:
        yield from _check_training(config, student[1], pools, run)
    else:
        yield check_memory()
    for role, client in (("teacher", config.teacher), ("evaluate.judge", config.evaluate.judge)):
        if isinstance(client, OpenAIEndpoint):
            yield from check_endpoint(role, client)


def _check_student(config: Config, run: RunDir) -> Generator[Finding, None, tuple[Encoder, StudentSizes] | None]:
    """Check the student's directory as a run would, and return its encoder and sizes."""
    try:
        run.check_place()
        encoder, sizes = check_before_spending(config, run)
    except UserError as problem:
        yield _wrong("student", problem)
        return None
    trained = f"{sizes.weights / 1e6:,.1f} M weights, {sizes.trained / 1e6:,.1f} M trained"
    yield Finding("ok", "student", f"{config.student.model} is whole: {trained}")
    return encoder, sizes


def _check_data(config: Config, encoder: Encoder | None) -> Generator[Finding, None, PromptPools | None]:
    """Read every file of prompts and answers as a run would, and return the pools; without an encoder only read."""
    source, pools = config.data.source, None
    try:
        if encoder is None:
            loaded, _ = load_data(config.data)
            yield Finding("ok", "data", f"{source}: {len(loaded.prompts):,} prompts")
        else:
            pools = load_prompt_pools(config, encoder, lambda _: None)
            split = f"{len(pools.train):,} prompts for training, {len(pools.held_out):,} held out"
            yield Finding("ok", "data", f"{source}: {split}; `purld check` shows what is left out")
    except UserError as problem:
        remedy = "mend the file or the key that names it; paths begin at this folder"
        yield Finding("wrong", "data", str(problem).rstrip("."), remedy)
    for role, file, prompts in _answer_files(config, pools):
        yield _check_answers(role, file, prompts, config)
    return pools


def _answer_files(
    config: Config, pools: PromptPools | None
) -> Iterator[tuple[str, AnswerFile, Sequence[Prompt] | None]]:
    """Yield the files whose answers a run takes, each with its role and the prompts that it answers, if known."""
    if isinstance(config.teacher, AnswerFile):
        yield "teacher", config.teacher, None if pools is None else pools.train
    if isinstance(config.evaluate.opponent, AnswerFile):
        yield "evaluate.opponent", config.evaluate.opponent, None if pools is None else pools.held_out


def _check_answers(role: str, file: AnswerFile, prompts: Sequence[Prompt] | None, config: Config) -> Finding:
    """Read a file of answers, and count the prompts that it answers."""
    try:
        found = len(anchors_in_file(file, prompts or [], config.anchors))
    except UserError as problem:
        return _wrong(role, problem)
    if prompts is None:
        return Finding("ok", role, f"{file.path} can be read")
    text = f"{file.path} answers {found:,} of {len(prompts):,} prompts"
    if found:
        return Finding("ok", role, text)
    return Finding("wrong", role, text, f"correct {role}.path or {role}.columns; `purld check` counts the reasons")


def _check_training(config: Config, sizes: StudentSizes, pools: PromptPools | None, run: RunDir) -> Iterator[Finding]:
    """Compare what training takes with the memory and the disk."""
    longest = config.student.max_prompt_tokens if pools is None else longest_prompt(config, pools, run)
    yield check_memory(training_bytes(config, sizes), plan_update(config, sizes, longest))
    plan_machine(plan := Plan(), config, sizes, run.path)
    yield from (Finding("wrong", "disk", problem.rstrip("."), "free some space") for problem in plan.problems)


def _wrong(subject: str, problem: UserError) -> Finding:
    return Finding("wrong", subject, str(problem).rstrip("."), "mend what this sentence names")
