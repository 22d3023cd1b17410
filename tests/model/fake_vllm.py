"""A server that keeps the part of vLLM's protocol that purld uses, on 127.0.0.1, and draws with transformers.

Paths, fields, status codes and the texts of errors are those of vLLM 0.32. Its log-probs are real: it runs the student
with the adapter that a request names. `faults` are taken one for each request that draws.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel


class FakeVllm:
    """The server's state; `url` is its address."""

    def __init__(
        self,
        model,
        name=None,
        updating=True,
        lora=True,
        max_lora_rank=64,
        max_model_len=2048,
        key=None,
        noise=0.0,
    ):
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.name = name or str(model)
        self.updating, self.lora, self.max_lora_rank, self.max_model_len = updating, lora, max_lora_rank, max_model_len
        self.key = key
        self.noise = noise  # added to every log-prob that it reports
        self.adapters: dict[str, PreTrainedModel] = {}
        self.loaded: list[str] = []  # every name that was ever loaded
        self.drawn: list[dict] = []  # the bodies of all requests to draw
        self.faults: deque[str] = deque()
        self.away_until = 0.0
        self.leave_after = math.inf  # so many adapters it is gone, for good
        self.blind = False  # to the folders of adapters
        self.vocabulary = self.model.config.vocab_size
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def restart(self, seconds):
        """Be gone for some seconds, and come back without adapters."""
        self.adapters.clear()
        self.away_until = time.monotonic() + seconds

    def load(self, name, path):
        """Return the status and the reply to a request to load an adapter."""
        if name in self.adapters:
            return 400, error(f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in")
        if self.blind or not (Path(path) / "adapter_config.json").exists():
            return 404, error(f"Loading lora {name} failed: No adapter found for {path}")
        if not self.lora:
            return 500, error("Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA.")
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return 500, error(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), path).merge_and_unload()
        self.loaded.append(name)
        if len(self.loaded) >= self.leave_after:
            self.away_until = math.inf
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, body):
        name, prompt = body["model"], body["prompt"]
        size = self.vocabulary
        model = self.model if name == self.name else self.adapters.get(name)
        if model is None:
            return 404, error(f"The model `{name}` does not exist.")
        if len(prompt) + body["max_tokens"] > self.max_model_len:
            return 400, error("This model's maximum context length is exceeded.")
        if any(int(token) >= size for token in body.get("logit_bias", {})):
            return 400, error(f"token_id(s) in logit_bias contain out-of-vocab token ids. Vocabulary size: {size}")
        with self.lock:
            ids, log_probs, reason = self.sample(model, body)
        choice = {"index": 0, "text": "…", "finish_reason": reason, "token_ids": ids, "prompt_token_ids": prompt}
        choice["logprobs"] = {"token_logprobs": log_probs, "tokens": [f"token_id:{token}" for token in ids]}
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": name, "choices": [choice], "usage": {}}

    @torch.no_grad()
    def sample(self, model, body):
        """Draw one completion as vLLM does: temperature, then top-p; log-probs are of the raw logits."""
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        rows, cache, ids, log_probs = torch.tensor([body["prompt"]]), None, [], []
        while True:
            output = model(input_ids=rows, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1]
            token = choose(logits, body.get("temperature", 1.0), body.get("top_p", 1.0), generator)
            ids.append(token)
            log_probs.append(logits.log_softmax(0)[token].item() + self.noise)
            if token in body.get("stop_token_ids", ()):
                return ids, log_probs, "stop"
            if len(ids) == body["max_tokens"]:
                return ids, log_probs, "length"
            rows = torch.tensor([[token]])


def choose(logits, temperature, top_p, generator):
    if temperature == 0:
        return logits.argmax().item()
    probabilities, order = (logits / temperature).softmax(0).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities > top_p] = 0
    return order[torch.multinomial(probabilities, 1, generator=generator)].item()


def error(message):
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVllm

    def do_GET(self):
        fake = self.fake
        if not self._here():
            return
        if self.path == "/health":
            self._send(200, None)
        elif self.path == "/version":
            self._send(200, {"version": "0.32.0"})
        elif self.path == "/v1/models":
            cards = [{"id": fake.name, "object": "model", "max_model_len": fake.max_model_len, "parent": None}]
            cards += [{"id": name, "object": "model", "parent": fake.name} for name in fake.adapters]
            self._send(200, {"object": "list", "data": cards})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self):
        fake, body = self.fake, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._here():
            return
        if self.path == "/v1/completions":
            self._complete(body)
        elif self.path == "/v1/load_lora_adapter" and fake.updating:
            self._send(*fake.load(body["lora_name"], body["lora_path"]))
        elif self.path == "/v1/unload_lora_adapter" and fake.updating:
            gone = fake.adapters.pop(body["lora_name"], None) is None
            self._send(404 if gone else 200, error("cannot be found") if gone else "Success")
        else:
            self._send(404, {"detail": "Not Found"})

    def _complete(self, body):
        fake = self.fake
        if "logit_bias" not in body:
            fake.drawn.append(body)
            fault = fake.faults.popleft() if fake.faults else None
        else:
            fault = None
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "restart":
            fake.restart(0.3)
            return
        if fault == "hang":
            time.sleep(1.5)
        if fault == "500":
            self._send(500, error("EngineCore encountered an issue."))
            return
        if fault == "garbage":
            self._send(200, "<html>busy</html>")
            return
        status, reply = fake.complete(body)
        if fault in SPOILED and status == 200:
            SPOILED[fault](reply)
        self._send(status, reply)

    def _here(self):
        """Return whether the server is up and lets the request in."""
        if time.monotonic() < self.fake.away_until:
            self.close_connection = True
            return False
        if self.fake.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {self.fake.key}":
            self._send(401, {"error": "Unauthorized"})
            return False
        return True

    def _send(self, status, reply):
        content = b"" if reply is None else reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def _change_choice(**values):
    return lambda reply: reply["choices"][0].update(values)


SPOILED = {
    "stale": lambda reply: reply.update(model="purld-0000000000000000"),
    "other prompt": _change_choice(prompt_token_ids=[1, 2, 3]),
    "no ids": _change_choice(token_ids=None),
    "no log-probs": _change_choice(logprobs=None),
    "too few log-probs": lambda reply: reply["choices"][0]["logprobs"]["token_logprobs"].pop(),
    "NaN": lambda reply: reply["choices"][0]["logprobs"].update(token_logprobs=[float("nan")] * 99),
    "text": _change_choice(token_ids="text"),
    "cut": lambda reply: (reply["choices"][0].update(finish_reason="abort", token_ids=[0]),
                          reply["choices"][0]["logprobs"].update(token_logprobs=[-1.0])),
    "no choices": lambda reply: reply.pop("choices"),
}  # fmt: skip
"""What a faulty server does to a good reply, by name."""
