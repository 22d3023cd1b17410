"""Open the client that a configuration describes: an endpoint, a local model, or an answer file."""

from __future__ import annotations

from purld.clients.answer_file import AnswerFileClient
from purld.clients.base import Client
from purld.clients.batch import BatchClient
from purld.clients.batch_api import OnWait
from purld.clients.endpoint import EndpointClient
from purld.clients.ledger import Ledger, Role
from purld.clients.local_model import LocalModelClient
from purld.config.clients import AnswerFile, LocalModel, OpenAIEndpoint


def open_client(
    config: OpenAIEndpoint | AnswerFile | LocalModel,
    ledger: Ledger,
    role: Role,
    resend_unknown: bool = False,
    on_wait: OnWait | None = None,
) -> Client:
    """Return the client that `config` describes; it records its calls in `ledger` under `role`.

    `on_wait` is called when the state of a batch changes.

    Raises:
        UserError: the API key or the answer file that `config` names is missing or cannot be used.
    """
    match config:
        case OpenAIEndpoint() if config.batch or ledger.open_batches():
            return BatchClient(config, ledger, role, resend_unknown, on_wait)
        case OpenAIEndpoint():
            return EndpointClient(config, ledger, role, resend_unknown)
        case AnswerFile():
            return AnswerFileClient(config)
        case LocalModel():
            return LocalModelClient(config, ledger, role)
