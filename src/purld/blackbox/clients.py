"""The client that a configuration asks for: an endpoint, a model on this machine, or a file of answers."""

from __future__ import annotations

from purld.blackbox.answers import FileClient
from purld.blackbox.endpoint import EndpointClient
from purld.blackbox.ledger import Ledger, Role
from purld.blackbox.local import LocalClient
from purld.blackbox.replies import Client
from purld.config import AnswerFile, LocalModel, OpenAIEndpoint


def open_client(
    config: OpenAIEndpoint | AnswerFile | LocalModel, ledger: Ledger, role: Role, resend_unknown: bool = False
) -> Client:
    """The client that `config` describes, keeping its books in `ledger` under `role`.

    Raises:
        UserError: the key, the file or the model directory that `config` names is not there.
    """
    match config:
        case OpenAIEndpoint():
            return EndpointClient(config, ledger, role, resend_unknown)
        case AnswerFile():
            return FileClient(config)
        case LocalModel():
            return LocalClient(config, ledger, role)
