"""What every stage of a run works with, as one object."""

from __future__ import annotations

from dataclasses import dataclass

from purld.config.schema import Config
from purld.display.progress import Reporter
from purld.model.encode import Encoder
from purld.pipeline.prompt_pools import PromptPools
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
