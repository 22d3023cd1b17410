"""LoRA adapters of the student: their settings, merging one into its base, and combining the two stages' into one."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from purld.config.schema import Student
from purld.errors import reason_of
from purld.model.causal_lm import CausalLM, has_adapters, unwrap_adapters
from purld.model.vision import vision_modules
from purld.model.weights import WeightsError

TRAINED = "default"  # peft's name of the adapter that a stage trains
STAGE_ONE = "stage_one"  # Stage I's, where it stays beside the weights
_WEIGHTS = "adapter_model.safetensors"
# Where the adapter lies that was merged into a model when it was loaded.
_merged_adapters: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()


def make_lora_config(student: Student, model: CausalLM) -> LoraConfig:
    """Return the student's adapter settings as peft takes them for `model`; alpha is 2 r unless set.

    Raises:
        ValueError: the student has no adapter settings.
    """
    if student.lora is None:
        raise ValueError("this student has no adapter settings (student.lora)")
    excluded = [] if student.trains_vision else list(vision_modules(model))
    alpha = student.lora.alpha or 2 * student.lora.r
    return LoraConfig(
        r=student.lora.r,
        lora_alpha=cast(int, alpha),  # peft takes any number
        lora_dropout=student.lora.dropout,
        target_modules=student.lora.target_modules,
        exclude_modules=rf".*\b({'|'.join(excluded)})\..*" if excluded else None,
        task_type="CAUSAL_LM",
    )


def merge_adapter(base: Any, path: Path) -> Any:
    """Return `base` with the adapter that is saved at `path` merged into its weights.

    Raises:
        WeightsError: the adapter is damaged or lacks weights, or is another base's.
    """
    merged = _read_onto(base, path, TRAINED).merge_and_unload()
    _merged_adapters[merged] = path
    return merged


def attach_adapter(base: Any, path: Path) -> PeftModel:
    """Return quantized `base` under the frozen adapter that is saved at `path`; see `merge_adapter`."""
    adapted = _read_onto(base, path, STAGE_ONE)
    _merged_adapters[cast(nn.Module, unwrap_adapters(cast(CausalLM, adapted)))] = path
    return adapted.requires_grad_(False)


def add_second_adapter(adapted: PeftModel) -> PeftModel:
    """Add a new adapter to a model under Stage I's frozen one; both are active, and only the new one is trained.

    It has the settings and modules of the first. Its weights come from torch's global random state.
    """
    config = copy.deepcopy(adapted.peft_config[STAGE_ONE])
    config.inference_mode = False
    adapted.add_adapter(TRAINED, config)
    use_adapters(adapted, TRAINED, STAGE_ONE)
    return adapted


def use_adapters(model: PeftModel, *names: str) -> None:
    """Make the adapters of these names the active ones; `TRAINED` alone stays trainable, whichever are active.

    peft switches `requires_grad` on for every adapter that it activates, and off for the others.
    """
    cast(Any, model.base_model).set_adapter(list(names))
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.requires_grad_(f".{TRAINED}." in name or name.endswith(f".{TRAINED}"))


def keeps_stage_one(model: CausalLM) -> bool:
    """Return whether Stage I's adapter lies beside the model's weights, and Stage II's beside it."""
    return has_adapters(model) and {TRAINED, STAGE_ONE} <= cast(PeftModel, model).peft_config.keys()


def _read_onto(base: Any, path: Path, name: str) -> PeftModel:
    """Return `base` under the adapter that is saved at `path`, which gets a name; see `merge_adapter` for errors."""
    held = _read_adapter(path)
    try:
        adapted = PeftModel.from_pretrained(base, str(path), adapter_name=name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"its adapter does not fit {base.config.name_or_path}: {reason_of(error)}") from None
    # peft leaves adapter weights that the file lacks as they were initialised, with no more than a warning.
    if lacking := sorted(_adapter_weights(adapted, name).keys() - held.keys()):
        raise WeightsError(f"{_WEIGHTS} lacks {len(lacking)} of the adapter's weights, such as {lacking[0]}")
    return adapted


def write_current_adapter(model: CausalLM, folder: Path) -> Path | None:
    """Return a folder with the one adapter that makes `model` of the student's own weights, or None for those weights.

    Args:
        model: as `purld.model.load` returns it, or the policy of Stage II.
        folder: is made and written to, unless the adapter lies in a file already.

    Raises:
        WeightsError: Stage I's adapter is damaged.
    """
    merged = _merged_adapters.get(cast(nn.Module, unwrap_adapters(model)))
    if not has_adapters(model) or merged is None or TRAINED not in cast(PeftModel, model).peft_config:
        return merged
    folder.mkdir(parents=True, exist_ok=True)
    combine_adapters(cast(PeftModel, model), merged, folder)
    _let_others_read(folder)
    return folder


def write_blank_adapter(student: Student, skeleton: CausalLM, folder: Path, stages: int) -> None:
    """Write an adapter that changes nothing, in the shape of the one that `stages` stages of training add up to.

    Args:
        student: says which adapter is trained.
        skeleton: the student on the meta device; it is changed.
        folder: where to write to; it exists.
        stages: 1 for Stage I's adapter, 2 for that of both stages.
    """
    config = make_lora_config(student, skeleton)
    config.r, config.lora_alpha = stages * config.r, stages * config.lora_alpha
    adapted = cast(PeftModel, get_peft_model(cast(PreTrainedModel, skeleton), config))
    blank = {name: torch.zeros(weight.shape) for name, weight in _adapter_weights(adapted).items()}
    adapted.peft_config["default"].save_pretrained(str(folder))
    save_file(blank, folder / _WEIGHTS, metadata={"format": "pt"})
    _let_others_read(folder)


def _let_others_read(folder: Path) -> None:
    """Let the umask say who may read an adapter's weights, which safetensors lets only their owner read."""
    shutil.copymode(folder / "adapter_config.json", folder / _WEIGHTS)


def hash_adapter(folder: Path) -> str:
    """Return the SHA-256 of a saved adapter's weights, in hexadecimal."""
    with (folder / _WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combine_adapters(policy: PeftModel, stage_one: Path, path: Path) -> None:
    """Save one adapter that adds to the base what the saved adapter of Stage I and that of the policy add together.

    Both have the same settings and modules. Their factors are concatenated, so the rank is the sum of theirs and the
    product is exact: (B_1 B_2) (A_1; A_2) = B_1 A_1 + B_2 A_2. Rank and alpha double, which leaves the scale alone.

    Args:
        policy: the policy under Stage II's adapter.
        stage_one: the directory of Stage I's adapter.
        path: the directory to write adapter_config.json and adapter_model.safetensors to; it exists.

    Raises:
        WeightsError: Stage I's adapter is damaged, or is not one of the same modules.
    """
    first, second = _read_adapter(stage_one), _adapter_weights(policy)
    if first.keys() != second.keys():
        raise WeightsError(f"{stage_one} holds an adapter of other modules than Stage II's")
    experts = _experts(policy)
    combined = {
        name: _concatenate(name, first[name], second[name].cpu(), experts.get(name.rpartition(".lora_")[0], 1))
        for name in first
    }
    config = cast(LoraConfig, policy.peft_config["default"]).to_dict()
    doubled = {name: 2 * config[name] for name in ("r", "lora_alpha")}
    doubled |= {name: {key: 2 * n for key, n in config[name].items()} for name in ("rank_pattern", "alpha_pattern")}
    LoraConfig.from_peft_type(**(config | doubled | {"inference_mode": True})).save_pretrained(str(path))
    save_file(combined, path / _WEIGHTS, metadata={"format": "pt"})


def _read_adapter(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path / _WEIGHTS} is missing or damaged ({reason_of(error)})") from None
    return {name: weight for name, weight in weights.items() if ".lora_" in name}  # peft adds adapted embeddings


def _adapter_weights(model: PeftModel, name: str = TRAINED) -> dict[str, Tensor]:
    """Return the weights of the adapter of a name by the names that they are saved under."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return weights


def _experts(model: PeftModel) -> dict[str, int]:
    """Return the number of experts of the modules whose adapters hold those of several experts, by their names."""
    return {
        name: module.num_experts
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and hasattr(module, "num_experts")
    }


def _concatenate(name: str, first: Tensor, second: Tensor, experts: int) -> Tensor:
    """Concatenate the factors A or B of two adapters along the rank.

    A is (E r, in) with a block of r rows for each of E experts; B is (out, r E) with the experts' columns interleaved.
    """
    if "lora_A" not in name and "lora_embedding_A" not in name:
        return torch.cat([first, second], dim=1).contiguous()
    blocks = [factor.unflatten(0, (experts, -1)) for factor in (first, second)]  # (E, r, in)
    return torch.cat(blocks, dim=1).flatten(0, 1).contiguous()
