"""The configuration of a run: what a user may say, checked when it is loaded.

Unknown keys are errors with the nearest known name; an illegal combination fails here, not an hour into a
run. This module imports neither torch nor anything that does, so that `purld check` and `--help` are quick.
Secrets are never part of it: a key is named by the environment variable or the file that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from purld.config.base import Count, Fraction, NonNegative, Positive, Section
from purld.config.methods import Align, LdlGrpo, TeacherJudgeGrpo


class Lora(Section):
    """A low-rank adapter in place of training all weights."""

    r: Count = 16
    alpha: Positive | None = None  # None: 2 r
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"


class Student(Section):
    """The model to align. `model` is a directory or a hub id; without `lora` all weights train."""

    model: str
    lora: Lora | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # auto: as saved with LoRA on a GPU, else float32
    max_prompt_tokens: Count = 1024  # a longer prompt is left out, and counted
    max_anchor_tokens: Count = 1024  # a longer anchor is cut, and counted
    max_image_pixels: Count | None = None  # a larger picture is made smaller; null: as the model's processor does
    # Whether what the model sees pictures with is trained too; null: if all weights are, and not with an adapter.
    train_vision: bool | None = None

    @property
    def trains_vision(self) -> bool:
        """Whether the parts that only pictures pass through are trained."""
        return self.lora is None if self.train_vision is None else self.train_vision


class Columns(Section):
    """Which columns of the prompt file hold what."""

    prompt: str = "prompt"
    reference: str = "reference"
    images: str = "images"


TaskName = Literal[
    "writingprompts_cw",
    "writingprompts_eu",
    "competition_math",
    "competition_math_counting",
    "competition_math_geometry",
    "aokvqa_mc",
    "aokvqa_rationale",
]


class Data(Section):
    """The prompts: a file of them, or a task by name and where its published data lie.

    Without `eval_prompts` or a published held-out split, `eval_fraction` of the pool is held out by content hash.
    """

    prompts: str | None = None
    task: TaskName | None = None  # `purld tasks` lists them
    path: str | None = None  # the task's data: a file or folder in the published format, or a hub data set
    columns: Columns = Columns()
    eval_prompts: str | None = None
    eval_fraction: Fraction = 0.1
    # The share of the training prompts whose anchors go to Stage I, the others going to Stage II; null: all to both.
    sft_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_prompts: Count | None = None
    max_eval_prompts: Count | None = None
    bad_rows: Literal["fail", "skip"] = "fail"  # a row that cannot be used stops the run, or is counted
    # How an answer is compared with gold; auto: as the task says; none: no accuracy is reported.
    check: Literal["auto", "none", "exact", "testbed", "math", "choice"] = "auto"

    @property
    def source(self) -> str:
        """The file or folder that the training prompts come from."""
        return self.path or self.prompts or ""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.prompts is None) == (self.task is None):
            raise ValueError("give either prompts, or task and path")
        if (self.task is None) != (self.path is None):
            raise ValueError("task and path go together: path is where the task's data lie")
        if self.task is not None and (self.eval_prompts is not None or self.columns != Columns()):
            raise ValueError("eval_prompts and columns go with prompts; a task knows its own splits and columns")
        return self


class FileColumns(Section):
    """Which columns of an answer file hold what; rows match a prompt by `id` or by `prompt` and its `images`."""

    answer: str = "answer"
    prompt: str = "prompt"
    id: str = "id"
    images: str = "images"


class OpenAIEndpoint(Section):
    """A model behind an OpenAI-compatible chat-completions endpoint, with hard caps on what it may cost."""

    kind: Literal["openai"]
    base_url: str
    model: str
    api_key_env: str | None = None  # name of the environment variable that holds the key
    api_key_file: str | None = None
    system: str | None = None  # for prompts without a system turn of their own
    temperature: NonNegative | None = 0.0  # null: not sent, for models that take none
    max_tokens_per_answer: Count = 1024
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(default_factory=dict)  # further request fields, such as reasoning_effort
    # A larger image is made smaller before it leaves; every image leaves without its metadata.
    max_image_side: Annotated[int, Field(ge=32, le=8000)] = 1536  # pixels of the longer side
    max_image_bytes: Annotated[int, Field(ge=10_000, le=50_000_000)] = 3_500_000  # 4.7 MB as a data URL
    # Counted over the whole life of the run's ledger, retries included; reserved before a call is sent.
    max_calls: Count | None = None
    max_tokens: Count | None = None
    max_cost: Positive | None = None
    input_price: NonNegative = 0.0  # per million tokens, in the currency of max_cost
    output_price: NonNegative = 0.0
    concurrency: Count = 8
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    timeout: Positive = 120.0  # seconds for one call, from connecting to its last byte
    retries: Annotated[int, Field(ge=0)] = 5  # of calls that cannot have been billed; others are never repeated

    @model_validator(mode="after")
    def _cap_needs_prices(self) -> OpenAIEndpoint:
        if self.max_cost is not None and self.input_price == self.output_price == 0:
            raise ValueError("max_cost needs input_price and output_price, or nothing ever counts towards it")
        if self.api_key_env and self.api_key_file:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    @field_validator("base_url")
    @classmethod
    def _plain_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or not url.isprintable()
            or " " in url
            or parts.port == 0
        ):
            raise ValueError("an endpoint's address begins with http:// or https:// and names a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not shown back: it may hold a secret, and so does the run directory's config.yaml.
            raise PydanticCustomError(
                "secret_in_url", "the address may hold no user, password or query; name a key by api_key_env"
            )
        return url.rstrip("/")

    @field_validator("extra_body")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "stream", "n", "best_of"}
        if taken := sorted(ours & extra.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set here")
        return extra


class AnswerFile(Section):
    """Answers collected elsewhere: JSONL or parquet."""

    kind: Literal["file"]
    path: str
    columns: FileColumns = FileColumns()


class LocalModel(Section):
    """A transformers model on this machine."""

    kind: Literal["local"]
    model: str
    temperature: NonNegative = 0.0
    max_tokens_per_answer: Count = 1024
    max_image_pixels: Count | None = None  # a larger picture is made smaller; null: as the model's processor does
    batch_size: Count = 8


TRANSPORT = frozenset(
    {
        "base_url",
        "api_key_env",
        "api_key_file",
        "max_calls",
        "max_tokens",
        "max_cost",
        "input_price",
        "output_price",
        "concurrency",
        "timeout",
        "retries",
        "requests_per_minute",
        "tokens_per_minute",
    }
)
"""How an endpoint is reached and what it may cost: no answer depends on it, so it can change at any time."""

Teacher = Annotated[OpenAIEndpoint | AnswerFile | LocalModel, Field(discriminator="kind")]
# A file holds the verdicts A, B or T on the pairs that purld writes out for it.
Judge = Annotated[OpenAIEndpoint | AnswerFile | LocalModel, Field(discriminator="kind")]


class AnchorPolicy(Section):
    """What becomes of a prompt whose answer is not a whole one.

    `failed` is every prompt without an answer: failed, lost after sending, missing from an answer file, or
    beyond a cap.
    """

    refused: Literal["drop", "keep", "fail"] = "drop"
    truncated: Literal["drop", "keep", "fail"] = "drop"
    failed: Literal["drop", "fail"] = "drop"


class TeacherAnchors(Section):
    """The opponent is the teacher: its answers to the held-out prompts, bought like any anchor."""

    kind: Literal["teacher"]


Opponent = Annotated[TeacherAnchors | AnswerFile, Field(discriminator="kind")]


class Sft(Section):
    """Stage I. The checkpoint with the lowest validation loss is kept when `validation_fraction` is not 0."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Positive = 1.0e-5
    batch_size: Count = 16
    micro_batch_size: Count = 4
    warmup_ratio: Fraction = 0.05
    validation_fraction: Fraction = 0.1
    checkpoint_steps: Count = 50


class Evaluate(Section):
    """How answers to the held-out prompts are drawn and judged."""

    samples: Count = 1  # answers per prompt
    temperature: NonNegative = 1.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 512
    batch_size: Count = 32
    judge: Judge | None = None
    judge_retries: Annotated[int, Field(ge=0)] = 1  # of a judge whose reply is none of A, B and T
    both_orders: bool = True
    opponent: Opponent | None = None


Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class Config(Section):
    """A whole run."""

    student: Student
    data: Data
    teacher: Teacher
    anchors: AnchorPolicy = AnchorPolicy()
    sft: Sft = Sft()
    align: Align = LdlGrpo()
    evaluate: Evaluate = Evaluate()
    # Trackers besides metrics.jsonl; some of them talk to a network.
    report_to: list[Tracker] = Field(default_factory=list)
    seed: int = 0
    _set_aside: tuple[str, ...] = PrivateAttr(())

    @property
    def set_aside(self) -> str | None:
        """A sentence if the file holds settings that only other methods have; they are not in force."""
        if not self._set_aside:
            return None
        *others, last = (f"align.{name}" for name in self._set_aside)
        keys, verb = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
        return f"{keys} {verb} set aside: only other methods than {self.align.method} have such a setting."

    @model_validator(mode="wrap")
    @classmethod
    def _settings_of_the_method(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        others: tuple[str, ...] = ()
        if isinstance(values, dict) and isinstance(values.get("align"), dict):
            align = {"method": "ldl_grpo"} | values["align"]
            others = _of_other_methods(align)
            values = values | {"align": {name: value for name, value in align.items() if name not in others}}
        config = validate(values)
        config._set_aside = others
        return config

    @model_validator(mode="after")
    def _a_file_cannot_judge(self) -> Config:
        if isinstance(self.align, TeacherJudgeGrpo) and isinstance(self.teacher, AnswerFile):
            raise ValueError(
                "align.method teacher_judge_grpo asks the teacher about every candidate, and teacher.kind file holds "
                "answers only; use openai or local"
            )
        return self

    @model_validator(mode="after")
    def _judge_needs_opponent(self) -> Config:
        if (self.evaluate.judge is None) != (self.evaluate.opponent is None):
            raise ValueError("evaluate.judge and evaluate.opponent go together: a judge compares two answers")
        return self


def _of_other_methods(align: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that only other methods have; they are set aside, so that changing the method is enough."""
    sections = _models_of(Align)
    own = next((section.model_fields for section in sections if align["method"] in _tags_of(section)), None)
    if own is None:
        return ()
    known = {name for section in sections for name in section.model_fields}
    return tuple(name for name in align if name in known and name not in own)


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_of(a)]


def _tags_of(model: type[BaseModel]) -> list[str]:
    for name in ("kind", "method"):
        if name in model.model_fields:
            return [str(v) for v in get_args(model.model_fields[name].annotation)]
    return []
