"""Draws of a vLLM server: by token ids, from the current adapter alone, through faults and restarts."""

from __future__ import annotations

import warnings

import pytest
import torch
from fake_vllm import SPOILED, FakeVllm
from rank_processes import run_ranks

from purld import ranks
from purld.config.schema import Lora, Student
from purld.errors import PlainWarning, UserError
from purld.model import vllm_server
from purld.model.load import load_encoder, load_model, load_roles, make_trainable, save_model, save_policy
from purld.model.log_probs import token_log_probs
from purld.model.sample import Decoding
from purld.model.vllm_sampler import VllmSampler, find_server
from purld.model.vllm_server import Draw, Drawn, DrawSettings, _NoReplyError, read_completion
from purld.records import Prompt

SAMPLED = Decoding(1.0, 4)
QUESTIONS = ("How many?", "Tell me about the fox. Use the word drum.")


@pytest.fixture(scope="module")
def fake(random_student):
    server = FakeVllm(random_student)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def fresh(fake, monkeypatch):
    monkeypatch.setattr(vllm_server, "POLL_SECONDS", 0.05)
    find_server.cache_clear()
    for state in (fake.adapters, fake.loaded, fake.drawn, fake.faults):
        state.clear()
    fake.noise = 0.0


@pytest.fixture(scope="module")
def base(random_student):
    return load_model(Student(model=str(random_student)), str(random_student))


@pytest.fixture(scope="module")
def encoder(random_student):
    return load_encoder(Student(model=str(random_student)))


@pytest.fixture(scope="module")
def prompts(encoder):
    return [encoder.encode_prompt(Prompt.from_text(text)) for text in QUESTIONS]


def student_of(fake, **engine):
    engine = {"kind": "vllm", "base_url": fake.url, "timeout": 30, "restart_timeout": 5} | engine
    return Student(model=fake.name, lora=Lora(r=4), engine=engine)


def sampler_of(fake, encoder, folder, decoding=SAMPLED, **engine):
    student = student_of(fake, **engine)
    return VllmSampler(student.engine, student.model, encoder, decoding, folder / "engine")


def moved(model, seed):
    """Give the adapter that is trained weights that matter."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            weight.data.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def stages(fake, encoder, tmp_path_factory):
    """The folder of a run whose two stages' adapters both matter, with p_sft in `sft` and the policy in `align`."""
    student, run = student_of(fake), tmp_path_factory.mktemp("run")
    first = moved(make_trainable(student, load_model(student, student.model)), 1)
    save_model(student, first, encoder, run / "sft")
    roles = load_roles(student, run / "sft")
    moved(roles.policy, 2)
    save_policy(student, roles, run / "sft", encoder, run / "align")
    return run, roles.policy.eval()


@pytest.fixture
def policy(stages):
    """The policy of Stage II."""
    return moved(stages[1], 2)


def expected_log_probs(model, prompt, completions, pad):
    with torch.no_grad():
        return token_log_probs(model, prompt, [c.ids for c in completions], pad)


def test_candidates_come_from_both_stages_adapters_by_token_ids(fake, policy, encoder, prompts, tmp_path):
    groups = sampler_of(fake, encoder, tmp_path)(policy, prompts, 3, [5] * len(prompts))
    assert [len(group) for group in groups] == [3, 3]
    for prompt, group in zip(prompts, groups):
        log_probs, mask = expected_log_probs(policy, prompt, group, encoder.pad)
        for completion, row, kept in zip(group, log_probs, mask.bool()):
            torch.testing.assert_close(torch.tensor(completion.log_probs), row[kept], atol=1e-4, rtol=0)
            assert completion.finished == (completion.ids[-1] == encoder.end)
            assert completion.finished or len(completion.ids) == 4
    asked = sorted(body["prompt"] for body in fake.drawn)  # they arrive in any order
    assert asked == sorted(list(p.ids) for p in prompts for _ in range(3))
    assert {body["model"] for body in fake.drawn} == set(fake.loaded) == set(fake.adapters)


def test_a_draw_depends_on_seed_prompt_and_number_alone(fake, policy, encoder, prompts, tmp_path):
    """So neither the batch nor the number of processes that share a step matters, nor what came before."""
    sampler = sampler_of(fake, encoder, tmp_path)
    together = sampler(policy, prompts, 3, [5] * len(prompts))
    assert sampler(policy, prompts[1:], 3, [5] * len(prompts[1:])) == together[1:]
    assert sampler(policy, prompts[::-1], 2, [5] * len(prompts[::-1])) == [group[:2] for group in together[::-1]]
    assert sampler(policy, prompts, 3, [6] * len(prompts)) != together
    assert len({tuple(c.ids) for c in together[0]}) == 3


def test_each_update_is_a_new_adapter_and_older_ones_are_taken_back(fake, policy, encoder, prompts, tmp_path):
    sampler = sampler_of(fake, encoder, tmp_path)
    for update in range(3):
        moved(policy, update)
        sampler(policy, prompts[:1], 1, [0] * len(prompts[:1]))
        assert list(fake.adapters) == [fake.drawn[-1]["model"]]
        assert [path.name for path in (tmp_path / "engine").iterdir()] == list(fake.adapters)
    assert len(set(fake.loaded)) == 3
    sampler(policy, prompts[:1], 1, [1] * len(prompts[:1]))  # nothing was learned
    assert len(fake.loaded) == 3


def test_runs_of_the_same_weights_leave_each_others_adapters_alone(fake, policy, encoder, prompts, tmp_path):
    one = sampler_of(fake, encoder, tmp_path / "one")
    find_server.cache_clear()  # as in a process of its own
    other = sampler_of(fake, encoder, tmp_path / "other")
    for sampler in (one, other):
        sampler(policy, prompts[:1], 1, [0])
    held = list(fake.adapters)
    assert len({name.rpartition("-")[2] for name in held}) == 1 and len(held) == 2
    one(moved(policy, 3), prompts[:1], 1, [0])
    assert held[1] in fake.adapters and held[0] not in fake.adapters
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlainWarning)  # that an adapter is gone
        other(moved(policy, 2), prompts[:1], 1, [0])
    assert len(fake.loaded) == 3


@pytest.mark.slow
def test_trained_models_are_served_from_their_own_files_and_the_base_without(
    fake, stages, base, encoder, prompts, tmp_path
):
    run, student = stages[0], student_of(fake)
    sampler = sampler_of(fake, encoder, tmp_path)
    (group,) = sampler(base, prompts[:1], 2, [0] * len(prompts[:1]))
    assert fake.loaded == [] and fake.drawn[-1]["model"] == fake.name
    log_probs, _ = expected_log_probs(base, prompts[0], group, encoder.pad)
    assert log_probs[0, 0].item() == pytest.approx(group[0].log_probs[0], abs=1e-4)
    for folder in ("sft", "align"):
        model = load_model(student, run / folder)
        (group,) = sampler_of(fake, encoder, tmp_path)(model, prompts[:1], 2, [0] * len(prompts[:1]))
        log_probs, _ = expected_log_probs(model, prompts[0], group, encoder.pad)
        assert log_probs[1, 0].item() == pytest.approx(group[1].log_probs[0], abs=1e-4)
    assert len(fake.loaded) == 2 and (run / "sft" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "engine").exists()


def test_processes_that_divide_the_weights_draw_what_one_process_draws(fake, stages, encoder, prompts, tmp_path):
    """Their adapters lie beside the weights, and one of them has a prompt to draw for where the other has none."""
    student = student_of(fake).model_copy(update={"shard": "fsdp"})

    def draw():
        policy = moved(load_roles(student, stages[0] / "sft").policy, 2)
        found = []
        for some in (prompts, prompts[:1]):
            mine = some[ranks.my_share(len(some))]
            found += sampler_of(fake, encoder, tmp_path)(policy, mine, 2, [5] * len(mine))
        ranks.barrier()
        return ranks.count(), found

    count, (both, other, again) = draw()
    adapter = fake.drawn[-1]["model"]
    assert count == 1 and adapter.startswith("purld-")
    assert run_ranks(draw) == [(2, [both]), (2, [other, again])]
    assert {body["model"] for body in fake.drawn} == {adapter}


def test_decoding_is_the_runs_own_whatever_the_server_would_take_from_the_model(fake, base, encoder, prompts, tmp_path):
    sampler_of(fake, encoder, tmp_path, Decoding(0.7, 5, 0.9))(base, prompts[:1], 1, [0] * len(prompts[:1]))
    (body,) = fake.drawn
    asked = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 5, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert asked.items() <= body.items()
    assert body["ignore_eos"] and body["stop_token_ids"] == [encoder.end]
    (greedy,), _ = sampler_of(fake, encoder, tmp_path, Decoding(0.0, 5))(base, prompts, 1, [0] * len(prompts))
    with torch.no_grad():
        first = base(input_ids=torch.tensor([prompts[0].ids])).logits[0, -1].argmax().item()
    assert greedy.ids[0] == first


@pytest.mark.parametrize("fault", SPOILED)
def test_a_reply_that_is_not_the_completion_asked_for_is_not_used(fault):
    draw, settings = Draw([5, 6], seed=0), DrawSettings(1.0, 1.0, max_tokens=3, ends=[9])
    choice = {"finish_reason": "stop", "token_ids": [7, 9], "prompt_token_ids": [5, 6]}
    choice["logprobs"] = {"token_logprobs": [-1.0, -2]}
    reply = {"model": "m", "choices": [choice]}
    assert read_completion(reply, draw, settings, "m") == Drawn([7, 9], [-1.0, -2.0], finished=True)
    SPOILED[fault](reply)
    with pytest.raises(_NoReplyError):
        read_completion(reply, draw, settings, "m")


def test_faults_and_a_restart_cost_requests_and_no_candidate(fake, policy, encoder, prompts, tmp_path):
    sampler = sampler_of(fake, encoder, tmp_path)
    whole = sampler(policy, prompts, 2, [5] * len(prompts))
    for fault in ("drop", "restart", "stale"):
        fake.faults.extend([None, fault])
        with pytest.warns(PlainWarning, match=r"student\.engine: the server at .* asks again"):
            assert sampler(policy, prompts, 2, [5] * len(prompts)) == whole
        assert list(fake.adapters) == [fake.drawn[-1]["model"]]


def test_a_timeout_is_asked_again(fake, base, encoder, prompts, tmp_path):
    sampler = sampler_of(fake, encoder, tmp_path, timeout=0.7)
    whole = sampler(base, prompts, 1, [5] * len(prompts))
    fake.faults.append("hang")
    with pytest.warns(PlainWarning, match=r"did not reply to /v1/completions within 0\.7 s"):
        assert sampler(base, prompts, 1, [5] * len(prompts)) == whole


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("stale", "drew from purld-0000000000000000 in place of"),
        ("garbage", "drew from None in place of"),
        ("500", "failed with 500, EngineCore encountered an issue"),
    ],
)
def test_a_server_that_never_gives_a_usable_reply_ends_the_draw_in_one_sentence(
    fake, base, encoder, prompts, tmp_path, fault, sentence
):
    fake.faults.extend([fault] * 9)
    with warnings.catch_warnings(), pytest.raises(UserError, match=sentence) as raised:
        warnings.simplefilter("ignore")
        sampler_of(fake, encoder, tmp_path)(base, prompts[:1], 1, [5] * len(prompts[:1]))
    assert "4 times in a row" in str(raised.value) and "\n" not in str(raised.value)


def test_a_server_that_stays_away_is_waited_for_and_then_given_up(random_student, base, encoder, prompts, tmp_path):
    gone = FakeVllm(random_student)
    gone.close()
    sampler = sampler_of(gone, encoder, tmp_path, restart_timeout=0.3)
    with (
        pytest.warns(PlainWarning, match=r"waits up to 0\.3 s"),
        pytest.raises(UserError, match=r"did not come back within 0\.3 s; .* goes on from the last checkpoint"),
    ):
        sampler(base, prompts, 1, [5] * len(prompts))


def test_another_models_log_probs_are_an_error_and_another_precisions_a_warning(fake, base, encoder, prompts, tmp_path):
    fake.noise = -0.1
    with pytest.warns(PlainWarning, match=r"differ from the trainer's by 0\.100 nats"):
        sampler_of(fake, encoder, tmp_path)(base, prompts, 2, [0] * len(prompts))
    fake.noise = -1.0
    with pytest.raises(UserError, match=r"holds other weights under the name .* differ by 1\.00 nats"):
        sampler_of(fake, encoder, tmp_path)(base, prompts, 2, [0] * len(prompts))
