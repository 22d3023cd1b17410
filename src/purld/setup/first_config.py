"""Make a first configuration that runs: ask what is not given, look at the model and the data, and write YAML.

What is written is what a user has to see or may want to change; every other key has its default. The text is read back
as a configuration before anyone sees it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from purld.clients.answer_file import AnswerFileClient
from purld.config.base import FormatName
from purld.config.clients import AnswerFile
from purld.config.methods import StageTwoSettings
from purld.config.schema import Columns, Config, Student
from purld.errors import UserError
from purld.records import Prompt
from purld.setup.data_survey import DataSurvey, FileSurvey, survey_data, survey_file
from purld.setup.draft import Draft
from purld.setup.model_survey import ModelSurvey, survey_model
from purld.setup.questions import (
    OWN_ANSWERS,
    Ask,
    Interview,
    Say,
    Wishes,
    clean_file,
    clean_key_variable,
    clean_model,
    clean_teacher,
    clean_text,
)
from purld.setup.teacher_section import TeacherContext, put_teacher

_SMALL_MODEL = 100_000_000  # weights; all of them are trained up to here
_MEASURED = 500  # prompts and answers whose tokens are counted
_FEW_PROMPTS = 200
_SFT_UPDATES = 60  # fewer updates of Stage I teach an adapter next to nothing
_MOST_EPOCHS = 4
_LEAST_STEPS, _MOST_STEPS = 25, 200
_PASSES = 4  # of Stage II over the prompts
_CHECK_COMMENTS = {
    "math": "an answer is right if its result equals that of the reference",
    "choice": "an answer is right if it chooses the reference among the column choices",
}
_COLUMN_COMMENTS = {
    "prompt": "the questions",
    "reference": "gold, which only the evaluation reads",
    "images": "the prompts' images",
}


@dataclass(frozen=True)
class FirstConfig:
    """A configuration as text and as values."""

    text: str
    config: Config

    @property
    def key_variable(self) -> str | None:
        """Return the environment variable that has to hold the teacher's key; None if there is none."""
        return getattr(self.config.teacher, "api_key_env", None)


def prepare_config(wishes: Wishes, path: Path, ask: Ask | None = None, say: Say = lambda line: None) -> FirstConfig:
    """Return a first configuration.

    Args:
        wishes: what is known already.
        path: where the text will be written; named in its first lines.
        ask: asks for the rest; None if there is no terminal.
        say: tells what was found.

    Raises:
        UserError: an answer cannot be used or is missing; model and data cannot be read; the result is no valid
            configuration.
    """
    draft, interview = Draft(wishes.overrides), Interview(ask, say)
    student = _put_student(draft, wishes, interview, say)
    data = interview.answer(wishes.data, "--data", "Prompts (a file, or a folder saved by datasets)", clean_file)
    file = survey_file(Path(data), draft.get("data.format") or "auto", draft.get("data.columns.prompt"))
    say(f"{data}: {file.title}; columns {', '.join(file.columns)}")
    answers = draft.get("teacher.columns.answer") or file.answer
    own = _describe_answers(answers, data, file)
    kind, address = interview.answer(
        wishes.teacher,
        "--teacher",
        _teacher_question(own),
        lambda text: clean_teacher(text, data, answers),
        default=OWN_ANSWERS if answers else None,
    )
    survey = _put_data(draft, data, file, kind == "same file", say)
    prompts = survey.loaded.prompts
    put_teacher(draft, kind, TeacherContext(address, file, prompts, wishes, interview))
    say(f"teacher: {own if kind == 'same file' else address}")
    _put_training(draft, len(prompts))
    _put_lengths(draft, student, data, prompts)
    return _finish(draft, path)


def _put_student(draft: Draft, wishes: Wishes, interview: Interview, say: Say) -> ModelSurvey:
    question = "Student (a model directory, or a hub id in the local cache)"
    model = interview.answer(wishes.model, "--model", question, clean_model)
    survey = survey_model(model)
    say(f"{model}: {survey.describe()}")
    draft.put("student.model", model, survey.describe())
    if survey.quantized or survey.parameters is None or survey.parameters > _SMALL_MODEL:
        draft.put("student.lora", {"r": 16}, "an adapter is trained; without this key all weights are")
    if not survey.has_template and draft.get("student.chat_template") is None:
        _check_tokenizer(model)
        template = interview.answer(
            None,
            "student.chat_template=FILE",
            "Chat template (the model has none: a file with the one to train it with)",
            clean_text("student.chat_template"),
        )
        draft.put("student.chat_template", template, "the model has none of its own")
    return survey


def _check_tokenizer(model: str) -> None:
    """Check that a model without a chat template has a tokenizer: without one it is no template that is missing.

    Raises:
        UserError: it has none that reads.
    """
    from purld.model.load import load_processor

    load_processor(model)


def _describe_answers(answers: str | None, data: str, file: FileSurvey) -> str | None:
    """Say where the file of prompts has answers, if it does: in a column, or where its format has them."""
    if answers is None:
        return None
    return f"the answers in the column {answers!r}" if answers in file.columns else f"the answers in {data}"


def _teacher_question(answers: str | None) -> str:
    own = f"{OWN_ANSWERS!r} for {answers}, " if answers else ""
    return f"Teacher ({own}a file of answers, an endpoint's address such as https://host/v1, or a model directory)"


def _put_data(draft: Draft, data: str, file: FileSurvey, own_answers: bool, say: Say) -> DataSurvey:
    """Add the section `data`: the file, its columns, and how answers are checked."""
    names = {"prompt": file.prompt, "reference": _gold_column(file, own_answers)}
    columns = {name: column for name, column in names.items() if column is not None}
    columns |= draft.columns("data")
    survey = _survey(draft, data, columns)
    if survey.check is None and own_answers and columns.get("reference") == file.answer:
        del columns["reference"]  # prose that is trained on is no gold
        survey = _survey(draft, data, columns)
    loaded = survey.loaded
    say(f"{data}: {loaded.rows:,} rows, {len(loaded.prompts):,} distinct prompts")
    draft.put("data.prompts", data, f"{loaded.format}; {len(loaded.prompts):,} distinct prompts")
    written = {key: column for key, column in columns.items() if column != getattr(Columns(), key, None)}
    trained_on = file.answer if own_answers else None
    draft.replace("data.columns", written, _describe_columns(written, trained_on))
    if loaded.skipped:
        say(f"{data}: {loaded.skipped:,} rows cannot be used and are left out, first: {loaded.first_skipped}")
        draft.put("data.bad_rows", "skip", f"{loaded.skipped:,} rows cannot be used; without this key the run stops")
    few = len(loaded.prompts) < _FEW_PROMPTS
    if draft.get("data.eval_prompts") is None:
        draft.put("data.eval_fraction", 0.2 if few else 0.1, "the share that is held out, and only evaluated on")
    if survey.check:
        say(f"{data}: the gold in the column {columns.get('reference', 'reference')!r} fits data.check: {survey.check}")
        draft.put("data.check", survey.check, _CHECK_COMMENTS[survey.check])
    elif survey.remark:
        say(f"{data}: {survey.remark}")
    return survey


def _survey(draft: Draft, data: str, columns: Mapping[str, str]) -> DataSurvey:
    known = {key: str(column) for key, column in columns.items() if key in Columns.model_fields}
    name: FormatName = draft.get("data.format") or "auto"
    return survey_data(Path(data), Columns(**known), name, draft.get("data.image_folder"))


def _describe_columns(columns: Mapping[str, str], trained_on: str | None) -> str:
    """Say what columns hold; gold may be the answers that are trained on, of which the evaluation reads the others."""
    comments = _COLUMN_COMMENTS
    if columns.get("reference") == trained_on:
        comments = comments | {"reference": "the teacher's answers, and gold where held out"}
    return "; ".join(f"{column}: {comments[key]}" for key, column in columns.items() if key in comments)


def _gold_column(file: FileSurvey, own_answers: bool) -> str | None:
    """Return the column of gold: one of its own, else that of the answers, if it is a column of the file."""
    if file.gold is not None:
        return file.gold
    return file.answer if file.answer in file.columns else None


def _put_lengths(draft: Draft, survey: ModelSurvey, data: str, prompts: Sequence[Prompt]) -> None:
    """Add limits on tokens: those that the data need, within what the student reads."""
    from purld.model.load import load_encoder
    from purld.setup.lengths import choose_lengths

    config = draft.read("the configuration")
    answers = _known_answers(config, data, prompts)
    encoder = load_encoder(config.student)
    lengths = [len(encoder.encode_prompt(prompt)) for prompt in prompts[:_MEASURED]]
    written = [len(encoder.encode_literal(text)) + 1 for text in answers]
    chosen = choose_lengths(survey.context, lengths, written)
    defaults = Student(model="")
    if chosen.prompt != defaults.max_prompt_tokens:
        draft.put("student.max_prompt_tokens", chosen.prompt, "a longer prompt is left out")
    if chosen.anchor != defaults.max_anchor_tokens:
        draft.put("student.max_anchor_tokens", chosen.anchor, "a longer answer of the teacher is cut")
    known = f"; the longest known answer has {max(written):,}" if written else ""
    draft.put("align.max_new_tokens", chosen.new, f"tokens of a candidate{known}")
    draft.put("evaluate.max_new_tokens", chosen.new, "tokens of an answer to a held-out prompt")


def _known_answers(config: Config, data: str, prompts: Sequence[Prompt]) -> list[str]:
    """Return some of the teacher's answers, if they are in a file."""
    if not isinstance(config.teacher, AnswerFile):
        return []
    replies = AnswerFileClient(config.teacher).ask(prompts)
    texts = [reply.text for reply in replies if reply.text is not None]
    if not texts:
        raise UserError(f"--teacher: {config.teacher.path} has no answers to the prompts of {data}.")
    return texts[:_MEASURED]


def _put_training(draft: Draft, prompts: int) -> None:
    """Add what decides how long training takes, by the number of prompts."""
    config = draft.read("the configuration")
    sft, align = config.sft, config.align
    held_out = 0.0 if config.data.eval_prompts else config.data.eval_fraction
    trained_on = max(1, round(min(prompts, config.data.max_prompts or prompts) * (1 - held_out)))
    per_epoch = math.ceil(trained_on * (1 - sft.validation_fraction) / sft.batch_size)
    epochs = min(_MOST_EPOCHS, max(1, math.ceil(_SFT_UPDATES / per_epoch)))
    draft.put("sft.epochs", epochs, f"about {epochs * per_epoch:,} updates of {sft.batch_size} answers")
    draft.put("align.method", "ldl_grpo", "`purld methods` lists the others")
    if not isinstance(align, StageTwoSettings):
        return
    if hasattr(align, "candidates"):
        draft.put("align.candidates", 8, "drawn for each prompt of a step")
    steps = min(_MOST_STEPS, max(_LEAST_STEPS, math.ceil(_PASSES * trained_on / align.prompts_per_step)))
    passes = align.groups_drawn(trained_on, steps) / trained_on
    draft.put("align.steps", steps, f"of {align.prompts_per_step} prompts: about {passes:.1f} passes over the prompts")
    draft.sort("align", ("method", "candidates", "steps"))


def _finish(draft: Draft, path: Path) -> FirstConfig:
    for key in ("teacher.api_key_env", "evaluate.judge.api_key_env"):
        if (name := draft.get(key)) is not None:
            clean_key_variable(str(name))
    header = [
        "A configuration of purld, written by `purld init`. A key that is not here has its default.",
        f"  purld check {path}    validates everything and shows the plan; nothing is sent",
        f"  purld run {path}      runs every stage; once stopped, the same command goes on",
    ]
    return FirstConfig(draft.text(header), draft.read(str(path)))
