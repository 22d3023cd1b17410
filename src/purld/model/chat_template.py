"""The chat template of a model as a run uses it: tried before anything is paid for, and with thinking as configured.

A template is a program that its authors wrote for their own conversations. It may be missing or broken, refuse a system
turn, leave one out without a word, or begin the model's thinking. All of that is found here, once, in a process of its
own (`purld.model.template_trial`). What the run changes about it becomes part of the template, so that the saved
model is served as it was trained: the values of its variables (`student.chat_template_kwargs`), a switch that turns
thinking off, and the end of a block that it opens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from purld.config.schema import TEMPLATE_NAME
from purld.errors import UserError, reason_of
from purld.model.template_trial import TemplateTrial, try_template
from purld.records import IMAGE, Message
from purld.thinking import THINK, ThinkingPolicy, ThinkingTags, opened_block, tags_in

THINKING_SWITCHES = (
    "enable_thinking",
    "thinking",
)  # the variables by which published templates turn thinking on or off

_QUESTION, _ANSWER, _SYSTEM = "Which number is next?", "It is the seventh one.", "Answer in one plain sentence."
_USER, _ASSISTANT = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
_SYSTEM_TURN = {"role": "system", "content": _SYSTEM}
_LONG = {"role": "user", "content": f"{_QUESTION} " * 200}
# What is tried: a question, one with its answer, one after a system turn, and longer chats for what they may run into.
_CHATS: tuple[tuple[list[dict[str, str]], bool], ...] = (
    ([_USER], True),
    ([_USER, _ASSISTANT], False),
    ([_SYSTEM_TURN, _USER], True),
    ([_USER, _ASSISTANT, _LONG], True),
    ([_SYSTEM_TURN, _USER, _ASSISTANT, _USER, _ASSISTANT, _LONG], True),
)


@dataclass(frozen=True)
class ChatSettings:
    """How a model is talked to.

    Attributes:
        template: the chat template, or the name of one of several that the model has; None for the model's own.
        variables: values of the template's variables.
        thinking: `strip` turns thinking off, by a switch of the template or by closing the block that it opens; `keep`
            leaves both as they are; `fail` refuses a template that opens a block.
        fold_system: put a system turn into the first user turn.
    """

    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    thinking: ThinkingPolicy = "strip"
    fold_system: bool = False


class ChatTemplate:
    """The chat template of a run; it is set as the processor's own, so that it is saved with the model.

    Args:
        processor: a tokenizer, or the processor of a model that reads images.
        settings: how the model is talked to.

    Attributes:
        tags: the tags between which the model thinks; None if neither template nor vocabulary has any.
        opened: the tags of the block that a prompt ends in and that the model's own text continues, with `keep`; else
            None.
        note: a sentence on what becomes of the thinking that the template provides for; None if it provides for none.
        opening: what the template puts between a prompt and the answer to it, such as a blank.
        ending: what the template puts after an answer.

    Raises:
        UserError: there is no template, it is broken, it has no such variable, or it must not open a block and does.
    """

    def __init__(self, processor: PreTrainedTokenizerBase | ProcessorMixin, settings: ChatSettings) -> None:
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self._processor = processor
        self._name = tokenizer.name_or_path
        self._owner = "student.chat_template" if settings.template is not None else f"{self._name}: the chat template"
        self._fold_system = settings.fold_system
        own = _chosen_template(processor, settings.template, self._name)
        variables, trial = self._try_with_variables(own, settings)
        template = _with_variables(own, variables)
        prompt, chat = trial.rendered[0] or "", trial.rendered[1] or ""
        self.opened = opened_block(prompt)
        if self.opened is not None and settings.thinking == "fail":
            raise UserError(
                f"{self._owner} begins every answer with {self.opened.opening}, which student.thinking: fail does not "
                "accept; strip closes the block at once, keep lets the student think."
            )
        self.note = self._describe_thinking(settings, variables)
        self._unthinking = _unthinking(self.opened, prompt, chat)
        self._template = self._direct = template  # with `fail` the student has learned to answer at once
        if settings.thinking != "fail":
            self._direct = _with_ending(template, self._unthinking)  # the answer comes first
        if settings.thinking == "strip":
            self._template = template = self._direct
            prompt, self.opened = prompt + self._unthinking, None
        self.tags = tags_in([own, *tokenizer.get_added_vocab()])
        self.opening, self.ending = _around_answer(prompt, chat)
        self._loses_system = trial.rendered[2] is not None and _SYSTEM not in trial.rendered[2]
        if template != processor.chat_template and (template != own or settings.template is not None):
            _set_template(processor, template)

    def render(self, messages: Sequence[Message], where: str, direct: bool = False) -> str:
        """Render a chat up to where the assistant's answer begins.

        Args:
            messages: the turns; each has a text, or with an image model also IMAGE marks.
            where: names the prompt in a message.
            direct: begin with the answer even where the student thinks first.

        Raises:
            UserError: the template refuses the chat, or would leave its system turn out.
        """
        if self._fold_system:
            messages = _fold_system_turn(messages)
        has_system = messages[0].role == "system"
        if has_system and self._loses_system:
            raise UserError(self._refusal(where, "it leaves a system turn out", has_system))
        turns: list[dict[str, Any]] = [{"role": m.role, "content": self._content(m.content)} for m in messages]
        try:
            rendered = self._processor.apply_chat_template(
                turns,
                chat_template=self._direct if direct else self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template may raise anything
            raise UserError(self._refusal(where, reason_of(error), has_system)) from None
        return str(rendered)

    def _describe_thinking(self, settings: ChatSettings, variables: Mapping[str, Any]) -> str | None:
        """Return a sentence on what becomes of the thinking that the template provides for, if it does."""
        if self.opened is not None:
            done = "the student thinks before it answers" if settings.thinking == "keep" else "the block is closed"
            return f"{self._owner} begins every answer with {self.opened.opening}: {done} (student.thinking)."
        switched = [name for name in variables if name not in settings.variables]
        if switched:
            return f"{self._owner} can let the student think: {switched[0]} is set to false (student.thinking)."
        return None

    def before_answer(self, thinking: str) -> str:
        """Return what a student that thinks writes between the end of a prompt and its answer."""
        if not thinking:
            return self._unthinking
        tags = self.tags or THINK
        newline = "" if tags.opening.endswith("|>") else "\n"
        opening = "" if self.opened is not None else tags.opening + newline
        return f"{opening}{thinking}{newline}{tags.closing}{newline * 2}"

    def _refusal(self, where: str, reason: str, has_system: bool) -> str:
        fold = "student.system_turn: fold puts it into the first user turn, and " if has_system else ""
        return (
            f"{where}: {self._owner} does not accept this chat ({reason}); {fold}data.bad_rows: skip leaves such rows "
            "out and counts them."
        )

    def _content(self, content: str) -> str | list[dict[str, str]]:
        """Return a message's content as templates take it: a text, or parts if the model reads images."""
        return list(_content_parts(content)) if isinstance(self._processor, ProcessorMixin) else content

    def _try_with_variables(self, template: str, settings: ChatSettings) -> tuple[dict[str, Any], TemplateTrial]:
        """Return the values to set in a template, and how it renders with them."""
        trial = self._try(template)
        for name in settings.variables:
            if name not in trial.variables or name in ("messages", "add_generation_prompt"):
                known = ", ".join(sorted(trial.variables - {"messages", "add_generation_prompt"})) or "none"
                raise UserError(
                    f"student.chat_template_kwargs: the chat template has no variable {name!r}; it has {known}."
                )
        off = {name: False for name in THINKING_SWITCHES if name in trial.variables}
        values = (off if settings.thinking == "strip" else {}) | dict(settings.variables)
        return values, self._try(_with_variables(template, values)) if values else trial

    def _try(self, template: str) -> TemplateTrial:
        tokenizer = self._processor.tokenizer if isinstance(self._processor, ProcessorMixin) else self._processor
        special = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        chats = [
            special
            | {
                "messages": [{"role": turn["role"], "content": self._content(turn["content"])} for turn in turns],
                "add_generation_prompt": unanswered,
            }
            for turns, unanswered in _CHATS
        ]
        trial = _cached_trial(template, json.dumps(chats))
        problem = trial.problem
        # Whether a template for images takes them is checked elsewhere, and said there.
        if problem is None and not isinstance(self._processor, ProcessorMixin):
            shown = trial.rendered[0]
            problem = trial.refusals[0] if shown is None else "" if _QUESTION in shown else "it leaves the question out"
        if problem:
            raise UserError(
                f"{self._owner} cannot be used: {problem.rstrip('.')}; give another by student.chat_template."
            )
        return trial


@functools.lru_cache(maxsize=32)
def _cached_trial(template: str, chats: str) -> TemplateTrial:
    return try_template(template, json.loads(chats))


def _chosen_template(processor: PreTrainedTokenizerBase | ProcessorMixin, given: str | None, name: str) -> str:
    """Return the text of the given template, of the one of a processor's that it names, or of its default.

    Raises:
        UserError: the processor has none of that name, or none at all.
    """
    if given is None:
        return _own_template(processor, name)
    if not TEMPLATE_NAME.fullmatch(given):
        return given
    templates = processor.chat_template if isinstance(processor.chat_template, dict) else {}
    if given not in templates:
        known = f"has {', '.join(templates)}" if templates else "has none with names"
        raise UserError(
            f"student.chat_template: {given} is neither a file nor the name of one of the model's templates; {name} "
            f"{known}."
        )
    return str(templates[given])


def _own_template(processor: PreTrainedTokenizerBase | ProcessorMixin, name: str) -> str:
    """Return the default among a processor's chat templates.

    Raises:
        UserError: there is none.
    """
    templates = processor.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            raise UserError(
                f"{name}: the model has several chat templates ({', '.join(templates)}) and none is the default; name "
                "the one to use by student.chat_template."
            )
        templates = templates["default"]
    if not templates:
        raise UserError(
            f"{name}: the tokenizer has no chat template; give one by student.chat_template (for a base model see "
            'docs/data.md, "Chat templates").'
        )
    return str(templates)


def _set_template(processor: PreTrainedTokenizerBase | ProcessorMixin, template: str) -> None:
    if isinstance(processor.chat_template, dict):
        processor.chat_template = processor.chat_template | {"default": template}
    else:
        processor.chat_template = template


def _with_variables(template: str, values: Mapping[str, Any]) -> str:
    """Return a template in which variables have values unless they are given others."""
    lines = [f"{{% if {n} is not defined %}}{{% set {n} = {value!r} %}}{{% endif %}}\n" for n, value in values.items()]
    return "".join(lines) + template


def _with_ending(template: str, ending: str) -> str:
    """Return a template that ends every prompt with a text."""
    if not ending:
        return template
    # A newline at the very end of a template is not part of what it writes.
    return template.removesuffix("\n") + f"{{{{ {ending!r} if add_generation_prompt else '' }}}}"


def _unthinking(opened: ThinkingTags | None, prompt: str, chat: str) -> str:
    """Return what has to follow a prompt so that the answer comes next: the end of a block, or what begins an answer.

    The latter is the channel of the answer in gpt-oss, an empty block in Qwen3, or a whole generation prompt that the
    template has forgotten.
    """
    if opened is not None:
        return f"\n{opened.closing}\n\n" if prompt.endswith("\n") else opened.closing
    opening, _ = _around_answer(prompt, chat)
    return opening if opening.strip() else ""


def _around_answer(prompt: str, chat: str) -> tuple[str, str]:
    """Return what a chat has between the prompt and the answer, and what it has after the answer."""
    before, found, after = chat.rpartition(_ANSWER)
    if not found:
        return "", ""
    return before.removeprefix(prompt) if before.startswith(prompt) else "", after


def _fold_system_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """Return a chat with its system turn put before the text of the first user turn."""
    first, *others = messages
    if first.role != "system":
        return messages
    index = next(i for i, message in enumerate(others) if message.role == "user")
    others[index] = Message("user", f"{first.content}\n\n{others[index].content}")
    return others


def _content_parts(content: str) -> Iterator[dict[str, str]]:
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            yield {"type": "image"}
        if text:
            yield {"type": "text", "text": text}
