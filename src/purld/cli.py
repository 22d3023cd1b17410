"""The command line.

Each command imports what it needs, so that `purld --help` is instant. An error that the user can fix is one sentence on
stderr and exit status 2. Ctrl-C, SIGTERM and SIGHUP are exit status 130, 143 and 129, and the same command continues.
"""

from __future__ import annotations

import codecs
import io
import locale
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from purld.display.streams import protected_streams
from purld.errors import PlainWarning, UserError, printable
from purld.failures import TRACEBACK_VARIABLE, describe_failure
from purld.signals import Stopped, stopping_signals

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, and is there at once
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement-learning alignment for small on-premise models from one teacher answer per prompt.",
)
testbed_app = typer.Typer(no_args_is_help=True, help="The synthetic world that the demo runs in.")
app.add_typer(testbed_app, name="testbed")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML configuration file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Keys to override in it.", show_default=False),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="The run directory; runs/<name of CONFIG> by default.")
]
ResendUnknown = Annotated[
    bool,
    typer.Option("--resend-unknown", help="Ask again where an answer may have been billed but never arrived."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from purld import __version__

        print(f"purld {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the `purld` command."""
    _use_utf8()
    with protected_streams(), stopping_signals():
        _configure_libraries()
        _configure_warnings()
        status = _run_command()
    sys.exit(status)


def _run_command() -> int:
    """Run the command and return its exit status; an error or a signal is one sentence on stderr."""
    try:
        status = _status_of(app)
        sys.stdout.flush()
    except Stopped as stopped:
        how = "interrupted" if stopped.signum == signal.SIGINT else f"stopped by {stopped}"
        return _fail(f"{how}; run the same command again to continue.", stopped.status)
    except BrokenPipeError:  # the reader of stdout has left, as `head` does; stderr raises nothing
        return 1
    except Exception as error:
        if TRACEBACK_VARIABLE in os.environ and not isinstance(error, UserError):
            raise
        return _fail(*describe_failure(error, _run_directory))
    return status


def _status_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:  # how typer ends a command
        return _fail(end.code, 1) if isinstance(end.code, str) else end.code or 0
    return 0


def _fail(sentence: str, status: int = 2) -> int:
    print(f"purld: {printable(sentence)}", file=sys.stderr)
    return status


@app.command()
def demo(
    overrides: Overrides = None,
    task: Annotated[
        str, typer.Option(help="counting, writing or scenes; scenes-mc or scenes-rationale for one half of scenes.")
    ] = "counting",
    student: Annotated[
        str | None, typer.Option(help="With scenes: qwen2_5_vl or llava.", show_default="qwen2_5_vl")
    ] = None,
    run_dir: RunDirOption = None,
) -> None:
    """Run the whole loop on the testbed.

    Anchors, SFT, LDL-GRPO, evaluation, report: an ordinary run with a tiny student and a local teacher.
    Takes three to five minutes on two cores.
    """
    from purld.testbed.demo import prepare_demo

    reporter = _reporter()
    with prepare_demo(task, run_dir, overrides or [], student) as (config, run):
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

    What will be sent, what it may cost at most, memory and steps. Uses no network.
    """
    settings, run = _open(config, overrides, run_dir)
    from purld.pipeline.plan import make_plan
    from purld.pipeline.plan_sheet import print_plan

    print_plan(make_plan(settings, run))


@app.command()
def anchors(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    resend_unknown: ResendUnknown = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Send nothing; write every request that would be sent to stdout, as JSONL, byte for byte."
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
def probe(config: ConfigPath, overrides: Overrides = None, run_dir: RunDirOption = None) -> None:
    """Measure whether the student can evaluate itself.

    Every scorer, without gold, on up to 64 prompts that have anchors: on p_sft after Stage I, on the student before.
    """
    settings, run = _open(config, overrides, run_dir)
    from purld.display.probe import print_probe

    print_probe(_pipeline(settings, run, _reporter()).probe())


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
        typer.Option("--out", help="The file to write; RUN/report.html for one run, report.html for several."),
    ] = None,
) -> None:
    """Write the report of one run or of several."""
    first, *overrides = runs
    if Path(first).is_file() or (first.endswith((".yaml", ".yml")) and not Path(first).is_dir()):
        _execute(Path(first), overrides, run_dir, ["report"])
    else:
        from purld.runs.files import check_new_file

        paths = [_existing_run(Path(run)) for run in runs]
        if out is not None:
            check_new_file(out)
        from purld.pipeline.export import report_runs

        print(report_runs(paths, out))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run directory.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another run directory.", show_default=False)],
    judge: Annotated[
        bool, typer.Option("--judge", help="Ask RUN_A's judge about the two models' answers head to head.")
    ] = False,
) -> None:
    """Say whether one run's model beats another's.

    RUN_A's final model against RUN_B's, paired on the same held-out prompts.
    """
    _existing_run(run_b)
    _existing_run(run_a)
    from purld.pipeline.compare import compare_runs, print_comparison

    print_comparison(compare_runs(run_a, run_b, judge, _reporter()))


@app.command()
def sweep(
    config: ConfigPath,
    grid: Annotated[
        list[str],
        typer.Argument(metavar="KEY.PATH=VALUE,VALUE...", help="Keys and the values they take.", show_default=False),
    ],
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="The folder of the runs; runs/<name of CONFIG>-sweep by default.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time; each needs the memory of one run.")] = 1,
) -> None:
    """Run every combination of the given values.

    Runs share anchors and Stage I wherever they can.
    """
    from purld.config.load import load_config

    load_config(config)  # before torch is imported
    from purld.pipeline.sweep import plan_sweep, run_sweep

    cells = plan_sweep(config, grid, run_dir or Path("runs") / f"{config.stem}-sweep")
    run_sweep(config, cells, jobs, _reporter())


@app.command()
def methods() -> None:
    """List the alignment methods."""
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
    out: Annotated[Path | None, typer.Option("--out", help="The directory to write; RUN/export by default.")] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="align, or sft for Stage I's model; the run's last one by default.", show_default=False),
    ] = None,
) -> None:
    """Export a run's model for serving, with adapters merged."""
    from purld.runs.files import check_new_folder

    _existing_run(run_path)
    if out is not None:
        check_new_folder(out)
    from purld.pipeline.export import export_model

    path = export_model(run_path, out, stage)
    print(path)


@app.command("import-gguf")
def import_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file of a causal LM.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Turn a GGUF file into a model directory for a student."""
    from purld.model.import_gguf import import_gguf as convert

    print(convert(file, out, dtype))


@app.command()
def ledger(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    export_to: Annotated[
        Path | None, typer.Option("--export", help="Write every request and answer to this JSONL file.")
    ] = None,
) -> None:
    """Show what was sent to remote models and what it cost.

    With --export, write every request and answer to a file.
    """
    _existing_run(run_path)
    from purld.pipeline.export import ledger_totals

    rows = ledger_totals(run_path, export_to)
    names = [name for name in rows[0] if name != "role"]
    _table(
        ["", *(row["role"] for row in rows)],
        [[name.replace("_", " "), *(_amount(row[name]) for row in rows)] for name in names],
    )


@testbed_app.command("build")
def testbed_build(
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    student: Annotated[str, typer.Option(help="text, qwen2_5_vl or llava.")] = "text",
) -> None:
    """Train a tiny student of the demo again, on the CPU.

    The text student is trained from scratch, the image students on top of it in rounds. A build that was stopped
    continues after its last finished round.
    """
    from purld.testbed.students.build import build_student

    with _reporter().progress("steps") as progress:
        build_student(out, seed=seed, progress=progress, student=student)


_run_directory: Path | None = None  # of this command, once it is known: a log of an error goes there


def _open(config: Path, overrides: Sequence[str] | None, run_dir: Path | None) -> tuple[Any, Any]:
    """Read the configuration, which imports neither torch nor anything that does, so a slip is told at once."""
    from purld.config.load import load_config
    from purld.runs.run_dir import RunDir

    settings, run = load_config(config, overrides or []), RunDir(run_dir or Path("runs") / config.stem)
    run.check_place()
    _remember_run(run.path)
    return settings, run


def _existing_run(path: Path) -> Path:
    """Return the path of a run directory, or say at once that it is none."""
    if not (path / "config.yaml").exists() and not (path / "manifest.json").exists():
        raise UserError(f"{path}: is not a run directory; it holds no config.yaml.")
    _remember_run(path)
    return path


def _remember_run(path: Path) -> None:
    global _run_directory
    _run_directory = path


def _execute(
    config: Path,
    overrides: Sequence[str] | None,
    run_dir: Path | None,
    stages: Sequence[str] | None,
    resend_unknown: bool = False,
) -> None:
    settings, run = _open(config, overrides, run_dir)
    from purld.pipeline.pipeline import STAGES

    _pipeline(settings, run, _reporter(), resend_unknown).execute(stages or STAGES)
    if stages is None:
        _closing(run)


def _pipeline(config: Any, run: Any, reporter: Any, resend_unknown: bool = False) -> Any:
    from purld.pipeline.pipeline import Pipeline

    return Pipeline(config, run, reporter, resend_unknown)


def _reporter() -> Any:
    from purld.display.progress import Reporter

    return Reporter()


def _closing(run: Any) -> None:
    """Print the results of a finished run as a table."""
    from purld.display.results import print_results

    print_results(run)


def _dry_run(config: Path, overrides: Sequence[str] | None, run_dir: Path | None, resend_unknown: bool) -> None:
    settings, run = _open(config, overrides, run_dir)
    from purld.pipeline.pipeline import Pipeline
    from purld.pipeline.plan_requests import write_dry_run
    from purld.pipeline.prompt_pools import load_prompt_pools

    reporter = _reporter()
    pools = load_prompt_pools(settings, Pipeline(settings, run, reporter).encoder, reporter.say)
    count, size = write_dry_run(sys.stdout, settings, pools, run, resend_unknown)
    reporter.say(f"{count:,} requests of {size:,} bytes would be sent; nothing was.")


def _amount(value: float) -> str:
    """Format money with four decimals and counts with separators."""
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale is ASCII, and never fail at a character of the result.

    Paths, prompts and answers hold any character, and an ASCII locale (LANG=C) can neither name nor print most of them.
    """
    ascii_only = codecs.lookup(locale.getpreferredencoding(False)).name == "ascii"
    if ascii_only and not sys.flags.utf8_mode and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace" if sys.stdout.encoding.lower() == "utf-8" else "replace")


def _configure_libraries() -> None:
    """Set what libraries read when they are imported: no progress bars and advice, and OpenMP threads that sleep.

    While they wait, OpenMP threads spin by default. Where another process uses a core, that made a training step on two
    threads 19 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _configure_warnings() -> None:
    """Print our own warnings as a line for the user; hide the deprecation warnings of libraries."""
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
        # peft says this of the experts' ranks, which it sets itself and does apply.
        warnings.filterwarnings(
            "ignore", message="The following (rank|alpha)_pattern keys did not match", module="peft"
        )
