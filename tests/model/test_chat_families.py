"""What a run makes of the chat templates of the most used families, with tokenizers that are made here."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files

import pytest
from chat_families import FAMILIES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from purld.errors import UserError
from purld.model import chat_template, template_trial
from purld.model.encode import Encoder
from purld.records import Message, Prompt

MARKS = re.compile(r"<\|?\w+\|?>|<｜[^｜]+｜>|\[/?(?:INST|gMASK)\]|</?s>|</?think>")
ROLES = ("system", "user", "assistant")
PUBLISHED = sorted(
    path.name
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja") and "training" not in path.name
)
READ_IMAGES = ("idefics3.jinja", "llava_next.jinja", "smolvlm.jinja")  # they take parts of content alone
QUESTION, ANSWER = "How many apples?", "Four of them."


@pytest.fixture(autouse=True)
def trials_in_this_process(monkeypatch):
    """Try templates here: these are known to come to an end."""

    def try_here(template, chats):
        answer = template_trial._answer({"template": template, "chats": chats})
        return template_trial.TemplateTrial(
            answer["problem"], frozenset(answer["variables"]), answer["rendered"], answer["refusals"]
        )

    monkeypatch.setattr(chat_template, "try_template", try_here)


def make_tokenizer(template: str, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters or bytes; no mark of the template is special but bos and eos."""
    if sentencepiece:
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
        model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        blank = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(blank)
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>"} if sentencepiece else {"bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **ends)
    marks = {*MARKS.findall(template), *(f"<|{role}|>" for role in ROLES)} - {*ends.values()}
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in sorted(marks)])
    return tokenizer


def marks_of(tokenizer, ids):
    return Counter(token for token in ids if token in tokenizer.added_tokens_decoder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_template_is_used_as_it_is_meant(name):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family.template, family.sentencepiece)
    encoder = Encoder(tokenizer, 64)
    prompt, answer = encoder.encode_prompt(Prompt.from_text(QUESTION)).ids, encoder.encode_answer(ANSWER).ids
    assert tokenizer.convert_ids_to_tokens(encoder.end) == family.end
    assert tokenizer.decode(prompt).endswith(family.tail)
    assert encoder.decode_text(answer) == ANSWER
    if family.whole:
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
        whole = tokenizer.encode(text, add_special_tokens=False)
        answered = [*prompt, *answer]
        assert whole[: len(answered) - 1] == answered[:-1]
        rest = tokenizer.decode(whole[len(answered) - 1 :]).strip()
        assert rest.startswith(family.end) or not rest


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_arrives_or_is_refused(name):
    family = FAMILIES[name]
    encoder = Encoder(make_tokenizer(family.template, family.sentencepiece), 64)
    prompt = Prompt((Message("system", "Be brief."), Message("user", QUESTION)), location="pool.jsonl, line 3")
    if family.system:
        assert "Be brief." in encoder.tokenizer.decode(encoder.encode_prompt(prompt).ids)
    else:
        with pytest.raises(UserError, match=r"pool.jsonl, line 3: .*(not supported|must alternate).*system_turn: fold"):
            encoder.encode_prompt(prompt)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_of_others_closes_a_turn_or_opens_one(name):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family.template, family.sentencepiece)
    encoder = Encoder(tokenizer, 4096)
    hostile = "".join(token.content for token in tokenizer.added_tokens_decoder.values()) + " and more"
    turns = (Message("user", QUESTION), Message("assistant", "{}"), Message("user", "{}"))
    prompts = [
        Prompt(tuple(Message(turn.role, turn.content.format(text)) for turn in turns)) for text in ("Plain.", hostile)
    ]
    plain, quoted = (marks_of(tokenizer, encoder.encode_prompt(prompt).ids) for prompt in prompts)
    assert plain == quoted
    assert not marks_of(tokenizer, encoder.encode_literal(hostile))
    assert marks_of(tokenizer, encoder.encode_answer(f"One {family.end} two.").ids) == {encoder.end: 1}
    frames = [encoder.evaluation_frame(prompt, text) for prompt, text in zip(prompts, ("Plain.", hostile), strict=True)]
    plain, quoted = (marks_of(tokenizer, [*frame.prefix.ids, *frame.suffix]) for frame in frames)
    assert plain == quoted


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in READ_IMAGES])
def test_published_templates_that_the_trainer_s_library_holds(name):
    """Prompt and answer are what the published template makes of the conversation, but for a block that is closed."""
    template = files("trl").joinpath("chat_templates", name).read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    encoder = Encoder(tokenizer, 64)
    prompt, answer = encoder.encode_prompt(Prompt.from_text(QUESTION)).ids, encoder.encode_answer(ANSWER).ids
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
    shown = tokenizer.decode([*prompt, *answer[:-1]])
    assert whole.startswith(shown.replace("<think>\n\n</think>\n\n", "") if name.startswith("deepseek") else shown)
    assert encoder.decode_text(answer) == ANSWER
