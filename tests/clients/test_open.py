"""Choosing a client, and endpoint settings that are refused before anything is sent."""

from __future__ import annotations

import subprocess
import sys

import pytest

from purld.clients.answer_file import AnswerFileClient
from purld.clients.base import Reply, ReplyCollector
from purld.clients.endpoint import EndpointClient
from purld.clients.open import open_client
from purld.config.clients import AnswerFile
from purld.config.engines import VllmEngine
from purld.config.load import parse_config
from purld.errors import UserError

BASE = {"student": {"model": "m"}, "data": {"prompts": "p"}}


def teacher(**settings):
    values = {"kind": "openai", "base_url": "http://h/v1", "model": "m"} | settings
    return parse_config(BASE | {"teacher": values}, "c.yaml").teacher


def test_each_configuration_has_its_client(endpoint, ledger, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": "a"}\n')
    assert isinstance(open_client(endpoint(), ledger, "teacher"), EndpointClient)
    file = AnswerFile(kind="file", path=str(tmp_path / "a.jsonl"))
    assert isinstance(open_client(file, ledger, "opponent"), AnswerFileClient)


def test_equal_questions_are_delivered_to_all_who_asked():
    seen = []
    collector = ReplyCollector(["a", "b", "a"], lambda index, reply: seen.append((index, reply.text)))
    assert list(collector.distinct_keys()) == [("a", 0), ("b", 1)]
    collector.add_reply("b", Reply("answered", "B"))
    collector.add_reply("a", Reply("answered", "A"))
    assert seen == [(1, "B"), (0, "A"), (2, "A")]
    assert [reply.text for reply in collector.in_order()] == ["A", "B", "A"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "localhost:8000"}, "begins with http"),
        ({"base_url": "http:///v1"}, "names a host"),
        ({"base_url": "http://two words/v1"}, "names a host"),
        ({"base_url": "http://h:99999/v1"}, "teacher.base_url: Port out of range"),
        ({"base_url": "http://user:hunter2@h/v1"}, "may hold no user, password or query"),
        ({"base_url": "http://h/v1?key=hunter2"}, "may hold no user, password or query"),
        ({"base_url": "user:hunter2@h/v1"}, "may hold no user, password or query"),
        ({"base_url": "https://user:hunter2@h:99999/v1"}, "may hold no user, password or query"),
        ({"api_key_env": "sk-proj-hunter2"}, "never the key itself"),
        ({"api_key_env": "HUNTER2HUNTER2HUNTER2"}, "never the key itself"),
        ({"api_key_env": "gsk_hunter2hunter2hunter2hunter2"}, "never the key itself"),
        ({"extra_body": {"stream": True}}, "stream cannot be set here"),
        ({"api_key": "hunter2"}, "unknown key teacher.api_key"),
        ({"max_cost": 3}, "max_cost needs input_price"),
    ],
)
def test_endpoints_that_are_refused_without_showing_a_secret(settings, words):
    with pytest.raises(UserError, match=words) as refused:
        teacher(**settings)
    assert "hunter2" not in str(refused.value).lower()


@pytest.mark.parametrize("name", ["TEACHER_API_KEY", "my_key", "OPENAI_KEY_2", "azure_openai_gateway_key"])
def test_names_of_variables_are_names(name):
    assert teacher(api_key_env=name).api_key_env == name
    assert VllmEngine(kind="vllm", api_key_env=name).api_key_env == name


def test_a_slash_at_the_end_of_an_address_means_nothing():
    assert teacher(base_url="http://h/v1/").base_url == "http://h/v1"


def test_choosing_a_client_imports_no_heavy_library():
    code = (
        "import sys, purld.clients.open, purld.clients.anchors, purld.clients.ledger, purld.data.prompts;"
        "print([m for m in ('torch', 'transformers', 'openai', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
