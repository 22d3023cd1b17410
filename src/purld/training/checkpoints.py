"""What both stages share in writing checkpoints, finding the last whole one, and logging to the run."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from purld.runs.files import sync_folder
from purld.runs.run_dir import RunDir

Progress = Callable[[int, int, str], None]
"""Called with what is done, the total, and a short note."""

_WHOLE = "complete"
_SHOWN = ("loss", "eval_loss", "objective", "score")


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that was written to its end, and its step; (None, 0) if there is none.

    Torn ones are removed, so that the trainer's own bookkeeping never counts them.
    """
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / _WHOLE).exists():
            whole[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    if not whole:
        return None, 0
    step = max(whole)
    return whole[step], step


class RunCallback(TrainerCallback):
    """Logs to the run, marks checkpoints as whole, and reports progress.

    Args:
        run: whose metrics.jsonl to write.
        stage: the `stage` of the rows.
        keys: which of the trainer's values to log; timings would differ between equal runs.
        progress: told of every step.
    """

    def __init__(self, run: RunDir, stage: str, keys: frozenset[str], progress: Progress) -> None:
        self._run = run
        self._stage = stage
        self._keys = keys
        self._progress = progress
        self._note = ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one row of metrics."""
        values = {key: float(value) for key, value in (logs or {}).items() if key in self._keys}
        # The trainer's closing summary repeats the last step without any of these.
        if not values.keys() & {"loss", "eval_loss", "objective", "dropped_groups"} or not state.is_world_process_zero:
            return
        self._run.log(self._stage, state.global_step, values)
        self._note = ", ".join(f"{key} {values[key]:.3f}" for key in _SHOWN if key in values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress."""
        self._progress(state.global_step, state.max_steps, self._note)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint that was just written as whole."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            (folder / _WHOLE).touch()
            sync_folder(folder)


class ModelNamedCheckpoints:
    """Mixed into a Trainer: its checkpoints hold weights under the names that its model has for them.

    A Trainer loads a checkpoint by these names and passes over what it does not find; `save_pretrained` writes the
    names of the model's published files, which in many image models are others. A best model that was never loaded, or
    a run that goes on from where it began, would be the silent result.
    """

    model: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        own = self.model.save_pretrained
        self.model.save_pretrained = functools.partial(own, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        finally:
            del self.model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        lost = set(load_result.missing_keys)
        there = {id(p) for name, p in self.model.named_parameters(remove_duplicate=False) if name not in lost}
        gone = [name for name, p in self.model.named_parameters() if id(p) not in there]
        if gone:
            raise RuntimeError(f"a checkpoint lacks {len(gone)} of the model's weights, such as {gone[0]}")


def device_arguments() -> dict[str, Any]:
    """Trainer arguments that follow the machine: mixed precision where a GPU has it, none on a CPU."""
    gpu = torch.cuda.is_available()
    return {
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "log_level": "error",
    }
