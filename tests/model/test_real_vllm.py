"""The same against a real vLLM server, where one is installed: PURLD_VLLM names its `vllm` executable.

    PURLD_VLLM=vllm-env/bin/vllm pytest -m slow tests/model/test_real_vllm.py

The model is a random one of 64-wide heads, which the CPU build can run as well.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from purld.config.schema import Lora, Student
from purld.model.engine_check import check_engine
from purld.model.load import load_encoder, load_model, load_roles, make_trainable, save_model
from purld.model.log_probs import token_log_probs
from purld.model.sample import Decoding
from purld.model.vllm_sampler import VllmSampler
from purld.records import Prompt

VLLM = os.environ.get("PURLD_VLLM")
START_SECONDS = 900
SEEDS = [5, 6]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(START_SECONDS + 600),
    pytest.mark.skipif(not VLLM, reason="PURLD_VLLM names no vllm executable"),
]
SERVER_SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@pytest.fixture(scope="module")
def student(shipped_student, tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(shipped_student)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    model, path = Qwen2ForCausalLM(config), tmp_path_factory.mktemp("student") / "model"
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, repetition_penalty=1.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = {"kind": "vllm", "base_url": f"http://127.0.0.1:{port}", "restart_timeout": START_SECONDS}
    return Student(model=str(path), lora=Lora(r=8), engine=engine)


def start(student, log):
    """Start the server that docs/engine.md describes, and return its process when it is healthy."""
    url = student.engine.base_url
    command = [VLLM, "serve", student.model, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-model-len", "512", "--dtype", "float32"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen([*command, "--enforce-eager"], env=environment | SERVER_SETTINGS, stdout=log, stderr=log)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return server
        except OSError:
            time.sleep(2)
    stop(server)
    pytest.fail("the server did not start")


def stop(server):
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def test_draws_log_probs_adapters_and_a_restart(student, tmp_path):
    encoder = load_encoder(student)
    prompts = [encoder.encode_prompt(Prompt.from_text(text)) for text in ("How many?", "Tell me about the fox.")]
    with (tmp_path / "server.log").open("wb") as log:
        server = start(student, log)
        try:
            check_engine(student, encoder, tmp_path, longest=500, stages=2, compare_weights=True)
            first = make_trainable(student, load_model(student, student.model))
            save_model(student, with_opinions(first), encoder, tmp_path / "sft")
            policy = with_opinions(load_roles(student, tmp_path / "sft").policy).eval()
            sampler = VllmSampler(student.engine, student.model, encoder, Decoding(1.0, 16), tmp_path / "engine")
            groups = sampler(policy, prompts, 4, SEEDS)
            for prompt, group in zip(prompts, groups):
                with torch.no_grad():
                    expected, mask = token_log_probs(policy, prompt, [c.ids for c in group], encoder.pad)
                for completion, row, kept in zip(group, expected, mask.bool()):
                    torch.testing.assert_close(torch.tensor(completion.log_probs), row[kept], atol=1e-3, rtol=0)
            alone = sampler(policy, prompts[1:], 4, SEEDS[1:])
            assert [c.ids for c in alone[0]] == [c.ids for c in groups[1]]
            stop(server)
            server = start(student, log)
            again = sampler(policy, prompts, 4, SEEDS)
            assert [[c.ids for c in group] for group in again] == [[c.ids for c in group] for group in groups]
        finally:
            stop(server)


def with_opinions(model):
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model
