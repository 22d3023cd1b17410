"""A run whose candidates a vLLM server draws: what is known before it starts, and what happens when the server dies."""

from __future__ import annotations

import math

import pytest
from command_line import purld
from fake_vllm import FakeVllm

from purld.config.load import load_config
from purld.config.schema import Lora, Student
from purld.errors import UserError
from purld.model import vllm_server
from purld.model.engine_check import check_engine
from purld.model.load import load_encoder
from purld.model.vllm_sampler import find_server
from purld.runs.files import read_json, read_rows
from purld.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def fake(random_student):
    server = FakeVllm(random_student)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(fake, monkeypatch):
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(vllm_server, "IDLE_ROUNDS", 1)
    find_server.cache_clear()
    for state in (fake.adapters, fake.loaded, fake.drawn):
        state.clear()
    before = dict(vars(fake))
    yield
    vars(fake).update(before)
    fake.away_until = 0.0


SHORT = [
    "student.lora={r: 4}",
    "align.steps=4",
    "align.candidates=2",
    "align.max_new_tokens=4",
    "align.importance_cap=2",
    "sft.epochs=1",
    "evaluate={samples: 1, max_new_tokens: 4, batch_size: 8}",
    "data.max_eval_prompts=2",
]


@pytest.mark.slow
def test_a_run_outlives_its_server_and_goes_on_where_it_was(tiny_config, fake, tmp_path, monkeypatch, capsys):
    """The server is gone for good in the third step; with another one the same command finishes."""
    run = RunDir(tmp_path / "run")
    engine = f"student.engine={{kind: vllm, base_url: {fake.url}/v1, restart_timeout: 0.2}}"
    command = ["run", tiny_config, *SHORT, engine, "--run-dir", run.path]
    assert purld(monkeypatch, "check", *command[1:]) == 0
    assert fake.adapters == {}
    plan = " ".join(capsys.readouterr().out.split())
    assert f"rollout engine: vLLM at {fake.url}, on this machine, without a key, past any proxy" in plan
    assert "Stage I and Stage II: nothing else" in plan
    # A trial's, p_sft's, that of the first two steps (the warm-up's first has a learning rate of 0), and the third's.
    fake.leave_after = len(fake.loaded) + 4
    assert purld(monkeypatch, *command) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    told = " ".join(told.split())
    assert "purld waits up to 0.2 s for it, loads the adapter and asks again." in told
    assert "did not come back within 0.2 s; start it again, and the same command goes on" in told
    assert [row["step"] for row in read_rows(run.metrics) if row["stage"] == "align"] == [1, 2]
    assert (run.checkpoints("align") / "checkpoint-2" / "complete").exists()
    fake.leave_after, fake.away_until = math.inf, 0.0
    fake.adapters.clear()
    assert purld(monkeypatch, *command) == 0
    rows = [row for row in read_rows(run.metrics) if row["stage"] == "align"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["engine_gap"] <= row["engine_gap_max"] < 1e-4
        assert row["importance"] == pytest.approx(1.0, abs=1e-3)
        assert row["importance_capped"] == 0
    assert len(read_rows(run.groups)) == 8
    assert list(read_json(run.results)["models"]) == ["base", "sft", "ldl_grpo"]
    assert not run.engine_files.exists()


def student_of(fake, **engine):
    return Student(
        model=str(fake.model.name_or_path),
        lora=Lora(r=4),
        engine={"kind": "vllm", "base_url": fake.url, "restart_timeout": 0.2} | engine,
    )


@pytest.fixture(scope="module")
def encoder(random_student):
    return load_encoder(Student(model=str(random_student)))


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        ({"away_until": math.inf}, "does not answer .*; start it as docs/engine.md says"),
        ({"name": "other/model"}, "serves other/model and not .*; give the name .* as student.engine.model"),
        ({"max_model_len": 100}, "reads 100 tokens, and the longest prompt and its answer may have 200"),
        ({"vocabulary": 700}, "holds another model under the name .* whose vocabulary has 841 tokens"),
        ({"vocabulary": 900}, "holds another model under the name .* whose vocabulary has 841 tokens"),
        ({"updating": False}, "takes no adapters while it runs; .*VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ({"lora": False}, "does not take the adapter .*; start it with --enable-lora"),
        ({"max_lora_rank": 4}, "LoRA rank 8 is greater than max_lora_rank 4.*; start it with a higher --max-lora"),
        ({"blind": True}, r"cannot read .*; let it see the run directory under the same path"),
        ({"key": "secret"}, r"refuses a request without a key \(401\); set student.engine.api_key_env"),
        ({"noise": -2.0}, "holds other weights under the name .* differ by 2.00 nats per token"),
    ],
)
def test_what_is_wrong_with_the_server_is_one_sentence_before_anything_is_paid_for(
    fake, encoder, tmp_path, server, sentence
):
    student = student_of(fake)
    vars(fake).update(server)
    with pytest.raises(UserError, match=sentence) as raised:
        check_engine(student, encoder, tmp_path, longest=200, stages=2, compare_weights="noise" in server)
    assert str(raised.value).startswith(f"student.engine: the server at {fake.url} ")
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


def test_a_key_comes_from_the_environment_and_is_sent(fake, encoder, tmp_path, monkeypatch):
    fake.key = "sk-local"
    monkeypatch.setenv("ENGINE_KEY", "sk-local")
    check_engine(student_of(fake, api_key_env="ENGINE_KEY"), encoder, tmp_path, 200, 1, compare_weights=False)
    monkeypatch.setenv("OTHER_KEY", "")
    with pytest.raises(UserError, match="environment variable OTHER_KEY holds no API key"):
        check_engine(student_of(fake, api_key_env="OTHER_KEY"), encoder, tmp_path, 200, 1, compare_weights=False)


def test_proxies_of_the_environment_are_passed_by(fake, encoder, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    check_engine(student_of(fake), encoder, tmp_path, 200, 1, compare_weights=False)


def test_all_weights_cannot_be_given_to_a_running_server(tiny_config):
    with pytest.raises(UserError, match=r"engine kind vllm needs student\.lora: .*NCCL"):
        load_config(tiny_config, ["student.engine={kind: vllm}"])
