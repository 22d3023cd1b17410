"""`purld completion`: a script that lets a shell complete commands, flags and configuration keys."""

from __future__ import annotations

from typing import Annotated

import typer

from purld.cli.common import app
from purld.errors import UserError

# Of flags that take any text; of --dtype what every command with this flag takes.
_VALUES = {
    "--stage": ["align", "sft"],
    "--dtype": ["float32", "bfloat16"],
    "--gguf-type": ["auto", "f32", "f16", "bf16", "q8_0"],
}


@app.command("completion")
def print_completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False)],
) -> None:
    """Print the script that lets a shell complete purld's commands.

    For bash, put `source <(purld completion bash)` into ~/.bashrc; for zsh, the same with zsh into ~/.zshrc after
    compinit; for fish, `purld completion fish | source` into ~/.config/fish/config.fish.
    """
    from purld.cli.completion_scripts import WRITERS
    from purld.cli.completion_tree import build_tree
    from purld.testbed.shipped import DEMOS, STUDENT_FOLDERS

    if shell not in WRITERS:
        raise UserError(f"{shell[:40]}: there is no completion for it; there is one for {', '.join(WRITERS)}.")
    values = {"--task": list(DEMOS), "--student": list(STUDENT_FOLDERS), **_VALUES}
    print(WRITERS[shell](build_tree(app, values)), end="")
