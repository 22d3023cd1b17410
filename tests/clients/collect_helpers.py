"""Collects answers in a separate process, for tests that kill it; that process imports this module by name."""

import os
from pathlib import Path

from purld.clients.base import Reply
from purld.clients.endpoint import EndpointClient
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import Ledger
from purld.config.clients import OpenAIEndpoint
from purld.records import Prompt


def collect_answers(url: str, ledger_path: Path, count: int, log_path: Path, share: bool = False) -> None:
    """Ask for all prompts, and log the index of every announced reply as one complete line.

    With `share`, the ledgers of the runs in the same folder are used as well.
    """
    config = OpenAIEndpoint(kind="openai", base_url=url, model="m", concurrency=16)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def log_reply(index: int, reply: Reply) -> None:
        if reply.state == "answered":
            os.write(log, f"{index}\n".encode())

    with Ledger(ledger_path, FolderLedgers(ledger_path) if share else None) as ledger:
        prompts = [Prompt.from_text(f"question {n}") for n in range(count)]
        EndpointClient(config, ledger, "teacher").ask(prompts, log_reply)
