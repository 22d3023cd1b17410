"""What every stage of a run works with, as one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from purld.clients.anchors import apply_thinking_policy
from purld.clients.answer_file import AnswerFileClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import Ledger
from purld.config.clients import AnchorPolicy, AnswerFile
from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.model.encode import Encoder
from purld.pipeline.prompt_pools import PromptPools
from purld.records import Anchor, Prompt
from purld.runs.files import read_rows
from purld.runs.run_dir import RunDir
from purld.tasks.checks import Check


@dataclass(frozen=True)
class RunContext:
    """One run that is being executed.

    Attributes:
        config: the validated configuration.
        run: the run directory.
        reporter: prints progress, facts and warnings.
        encoder: the student's tokenizer with the run's conventions.
        check: tells whether an answer is right; None if no accuracy is to be reported.
        pools: the prompts.
        resend_unknown: ask again where an answer may have been billed but never arrived.
    """

    config: Config
    run: RunDir
    reporter: Reporter
    encoder: Encoder
    check: Check | None
    pools: PromptPools
    resend_unknown: bool


@contextlib.contextmanager
def open_ledger(run: RunDir, reporter: Reporter) -> Iterator[Ledger]:
    """Open a run's ledger together with those of the other runs in its folder; warn of any that cannot be read.

    Raises:
        UserError: the ledger cannot be used; see `Ledger`.
    """
    with Ledger(run.ledger, FolderLedgers(run.ledger)) as ledger:
        try:
            yield ledger
        finally:
            for path in ledger.unreadable_ledgers:
                reporter.warn(f"{path}: cannot be read, so what it holds may have been bought again.")


def examples_of_pool(run: RunDir, pool: list[Prompt]) -> list[tuple[Prompt, Anchor]]:
    """Pair the prompts of a stage with their anchors, in the pool's order; leave out prompts without one."""
    anchors = {row["prompt_id"]: Anchor.from_row(row) for row in read_rows(run.anchors)}
    return [(p, anchors[p.id]) for p in pool if p.id in anchors]


def anchors_in_file(file: AnswerFile, prompts: Sequence[Prompt], policy: AnchorPolicy) -> dict[str, str]:
    """Return the answers that a file has for prompts, by prompt id, as the policy wants their thinking.

    Raises:
        UserError: the file cannot be read.
    """
    replies = [apply_thinking_policy(reply, policy) for reply in AnswerFileClient(file).ask(prompts)]
    return {p.id: reply.text for p, reply in zip(prompts, replies, strict=True) if reply.text is not None}
