"""Chat templates as Ollama renders them, with the templates of the most used families."""

import json
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from chat_families import FAMILIES
from transformers import PreTrainedTokenizerFast

from purld.model.encode import Encoder
from purld.model.modelfile import ServedSampling, _renderer, write_modelfile
from purld.model.ollama_template import find_pieces, go_template
from purld.model.template_dates import fill_dates

SYSTEM, QUESTIONS = ("system", 'Be "short" {{ now }}.'), [("user", f"Wie? <{n}> {{{{ .System }}}}") for n in "123"]
ANSWERS = [("assistant", "Four."), ("assistant", "Five & six.")]
CHATS = [
    QUESTIONS[:1],
    [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], QUESTIONS[2]],
    [SYSTEM, QUESTIONS[0]],
    [SYSTEM, QUESTIONS[0], ANSWERS[0], QUESTIONS[1]],
]
# They put the system turn into the last question, wherever that is.
UNTRANSLATED = {"Mistral v3", "Mistral Nemo"}
TRANSLATED = sorted(FAMILIES.keys() - UNTRANSLATED)


@pytest.fixture
def render(tokenizer):
    """Return how a chat template renders."""

    def with_template(template):
        own = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=template
        )
        return _renderer(own)

    return with_template


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_pieces_of_a_template_render_what_it_renders(name, render):
    template = render(FAMILIES[name].template)
    pieces = find_pieces(template)
    assert (pieces.system is not None) == FAMILIES[name].system
    for chat in CHATS:
        if pieces.system is not None or chat[0][0] != "system":
            assert pieces.render(chat) == template(chat)


@pytest.mark.parametrize(
    "template",
    [
        *(FAMILIES[name].template for name in sorted(UNTRANSLATED)),
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_pieces_cannot_render_has_no_translation(template, render):
    assert find_pieces(render(template)) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_renders_the_translations_as_the_templates_do(render, tmp_path):
    """Ollama runs Go's text/template on these values; no version of Ollama itself is needed."""
    cases, wanted = [], []
    for name in TRANSLATED:
        template = render(FAMILIES[name].template)
        pieces = find_pieces(template)
        for chat in CHATS:
            if pieces.system is not None or chat[0][0] != "system":
                turns = [{"Role": role, "Content": content} for role, content in chat]
                cases.append({"Template": go_template(pieces), "Messages": turns})
                wanted.append(template(chat))
    for layout in ("%d %b %Y", "%B %d, %Y", "{%y/%m}"):
        template = LLAMA_DATE.replace("%d %b %Y", layout)
        pieces = find_pieces(render(template))
        for chat in CHATS:
            turns = [{"Role": role, "Content": content} for role, content in chat]
            cases.append({"Template": go_template(pieces), "Messages": turns})
            wanted.append(fill_dates(render(template)(chat), datetime(2031, 7, 4)))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = Path(__file__).parent / "render_go_template.go"
    done = subprocess.run(["go", "run", program, tmp_path / "cases.json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == wanted
    assert len(wanted) > 50


def test_a_modelfile_has_template_end_tokens_and_the_evaluations_sampling(tokenizer):
    encoder = Encoder(tokenizer, 64, ends=[5])
    text, problem = write_modelfile(encoder, ["./model.gguf"], ServedSampling(0.7, 0.9, 4096))
    assert problem is None
    assert text.startswith("FROM ./model.gguf\n")
    assert go_template(find_pieces(_renderer(tokenizer))) in text and "currentDate" not in text
    for token in encoder.ends:
        assert f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(token)}"' in text
    for line in ("temperature 0.7", "top_p 0.9", "top_k 0", "repeat_penalty 1", "num_ctx 4096"):
        assert f"PARAMETER {line}\n" in text


LLAMA_DATE = (
    "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set today = '26 Jul 2024' %}{%- endif %}{{ '<bos>system Today Date: ' + today + '\\n\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{%- set messages = messages[1:] %}{%- endif %}"
    "{{ '<eot>' }}{%- for m in messages %}{{ m.role + '\\n' + m.content + '<eot>' }}{%- endfor %}{{ 'assistant\\n' }}"
)


def encoder_with(template, tokenizer):
    backend = tokenizer.backend_tokenizer
    return Encoder(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=template), 64, [5]
    )


def test_a_template_that_writes_todays_date_writes_it_in_ollama_too(tokenizer):
    encoder = encoder_with(LLAMA_DATE, tokenizer)
    text, problem = write_modelfile(encoder, ["."], ServedSampling(0.7, 0.9, 4096))
    assert problem is None and "needs Ollama 0.11.1" in text
    assert str(datetime.now().year) not in text and "2024" not in text
    assert '{{ "<bos>system Today Date: " }}{{ slice (currentDate) 8 10 }} {{ with slice (currentDate) 5 7 }}' in text
    assert '{{ else if eq . "11" }}Nov{{ else if' in text


@pytest.mark.parametrize(
    "date",
    ["strftime_now('%A, %d %B')", "strftime_now('%H:%M')", "strftime_now('%b') | upper", "strftime_now('%Y')[2:]"],
)
def test_other_dates_than_days_months_and_years_have_no_translation(date, tokenizer):
    encoder = encoder_with(LLAMA_DATE.replace("strftime_now('%d %b %Y')", date), tokenizer)
    text, problem = write_modelfile(encoder, ["."], ServedSampling(0.7, 0.9, 4096))
    assert "cannot be translated" in problem and "TEMPLATE" not in text


def test_the_token_that_begins_every_text_is_left_to_the_engine(render):
    pieces = find_pieces(render(FAMILIES["Llama 3"].template))
    assert not pieces.without_start(pieces.start[:4]).start.startswith(pieces.start[:4])
    assert pieces.without_start("<other>") == pieces
