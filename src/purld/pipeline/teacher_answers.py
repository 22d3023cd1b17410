"""Collect the teacher's answers: the anchors, and the opponent's answers to held-out prompts.

The anchors stage buys both. The evaluation buys what it lacks of the opponent's: all of it where the opponent was added
to the configuration later, and the rest where a cap left prompts unasked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from purld.clients.anchors import collect_anchors
from purld.clients.base import ReplyState
from purld.clients.batch import BatchClient
from purld.clients.ledger import Ledger, Role
from purld.clients.open import open_client
from purld.clients.recorded import open_recorded
from purld.clients.requests import build_requests, read_api_key
from purld.config.clients import OpenAIEndpoint, Teacher, TeacherAnchors
from purld.pipeline.context import RunContext, open_ledger
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows, write_rows
from purld.runs.run_dir import RunDir
from purld.runs.shortfalls import CapShortfall, find_shortfalls
from purld.thinking import split_thinking


def submit_together(context: RunContext, ledger: Ledger) -> None:
    """Submit the batches for training and for held-out prompts, so that neither waits for the other."""
    held_out = context.pools.held_out if isinstance(context.config.evaluate.opponent, TeacherAnchors) else []
    asked: list[tuple[Role, list[Prompt]]] = [("teacher", context.pools.train), ("opponent", held_out)]
    for role, prompts in asked:
        client = open_client(context.config.teacher, ledger, role, context.resend_unknown)
        if isinstance(client, BatchClient):
            client.submit(prompts)


def ask_for_anchors(context: RunContext, ledger: Ledger) -> tuple[list[Anchor], list[CapShortfall]]:
    """Return the anchors of the training prompts, and what caps left unasked.

    Raises:
        UserError: see `collect_anchors`.
    """
    return _ask(context, ledger, "teacher", context.pools.train, "answers")


def buy_opponent(context: RunContext, ledger: Ledger) -> list[CapShortfall]:
    """Write the teacher's answers to the held-out prompts, and return what caps left unasked.

    Raises:
        UserError: see `collect_anchors`.
    """
    answers, shortfalls = _ask(context, ledger, "opponent", context.pools.held_out, "held-out prompts answered")
    write_opponent(context, answers)
    return shortfalls


def read_opponent(run: RunDir) -> dict[str, str]:
    """Return the opponent's answers by prompt id; with `anchors.thinking: keep` the file still has their thinking."""
    return {row["prompt_id"]: split_thinking(row["text"]).answer for row in read_rows(run.opponent)}


def complete_opponent(context: RunContext, ledger: Ledger) -> list[CapShortfall]:
    """Buy the opponent's answers that nobody has asked for yet, if there are any, and return what caps left unasked.

    A prompt whose answer failed or was lost is asked again only with `resend_unknown`.

    Raises:
        UserError: see `collect_anchors`; or the judge's API key is missing, without which the answers are of no use.
    """
    if not _lacks_answers(context, ledger):
        return []
    if isinstance(context.config.evaluate.judge, OpenAIEndpoint):
        read_api_key(context.config.evaluate.judge)
    return buy_opponent(context, ledger)


def rebuild_answers(context: RunContext, paths: Collection[Path]) -> None:
    """Write damaged files of finished anchors again, from the ledger or the answer file; nothing is sent.

    Raises:
        UserError: the answers are not there, or the answer file cannot be read.
    """
    run, teacher = context.run, context.config.teacher
    with open_ledger(run, context.reporter) as ledger:
        client = open_recorded(teacher, ledger)
        for path, prompts in ((run.anchors, context.pools.train), (run.opponent, context.pools.held_out)):
            if path in paths:
                anchors = collect_anchors(prompts, client, context.config.anchors).anchors
                write_rows(path, [anchor.to_row() for anchor in anchors])
                if run.damaged_files(path):  # an older version did not record which of them were cut
                    write_rows(path, [replace(anchor, cut=False).to_row() for anchor in anchors])


def write_opponent(context: RunContext, answers: Sequence[Anchor]) -> None:
    """Write the opponent's answers; their record becomes that of the stage that is at work."""
    context.run.forget_file(context.run.opponent)
    write_rows(context.run.opponent, [answer.to_row() for answer in answers])


def _lacks_answers(context: RunContext, ledger: Ledger) -> bool:
    run, teacher = context.run, context.config.teacher
    if not run.opponent.exists():
        return True
    answered = {row["prompt_id"] for row in read_rows(run.opponent)}
    missing = [prompt for prompt in context.pools.held_out if prompt.id not in answered]
    if not missing or not isinstance(teacher, OpenAIEndpoint):
        return False
    return context.resend_unknown or any(
        ledger.find_result(request.key) is None for request in build_requests(teacher, missing)
    )


def _ask(
    context: RunContext, ledger: Ledger, role: Role, prompts: list[Prompt], what: str
) -> tuple[list[Anchor], list[CapShortfall]]:
    teacher = context.config.teacher
    with context.reporter.progress(what) as progress:
        client = open_client(teacher, ledger, role, context.resend_unknown, progress)

        def on_progress(counts: Counter[ReplyState]) -> None:
            progress(counts.total(), len(prompts), _collection_status(counts, ledger, role, teacher))

        collection = collect_anchors(prompts, client, context.config.anchors, on_progress)
    context.reporter.say(f"{what.capitalize()}: {collection.summary()}.")
    return collection.anchors, find_shortfalls(role, collection.capped, teacher, len(prompts))


def _collection_status(counts: Counter[ReplyState], ledger: Ledger, role: Role, teacher: Teacher) -> str:
    """Describe the progress of a collection: the count of each state, calls in flight, and what was spent."""
    words = [f"{n:,} {state}" for state, n in counts.items() if n]
    if isinstance(teacher, OpenAIEndpoint):
        spent = ledger.settled_spend(role)
        priced = teacher.input_price or teacher.output_price
        words.append(f"{ledger.calls_in_flight(role)} in flight")
        words.append(f"{spent.cost:,.4f} spent" if priced else f"{spent.tokens:,} tokens spent")
    return ", ".join(words)
