"""The configuration of a run: what a user may say, checked when it is loaded.

Unknown keys are errors with the nearest known name; an illegal combination fails here, not an hour into a
run. This module imports neither torch nor anything that does, so that `purld check` and `--help` are quick.
Secrets are never part of it: a key is named by the environment variable or the file that holds it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from purld.errors import UserError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    extra_body: dict[str, Any] = {}  # further request fields, such as reasoning_effort
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


class StageTwo(Section):
    """What every method of Stage II has: so many updates on so many prompts each, and the optimiser's settings."""

    prompts_per_step: Count = 8
    steps: Count = 200  # updates of the policy, whatever the method
    learning_rate: Positive = 1.0e-6
    warmup_ratio: Fraction = 0.05
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    max_grad_norm: Positive = 1.0
    micro_batch_size: Count = 8  # members of a group per backward pass; the gradient does not depend on it
    checkpoint_steps: Count = 50

    @property
    def drawn(self) -> int:
        """Candidates drawn per prompt."""
        return 0

    @property
    def updates(self) -> int:
        """Updates made on the same candidates."""
        return 1

    @property
    def candidates_in_all(self) -> int:
        """Candidates that the whole stage draws."""
        return -(-self.steps // self.updates) * self.prompts_per_step * self.drawn


class Sampling(StageTwo):
    """A method that draws one candidate per prompt."""

    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 512

    @property
    def drawn(self) -> int:
        """Candidates drawn per prompt."""
        return 1


class GroupSampling(Sampling):
    """A method that compares the candidates of a group."""

    candidates: Annotated[int, Field(ge=2)] = 8  # K

    @property
    def drawn(self) -> int:
        """Candidates drawn per prompt."""
        return self.candidates


class SelfScoring(Section):
    """A method whose candidates are scored by the frozen p_sft."""

    score: Literal["expected", "verbal"] = "expected"
    score_batch_size: Count = 16


class Clipping(StageTwo):
    """A policy-gradient method: it may make several updates on the same candidates, its steps kept small by a clip."""

    updates_per_rollout: Count = 1
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2

    @property
    def updates(self) -> int:
        """Updates made on the same candidates."""
        return self.updates_per_rollout

    @model_validator(mode="after")
    def _checkpoints_between_rollouts(self) -> Self:
        every, updates = min(self.checkpoint_steps, self.steps), self.updates_per_rollout
        if every < self.steps and every % updates:
            raise ValueError(
                f"checkpoint_steps ({every}) must be a multiple of updates_per_rollout ({updates}): "
                "candidates are not part of a checkpoint"
            )
        return self


class LdlGrpo(GroupSampling, SelfScoring):
    """Stage II by LDL-GRPO (section 3.3)."""

    method: Literal["ldl_grpo"] = "ldl_grpo"
    # Eq. 3 is `likelihood`; `mean` divides by length; `ratio` divides by p_sft. docs/decisions.md compares.
    q: Literal["ratio", "likelihood", "mean"] = "ratio"
    gamma: Positive = 5.0
    tau: Positive = 1.2
    beta: NonNegative = 0.01  # of KL(p || p_sft), in every method that has one


class AnchorRankDpo(GroupSampling, SelfScoring):
    """Stage II by DPO on the pairs that the candidates' ranking implies."""

    method: Literal["anchorrank_dpo"]
    beta: Positive = 0.1
    pairs: Literal["all", "extremes"] = "all"  # extremes: the best candidate against the worst
    margin: NonNegative = 0.0  # the scores of a pair differ by more than this


class AnchorGrpo(GroupSampling, SelfScoring, Clipping):
    """Stage II by GRPO with the anchor-conditioned score as the reward."""

    method: Literal["anchor_grpo"]
    beta: NonNegative = 0.0


class TeacherJudgeGrpo(GroupSampling, Clipping):
    """Stage II by GRPO with the teacher's score of every candidate as the reward."""

    method: Literal["teacher_judge_grpo"]
    beta: NonNegative = 0.0
    max_tokens_per_score: Count = 16


class SelfPpo(Sampling, SelfScoring, Clipping):
    """Stage II by PPO on the student's score of one candidate, without an anchor."""

    method: Literal["self_ppo"]
    beta: NonNegative = 0.05  # a cost per token of the reward
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    trace: Annotated[float, Field(ge=0, le=1)] = 0.95  # GAE's lambda
    value_clip: Positive = 0.2
    value_learning_rate: Positive = 1.0e-3


class SinglePairDpo(Sampling):
    """Stage II by DPO, the anchor over one candidate."""

    method: Literal["singlepair_dpo"]
    beta: Positive = 0.1


class SftSft(StageTwo):
    """Stage II as more fine-tuning, on the anchors of its prompts."""

    method: Literal["sft_sft"]


class SftOnly(Section):
    """Stop after Stage I."""

    method: Literal["sft"]


Align = Annotated[
    LdlGrpo | AnchorRankDpo | AnchorGrpo | SelfPpo | SinglePairDpo | SftSft | TeacherJudgeGrpo | SftOnly,
    Field(discriminator="method"),
]


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
    report_to: list[Tracker] = []  # trackers beside metrics.jsonl; some of them talk to a network
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, and validate.

    Paths in the file are relative to the folder that purld is started in, like every path on a command line.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is wrong; names which.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error}).") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: is not valid YAML: {problem}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys such as student, data and teacher.")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate plain values.

    Raises:
        UserError: names `source`, the key and what is wrong with it.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: write key.path=value, for example align.tau=0.9.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section.")
        values = child
    try:
        values[last] = _number(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML.") from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; on a command line it is a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    """The first problem of a failed validation as one sentence."""
    # A misspelt key is also a missing one; the spelling is what to mend.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    # Pydantic puts the tag of a union into the path ("teacher.openai.model"): users never wrote it.
    where, model = _locate(problem["loc"])
    key = ".".join(where)
    more = f" ({error.error_count() - 1} more problem(s) after this one)" if error.error_count() > 1 else ""
    match problem["type"]:
        case "extra_forbidden":
            known = list(model.model_fields) if model else []
            near = difflib.get_close_matches(where[-1], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(sorted(known))}."
            return f"unknown key {key}; {hint}{more}"
        case "missing":
            return f"key {key} is missing.{more}"
        case "union_tag_not_found":
            tag = problem["ctx"]["discriminator"].strip("'")
            return f"key {key}.{tag} is missing.{more}"
        case "union_tag_invalid":
            tag = problem["ctx"]["discriminator"].strip("'")
            found, allowed = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
            return f"{key}.{tag} is {found!r}; it can be {allowed}.{more}"
        case _:
            message = problem["msg"].removeprefix("Value error, ")
            prefix = f"{key}: " if key else ""
            value = problem["input"]
            secret = problem["type"] == "secret_in_url"
            shown = f" (found {value!r})" if isinstance(value, str | int | float) and not secret else ""
            return f"{prefix}{message}{shown}.{more}"


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """The path a user wrote, and the section that should have held its last key."""
    written: list[str] = []
    model: type[BaseModel] | None = Config
    holder: type[BaseModel] | None = Config
    choices: dict[str, type[BaseModel]] = {}
    for part in map(str, location):
        if part in choices:
            model, choices = choices[part], {}
            continue
        holder = model
        written.append(part)
        field = model.model_fields.get(part) if model else None
        models = _models_of(field.annotation) if field else []
        model = models[0] if len(models) == 1 else None
        choices = {tag: m for m in models for tag in _tags_of(m)} if len(models) > 1 else {}
    return written, holder


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_of(a)]


def _tags_of(model: type[BaseModel]) -> list[str]:
    for name in ("kind", "method"):
        if name in model.model_fields:
            return [str(v) for v in get_args(model.model_fields[name].annotation)]
    return []
