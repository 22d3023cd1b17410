"""A local model as the teacher, tested with a tiny random one."""

from __future__ import annotations

import pytest

from purld.clients.ledger import Caps, Ledger
from purld.clients.local_model import LocalModelClient, build_local_request
from purld.clients.open import open_client
from purld.config.clients import LocalModel
from purld.errors import UserError
from purld.records import Message, Prompt

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=fast.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)
    return str(path)


def config(model_dir, **settings):
    return LocalModel(kind="local", model=model_dir, **({"max_tokens_per_answer": 12, "batch_size": 2} | settings))


PROMPTS = [
    Prompt.from_text("One question."),
    Prompt((Message("system", "Terse."), Message("user", "Another, longer question?"))),
    Prompt.from_text("Third"),
]


def test_batches_answer_as_prompts_do_alone(model_dir, tmp_path):
    with Ledger(tmp_path / "a.sqlite") as first, Ledger(tmp_path / "b.sqlite") as second:
        together = LocalModelClient(config(model_dir), first, "teacher").ask(PROMPTS)
        alone = [LocalModelClient(config(model_dir), second, "teacher").ask([prompt])[0] for prompt in PROMPTS]
    assert together == alone
    assert len({reply.text for reply in together}) == 3
    assert {reply.state for reply in together} <= {"answered", "truncated"}


def test_sampling_is_repeatable_and_sampling(model_dir, tmp_path):
    replies = []
    for name, temperature in [("a", 2.0), ("b", 2.0), ("c", 0.0)]:
        with Ledger(tmp_path / f"{name}.sqlite") as ledger:
            client = LocalModelClient(config(model_dir, temperature=temperature), ledger, "teacher")
            replies.append(client.ask(PROMPTS))
    assert replies[0] == replies[1] != replies[2]


def test_answers_are_remembered_and_nothing_counts_as_a_call(model_dir, ledger, monkeypatch):
    first = open_client(config(model_dir), ledger, "teacher").ask([*PROMPTS, PROMPTS[0]])
    seen = []
    monkeypatch.setattr("purld.clients.local_model._load_writer", None)  # loading again would fail
    assert LocalModelClient(config(model_dir), ledger, "teacher").ask(PROMPTS, lambda *r: seen.append(r)) == first[:3]
    assert sorted(index for index, _ in seen) == [0, 1, 2]
    totals = ledger.totals("teacher")
    assert (totals["prompts"], totals["calls"], totals["cost"]) == (3, 0, 0)
    assert totals["output_tokens"] > 0


def test_a_kill_costs_nothing_that_cannot_be_generated_again(model_dir, ledger):
    ledger.reserve(build_local_request(config(model_dir), PROMPTS[0]), "teacher", 0, 0.0, Caps())  # never settled
    assert LocalModelClient(config(model_dir), ledger, "teacher").ask(PROMPTS[:1])[0].text


def test_a_prompt_without_room_for_an_answer_fails_and_the_others_do_not(model_dir, ledger):
    long = Prompt.from_text("x" * 120)
    replies = LocalModelClient(config(model_dir), ledger, "teacher").ask([PROMPTS[0], long])
    assert [reply.state == "failed" for reply in replies] == [False, True]
    assert replies[1].detail == "the prompt does not fit the model's context"


def test_a_directory_without_a_model(ledger, tmp_path):
    with pytest.raises(UserError, match="no language model can be loaded"):
        LocalModelClient(config(str(tmp_path)), ledger, "teacher").ask(PROMPTS)
