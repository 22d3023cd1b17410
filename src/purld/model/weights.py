"""Load a model's weights, and check that its files hold all of them.

transformers fills weights that a file lacks with random numbers and leaves out what the model has no place for. Here
both are errors, before loading (from the headers of the files, without reading the weights) and after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from purld import ranks
from purld.errors import reason_of
from purld.model.pretrained import load_part
from purld.model.processor import auto_model_class, model_class

# Tensors that some published files hold and no forward pass of a causal LM reads: masks and positions that old
# versions saved, and heads that predict further tokens or values.
_UNUSED = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|rotary_emb\.\w+|attn(\.attention)?\.bias|v_head\..*|mtp\w*(\..*)?)$"
)
_INDICES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)


class WeightsError(ValueError):
    """Weight files that are missing, damaged, incomplete, or of another model; the message is a clause."""


def load_weights(model: str, dtype: torch.dtype | str, **options: Any) -> Any:
    """Load all weights of a model directory or hub id; `options` are further arguments of `from_pretrained`.

    Raises:
        WeightsError: its files do not hold them.
        OSError, ValueError, KeyError, ImportError, RuntimeError: it cannot be loaded.
    """
    config = load_part(AutoConfig, model)
    read_headers(model, config)  # errors name the file
    loaded, info = load_part(
        auto_model_class(config),
        model,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    _check_names(info, config)
    return loaded


def load_skeleton(model: str, config: PreTrainedConfig) -> Any:
    """Build the model without memory for weights, on the meta device, and check the headers of its weight files.

    Raises:
        WeightsError: the files do not hold the model's weights.
        OSError, ValueError, KeyError, ImportError, RuntimeError: the model cannot be built.
    """
    headers = read_headers(model, config)
    if headers is None:
        return build_skeleton(config)
    loaded, info = model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=headers,
        device_map="meta",
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    _check_names(info, config)
    loaded.tie_weights()  # weights that are tied and stored twice look different without numbers
    return loaded


def build_skeleton(config: PreTrainedConfig) -> Any:
    """Build a model of a configuration without memory for weights, on the meta device."""
    with torch.device("meta"):
        return auto_model_class(config).from_config(config)


def read_headers(model: str, config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """Return the weights that a model's files hold by name, as tensors on the meta device.

    None if its configuration names the files in a way of its own, which transformers resolves.

    Raises:
        WeightsError: there are no files, or one is missing or damaged.
    """
    if getattr(config, "transformers_weights", None) is not None:
        return None
    headers: dict[str, Tensor] = {}
    for file in weight_files(model):
        headers |= _read_header(file)
    return headers


def weight_files(model: str) -> list[Path]:
    """Return the files that hold the weights of a model directory, or of a hub id in the local cache.

    Raises:
        WeightsError: there are none, or one that the index names is missing.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        found = cached_file(
            model,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            return _shards(Path(found)) if name in _INDICES else [Path(found)]
    raise WeightsError(f"it holds no weights ({SAFE_WEIGHTS_NAME})")


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that named weights hold neither NaN nor infinity.

    Raises:
        WeightsError: one does; the message names the first.
    """
    for name, whole in tensors:
        tensor = ranks.local_part(whole)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass without a mask as large as the weights; NaN shows in both ends. Eight bits have no such function.
        low, high = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
        if not torch.isfinite(low) or not torch.isfinite(high):
            raise WeightsError(f"its weights {name} are not finite (NaN or infinity)")


def stored_weights(model: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in the safetensors files of a model directory or hub id with its name.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    for file in weight_files(model):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as handle:
                    names = handle.keys()
                    for name in names:
                        yield name, handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from None


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index.name} is not a readable index of weight files") from None
    files = [index.parent / str(name) for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        raise WeightsError(f"{len(missing)} of its {len(files)} weight files are missing, the first is {missing[0]}")
    return files


def _read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file on the meta device; a file of pickled tensors is read without its numbers."""
    try:
        if file.suffix != ".safetensors":
            pickled = torch.load(file, map_location="meta", weights_only=True)
            return {name: tensor for name, tensor in pickled.items() if isinstance(tensor, Tensor)}
        with safe_open(file, framework="pt") as handle:
            names = handle.keys()
            shapes = {name: handle.get_slice(name).get_shape() for name in names}
    except Exception as error:  # a damaged pickle may raise anything
        raise _damaged(file, error) from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _damaged(file: Path, error: Exception) -> WeightsError:
    if _is_lfs_pointer(file):
        return WeightsError(f"{file.name} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`")
    return WeightsError(f"{file.name} is truncated or damaged ({reason_of(error)}); copy the file again")


def _is_lfs_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as handle:
            return handle.read(19) == b"version https://git"
    except OSError:
        return False


def _check_names(info: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Check what transformers found when it matched the weights in the files with the model's.

    Raises:
        WeightsError: weights are missing, left over, or of another shape.
    """
    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not _UNUSED.search(name))
    mismatched = sorted(info["mismatched_keys"])
    kind = config.model_type
    if missing and unexpected:
        raise WeightsError(
            f"its config.json and its weight files are of different models: they lack {_count(missing)} of a {kind} "
            f"model and hold {_count(unexpected)} that it does not have"
        )
    if missing:
        raise WeightsError(f"its weight files lack {_count(missing)}; copy the model again")
    if unexpected:
        raise WeightsError(
            f"its weight files hold {_count(unexpected)} that a {kind} model of its config.json does not have; check "
            "model_type there and the number of layers"
        )
    if mismatched:
        name, held, wanted = mismatched[0]
        raise WeightsError(
            f"its weights {name} have the shape {list(held)} in the files, and {list(wanted)} by its config.json"
        )


def _count(names: list[str]) -> str:
    return f"the weights {names[0]}" if len(names) == 1 else f"{len(names)} weights (such as {names[0]})"
