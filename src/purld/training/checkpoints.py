"""Write checkpoints, find the last complete one, and log to the run directory, for both training stages."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from purld import ranks
from purld.errors import PlainWarning, reason_of
from purld.model.adapters import TRAINED
from purld.model.causal_lm import has_adapters
from purld.model.load import default_device
from purld.model.whole_weights import divide_loaded_state, whole_optimizer_state, whole_weights
from purld.records import content_hash
from purld.runs.checksums import FileRecord, find_damage, record_file
from purld.runs.files import sync_folder, write_json
from purld.runs.run_dir import RunDir
from purld.training.context import Progress

_TRAINER_STATE = "trainer_state.json"
_COMPLETE = "complete"  # written last: the records of the checkpoint's files and of the run's logs
_KEPT = 2  # checkpoints, beside those of the best models that they name
_SHOWN = ("loss", "eval_loss", "objective", "score")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to resume from.

    Attributes:
        path: its folder; None to train from the start.
        step: its step; 0 for the start.
        logs: the records of the run's logs at that step; None if it has none, as in an older version.
        set_aside: a sentence on a newer checkpoint that is damaged; None if there is none.
    """

    path: Path | None = None
    step: int = 0
    logs: Mapping[str, Any] | None = None
    set_aside: str | None = None


def last_checkpoint(run: RunDir, folder: Path) -> Checkpoint:
    """Return the newest checkpoint that is whole, with the best model of its time and the run's logs up to it.

    Incomplete and damaged ones are removed, so that the trainer's own bookkeeping never counts them. A checkpoint of an
    older version, whose marker is empty, is taken as it is.
    """
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    problems: list[str] = []
    chosen = Checkpoint()
    for path in sorted((p for p in steps if steps[p].isdigit()), key=lambda p: int(steps[p]), reverse=True):
        if not (path / _COMPLETE).exists():
            shutil.rmtree(path)
            continue
        if chosen.path is not None:
            continue  # an older one stays: it may hold the best model
        problem, logs = _examine(run, path)
        if problem is None:
            chosen = Checkpoint(path, int(steps[path]), logs)
        else:
            problems.append(problem)
            shutil.rmtree(path)
    if not problems:
        return chosen
    instead = f"the checkpoint of step {chosen.step} is used" if chosen.path else "the stage starts again"
    return replace(chosen, set_aside=f"{problems[0]}; {instead}.")


def resume_point(run: RunDir, stage: str) -> Checkpoint:
    """Return the checkpoint that a stage resumes from, after removing what the run logged after it; rank 0 decides."""

    def find() -> Checkpoint:
        checkpoint = last_checkpoint(run, run.checkpoints(stage))
        if checkpoint.set_aside:
            warnings.warn(checkpoint.set_aside, PlainWarning, stacklevel=4)
        run.rewind_log(stage, checkpoint.step, checkpoint.logs)
        return checkpoint

    return ranks.on_first(find)


def _examine(run: RunDir, path: Path) -> tuple[str | None, Mapping[str, Any] | None]:
    """Return what keeps a complete checkpoint from being used (None: nothing), and its records of the logs."""
    try:
        records = _read_marker(run, path)
        if problem := _find_damage(path, records):
            return problem, None
        step = _best_step(path)
        best = path.with_name(f"checkpoint-{step}")
        if step and best != path and (problem := _find_damage(best, _read_marker(run, best))):
            return problem, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: is damaged ({reason_of(error)})", None
    if records is None:
        return None, None
    return run.find_log_damage(records["logs"]), records["logs"]


def _best_step(path: Path) -> int | None:
    """Return the best step so far by the trainer's state in a checkpoint; None if it names none."""
    step: int | None = json.loads((path / _TRAINER_STATE).read_text(encoding="utf-8")).get("best_global_step")
    return step


def find_log_damage(run: RunDir) -> str | None:
    """Return what is wrong with the logs of a stage that is under way, by its newest checkpoint; None if nothing is."""
    for stage in run.begun_stages() & {"sft", "align"} - run.finished_stages().keys():
        paths = [marker.parent for marker in run.checkpoints(stage).glob(f"checkpoint-*/{_COMPLETE}")]
        newest = max(paths, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # removed meanwhile, or itself damaged
            records = _read_marker(run, newest) if newest else None
            if records is not None and (problem := run.find_log_damage(records["logs"])):
                return problem
    return None


def _read_marker(run: RunDir, path: Path) -> dict[str, Any] | None:
    """Return the records of a complete checkpoint; None for one of an older version, whose marker is empty."""
    text = (path / _COMPLETE).read_text(encoding="utf-8")
    if not text and "started" in run.begin_facts(path.parent.parent.name):
        raise ValueError(f"{_COMPLETE} is empty")
    records: dict[str, Any] | None = json.loads(text) if text else None
    if records is not None and records.pop("hash") != content_hash(records):
        raise ValueError(f"{_COMPLETE} is not as it was written")
    return records


def _find_damage(path: Path, records: Mapping[str, Any] | None) -> str | None:
    for name, entry in (records or {"files": {}})["files"].items():
        if problem := find_damage(path / name, FileRecord.from_json(entry)):
            return f"{path / name}: {problem}"
    return None


def mark_complete(run: RunDir, path: Path) -> None:
    """Sync every file of a checkpoint and its folders, and then write the marker that makes it count."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    records = {
        "files": {file.relative_to(path).as_posix(): record_file(file).to_json() for file in files},
        "logs": run.log_records(),
    }
    # The logs' own names too: without the files that its records name, a checkpoint would not count.
    logs = {(run.path / name).parent for name in records["logs"]}
    for folder in {file.parent for file in files} | {path, path.parent, path.parent.parent} | logs:
        sync_folder(folder)
    write_json(path / _COMPLETE, records | {"hash": content_hash(records)})


def unmark_checkpoint(folder: Path, step: int) -> None:
    """Let the checkpoint of a step, if there is one, no longer count as complete."""
    (folder / f"checkpoint-{step}" / _COMPLETE).unlink(missing_ok=True)


def remove_older(folder: Path) -> None:
    """Remove all checkpoints but the newest two and those of the best models that these name.

    The older of the two is there for a newest one that turns out to be damaged, and cannot be used without its own best
    model. A Trainer would remove checkpoints before the newest one counts as complete: after a kill in between, what is
    left may be far behind, or lack the best model that it refers to. So trainers get no `save_total_limit`.
    """
    steps = sorted(int(n) for path in folder.glob("checkpoint-*") if (n := path.name.rpartition("-")[2]).isdigit())
    needed: set[int | None] = {*steps[-_KEPT:]}
    for step in steps[-_KEPT:]:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # damaged: it is not used in any case
            needed.add(_best_step(folder / f"checkpoint-{step}"))
    for step in steps:
        if step not in needed:
            unmark_checkpoint(folder, step)  # first: half a checkpoint must not count
            shutil.rmtree(folder / f"checkpoint-{step}")


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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the number of steps; find the best model's checkpoint again in a run directory that was moved."""
        if ranks.is_first():
            self._run.note_facts(self._stage, steps=state.max_steps)
        _find_best(args, state)

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
        if (
            not values.keys() & {"loss", "eval_loss", "eval_score", "eval_unscored", "objective", "dropped_groups"}
            or not ranks.is_first()
        ):
            return
        self._run.log_metrics(self._stage, state.global_step, values)
        self._note = ", ".join(f"{key} {values[key]:.3f}" for key in _SHOWN if key in values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress."""
        self._progress(state.global_step, state.max_steps, self._note)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint that was just written as complete, and record the time spent so far."""
        if ranks.is_first():
            folder = Path(args.output_dir or "")
            mark_complete(self._run, folder / f"checkpoint-{state.global_step}")
            self._run.note_seconds(self._stage)
            remove_older(folder)
        _find_best(args, state)


def _find_best(args: TrainingArguments, state: TrainerState) -> None:
    best = Path(args.output_dir or "") / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)


class ModelNamedCheckpoints:
    """A mixin for Trainers whose checkpoints hold weights under the model's own parameter names, written by rank 0.

    A Trainer loads a checkpoint by these names and skips what it does not find. `save_pretrained` writes the names of
    the published files, which differ in many image models: the best model would silently never be loaded, and a
    resumed run would start again from the beginning.
    """

    model: Any
    optimizer: Any
    _whole: dict[str, Any] | None = None  # the gathered weights of a sharded model, while a checkpoint is written

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the trainer's own optimiser, which reads its state from a checkpoint of any number of ranks."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        divide_loaded_state(optimizer)
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._whole = whole_weights(self.model)
        with whole_optimizer_state(self.optimizer.optimizer):
            if ranks.is_first():  # the trainers of all ranks are in the same state
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self._whole = None
        ranks.barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        own = self.model.save_pretrained
        # A frozen adapter beside the trained one is not part of a checkpoint.
        chosen = {"selected_adapters": [TRAINED]} if has_adapters(self.model) else {}
        self.model.save_pretrained = functools.partial(own, save_original_format=False, **chosen)
        try:
            super()._save(output_dir, self._whole if state_dict is None else state_dict)  # type: ignore[misc]
        finally:
            del self.model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        lost = set(load_result.missing_keys)
        loaded = {id(p) for name, p in self.model.named_parameters(remove_duplicate=False) if name not in lost}
        missing = [name for name, p in self.model.named_parameters() if id(p) not in loaded]
        if missing:
            raise RuntimeError(f"a checkpoint lacks {len(missing)} of the model's weights, such as {missing[0]}")


Arguments = TypeVar("Arguments", bound=TrainingArguments)


def make_arguments(kind: type[Arguments], **values: Any) -> Arguments:
    """Make a trainer's arguments for the device of this process.

    By itself a trainer takes the first GPU, and copies the model to every GPU that it sees.
    """
    device = default_device()
    arguments = kind(**values, **device_arguments())
    if device.type == "cuda":
        assert arguments.device.type == "cuda"
        arguments._n_gpu = 1
        arguments.__dict__["_setup_devices"] = device  # what `device` returns
        torch.cuda.set_device(device)
    return arguments


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
        "logging_nan_inf_filter": False,  # it would log a loss that is not finite as 0
        "log_level": "error",
    }
