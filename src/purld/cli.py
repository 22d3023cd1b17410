"""The command line. Heavy modules are imported by the command that needs them, so that `purld --help` is instant.

An error that a user can mend is one sentence on stderr and exit status 2; Ctrl-C is status 130, and the same
command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from purld.errors import PlainWarning, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, and is there at once
    help="Reinforcement-learning alignment for small on-premise models from one teacher answer per prompt.",
)
testbed_app = typer.Typer(no_args_is_help=True, help="The synthetic world that the demo runs in.")
app.add_typer(testbed_app, name="testbed")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML configuration.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Override keys of it.", show_default=False),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Where the run lives; runs/<name of CONFIG> unless given.")
]
ResendUnknown = Annotated[
    bool,
    typer.Option("--resend-unknown", help="Ask again what may have been billed without an answer arriving."),
]


def main() -> None:
    """Entry point of the `purld` command."""
    _settle_libraries()
    _settle_warnings()
    try:
        app()
    except UserError as error:
        print(f"purld: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"purld: {where}the disk is full ({error.strerror}); make room, and the same command goes on from here.",
            file=sys.stderr,
        )
        sys.exit(2)


@app.command()
def demo(
    overrides: Overrides = None,
    task: Annotated[
        str, typer.Option(help="counting, writing, or scenes (of which scenes-mc and scenes-rationale are halves).")
    ] = "counting",
    student: Annotated[
        str | None, typer.Option(help="With scenes: qwen2_5_vl or llava.", show_default="qwen2_5_vl")
    ] = None,
    run_dir: RunDirOption = None,
) -> None:
    """Run the whole loop on the testbed.

    Anchors, SFT, LDL-GRPO, evaluation, report: an ordinary run with a tiny student and a local teacher.
    Takes about three minutes on two cores.
    """
    from purld.testbed.demo import prepare

    reporter = _reporter()
    with _interruptible(), prepare(task, run_dir, overrides or [], student) as (config, run):
        _pipeline(config, run, reporter).execute()
    _closing(run)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
) -> None:
    """Run every stage that is not finished.

    Anchors, SFT, alignment, evaluation, report.
    """
    _execute(config, overrides, run_dir, None, resend_unknown)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Validate everything and show the plan.

    What will leave this machine, what it may cost, what it takes. Touches no network.
    """
    from purld.pipeline.plan import make_plan
    from purld.pipeline.plan_sheet import print_plan

    print_plan(make_plan(*_open(config, overrides, run_dir)))


@app.command()
def anchors(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Ask nothing; write every request that would leave to stdout, as JSONL, byte for byte."
        ),
    ] = False,
) -> None:
    """Ask the teacher once for each prompt."""
    if dry_run:
        _dry_run(config, overrides, run_dir, resend_unknown)
    else:
        _execute(config, overrides, run_dir, ["anchors"], resend_unknown)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Stage I: fine-tune on the anchors."""
    _execute(config, overrides, run_dir, ["sft"])


@app.command()
def align(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Stage II: align by align.method. Uses no network, unless the teacher judges candidates."""
    _execute(config, overrides, run_dir, ["align"])


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
) -> None:
    """Answer the held-out prompts; judge the answers."""
    _execute(config, overrides, run_dir, ["evaluate"], resend_unknown)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run directories; or a CONFIG and overrides.", show_default=False),
    ],
    run_dir: RunDirOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write; RUN/report.html for one run, report.html for several."),
    ] = None,
) -> None:
    """Write the report of one run or of several."""
    first, *overrides = runs
    if Path(first).is_file() or (first.endswith((".yaml", ".yml")) and not Path(first).is_dir()):
        _execute(Path(first), overrides, run_dir, ["report"])
    else:
        from purld.pipeline.export import report_runs

        print(report_runs([Path(run) for run in runs], out))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another.", show_default=False)],
    judge: Annotated[
        bool, typer.Option("--judge", help="Ask RUN_A's judge about the two models' answers head to head.")
    ] = False,
) -> None:
    """Say whether one run's model beats another's.

    RUN_A's final model against RUN_B's, paired on the same held-out prompts.
    """
    from purld.pipeline.compare import compare_runs, print_comparison

    with _interruptible():
        print_comparison(compare_runs(run_a, run_b, judge, _reporter()))


@app.command()
def sweep(
    config: ConfigPath,
    grid: Annotated[
        list[str],
        typer.Argument(metavar="KEY.PATH=VALUE,VALUE...", help="Keys and the values they take.", show_default=False),
    ],
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where the runs live; runs/<name of CONFIG>-sweep unless given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; each takes the memory of one.")] = 1,
) -> None:
    """Run every combination of the given values.

    Runs share anchors and Stage I wherever they can.
    """
    from purld.pipeline.sweep import plan_sweep, run_sweep

    cells = plan_sweep(config, grid, run_dir or Path("runs") / f"{config.stem}-sweep")
    with _interruptible():
        run_sweep(config, cells, jobs, _reporter())


@app.command()
def methods() -> None:
    """List the methods of alignment."""
    from purld.methods.table import METHODS

    _table(
        ["method", "signal", "objective", "teacher calls"],
        [[m.name, m.signal, m.objective, m.teacher_calls] for m in METHODS.values()],
    )


@app.command()
def tasks() -> None:
    """List the tasks that come with purld."""
    from purld.tasks.registry import TASKS
    from purld.testbed.shipped import DEMOS

    rows = [[task, "testbed", f"purld demo --task {task}"] for task in DEMOS]
    rows += [[name, task.check, f"data.task and data.path, {task.path}"] for name, task in TASKS.items()]
    _table(["task", "check", "use it with"], rows)


@app.command()
def export(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; RUN/export unless given.")] = None,
    stage: Annotated[str, typer.Option(help="align, or sft for Stage I's model.")] = "align",
) -> None:
    """Write a run's model for serving, adapters merged."""
    from purld.pipeline.export import export_model

    path = export_model(run_path, out, stage)
    print(path)


@app.command()
def ledger(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Write every request and answer to this JSONL file.")
    ] = None,
) -> None:
    """Show what left the building and what it cost.

    With --export, every request and answer.
    """
    from purld.pipeline.export import ledger_totals

    rows = ledger_totals(run_path, export_to)
    names = [name for name in rows[0] if name != "role"]
    _table(
        ["", *(row["role"] for row in rows)],
        [[name.replace("_", " "), *(_amount(row[name]) for row in rows)] for name in names],
    )


@testbed_app.command("build")
def testbed_build(
    out: Annotated[Path, typer.Argument(help="Where to write the student.")],
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    student: Annotated[str, typer.Option(help="text, qwen2_5_vl or llava.")] = "text",
) -> None:
    """Make a tiny student again, on the CPU.

    The one that reads is made from nothing; those that see are built on it, in rounds: stopped, they go on after the
    last that was finished.
    """
    from purld.testbed.students.build import build_student

    with _reporter().progress("steps") as progress:
        build_student(out, seed=seed, progress=progress, student=student)


def _open(config: Path, overrides: Sequence[str] | None, run_dir: Path | None) -> tuple[Any, Any]:
    from purld.config.load import load_config
    from purld.runs.run_dir import RunDir

    return load_config(config, overrides or []), RunDir(run_dir or Path("runs") / config.stem)


def _execute(
    config: Path,
    overrides: Sequence[str] | None,
    run_dir: Path | None,
    stages: Sequence[str] | None,
    resend_unknown: bool = False,
) -> None:
    from purld.pipeline.pipeline import STAGES

    settings, run = _open(config, overrides, run_dir)
    with _interruptible():
        _pipeline(settings, run, _reporter(), resend_unknown).execute(stages or STAGES)
    if stages is None:
        _closing(run)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends a run in one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        print("purld: interrupted; the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(130) from None


def _pipeline(config: Any, run: Any, reporter: Any, resend_unknown: bool = False) -> Any:
    from purld.pipeline.pipeline import Pipeline

    return Pipeline(config, run, reporter, resend_unknown)


def _reporter() -> Any:
    from purld.display.progress import Reporter

    return Reporter()


def _closing(run: Any) -> None:
    """The results of a finished run as a table on stdout."""
    from purld.display.results import print_results

    print_results(run)


def _dry_run(config: Path, overrides: Sequence[str] | None, run_dir: Path | None, resend_unknown: bool) -> None:
    from purld.pipeline.pipeline import Pipeline
    from purld.pipeline.plan_requests import write_dry_run
    from purld.pipeline.prompt_pools import load_prompt_pools

    settings, run = _open(config, overrides, run_dir)
    reporter = _reporter()
    pools = load_prompt_pools(settings, Pipeline(settings, run, reporter).encoder, reporter.say)
    count, size = write_dry_run(sys.stdout, settings, pools, run, resend_unknown)
    reporter.say(f"{count:,} requests of {size:,} bytes would leave this machine; nothing was sent.")


def _amount(value: float) -> str:
    """Money with four decimals, a count with separators."""
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _settle_libraries() -> None:
    """Settings that libraries read when they are imported.

    Their own bars and advice are for people who call them. OpenMP's threads shall sleep and not spin while they
    wait: where something else runs on a core, spinning made a training step on two threads 19 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _settle_warnings() -> None:
    """Our own warnings are a line for the user; what libraries say of their future is for their own callers."""
    show_others = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, PlainWarning):
            _reporter().warn(str(message))
        else:
            show_others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|torch|accelerate")
