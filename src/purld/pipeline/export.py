"""Export the final model of a run for serving, with adapters merged."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import ProcessorMixin

from purld.config.schema import Config
from purld.errors import PlainWarning, UserError
from purld.model.causal_lm import has_adapters
from purld.model.encode import Encoder
from purld.model.load import context_length, load_encoder, load_model, save_model
from purld.model.modelfile import ServedSampling, write_modelfile
from purld.pipeline.base_licence import read_licence
from purld.pipeline.gguf_converter import convert_to_gguf
from purld.pipeline.model_card import CardFacts, write_card
from purld.runs.files import atomic_folder, check_new_folder, read_json
from purld.runs.open import final_model, open_run
from purld.runs.run_dir import TRAINED, RunDir

GGUF_FILE, PROJECTOR_FILE = "model.gguf", "mmproj.gguf"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLEST_CONTEXT = 4096


@dataclass(frozen=True)
class ExportOptions:
    """What an export holds besides the merged weights.

    Attributes:
        stage: `align` for the model of Stage II, `sft` for that of Stage I; None for the run's final model.
        adapter: write the adapter alone, for servers that load it beside the base model.
        dtype: the type of the weights, `float32`, `bfloat16` or `float16`; None for that of the run.
        converter: the command of llama.cpp's converter, to add a GGUF file; None for none.
        gguf_type: the type of the GGUF file's weights, see `gguf_converter.GGUF_TYPES`.
    """

    stage: str | None = None
    adapter: bool = False
    dtype: str | None = None
    converter: Sequence[str] | None = None
    gguf_type: str = "auto"


def export_model(run_path: Path, out: Path | None, options: ExportOptions | None = None) -> Path:
    """Write a run's model as one directory that any server loads, with adapters merged; return the directory.

    Beside the weights it holds a model card (README.md), an Ollama Modelfile, the licence texts of the base model, and
    a GGUF file if one is asked for. The directory is there once it is complete.

    Args:
        run_path: a run directory.
        out: where to write, a new or empty folder; None for `export` in the run directory, which is replaced.
        options: what the export holds; by default the final model's weights.

    Raises:
        UserError: `run_path` is not a run directory, the stage is unknown or not finished, its files are damaged, `out`
            holds something else, the run trained no adapter, or the GGUF file cannot be made.
    """
    options = options or ExportOptions()
    run, config = open_run(run_path)
    stage = options.stage or final_model(config.align.method).stage
    _check_options(run_path, run, config, stage, options)
    if out is not None:
        check_new_folder(out)
    source = run.sft if stage == "sft" else run.align
    run.check_files(source, run.results)
    encoder = load_encoder(config.student)
    target = out or run.path / "export"
    with atomic_folder(target) as partial:
        if options.adapter:
            for file in source.iterdir():
                if file.is_file():
                    shutil.copyfile(file, partial / file.name)
        else:
            _write_model(config, source, encoder, partial, options)
        _write_companions(run, config, stage, encoder, partial, options)
    return target


def _check_options(run_path: Path, run: RunDir, config: Config, stage: str, options: ExportOptions) -> None:
    if stage not in TRAINED:
        raise UserError(f"--stage {stage}: give align or sft.")
    if stage not in (finished := run.finished_stages()):
        remedy = "finish the run, or give --stage sft for Stage I's" if "sft" in finished else "finish the run first"
        raise UserError(f"{run_path}: stage {stage} is not finished, so there is no model of it to export; {remedy}.")
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise UserError(f"--dtype {options.dtype}: give {', '.join(_DTYPES)}.")
    if options.adapter and config.student.lora is None:
        raise UserError(f"{run_path}: trained all weights, so there is no adapter; export it without --adapter.")
    if options.adapter and (options.converter is not None or options.dtype is not None):
        raise UserError("--adapter writes the adapter as it was trained; leave out --gguf and --dtype.")


def _write_model(config: Config, source: Path, encoder: Encoder, folder: Path, options: ExportOptions) -> None:
    # An adapter is merged into the base as it was before it was quantized.
    model = load_model(config.student.model_copy(update={"quantize": None}), source)
    if has_adapters(model):
        raise UserError(
            f"student.model: the weights of {config.student.model} are quantized, and an adapter is not merged into "
            "such weights; export the adapter with --adapter."
        )
    if options.dtype is not None:
        cast(nn.Module, model).to(_DTYPES[options.dtype])
    save_model(config.student, model, encoder, folder)
    if options.converter is not None:
        end = str(encoder.tokenizer.convert_ids_to_tokens(encoder.end))
        name = Path(config.student.model).name
        outputs = [(GGUF_FILE, False), *([(PROJECTOR_FILE, True)] if _reads_images(encoder) else [])]
        for file, projector in outputs:
            convert_to_gguf(options.converter, folder, folder / file, options.gguf_type, name, end, projector)


def _write_companions(
    run: RunDir, config: Config, stage: str, encoder: Encoder, folder: Path, options: ExportOptions
) -> None:
    """Write what goes with the weights: the card, the base's licence texts, and a Modelfile for merged weights."""
    licence = read_licence(config.student.model)
    licence.copy_files(folder)
    results = read_json(run.results) if "evaluate" in run.finished_stages() else {}
    gguf = options.converter is not None
    facts = CardFacts(
        config, stage, run.finished_stages(), results, licence, options.adapter, _reads_images(encoder), gguf
    )
    (folder / "README.md").write_text(write_card(facts), encoding="utf-8")
    if options.adapter:
        return
    sources = [f"./{file}" for file in (GGUF_FILE, PROJECTOR_FILE) if (folder / file).exists()] or ["."]
    text, problem = write_modelfile(encoder, sources, _served_sampling(config))
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    if problem is not None:
        warnings.warn(f"Modelfile: {problem}", PlainWarning, stacklevel=2)


def _served_sampling(config: Config) -> ServedSampling:
    """Return the evaluation's sampling, and a context that holds a prompt and an answer of the run."""
    evaluate, student = config.evaluate, config.student
    needed = max(_SMALLEST_CONTEXT, student.max_prompt_tokens + evaluate.max_new_tokens)
    return ServedSampling(evaluate.temperature, evaluate.top_p, min(needed, context_length(student.model) or needed))


def _reads_images(encoder: Encoder) -> bool:
    return isinstance(encoder.processor, ProcessorMixin)
