"""Write the README.md of an exported model: data, method, figures with intervals, licence of the base, how to load it.

A card travels with the model, so it names files and models and holds neither paths nor addresses of this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from purld import __version__
from purld.config.clients import AnswerFile, LocalModel, OpenAIEndpoint
from purld.config.schema import Config
from purld.display.results import describe_self_comparison, format_signed_difference
from purld.display.titles import METRIC_TITLES, model_title
from purld.methods.table import METHODS
from purld.pipeline.base_licence import BaseLicence
from purld.runs.open import final_model

_LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of.

    Attributes:
        config: the run's configuration.
        stage: the stage whose model is exported, `align` or `sft`.
        finished: the facts of the finished stages by name, from the manifest.
        results: results.json; empty if the run was not evaluated.
        licence: what the base's folder states.
        adapter: whether only the adapter is exported.
        images: whether the model reads images.
        gguf: whether there is a GGUF file.
    """

    config: Config
    stage: str
    finished: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Any]
    licence: BaseLicence
    adapter: bool = False
    images: bool = False
    gguf: bool = False

    @property
    def base(self) -> str:
        """The name of the base model: its hub id, or the name of its folder."""
        return Path(self.config.student.model).name if self._base_is_local else self.config.student.model

    @property
    def _base_is_local(self) -> bool:
        return Path(self.config.student.model).expanduser().is_dir()

    @property
    def hub_base(self) -> str | None:
        """The hub id of the base model, if it was loaded by one."""
        return None if self._base_is_local else self.config.student.model

    @property
    def model(self) -> str:
        """The name of the exported model in results.json."""
        return final_model(self.config.align.method).name if self.stage == "align" else "sft"


def write_card(facts: CardFacts) -> str:
    """Return the card as Markdown with the hub's front matter."""
    sections = {
        f"{facts.base}, {'aligned' if facts.stage == 'align' else 'fine-tuned'} with purld": _summary(facts),
        "Results": _results(facts),
        "Data": _data(facts),
        "Training": _training(facts),
        "Load it": _loading(facts),
        "Licence": _licence(facts),
    }
    body = "\n".join(
        f"{'##' if number else '#'} {title}\n\n{text}\n" for number, (title, text) in enumerate(sections.items())
    )
    return f"---\n{_front_matter(facts)}---\n\n{body}"


def _front_matter(facts: CardFacts) -> str:
    values: dict[str, Any] = {
        "license": facts.licence.name,
        "base_model": facts.hub_base,
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if facts.images else "text-generation",
        "tags": ["purld", facts.model],
    }
    return yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False, allow_unicode=True)


def _summary(facts: CardFacts) -> str:
    teacher = _name_of(facts.config.teacher)
    text = f"{facts.base} was fine-tuned on one answer per prompt of {teacher} in Stage I"
    if facts.stage == "align":
        method = METHODS.get(facts.config.align.method)
        learned = f" (objective: {method.objective})" if method is not None else ""
        text += f" and then aligned by {model_title(facts.model)}{learned} in Stage II"
    kind = "This folder holds the adapter alone; it needs the base model." if facts.adapter else ""
    return f"{text}. {kind}".strip()


def _results(facts: CardFacts) -> str:
    models: Mapping[str, Mapping[str, Any]] = facts.results.get("models", {})
    shown = {name: m for name, m in models.items() if facts.stage == "align" or name in ("base", "sft")}
    if facts.model not in shown:
        return "The model was not evaluated."
    keys = [key for key in METRIC_TITLES if any(key in metrics for metrics in shown.values())]
    lines = [f"On {shown[facts.model]['n']:,} held-out prompts, with 95% intervals, seed {facts.config.seed}."]
    if keys:
        table = [_row(model_title(name), (_cell(metrics, key) for key in keys)) for name, metrics in shown.items()]
        differences = facts.results.get("difference", {})
        for pair, values in differences.items():
            names = pair.split(" - ")
            if set(names) <= shown.keys():
                title = " minus ".join(map(model_title, names))
                table.append(_row(title, (_signed(values, key) for key in keys)))
        heading = [_row("", (METRIC_TITLES[key] for key in keys)), _row("---", ["---"] * len(keys))]
        lines += ["", *heading, *table, "", *_how_measured(facts, keys)]
    elif facts.stage == "align":
        lines += ["", *(line.strip() for line in describe_self_comparison(facts.results))]
    else:
        lines += ["", "Neither gold nor a judge compared the answers."]
    return "\n".join(lines)


def _how_measured(facts: CardFacts, keys: Iterable[str]) -> list[str]:
    evaluate, data = facts.config.evaluate, facts.config.data
    drawn = f"{evaluate.samples} sampled" if evaluate.temperature else "greedy"
    lines = [
        f"Answers: {drawn} per prompt, temperature {evaluate.temperature:g}, top-p {evaluate.top_p:g}, at most "
        f"{evaluate.max_new_tokens:,} tokens."
    ]
    if "accuracy" in keys:
        lines.append(f"Accuracy: against gold (`data.check: {data.check}`), which training never reads.")
    if evaluate.judge is not None and evaluate.opponent is not None:
        opponent = "the teacher's own answers" if evaluate.opponent.kind == "teacher" else "given answers"
        orders = "in both orders" if evaluate.both_orders else "in one order"
        lines.append(
            f"Win rate: {_name_of(evaluate.judge)} compares with {opponent}, {orders}; LC is length-controlled."
        )
    return [" ".join(lines)]


def _data(facts: CardFacts) -> str:
    data = facts.config.data
    anchors, sft = facts.finished.get("anchors", {}).get("teacher", {}), facts.finished.get("sft", {})
    source = f"the task {data.task}" if data.task is not None else f"`{Path(data.source).name}`"
    lines = [f"- Prompts: {source}"]
    if anchors:
        lines.append(
            f"- Answers (anchors): {anchors['answered']:,} usable of {anchors['prompts']:,} prompts, one each, of "
            f"{_name_of(facts.config.teacher)}"
        )
    if "trained_on" in sft:
        lines.append(f"- Stage I: trained on {sft['trained_on']:,}, validated on {sft.get('validated_on', 0):,}")
    if facts.stage == "align" and "prompts" in facts.finished.get("align", {}):
        lines.append(f"- Stage II: {facts.finished['align']['prompts']:,} prompts, without gold")
    return "\n".join(lines)


def _training(facts: CardFacts) -> str:
    config, sft, align = facts.config, facts.config.sft, facts.config.align
    trained = "all weights" if config.student.lora is None else f"LoRA, rank {config.student.lora.r} per stage"
    rows = {
        "Trained": trained,
        "Stage I": f"epochs {sft.epochs:g}, batch {sft.batch_size}, learning rate {sft.learning_rate:g}",
    }
    if facts.stage == "align":
        # Methods differ in their settings, and a card tells what this one had.
        steps, rate = getattr(align, "steps", None), getattr(align, "learning_rate", None)
        falls = ", falling to 0" if getattr(align, "rate_falls", False) else ""
        parts = [align.method, *([f"{steps} steps"] if steps is not None else [])]
        parts += [f"{name.replace('_', ' ')} {getattr(align, name)}" for name in _SHOWN if hasattr(align, name)]
        parts += [f"learning rate {rate:g}{falls}"] if rate is not None else []
        rows["Stage II"] = ", ".join(parts)
        if verdict := facts.results.get("probe", {}).get("verdict"):
            rows["Self-evaluation"] = verdict
    rows |= {"Seed": str(config.seed), "Exported with": _versions()}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_escaped(value)} |" for key, value in rows.items())])


_SHOWN = ("prompts_per_step", "candidates", "temperature", "q", "gamma", "tau", "beta", "score")


def _versions() -> str:
    return ", ".join([f"purld {__version__}", *(f"{name} {version(name)}" for name in _LIBRARIES)])


def _loading(facts: CardFacts) -> str:
    if facts.adapter:
        base = facts.hub_base or f"PATH/TO/{facts.base}"
        loaded = f'AutoModelForCausalLM.from_pretrained("{base}"), folder)'
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # this one',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = PeftModel.from_pretrained({loaded}",
        ]
        rank = 2 * facts.config.student.lora.r if facts.config.student.lora and facts.stage == "align" else None
        rank = rank or (facts.config.student.lora.r if facts.config.student.lora else 16)
        served = [f"vllm serve {base} --enable-lora --lora-modules aligned=. --max-lora-rank {max(8, rank)}"]
    else:
        auto = "AutoModelForImageTextToText" if facts.images else "AutoModelForCausalLM"
        reader = "AutoProcessor" if facts.images else "AutoTokenizer"
        code = [
            f"from transformers import {auto}, {reader}",
            "",
            'folder = "."  # this one',
            f"{'processor' if facts.images else 'tokenizer'} = {reader}.from_pretrained(folder)",
            f"model = {auto}.from_pretrained(folder)",
        ]
        served = ["vllm serve .", "transformers serve .", "ollama create aligned && ollama run aligned"]
        served += ["llama-server --model model.gguf"] if facts.gguf else []
    sampling = facts.config.evaluate
    note = (
        "The chat template and the tokens that end an answer are those of training. The figures above were measured at "
        f"temperature {sampling.temperature:g} and top-p {sampling.top_p:g}; set both in a request to repeat them."
    )
    return "\n".join(["```python", *code, "```", "", "```bash", *served, "```", "", note])


def _licence(facts: CardFacts) -> str:
    return (
        f"Licence of the base model, as its folder states it: {facts.licence}. Check that the terms of the teacher "
        f"({_name_of(facts.config.teacher)}) allow to train on its answers."
    )


def _name_of(source: OpenAIEndpoint | AnswerFile | LocalModel) -> str:
    """Return the name of a model, or of the file that answers come from, without its path."""
    if isinstance(source, AnswerFile):
        return f"the file `{Path(source.path).name}`"
    return Path(source.model).name if isinstance(source, LocalModel) else source.model


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    if key not in metrics:
        return "-"
    low, high = metrics[f"{key}_ci"]
    return f"{metrics[key]:.3f} [{low:.3f}, {high:.3f}]"


def _signed(difference: Mapping[str, Any], key: str) -> str:
    return format_signed_difference(difference, key) if key in difference else "-"


def _row(title: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([title, *cells])} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
