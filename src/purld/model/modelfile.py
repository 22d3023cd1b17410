"""Write the Modelfile by which Ollama serves an exported model as it was trained: template, end tokens, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from purld.model.encode import Encoder
from purld.model.ollama_template import Render, Turn, find_pieces, go_template, writes_known_dates
from purld.model.template_dates import fill_dates, with_marked_dates


@dataclass(frozen=True)
class ServedSampling:
    """How answers are drawn where the request does not say it.

    Attributes:
        temperature: of sampling; 0 is greedy.
        top_p: the share of the probability that is sampled from.
        context: tokens of prompt and answer together.
    """

    temperature: float
    top_p: float
    context: int


def write_modelfile(encoder: Encoder, sources: Sequence[str], sampling: ServedSampling) -> tuple[str, str | None]:
    """Return a Modelfile, and a sentence on what it leaves to Ollama; None if nothing.

    Args:
        encoder: the student's, with the chat template of the run.
        sources: the files or folders that hold the weights, relative to the Modelfile.
        sampling: how answers are drawn.
    """
    template, problem = _template(encoder)
    lines = [*(f"FROM {source}" for source in sources), ""]
    lines += [f"# {problem}"] if template is None else [f'TEMPLATE """{template}"""']
    if template is not None and "currentDate" in template:
        lines.insert(len(lines) - 1, "# Writes today's date, which needs Ollama 0.11.1 or newer.")
    parameters = [f"stop {_quoted(token)}" for token in _end_texts(encoder)]
    parameters += [f"temperature {sampling.temperature:g}", f"top_p {sampling.top_p:g}", "top_k 0", "min_p 0"]
    parameters += ["repeat_penalty 1", f"num_ctx {sampling.context}"]
    return "\n".join([*lines, "", *(f"PARAMETER {parameter}" for parameter in parameters), ""]), problem


def _template(encoder: Encoder) -> tuple[str | None, str | None]:
    """Return the chat template in Ollama's language, or None and why there is none."""
    if isinstance(encoder.processor, ProcessorMixin):
        return None, "The chat template of a model that reads images is left to Ollama; compare its prompts first."
    pieces = find_pieces(_renderer(encoder.processor))
    if pieces is None or not writes_known_dates(pieces) or not _keeps_dates(encoder.processor):
        return None, (
            "The chat template cannot be translated for Ollama, which looks for a similar one; compare its prompts, or "
            "serve with a server that uses the model's own template."
        )
    if mark := _own_start(encoder.tokenizer):
        pieces = pieces.without_start(mark)
    return go_template(pieces), None


def _keeps_dates(processor: PreTrainedTokenizerBase) -> bool:
    """Return whether a template writes today's date as it is, so that a mark in its place stands for it."""
    chat = [("user", "a")]
    marked, before = _renderer(processor)(chat), datetime.now()
    dated = _renderer(processor, marks=False)(chat)
    return marked is None or dated in (fill_dates(marked, before), fill_dates(marked, datetime.now()))


def _renderer(processor: PreTrainedTokenizerBase, marks: bool = True) -> Render:
    """Return a function that renders chats, with marks in the place of today's date."""
    template = processor.chat_template
    if marks and isinstance(template, str):
        template = with_marked_dates(template)

    def render(turns: Sequence[Turn]) -> str | None:
        chat = [{"role": role, "content": content} for role, content in turns]
        try:
            return str(
                processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, chat_template=template)
            )
        except Exception:  # a template may raise anything
            return None

    return render


def _own_start(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that the tokenizer puts before every text, as the engine of Ollama then does too."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def _end_texts(encoder: Encoder) -> list[str]:
    return [str(encoder.tokenizer.convert_ids_to_tokens(token)) for token in sorted(encoder.ends)]


def _quoted(text: str) -> str:
    return f'"{text}"' if '"' not in text else f'"""{text}"""'
