"""What the commands share: the application, their arguments, and how they open a configuration or a run.

A configuration or a run is checked before anything that imports torch, so that a slip is told at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from purld import ranks
from purld.errors import UserError

# The commands whose work the processes of a job share.
_SHARED_COMMANDS = frozenset({"run", "anchors", "sft", "probe", "align", "evaluate", "report"})
# The commands that go on where an earlier call was stopped; the others begin anew, or only look.
_CONTINUED_COMMANDS = _SHARED_COMMANDS | {"demo", "sweep", "compare", "testbed"}

# A new user's first commands, in the order of use; the help shows them before the others.
_FIRST_IN_HELP = ("demo", "init", "doctor", "check", "run", "status", "watch", "chat", "report", "export")


class _CommandsInOrder(TyperGroup):
    """Lists the commands in the order in which a new user needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        first = [name for name in _FIRST_IN_HELP if name in self.commands]
        return [*first, *(name for name in self.commands if name not in first)]


app = typer.Typer(
    cls=_CommandsInOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, and is there at once
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement-learning alignment for small on-premise models from one teacher answer per prompt.",
)

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
Live = Annotated[
    bool, typer.Option("--live", help="Keep the run's report.html up to date meanwhile: open it in a browser.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from purld import __version__

        print(f"purld {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    global _continues
    _continues = context.invoked_subcommand in _CONTINUED_COMMANDS
    if context.invoked_subcommand not in _SHARED_COMMANDS:  # in a job of several processes, the first works alone
        if not ranks.is_first():
            raise typer.Exit
        context.with_resource(ranks.working_alone())


_run_directory: Path | None = None  # of this command, once it is known
_continues = False  # whether the same command goes on where this one is stopped


def run_directory() -> Path | None:
    """Return the run directory of this command, where the log of an error goes; None while it is not known."""
    return _run_directory


def continues() -> bool:
    """Return whether the same command goes on where this one is stopped."""
    return _continues


def open_config(config: Path, overrides: Sequence[str] | None, run_dir: Path | None) -> tuple[Any, Any]:
    """Read the configuration, which imports neither torch nor anything that does, so a slip is told at once."""
    from purld.config.load import load_config
    from purld.runs.run_dir import RunDir

    settings, run = load_config(config, overrides or []), RunDir(run_dir or Path("runs") / config.stem)
    run.check_place()
    _remember_run(run.path)
    return settings, run


def existing_run(path: Path) -> Path:
    """Return the path of a run directory, or say at once that it is none."""
    if not (path / "config.yaml").exists() and not (path / "manifest.json").exists():
        raise UserError(f"{path}: is not a run directory; it holds no config.yaml.")
    _remember_run(path)
    return path


def _remember_run(path: Path) -> None:
    global _run_directory
    _run_directory = path


def execute(
    config: Path,
    overrides: Sequence[str] | None,
    run_dir: Path | None,
    stages: Sequence[str] | None,
    resend_unknown: bool = False,
    live: bool = False,
) -> None:
    """Run the given stages, or all of them and then print the results."""
    settings, run = open_config(config, overrides, run_dir)
    from purld.pipeline.pipeline import STAGES

    pipeline = make_pipeline(settings, run, make_reporter(), resend_unknown)
    with watching(pipeline, live):
        pipeline.execute(stages or STAGES)
    if stages is None and ranks.is_first():
        print_closing(run)


def make_pipeline(config: Any, run: Any, reporter: Any, resend_unknown: bool = False) -> Any:
    """Return the pipeline of a run."""
    from purld.pipeline.pipeline import Pipeline

    return Pipeline(config, run, reporter, resend_unknown)


@contextlib.contextmanager
def watching(pipeline: Any, live: bool) -> Iterator[None]:
    """Keep the page of a pipeline's run up to date during the block, if that is wanted."""
    if not live or not ranks.is_first():
        yield
        return
    from purld.pipeline.watch import live_page

    with live_page(pipeline.run, pipeline.reporter):
        yield


def make_reporter() -> Any:
    """Return what prints progress, facts and warnings to stderr."""
    from purld.display.progress import Reporter

    return Reporter()


def print_closing(run: Any) -> None:
    """Print the results of a finished run as a table."""
    from purld.display.results import print_results

    print_results(run)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; its first column is never wrapped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)
