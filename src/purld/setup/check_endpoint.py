"""Look at an endpoint before anything is paid for: its key, whether it can be reached, and whether it has the model.

The only request is for the list of models, which no provider bills. A server may have no such list, or show it to
anyone, and then it is said what cannot be known.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from purld.clients.model_list import ModelList, fetch_model_list
from purld.clients.requests import read_api_key
from purld.config.clients import OpenAIEndpoint
from purld.errors import UserError
from purld.setup.finding import Finding

_LOCAL = ("127.0.0.1", "::1", "localhost")
_SHOWN_MODELS = 5
_CLOCK_SECONDS = 120
_UNKNOWN = "whether key and model are right cannot be known without a call that may be billed"


def check_endpoint(role: str, endpoint: OpenAIEndpoint) -> Iterator[Finding]:
    """Check the key of an endpoint, and ask it for its models.

    Args:
        role: `teacher` or `evaluate.judge`, for the keys that messages name.
        endpoint: its section of the configuration.
    """
    try:
        key = read_api_key(endpoint)
    except UserError as problem:
        source = f"export {endpoint.api_key_env}=…" if endpoint.api_key_env else f"mend {endpoint.api_key_file}"
        yield Finding("wrong", f"{role} key", str(problem).rstrip("."), source)
        usable, key = False, None
    else:
        yield _describe_key(role, endpoint, key)
        usable = True
    try:
        found = fetch_model_list(endpoint, key)
    except UserError as problem:
        yield Finding("wrong", role, str(problem).rstrip("."), "mend these settings of the environment")
        return
    if usable or found.status is None:
        yield _describe_answer(role, endpoint, found)
    else:
        yield Finding("ok", role, f"{endpoint.base_url} can be reached; more is known once the key is there")
    if found.clock_error is not None and abs(found.clock_error) > _CLOCK_SECONDS:
        ahead = "ahead of" if found.clock_error > 0 else "behind"
        text = f"this machine's clock is {abs(found.clock_error):,.0f} s {ahead} that of {endpoint.base_url}"
        yield Finding("warning", "clock", text, "set the clock")


def _describe_key(role: str, endpoint: OpenAIEndpoint, key: str | None) -> Finding:
    subject = f"{role} key"
    if key is None:
        if urlsplit(endpoint.base_url).hostname in _LOCAL:
            return Finding("ok", subject, "none is configured, for a server on this machine")
        return Finding("warning", subject, "none is configured", f"name its variable by {role}.api_key_env")
    if endpoint.api_key_file and Path(endpoint.api_key_file).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        text = f"{endpoint.api_key_file} can be read by other users of this machine"
        return Finding("warning", subject, text, f"chmod 600 {endpoint.api_key_file}")
    return Finding("ok", subject, f"is set ({endpoint.api_key_env or endpoint.api_key_file})")


def _describe_answer(role: str, endpoint: OpenAIEndpoint, found: ModelList) -> Finding:
    """Say what the response to the request for the list of models means."""
    where, said = endpoint.base_url, f": {found.words}" if found.words else ""
    match found.status:
        case None:
            remedy = f"correct {role}.base_url, start the server, or see the proxy settings"
            return Finding("wrong", role, f"{where} cannot be reached{said}", remedy)
        case 401 | 403:
            return Finding("wrong", role, f"{where} refuses the key (HTTP {found.status}{said})", "set the right key")
        case 402:
            return Finding("wrong", role, f"{where} asks for payment (HTTP 402{said})", "see the account")
        case 404 | 405 | 501:
            text = f"{where} can be reached and has no list of models (HTTP {found.status}); {_UNKNOWN}"
            return Finding("warning", role, text, _version_hint(role, endpoint))
        case status if 300 <= status < 400:
            text = f"{where} redirects to another address (HTTP {status}), and prompts are sent to this one only"
            return Finding("wrong", role, text, f"correct {role}.base_url")
        case status if not 200 <= status < 300:
            text = f"{where} can be reached and answers with HTTP {status}{said}; {_UNKNOWN}"
            return Finding("warning", role, text, "try again later")
    if found.models is None:
        text = f"{where} can be reached, and its answer is no list of models; {_UNKNOWN}"
        return Finding("warning", role, text, _version_hint(role, endpoint))
    if endpoint.model in found.models:
        return Finding("ok", role, f"{where} lists {endpoint.model} ({found.seconds:.1f} s)")
    listed = ", ".join(found.models[:_SHOWN_MODELS]) + (", …" if len(found.models) > _SHOWN_MODELS else "")
    text = f"{where} does not list {endpoint.model!r}, but {listed or 'nothing'}"
    return Finding("warning", role, text, f"correct {role}.model, unless it is another name of one of these")


def _version_hint(role: str, endpoint: OpenAIEndpoint) -> str:
    if urlsplit(endpoint.base_url).path.strip("/"):
        return ""
    return f"addresses usually end in /v1: try {role}.base_url={endpoint.base_url}/v1"
