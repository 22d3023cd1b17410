"""The client that a configuration asks for: an endpoint, a model on this machine, or a file of answers."""

from __future__ import annotations

from purld.clients.answer_file import AnswerFileClient
from purld.clients.base import Client
from purld.clients.endpoint import EndpointClient
from purld.clients.ledger import Ledger, Role
from purld.clients.local_model import LocalModelClient
from purld.config.schema import AnswerFile, LocalModel, OpenAIEndpoint


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
            return AnswerFileClient(config)
        case LocalModel():
            return LocalModelClient(config, ledger, role)
