"""Try a chat template on conversations in a process of its own, with a limit on its time and its memory.

A chat template is a program that comes with a model. One that loops without end or writes gigabytes would take a run
down with it, and Python cannot bound a call in its own process. `purld.model.chat_template` runs this file as a script:
it reads one JSON object from standard input and writes one to standard output. It imports Jinja and nothing of purld,
so that it starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CPU_SECONDS = 4
MAX_MEMORY = 2**29  # bytes
MAX_TEXT = 2_000_000  # characters of one conversation
_WALL_SECONDS = 60  # far more than the process's own limit, for a machine that is busy


@dataclass(frozen=True)
class TemplateTrial:
    """The outcome of a trial.

    Attributes:
        problem: why the template cannot be used at all; None if it can be.
        variables: the names that the template looks up in what it is given.
        rendered: each conversation as text, or None if the template refuses it.
        refusals: the template's own words for each conversation that it refuses, "" for the others.
    """

    problem: str | None
    variables: frozenset[str] = frozenset()
    rendered: Sequence[str | None] = ()
    refusals: Sequence[str] = ()


def try_template(template: str, chats: Sequence[Mapping[str, Any]]) -> TemplateTrial:
    """Render conversations by a template, in a process of its own.

    Args:
        template: the chat template.
        chats: what the template is given for each conversation: `messages`, `add_generation_prompt`, special tokens.
    """
    command = [sys.executable, "-I", __file__]
    question = json.dumps({"template": template, "chats": chats})
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return TemplateTrial("it does not come to an end")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        stopped = done.returncode < 0  # by the limit on CPU time
        return TemplateTrial("it does not come to an end" if stopped else "it cannot be run in a process of its own")
    return TemplateTrial(answer["problem"], frozenset(answer["variables"]), answer["rendered"], answer["refusals"])


def _environment() -> Any:
    """Return Jinja set up as transformers does for chat templates."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tags around what the assistant wrote, which change nothing in the text."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _render(template: Any, chat: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(**chat):
        size += len(piece)
        if size > MAX_TEXT:
            raise OverflowError(f"it writes more than {MAX_TEXT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError, meta

    environment = _environment()
    answer: dict[str, Any] = {"problem": None, "variables": [], "rendered": [], "refusals": []}
    try:
        answer["variables"] = sorted(meta.find_undeclared_variables(environment.parse(question["template"])))
        template = environment.from_string(question["template"])
        for chat in question["chats"]:
            text, refusal = _rendered_or_refused(template, chat)
            answer["rendered"].append(text)
            answer["refusals"].append(refusal)
    except TemplateSyntaxError as error:
        answer["problem"] = f"line {error.lineno}: {error.message}"
    except MemoryError:
        answer["problem"] = f"it needs more than {MAX_MEMORY // 2**20} MiB of memory"
    except OverflowError as error:
        answer["problem"] = str(error)
    except RecursionError:
        answer["problem"] = "it does not come to an end"
    return answer


def _rendered_or_refused(template: Any, chat: Mapping[str, Any]) -> tuple[str | None, str]:
    try:
        return _render(template, chat), ""
    except (MemoryError, OverflowError, RecursionError):
        raise
    except Exception as error:  # a template may raise anything
        return None, str(error) or type(error).__name__


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # not on this system: only the clock limits it
        return
    for kind, limits in (
        (resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1)),
        (resource.RLIMIT_CORE, (0, 0)),
        (resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY)),
    ):
        with contextlib.suppress(ValueError, OSError):  # the system has a lower limit already, or none of this kind
            resource.setrlimit(kind, limits)


if __name__ == "__main__":
    _limit_resources()
    print(json.dumps(_answer(json.load(sys.stdin))))
