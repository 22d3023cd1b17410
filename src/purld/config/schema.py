"""The configuration of a run, checked when it is loaded.

An unknown key is an error that suggests the nearest known name, and an illegal combination fails here, not an hour
into a run. This package imports neither torch nor anything that does, so that `purld --help` is quick. Secrets are
never part of a configuration: a key is named by the environment variable or the file that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from purld.config.base import (
    Count,
    FormatName,
    Fraction,
    LearningRate,
    Positive,
    Retries,
    Section,
    Seed,
    Temperature,
    section_tags,
    union_sections,
)
from purld.config.clients import AnchorPolicy, AnswerFile, Judge, Opponent, Teacher
from purld.config.engines import Engine, GenerateEngine, VllmEngine
from purld.config.methods import Align, LdlGrpo, TeacherJudgeGrpo

# How one of a model's own chat templates is named: a word, which no template and hardly a file is.
TEMPLATE_NAME = re.compile(r"[\w-]+")


class Lora(Section):
    """A low-rank adapter, trained in place of all weights."""

    r: Count = 16
    alpha: Positive | None = None  # None: 2 r
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"


class Student(Section):
    """The model to align. `model` is a directory, or a hub id in the local cache; without `lora` all weights train."""

    model: str
    lora: Lora | None = None
    # nf4: the frozen base in four bits, by bitsandbytes; an adapter is trained on it, and never merged into it.
    quantize: Literal["nf4"] | None = None
    # fsdp: several processes divide the weights, their gradients and the optimiser's state, each holding a share.
    shard: Literal["fsdp"] | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # auto: as saved with LoRA on a GPU, else float32
    # A file, the template itself, or the name of one of several that the model has; null: the model's own.
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # values of the template's variables
    # strip: the student answers without thinking; keep: it thinks as its template says, and is trained to; fail: a
    # template that begins the thinking is refused. Only answers are scored, judged and checked, never thoughts.
    thinking: Literal["strip", "keep", "fail"] = "strip"
    system_turn: Literal["keep", "fold"] = "keep"  # fold: put a system turn into the first user turn
    max_prompt_tokens: Count = 1024  # a longer prompt is left out, and counted
    max_anchor_tokens: Count = 1024  # a longer anchor is cut, and counted
    max_image_pixels: Count | None = None  # a larger image is scaled down; null: as the model's processor does
    engine: Engine = GenerateEngine()  # what draws completions from the student
    # Whether the vision modules are trained too; null: if all weights are, and not with an adapter.
    train_vision: bool | None = None

    @model_validator(mode="after")
    def _engine_takes_adapters(self) -> Student:
        if isinstance(self.engine, VllmEngine) and self.lora is None:
            raise ValueError(
                "engine kind vllm needs student.lora: a running vLLM server takes new adapters from files, but all "
                "weights only over NCCL from a process that has vllm installed, and vllm does not install beside "
                "purld's transformers"
            )
        return self

    @model_validator(mode="after")
    def _four_bits_are_not_trained(self) -> Student:
        if self.quantize is not None and self.lora is None:
            raise ValueError("quantize: weights in four bits cannot be trained themselves; set lora as well")
        if self.quantize is not None and self.shard is not None:
            raise ValueError("shard: weights in four bits cannot be divided among processes; leave quantize out")
        return self

    @property
    def trains_vision(self) -> bool:
        """Return whether the vision modules are trained."""
        return self.lora is None if self.train_vision is None else self.train_vision


class Columns(Section):
    """The names of the columns in the prompt file."""

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
    """The prompts: a file of them, or a published task and the path of its data.

    Without `eval_prompts` or a published held-out split, `eval_fraction` of the pool is held out by content hash.
    """

    prompts: str | None = None
    task: TaskName | None = None  # `purld tasks` lists them
    path: str | None = None  # the task's data: a file or folder in the published format, or of the hub
    # How a row holds its prompt: auto finds it; `columns` means in a column of its own. Or the kind of the file, where
    # its name and content do not say it.
    format: FormatName = "auto"
    columns: Columns = Columns()
    image_folder: str | None = None  # where images may lie besides the folder of the prompt file
    eval_prompts: str | None = None
    eval_fraction: Fraction = 0.1
    # The share of the training prompts that Stage I uses, leaving the others to Stage II; null: both use all.
    sft_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_prompts: Count | None = None
    max_eval_prompts: Count | None = None
    # Near-copies of one question are on one side of the split; `ignore` looks for equal prompts only.
    near_duplicates: Literal["apart", "ignore"] = "apart"
    bad_rows: Literal["fail", "skip"] = "fail"  # stop at a row that cannot be used, or skip and count it
    # How an answer is compared with gold; auto: as the task says; none: no accuracy is reported.
    check: Literal["auto", "none", "exact", "testbed", "math", "choice"] = "auto"

    @property
    def source(self) -> str:
        """Return the file or folder that holds the training prompts."""
        return self.path or self.prompts or ""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.prompts is None) == (self.task is None):
            raise ValueError("give either prompts, or task and path")
        if (self.task is None) != (self.path is None):
            raise ValueError("task and path go together: path is where the task's data lie")
        if self.task is not None and (self.eval_prompts is not None or self.columns != Columns()):
            raise ValueError("eval_prompts and columns go with prompts; a task knows its own splits and columns")
        if self.task is not None and (self.format != "auto" or self.image_folder is not None):
            raise ValueError("format and image_folder go with prompts; a task knows its own format and images")
        return self


class Sft(Section):
    """Stage I. The checkpoint with the lowest validation loss is kept when `validation_fraction` is not 0."""

    epochs: Positive = 1.0
    learning_rate: LearningRate = 1.0e-5  # for all weights; with student.lora 1e-4
    batch_size: Count = 16
    # Answers per backward pass; changes memory and time, not the gradient. auto: 4 on a CPU; on a GPU as many as fit.
    micro_batch_size: Count | Literal["auto"] = "auto"
    warmup_ratio: Fraction = 0.05
    validation_fraction: Fraction = 0.1
    checkpoint_steps: Count = 50


class Evaluate(Section):
    """Settings for drawing and judging answers to the held-out prompts."""

    samples: Count = 1  # answers per prompt
    temperature: Temperature = 1.0  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 512
    batch_size: Count = 32
    judge: Judge | None = None
    judge_retries: Retries = 1  # repeats where a judge's reply is none of A, B and T
    both_orders: bool = True
    opponent: Opponent | None = None


Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


# An adapter's low rank needs larger steps than all weights to learn anything in as many.
LORA_LEARNING_RATES = {"sft": 1.0e-4, "align": 5.0e-5}


class Config(Section):
    """A whole run."""

    student: Student
    data: Data
    teacher: Teacher
    anchors: AnchorPolicy = AnchorPolicy()
    sft: Sft = Sft()
    align: Align = LdlGrpo()
    evaluate: Evaluate = Evaluate()
    # Experiment trackers, beside metrics.jsonl; some of them use a network.
    report_to: list[Tracker] = Field(default_factory=list)
    seed: Seed = 0
    _set_aside: tuple[str, ...] = PrivateAttr(())
    _default_rates: tuple[str, ...] = PrivateAttr(())

    @property
    def set_aside(self) -> str | None:
        """Return a sentence that names settings of other methods, which have no effect here; None if there are none."""
        if not self._set_aside:
            return None
        *others, last = (f"align.{name}" for name in self._set_aside)
        keys, verb = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
        return f"{keys} {verb} set aside: only other methods than {self.align.method} have such a setting."

    def describe_rate(self, section: Literal["sft", "align"]) -> str:
        """Return a stage's learning rate, whether it falls to 0, and where it comes from."""
        settings, origin = getattr(self, section), "as configured"
        if section in self._default_rates:
            origin = f"default for {'all weights' if self.student.lora is None else 'LoRA'}"
        falls = ", falling to 0" if getattr(settings, "rate_falls", False) else ""
        return f"learning rate {settings.learning_rate:g}{falls} ({origin})"

    @model_validator(mode="wrap")
    @classmethod
    def _settings_of_the_method(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        others: tuple[str, ...] = ()
        values = _with_shared_file(values)
        if isinstance(values, dict) and isinstance(values.get("align"), dict):
            align = {"method": "ldl_grpo"} | values["align"]
            others = _of_other_methods(align)
            values = values | {"align": {name: value for name, value in align.items() if name not in others}}
        config = validate(values)
        config._set_aside = others
        if isinstance(values, dict):
            config._choose_learning_rates()
        return config

    def _choose_learning_rates(self) -> None:
        """Replace the defaults for all weights by those for an adapter, if one is trained."""
        sections = [(name, getattr(self, name)) for name in LORA_LEARNING_RATES]
        chosen = [
            (name, section)
            for name, section in sections
            if "learning_rate" in type(section).model_fields and "learning_rate" not in section.model_fields_set
        ]
        self._default_rates = tuple(name for name, _ in chosen)
        if self.student.lora is not None:
            for name, section in chosen:  # past the freeze: nobody has seen this configuration yet
                self.__dict__[name] = section.model_copy(update={"learning_rate": LORA_LEARNING_RATES[name]})

    @model_validator(mode="after")
    def _a_file_cannot_judge(self) -> Config:
        if isinstance(self.align, TeacherJudgeGrpo) and isinstance(self.teacher, AnswerFile):
            raise ValueError(
                "align.method teacher_judge_grpo asks the teacher about every candidate, and teacher.kind file holds "
                "answers only; use openai or local"
            )
        return self

    @model_validator(mode="after")
    def _kept_thinking_needs_a_thinking_student(self) -> Config:
        if self.anchors.thinking == "keep" and self.student.thinking != "keep":
            raise ValueError(
                "anchors.thinking: keep trains the student to think, so student.thinking must be keep as well"
            )
        return self

    @model_validator(mode="after")
    def _judge_needs_opponent(self) -> Config:
        if (self.evaluate.judge is None) != (self.evaluate.opponent is None):
            raise ValueError("evaluate.judge and evaluate.opponent go together: a judge compares two answers")
        return self


def _with_shared_file(values: Any) -> Any:
    """Let `teacher: {kind: file}` without a path take its answers from the prompt file, as that file is read."""
    if not isinstance(values, dict) or not all(isinstance(values.get(name), dict) for name in ("data", "teacher")):
        return values
    data, teacher = values["data"], values["teacher"]
    if teacher.get("kind") != "file":
        return values
    shared = {"image_folder": data.get("image_folder")}
    if data.get("prompts") and teacher.get("path", data["prompts"]) == data["prompts"]:
        shared |= {"path": data["prompts"], "format": data.get("format", "auto")}
        if "path" not in teacher and isinstance(data.get("columns"), dict):
            own = teacher.get("columns", {})
            columns = {name: data["columns"][name] for name in ("prompt", "images") if name in data["columns"]}
            shared["columns"] = columns | own if isinstance(own, dict) else own
            teacher = {name: value for name, value in teacher.items() if name != "columns"}
    return values | {"teacher": shared | teacher}


def _of_other_methods(align: Mapping[str, Any]) -> tuple[str, ...]:
    """List the settings that only other methods have; they are ignored, so that a comparison changes one key."""
    sections = union_sections(Align)
    own = next((section.model_fields for section in sections if align["method"] in section_tags(section)), None)
    if own is None:
        return ()
    known = {name for section in sections for name in section.model_fields}
    return tuple(name for name in align if name in known and name not in own)
