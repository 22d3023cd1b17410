"""Completion, by the shells themselves: what they reply to the beginnings of command lines."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest
import typer
from typer.testing import CliRunner

from purld.cli import app
from purld.cli.completion import _VALUES
from purld.cli.completion_scripts import WRITERS
from purld.cli.completion_tree import build_tree, config_keys
from purld.config.load import parse_config
from purld.errors import UserError
from purld.methods.table import METHODS

CASES = {
    "purld al": ["align"],
    "purld --ver": ["--version"],
    "purld run --re": ["--resend-unknown"],
    "purld run run.yaml ali": ["align."],
    "purld run run.yaml see": ["seed="],
    "purld run run.yaml align.me": ["align.method="],
    "purld run run.yaml align.tau=1 align.method=ldl": ["ldl_grpo"],
    "purld run run.yaml --run-dir r data.che": ["data.check="],
    "purld run run.yaml data.check=ma": ["math"],
    "purld run run.yaml student.system_turn=": ["keep", "fold"],
    "purld run run.yaml teacher.base_url=http://h/v": [],
    "purld run run.yaml teacher.batch=t": ["true"],
    "purld run r": [],  # a file, which readline completes
    "purld sweep run.yaml align.gam": ["align.gamma="],
    "purld demo --task wri": ["writing"],
    "purld demo --task writing align.gam": ["align.gamma="],
    "purld demo --run-dir x": [],
    "purld export RUN --stage s": ["sft"],
    "purld testbed b": ["build"],
    "purld testbed build --st": ["--student"],
    "purld completion f": ["fish"],
    "purld status fol": ["folder"],
    "purld nonsense x": [],
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts as the command prints them, in a folder that holds another one."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "folder").mkdir()
    (folder / "run.yaml").touch()
    for shell in WRITERS:
        (folder / shell).write_text(CliRunner().invoke(app, ["completion", shell], catch_exceptions=False).stdout)
    return folder


def test_bash_completes_what_is_begun(scripts):
    lines = "".join(
        f"COMP_LINE={line!r}; COMP_POINT={len(line)}; _purld; printf '%s,' \"${{COMPREPLY[@]}}\"; echo\n"
        for line in CASES
    )
    code = f"source ./bash\n{lines}"
    command = ["bash", "--norc", "--noprofile", "-c", code]
    ran = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    replies = [[word for word in line.split(",") if word] for line in ran.stdout.splitlines()]
    assert dict(zip(CASES, replies, strict=True)) == CASES


START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
READY = {"bash": "source ./bash", "zsh": "autoload -U compinit; compinit -u -D; source ./zsh"}
TYPED = {
    "purld ali": "gn ",
    "purld run run.y": "aml ",
    "purld run run.yaml align.me": "thod=",
    "purld run run.yaml align.method=ldl": "_grpo ",
}


@pytest.mark.parametrize("shell", START)
def test_a_tab_in_a_real_shell(shell, scripts):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = os.environ | {"TERM": "dumb", "PS1": "$ ", "HOME": str(scripts), "INPUTRC": "/dev/null"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(scripts)
        os.execvpe(shell, START[shell], environment)
    try:
        type_and_wait(terminal, "echo st''arted\n", "started")
        type_and_wait(terminal, f"{READY[shell]}; echo re''ady\n", "ready")
        for begun, rest in TYPED.items():
            type_and_wait(terminal, f"{begun}\t", begun + rest)
            os.write(terminal, b"\x15")  # clears the line
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def type_and_wait(terminal, text, expected):
    os.write(terminal, text.encode())
    shown, deadline = "", time.monotonic() + 60
    while expected not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    assert expected in shown


def test_fish_completes_what_is_begun(scripts):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    for begun, expected in {
        "purld ali": "align",
        "purld run --re": "--resend-unknown",
        "purld run run.yaml align.me": "align.method=",
        "purld run run.yaml align.method=ldl": "align.method=ldl_grpo",
        "purld demo --task wri": "writing",
    }.items():
        code = f'source ./fish; complete -C "{begun}"'
        ran = subprocess.run(
            ["fish", "--no-config", "-c", code], cwd=scripts, capture_output=True, text=True, check=True
        )
        assert [line.split("\t")[0] for line in ran.stdout.splitlines()] == [expected]


def test_the_words_are_those_of_the_commands_and_the_configuration():
    keys = config_keys()
    assert set(keys["align.method"]) == set(METHODS)
    assert keys["evaluate.judge.kind"] == keys["teacher.kind"] == ("openai", "file", "local")
    assert "student.lora.r" in keys and "student.lora" not in keys and keys["teacher.max_cost"] == ()
    base = {"student": {"model": "m"}, "data": {"prompts": "p"}, "teacher": {"kind": "file", "path": "a"}}
    for check in keys["data.check"]:  # values as the configuration takes them
        parse_config(base | {"data": {"prompts": "p", "check": check}}, "c")
    tree = build_tree(app, _VALUES)
    known = {command.name: command for command in tree.commands}
    root = typer.main.get_command(app)
    assert {name.split()[0] for name in known} == set(root.commands)
    assert known["run"].arguments == ("file", "keys") and known["testbed build"].arguments == ("folder",)
    flags = [flag for command in tree.commands for flag in command.flags]
    assert all(any(name in flag.names and flag.values for flag in flags) for name in _VALUES)


def test_another_shell_is_refused():
    with pytest.raises(UserError, match="there is one for bash, zsh, fish"):
        CliRunner().invoke(app, ["completion", "tcsh"], catch_exceptions=False)
