"""`purld chat`: base, SFT and aligned model side by side."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from purld.cli.common import app, existing_run, make_reporter
from purld.errors import UserError, printable
from purld.signals import Stopped


@app.command("chat")
def chat(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Prompts: a .txt file line by line, or a file as data.prompts.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=1000, help="0: greedy; the run's own by default.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The limit of an answer; the run's own by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the answers; the run's own by default.")] = None,
) -> None:
    """Ask base, SFT and aligned model the same thing.

    Prompts are typed in, or given by --prompt or --file; each stands alone. Works as soon as Stage I is finished, and
    uses no network.
    """
    existing_run(run_path)
    if file is not None and not file.exists():
        raise UserError(f"--file {file}: does not exist.")
    from rich.console import Console

    from purld.display.side_by_side import print_side_by_side
    from purld.display.titles import model_title
    from purld.pipeline.chat import ChatSession, ChatSettings
    from purld.records import Prompt

    given = bool(prompt or file)
    session = ChatSession(run_path, ChatSettings(temperature, max_new_tokens, seed, keep=not given))
    if session.unfinished:
        make_reporter().say(f"{model_title(session.unfinished)} is not trained yet; only the others answer.")
    console = Console(highlight=False)
    titles = [model_title(name) for name in session.models]

    def answer(prompts: Iterable[Prompt], typed: bool = False) -> None:
        asked = list(prompts)
        for one, answers in zip(asked, session.ask(asked)):
            if not typed:
                console.print(f"> {printable(one.question)}", markup=False, soft_wrap=True)
            texts = [f"{a.text}{' […]' if a.cut else ''}" for a in answers]
            print_side_by_side(titles, texts, console)

    if given:
        answer([*map(Prompt.from_text, prompt or []), *(session.read_prompts(file) if file else [])])
        return
    for line in _typed_lines():
        try:
            answer([Prompt.from_text(line)], typed=sys.stdin.isatty())
        except UserError as problem:  # of this prompt alone; the models are loaded, and the next one may be better
            make_reporter().warn(str(problem))


def _typed_lines() -> Iterator[str]:
    """Yield the lines that are typed in, or piped, until they end."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # lets the arrow keys edit and recall lines

        print("Type a prompt; Ctrl-D or Ctrl-C ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        except Stopped as stop:  # Ctrl-C at the prompt leaves nothing to go on with
            if not terminal or stop.signum != signal.SIGINT:
                raise
            print(file=sys.stderr)
            return
        if line.strip():
            yield line
