"""Look at the machine, and with a configuration at everything that it names, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from purld.config.clients import OpenAIEndpoint
from purld.config.schema import Config
from purld.errors import UserError
from purld.runs.run_dir import RunDir
from purld.setup.check_endpoint import check_endpoint
from purld.setup.check_machine import (
    check_clock,
    check_devices,
    check_disk,
    check_locale,
    check_memory,
    check_versions,
)
from purld.setup.finding import Finding


def examine_machine(run: Path) -> Iterator[Finding]:
    """Yield what is found on this machine; runs go to `run`."""
    yield from check_versions()
    yield from check_devices()
    yield from check_disk(run)
    yield check_clock()
    yield check_locale()


def examine_config(config: Config, run: RunDir) -> Iterator[Finding]:
    """Yield what is found about the student, the memory that it needs, the data, and the endpoints."""
    yield from _check_student(config, run)
    yield from _check_data(config)
    for role, client in (("teacher", config.teacher), ("evaluate.judge", config.evaluate.judge)):
        if isinstance(client, OpenAIEndpoint):
            yield from check_endpoint(role, client)


def _check_student(config: Config, run: RunDir) -> Iterator[Finding]:
    """Check the student's directory as a run would, and the memory and disk that its training takes."""
    from purld.pipeline.chosen_score import with_chosen_score
    from purld.pipeline.plan_machine import plan_machine, training_bytes
    from purld.pipeline.plan_sheet import Plan
    from purld.pipeline.preflight import check_before_spending

    try:
        run.check_place()
        _, sizes = check_before_spending(with_chosen_score(config), run)
    except UserError as problem:
        yield Finding("wrong", "student", str(problem).rstrip("."), "mend what this sentence names")
        yield from check_memory()
        return
    trained = f"{sizes.weights / 1e6:,.1f} M weights, {sizes.trained / 1e6:,.1f} M trained"
    yield Finding("ok", "student", f"{config.student.model} is whole: {trained}")
    yield from check_memory(training_bytes(config, sizes))
    plan_machine(plan := Plan(), config, sizes, run.path)
    yield from (Finding("wrong", "disk", problem.rstrip("."), "free some space") for problem in plan.problems)


def _check_data(config: Config) -> Iterator[Finding]:
    data = config.data
    named = {"data.prompts": data.prompts, "data.eval_prompts": data.eval_prompts}
    named |= {"teacher.path": getattr(config.teacher, "path", None)}
    missing = {key: name for key, name in named.items() if name is not None and not Path(name).exists()}
    for key, name in missing.items():
        yield Finding("wrong", "data", f"{key}: {name} does not exist", f"correct {key}; paths begin at this folder")
    if not missing:
        yield Finding("ok", "data", f"{data.source} is there; `purld check` reads it" if data.prompts else data.source)
