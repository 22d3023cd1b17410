"""Write checkpoints, find the last complete one, and log to the run directory, for both training stages."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from purld.runs.files import sync_folder
from purld.runs.run_dir import RunDir
from purld.training.context import Progress

_COMPLETE = "complete"
_SHOWN = ("loss", "eval_loss", "objective", "score")


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Return the newest complete checkpoint and its step; (None, 0) if there is none.

    Incomplete ones are removed, so that the trainer's own bookkeeping never counts them.
    """
    complete: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / _COMPLETE).exists():
            complete[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    if not complete:
        return None, 0
    step = max(complete)
    return complete[step], step


class RunCallback(TrainerCallback):
    """Logs to the run, marks checkpoints as complete, and reports progress.

    Args:
        run: the run directory with metrics.jsonl.
        stage: the `stage` of the rows.
        is_logged: says by name which of the trainer's values to log; timings would differ between equal runs.
        progress: called after every step.
    """

    def __init__(self, run: RunDir, stage: str, is_logged: Callable[[str], bool], progress: Progress) -> None:
        self._run = run
        self._stage = stage
        self._is_logged = is_logged
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
        values = {key: float(value) for key, value in (logs or {}).items() if self._is_logged(key)}
        # The trainer's closing summary repeats the last step without any of these.
        if not values.keys() & {"loss", "eval_loss", "objective", "dropped_groups"} or not state.is_world_process_zero:
            return
        self._run.log_metrics(self._stage, state.global_step, values)
        self._note = ", ".join(f"{key} {values[key]:.3f}" for key in _SHOWN if key in values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress."""
        self._progress(state.global_step, state.max_steps, self._note)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint that was just written as complete."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            (folder / _COMPLETE).touch()
            sync_folder(folder)


class ModelNamedCheckpoints:
    """A mixin for Trainers whose checkpoints hold weights under the model's own parameter names.

    A Trainer loads a checkpoint by these names and skips what it does not find. `save_pretrained` writes the names of
    the published files, which differ in many image models: the best model would silently never be loaded, and a
    resumed run would start again from the beginning.
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
        loaded = {id(p) for name, p in self.model.named_parameters(remove_duplicate=False) if name not in lost}
        missing = [name for name, p in self.model.named_parameters() if id(p) not in loaded]
        if missing:
            raise RuntimeError(f"a checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}")


def device_autocast() -> AbstractContextManager[Any]:
    """Return the precision that the trainers compute in on this machine, for work outside of them."""
    if device_arguments()["bf16"]:
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def device_arguments() -> dict[str, Any]:
    """Return the trainer arguments that depend on the machine: mixed precision where a GPU has it, none on a CPU."""
    gpu = torch.cuda.is_available()
    return {
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "log_level": "error",
    }
