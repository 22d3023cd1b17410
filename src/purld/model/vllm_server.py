"""Talk to a vLLM server: models, adapters and completions by token ids, over its OpenAI-compatible HTTP API.

Only the address in the configuration is spoken to: no proxy, no redirect, no cookie. A request that got no usable
reply is made again, since a request with a seed gives the same tokens; nothing here costs money. What the server
replies is checked before it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from purld.api_keys import checked_key
from purld.config.engines import VllmEngine
from purld.errors import PlainWarning, UserError, one_line, reason_of
from purld.event_loops import run_async

if TYPE_CHECKING:
    from httpx2 import AsyncClient

Result = TypeVar("Result")

IDLE_ROUNDS = 3  # rounds of requests without one usable reply, before giving up
POLL_SECONDS = 1.0  # between looks whether a server is back
_CONNECT_SECONDS = 10.0
_SHORT_SECONDS = 60.0  # for what draws nothing; an adapter of gigabytes takes some time to load
_BODY_BYTES = 8 * 2**20  # read of a reply at most, and so many more for each token of prompt and completion
_BYTES_PER_TOKEN = 512


@dataclass(frozen=True)
class ServedModel:
    """A model or an adapter that the server lists; `max_length` counts the tokens of prompt and completion."""

    name: str
    is_adapter: bool
    max_length: int | None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in peft's format, under the name that stands for exactly these weights.

    The folder of a `temporary` one is removed when the server has been given a newer adapter.
    """

    name: str
    folder: Path
    temporary: bool = False


@dataclass(frozen=True)
class DrawSettings:
    """What all completions of a call have in common; completions stop after one of `ends`."""

    temperature: float
    top_p: float
    max_tokens: int
    ends: Sequence[int]


@dataclass(frozen=True)
class Draw:
    """One completion to draw: the prompt's token ids, and the seed of its random numbers."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A completion: its token ids, with the end if it met one, and their log-probs at temperature 1, in nats."""

    ids: list[int]
    log_probs: list[float]
    finished: bool


class _NoReplyError(Exception):
    """A request without a usable reply, which may get one later; the message says why."""


class _ServerFaultError(_NoReplyError):
    """A reply that says the server failed."""


class VllmServer:
    """A vLLM server at the address that the configuration names.

    Args:
        engine: `student.engine` of the configuration.

    Raises:
        UserError: the environment variable for the key holds none.
    """

    def __init__(self, engine: VllmEngine) -> None:
        self.url = engine.base_url
        self._engine = engine
        self._key = None
        if engine.api_key_env:
            source = f"environment variable {engine.api_key_env}"
            self._key = checked_key(os.environ.get(engine.api_key_env, ""), source, self.url)
        self._given: list[Adapter] = []  # which the server was given by this process and holds, unless it was restarted
        self._current: str | None = None  # the name of the last of them; None where it may be gone

    def list_models(self) -> list[ServedModel]:
        """Return the models and adapters that the server can draw from.

        Raises:
            UserError: it cannot be reached, or does not reply as vLLM does.
        """
        status, reply = self._run_once(lambda http: self._call(http, "GET", "/v1/models"))
        try:
            cards = [(str(card["id"]), card.get("parent"), card.get("max_model_len")) for card in reply["data"]]
        except (KeyError, TypeError, AttributeError):
            raise self.error(f"replies to /v1/models with {status} and no list of models") from None
        return [ServedModel(name, parent is not None, length) for name, parent, length in cards]

    def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter in place of those that the server was given before.

        Raises:
            UserError: the server cannot be reached, or does not take the adapter.
        """
        self._run_once(lambda http: self._load(http, adapter))

    def unload_adapters(self) -> None:
        """Take back the adapters that the server was given."""
        self._run_once(lambda http: self._take_back(http, None))

    def has_token(self, model: str, token: int) -> bool:
        """Return whether a model's vocabulary has a token of this id.

        Raises:
            UserError: the server cannot be reached.
        """
        # A bias is compared with the size of the vocabulary; in a prompt, an id beyond it might reach the model.
        body = {"model": model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(token): 0.0}}
        status, _ = self._run_once(lambda http: self._call(http, "POST", "/v1/completions", body))
        return status == 200

    def draw(
        self, draws: Sequence[Draw], settings: DrawSettings, model: str, adapter: Adapter | None = None
    ) -> list[Drawn]:
        """Draw completions, through a restart of the server if need be.

        Args:
            draws: what to complete; each may be asked for more than once.
            settings: the settings of sampling.
            model: the server's name of the student's own weights.
            adapter: what to draw from in place of them; it is loaded where the server does not hold it.

        Raises:
            UserError: the server stayed away for `restart_timeout`, or several rounds gave not one usable reply.
        """
        if adapter is not None:
            model = adapter.name

        async def all_draws(http: AsyncClient) -> list[Drawn]:
            return await self._draw_all(http, draws, settings, model, adapter)

        return self._run(all_draws)

    def error(self, what: str, advice: str = "") -> UserError:
        """Return an error that says what is wrong with the server, and what to do."""
        return UserError(f"student.engine: the server at {self.url} {what}{f'; {advice}' if advice else ''}.")

    # --- rounds of requests ------------------------------------------------------------------------------------

    async def _draw_all(
        self, http: AsyncClient, draws: Sequence[Draw], settings: DrawSettings, model: str, adapter: Adapter | None
    ) -> list[Drawn]:
        found: dict[int, Drawn] = {}
        idle = 0
        while len(found) < len(draws):
            before = len(found)
            try:
                if adapter is not None and adapter.name != self._current:
                    await self._load(http, adapter)
                await self._ask_missing(http, draws, settings, model, found)
            except _NoReplyError as problem:
                idle = 0 if len(found) > before else idle + 1
                if idle > IDLE_ROUNDS:
                    raise self.error(f"{problem}, {idle} times in a row", _CONTINUE) from None
                self._current = None  # a server that was started again holds none
                await self._await_server(http, str(problem))
        return [found[index] for index in range(len(draws))]

    async def _ask_missing(
        self,
        http: AsyncClient,
        draws: Sequence[Draw],
        settings: DrawSettings,
        model: str,
        found: dict[int, Drawn],
    ) -> None:
        """Ask for the draws that are not in `found` and add them; after the first failure no more are asked for."""
        gate = asyncio.Semaphore(self._engine.concurrency)
        failures: list[BaseException] = []

        async def ask(index: int) -> None:
            async with gate:
                if failures:
                    return
                try:
                    found[index] = await self._ask(http, draws[index], settings, model)
                except (_NoReplyError, UserError) as error:
                    failures.append(error)

        await asyncio.gather(*(ask(index) for index in range(len(draws)) if index not in found))
        if failures:
            raise next((error for error in failures if isinstance(error, UserError)), failures[0])

    async def _await_server(self, http: AsyncClient, problem: str) -> None:
        """Wait until the server is healthy.

        Raises:
            UserError: it was not, for as long as it is waited for.
        """
        patience = self._engine.restart_timeout
        warnings.warn(
            PlainWarning(
                f"{self.error(problem)} purld waits up to {patience:g} s for it, loads the adapter and asks again."
            ),
            stacklevel=2,
        )
        deadline = time.monotonic() + patience
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if (await self._call(http, "GET", "/health"))[0] == 200:
                    return
            except _NoReplyError as error:
                problem = str(error)
            if time.monotonic() > deadline:
                raise self.error(f"{problem}, and did not come back within {patience:g} s", _CONTINUE)

    # --- single requests ---------------------------------------------------------------------------------------

    async def _ask(self, http: AsyncClient, draw: Draw, settings: DrawSettings, model: str) -> Drawn:
        body = {
            "model": model,
            "prompt": list(draw.prompt),
            "seed": draw.seed,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            # All that a server may take from the model's generation_config.json is said, so that nothing is.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": list(settings.ends),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        limit = _BODY_BYTES + _BYTES_PER_TOKEN * (len(draw.prompt) + settings.max_tokens)
        status, reply = await self._call(http, "POST", "/v1/completions", body, self._engine.timeout, limit)
        if status == 404:
            raise _NoReplyError(f"does not hold {model} ({_server_words(reply)})")
        if status != 200:
            raise self.error(f"refuses to draw: {status}, {_server_words(reply)}")
        return read_completion(reply, draw, settings, model)

    async def _load(self, http: AsyncClient, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name, "lora_path": str(adapter.folder.resolve())}
        try:
            status, reply = await self._call(http, "POST", "/v1/load_lora_adapter", body)
        except _ServerFaultError as fault:  # whatever an adapter's loader raises is the server's own fault to vLLM
            if (advice := _load_advice(str(fault))) is None:
                raise
            raise self.error(f"does not take the adapter ({fault})", advice) from None
        words = _server_words(reply)
        if status == 200 or "already been loaded" in words:  # by another process of this run: names are by content
            await self._take_back(http, adapter)
        elif status in (404, 405) and not isinstance(_get(reply, "error"), dict):
            raise self.error(
                "takes no adapters while it runs",
                "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and --enable-lora",
            )
        elif status == 404:
            raise self.error(
                f"cannot read {adapter.folder.resolve()}",
                "let it see the run directory under the same path (in a container: mount it there)",
            )
        else:
            raise self.error(f"does not take the adapter ({status}, {words})", _load_advice(words) or "")

    async def _take_back(self, http: AsyncClient, newer: Adapter | None) -> None:
        """Unload the adapters that were given before, and note the newer one; what is gone already is no error."""
        older = [adapter for adapter in self._given if newer is None or adapter.name != newer.name]
        self._given = [] if newer is None else [newer]
        self._current = None if newer is None else newer.name
        for adapter in older:
            with contextlib.suppress(_NoReplyError):
                await self._call(http, "POST", "/v1/unload_lora_adapter", {"lora_name": adapter.name})
            if adapter.temporary:
                shutil.rmtree(adapter.folder, ignore_errors=True)

    async def _call(
        self,
        http: AsyncClient,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = _SHORT_SECONDS,
        limit: int = _BODY_BYTES,
    ) -> tuple[int, Any]:
        """Return status and content of a reply; content is a value of JSON, or text where it is none.

        Raises:
            _NoReplyError: there is no whole reply, or it is a fault of the server.
            UserError: the key is refused, or the server refers to another address.
        """
        import httpx2

        try:
            async with asyncio.timeout(seconds):
                async with http.stream(method, f"{self.url}{path}", json=body) as response:
                    content = await _read(response.aiter_raw(), limit)
        except TimeoutError:
            raise _NoReplyError(f"did not reply to {path} within {seconds:g} s") from None
        except (httpx2.HTTPError, OSError) as error:
            raise _NoReplyError(f"does not answer ({one_line(reason_of(error))})") from None
        status = response.status_code
        reply = _parse(content)
        if status in (401, 403):
            key = self._engine.api_key_env
            raise self.error(
                f"refuses {f'the key in {key}' if key else 'a request without a key'} ({status})",
                "set student.engine.api_key_env to the environment variable that holds its key",
            )
        if 300 <= status < 400:
            raise self.error(f"refers to another address ({status})", "give the address of vLLM itself")
        if status in (408, 425, 429) or status >= 500:
            raise _ServerFaultError(f"failed with {status}, {_server_words(reply)}")
        return status, reply

    # --- the event loop ----------------------------------------------------------------------------------------

    def _run(self, work: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
        async def with_client() -> Result:
            async with self._open() as http:
                return await work(http)

        return run_async(with_client())

    def _run_once(self, work: Callable[[AsyncClient], Awaitable[Result]]) -> Result:
        """Do what is not repeated: no reply is the user's error."""
        try:
            return self._run(work)
        except _NoReplyError as error:
            raise self.error(str(error), "start it as docs/engine.md says") from None

    def _open(self) -> AsyncClient:
        import httpx2

        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "close",  # a kept connection to a server that was started again would be a failure
            "User-Agent": "purld",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=False,  # prompts go to the address in the configuration, not to a proxy of the environment
        )


_CONTINUE = "start it again, and the same command goes on from the last checkpoint"


def read_completion(reply: Any, draw: Draw, settings: DrawSettings, model: str) -> Drawn:
    """Return the completion in a reply of /v1/completions.

    Raises:
        _NoReplyError: it is another model's or another prompt's, or not a whole completion.
    """
    if (by := _get(reply, "model")) != model:
        raise _NoReplyError(f"drew from {one_line(str(by))} in place of {model}")
    choice = _get(_get(reply, "choices"), 0)
    ids, reason = _get(choice, "token_ids"), _get(choice, "finish_reason")
    log_probs = _get(_get(choice, "logprobs"), "token_logprobs")
    if not _are_ids(ids):
        raise _NoReplyError("returns no token ids, which vLLM does since 0.10.2")
    if _get(choice, "prompt_token_ids") != list(draw.prompt):
        raise _NoReplyError("completed another prompt than it was given")
    if not _are_log_probs(log_probs) or len(log_probs) != len(ids):
        raise _NoReplyError("returns no log-prob for each token")
    if any(token in settings.ends for token in ids[:-1]):
        raise _NoReplyError("went on after the end of a turn")
    finished = ids[-1] in settings.ends
    if not finished and (reason != "length" or len(ids) != settings.max_tokens):
        raise _NoReplyError(f"stopped after {len(ids)} of {settings.max_tokens} tokens ({one_line(str(reason))})")
    return Drawn(ids, [float(value) for value in log_probs], finished)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _are_log_probs(value: Any) -> bool:
    # A likely token's log-prob may round to slightly above 0; NaN fails the comparison.
    return isinstance(value, list) and all(type(x) in (int, float) and -1e6 < x < 1e-3 for x in value)


def _get(value: Any, key: str | int) -> Any:
    """Return an item of what JSON held; None if there is none."""
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _server_words(reply: Any) -> str:
    """Return what the server says about an error, as one line."""
    error = _get(reply, "error")
    words = _get(error, "message") or error or _get(reply, "message") or _get(reply, "detail") or reply
    return one_line(words if isinstance(words, str) else json.dumps(words))


def _load_advice(words: str) -> str | None:
    """Return what to do about the server's words on an adapter; None where they say nothing of its settings."""
    if "max_lora_rank" in words:
        return "start it with a higher --max-lora-rank, which is at least twice student.lora.r"
    if "not enabled" in words:
        return "start it with --enable-lora"
    if "target" in words or "modules" in words:
        return "set student.lora.target_modules to those that it takes"
    return None


async def _read(chunks: Any, limit: int) -> bytes:
    content = bytearray()
    async for chunk in chunks:
        content += chunk
        if len(content) > limit:
            raise _NoReplyError(f"sent more than {limit:,} bytes")
    return bytes(content)


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content[:4096].decode("utf-8", "replace")
