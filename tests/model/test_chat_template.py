"""Chat templates as a run uses them: broken ones, refusals, system turns, variables, and thinking turned off."""

import time
from pathlib import Path

import pytest
from chat_families import FAMILIES
from transformers import AutoTokenizer

from purld.errors import UserError
from purld.model.chat_template import ChatSettings
from purld.model.encode import Encoder
from purld.model.template_trial import try_template
from purld.records import Message, Prompt

BASE_MODEL = Path(__file__).parents[2] / "configs" / "base-model.jinja"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")
EMPTY_BLOCK = "<think>\\n\\n</think>\\n\\n"
SWITCH = CHATML.replace(
    "assistant\\n' }}",
    "assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '" + EMPTY_BLOCK + "' }}{% endif %}",
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace("messages %}", "messages if m.role != 'system' %}")
SYSTEM = Prompt((Message("system", "Be brief."), Message("user", "How many?")), location="pool.jsonl, line 3")
PROMPT = Prompt.from_text("How many?")
OPENING = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def fresh(shipped_student):
    return AutoTokenizer.from_pretrained(shipped_student)


def make(tokenizer, template, **settings):
    return Encoder(tokenizer, 64, chat=ChatSettings(template, **settings))


def shown(encoder, prompt=PROMPT, **options):
    return encoder.tokenizer.decode(encoder.encode_prompt(prompt, **options).ids)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if messages %}", "line 1: Unexpected end of template"),
        ("{{ messages[0]['content'] | shout }}", "No filter named 'shout'"),
        ("{{ messages[0].parts.text }}", "has no attribute 'parts'"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does not come to an end"),
        ("{% for i in range(99999) %}{{ messages[0]['content'] * 999 }}{% endfor %}", "writes more than 2,000,000"),
        ("{{ 'x' * 10**10 }}", "needs more than 512 MiB"),
        ("You are a helpful assistant.", "leaves the question out"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(fresh, template, reason):
    with pytest.raises(UserError, match=rf"student.chat_template cannot be used: .*{reason}.*; give another"):
        make(fresh, template)


def test_one_of_several_templates_of_a_model_is_named(fresh):
    fresh.chat_template = {"tool_use": CHATML.replace("|im_start|", "|im_start|>tool<|im_start|"), "plain": CHATML}
    with pytest.raises(
        UserError, match=r"several chat templates \(tool_use, plain\) and none is the default; name the"
    ):
        make(fresh, None)
    with pytest.raises(UserError, match=r"chat_template: chatml is neither a file nor .*; .* has tool_use, plain\."):
        make(fresh, "chatml")
    encoder = make(fresh, "plain")
    assert shown(encoder) == OPENING
    assert Encoder(encoder.tokenizer, 64).encode_prompt(PROMPT) == encoder.encode_prompt(PROMPT)  # it is saved


def test_a_template_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr("purld.model.template_trial._WALL_SECONDS", 1)
    loop, begun = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, time.monotonic()
    assert try_template(loop, [{"messages": []}]).problem == "it does not come to an end"
    assert time.monotonic() - begun < 20


def test_a_block_that_the_template_opens_is_closed(fresh):
    encoder = make(fresh, THINKING)
    assert shown(encoder) == OPENING + "<think>\n\n</think>\n\n"
    suffix = encoder.tokenizer.decode(encoder.evaluation_frame(PROMPT, "4.").suffix)
    assert suffix.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert encoder.thinking_note.endswith("begins every answer with <think>: the block is closed (student.thinking).")
    again = Encoder(encoder.tokenizer, 64)  # the template is saved with the model, block closed
    assert again.encode_prompt(PROMPT) == encoder.encode_prompt(PROMPT)


def test_a_switch_of_the_template_is_used_and_can_be_set_back(fresh, shipped_student):
    encoder = make(fresh, SWITCH)
    assert shown(encoder) == OPENING + "<think>\n\n</think>\n\n"
    assert encoder.thinking_note.endswith("enable_thinking is set to false (student.thinking).")
    other = AutoTokenizer.from_pretrained(shipped_student)
    assert shown(make(other, SWITCH, variables={"enable_thinking": True})) == OPENING


def test_thinking_that_is_kept_is_trained_and_not_scored(fresh):
    encoder = make(fresh, THINKING, thinking="keep")
    assert shown(encoder) == OPENING + "<think>\n"
    assert shown(encoder, direct=True) == OPENING + "<think>\n\n</think>\n\n"
    decode = encoder.tokenizer.decode
    assert decode(encoder.encode_target("<think>I add.</think>4.").ids) == "I add.\n</think>\n\n4.<|im_end|>"
    assert decode(encoder.encode_target("4.").ids) == "\n</think>\n\n4.<|im_end|>"
    assert decode(encoder.encode_answer("<think>I add.</think>4.").ids) == "4.<|im_end|>"
    reply = encoder.read_reply(encoder.encode_target("<think>I add.</think>4.").ids)
    assert (reply.thinking, reply.answer) == ("I add.", "4.")
    assert "I add." not in decode(encoder.evaluation_frame(PROMPT, "<think>I add.</think>4.").prefix.ids)
    assert decode(encoder.encode_quoted_anchor("<think>I add.</think>4.")) == "4."
    for direct, opening in ((False, "<think>\n"), (True, "<think>\n\n</think>\n\n")):
        anchored = decode(encoder.encode_anchored_prompt(PROMPT, "4.", direct).ids)
        assert anchored.endswith(f"<|im_start|>assistant\n{opening}")


def test_thinking_that_must_not_be_is_refused(fresh, shipped_student):
    with pytest.raises(UserError, match="begins every answer with <think>"):
        make(fresh, THINKING, thinking="fail")
    encoder = make(AutoTokenizer.from_pretrained(shipped_student), FAMILIES["Qwen 3"].template, thinking="fail")
    # What is scored is what it was trained on: an answer right after the prompt.
    assert encoder.encode_prompt(PROMPT, direct=True) == encoder.encode_prompt(PROMPT)
    with pytest.raises(UserError, match="the student began to think"):
        encoder.decode_text(encoder.encode_literal("<think>I add.</think>4."))


def test_a_candidate_is_its_answer(fresh):
    encoder = make(fresh, CHATML)
    assert encoder.decode_text([*encoder.encode_literal("<think>\nI add.\n</think>\n\n4."), encoder.end]) == "4."
    assert encoder.decode_text(encoder.encode_literal("<think>\nI add and")) == ""


def test_an_earlier_answer_loses_its_thinking_where_the_model_thinks(fresh):
    turns = (Message("user", "Hi."), Message("assistant", "<think>Hm.</think>Hello."), Message("user", "How many?"))
    assert "assistant\nHello.<|im_end|>" in shown(make(fresh, THINKING), Prompt(turns))


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_turn_that_is_not_taken_is_one_sentence_or_folded(fresh, shipped_student, template):
    reason = "System role not supported" if "raise" in template else "it leaves a system turn out"
    with pytest.raises(UserError, match=rf"pool.jsonl, line 3: .*\({reason}\); student.system_turn: fold .*bad_rows"):
        make(fresh, template).encode_prompt(SYSTEM)
    folded = make(AutoTokenizer.from_pretrained(shipped_student), template, fold_system=True)
    assert "user\nBe brief.\n\nHow many?<|im_end|>" in shown(folded, SYSTEM)


def test_a_variable_that_the_template_has_not_is_an_error(fresh):
    with pytest.raises(UserError, match=r"no variable 'enable_thinkin'; it has enable_thinking"):
        make(fresh, SWITCH, variables={"enable_thinkin": False})


def test_a_base_model_ends_its_turns_as_its_documents(fresh):
    fresh.add_special_tokens({"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    encoder = make(fresh, BASE_MODEL.read_text(encoding="utf-8"))
    system, user, assistant = (Message(role, text) for role, text in zip(("system", "user", "assistant"), "SQA"))
    assert shown(encoder, Prompt((system, user))) == "<|bos|>S\nQuestion: Q\nAnswer:"
    assert shown(encoder, Prompt((user, assistant, user))) == "<|bos|>Question: Q\nAnswer: A<|eos|>Question: Q\nAnswer:"
    assert encoder.end == fresh.eos_token_id
    assert encoder.encode_answer("A").ids == [*encoder.encode_literal(" A"), encoder.end]


def test_a_generation_prompt_that_the_template_forgets_is_added(fresh):
    assert shown(make(fresh, CHATML.partition("{% if add")[0])) == OPENING


def test_what_is_made_of_a_template_renders_as_the_template_does(fresh):
    """White space at both ends of a template has its own rules."""
    plain = "\n  {% if enable_thinking %}T{% endif %}" + CHATML + "\n"
    encoder = make(fresh, plain, variables={"enable_thinking": True})
    turn = [{"role": "user", "content": "How many?"}]
    given = {"tokenize": False, "add_generation_prompt": True}
    expected = fresh.apply_chat_template(turn, chat_template=plain, enable_thinking=True, **given)
    assert shown(encoder) == expected == fresh.apply_chat_template(turn, **given)
