"""`purld init`: write a first configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from purld.cli.common import app, make_reporter
from purld.errors import UserError
from purld.signals import Stopped


@app.command("init")
def write_first_config(
    config: Annotated[Path, typer.Argument(metavar="[CONFIG]", help="The file to write.")] = Path("run.yaml"),
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Further keys to write into it.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The student: a model directory, or a hub id in the local cache.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The prompts: a file, or a folder saved by datasets.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="data for the answers in that file, another file, an endpoint's address, a model directory."),
    ] = None,
    teacher_model: Annotated[str | None, typer.Option(help="The endpoint's name of its model.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the endpoint's key; empty for none.")
    ] = None,
    input_price: Annotated[float | None, typer.Option(help="Per million tokens of prompts.")] = None,
    output_price: Annotated[float | None, typer.Option(help="Per million tokens of answers.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="The hard cap on the teacher's bill.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite CONFIG if it exists.")] = False,
) -> None:
    """Write a configuration for your model, data and teacher.

    Asks for what is not given as a flag, looks at the model and the data, writes a commented YAML file that runs, and
    shows the plan. Sends nothing.
    """
    from purld.setup.questions import Wishes

    if "=" in config.name:  # no file was named, and this is the first key
        config, overrides = Path("run.yaml"), [str(config), *(overrides or [])]
    _check_target(config, force)
    reporter = make_reporter()
    wishes = Wishes(
        model, data, teacher, teacher_model, api_key_env, input_price, output_price, max_cost, overrides or []
    )
    from purld.setup.first_config import prepare_config

    first = prepare_config(wishes, config, _ask if sys.stdin.isatty() else None, reporter.say)
    from purld.runs.files import atomic_write

    with atomic_write(config) as handle:
        handle.write(first.text)
    print(first.text)
    _show_plan(config, first.key_variable)


def _check_target(config: Path, force: bool) -> None:
    """Check that the file can be written, before anything is asked."""
    from purld.runs.files import nearest_folder

    if config.is_dir():
        raise UserError(f"{config}: is a folder; give a file to write, such as {config / 'run.yaml'}.")
    if config.exists() and not force:
        raise UserError(f"{config}: exists; --force overwrites it, or give another name.")
    folder = nearest_folder(config.parent)
    if not folder.is_dir():
        raise UserError(f"{config}: {folder} is a file; give a path in a folder.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{config}: the folder {folder} cannot be written; give a path in another one.")


def _ask(question: str, default: str | None) -> str:
    try:
        return str(typer.prompt(question, default=default, err=True, show_default=bool(default)))
    except (typer.Abort, Stopped) as end:
        how, status = ("stopped", end.status) if isinstance(end, Stopped) else ("the input ended at a question", 2)
        typer.echo(f"\npurld: {how}; nothing was written.", err=True)
        raise typer.Exit(status) from None


def _show_plan(config: Path, key_variable: str | None) -> None:
    """Show what `purld check` shows, and the command that comes next."""
    from purld.cli.common import open_config

    settings, run = open_config(config, [], None)
    from purld.pipeline.plan import make_plan
    from purld.pipeline.plan_sheet import print_plan

    try:
        print_plan(make_plan(settings, run))
    except UserError as problem:
        raise UserError(f"{problem} {config} is written; mend it, and `purld check {config}` shows the plan.") from None
    print(f"\n{config} is written. Next:")
    if key_variable and not os.environ.get(key_variable):
        print(f"  export {key_variable}=…   # the key, which no file holds")
    print(f"  purld run {config}")
