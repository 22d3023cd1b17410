"""Open an existing run together with its configuration, and name its final model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from purld import ranks
from purld.config.load import load_config
from purld.config.methods import has_stage_two
from purld.config.read_yaml import read_yaml
from purld.config.schema import Config
from purld.errors import UserError
from purld.runs.run_dir import RunDir

_NETWORK_DISK_DELAY = 90.0  # seconds; a network disk shows a new file after a minute at most


def open_run(run_path: Path) -> tuple[RunDir, Config]:
    """Return an existing run and its configuration.

    Raises:
        UserError: `run_path` is not a run directory, its manifest is missing, or its configuration is damaged.
    """
    run = RunDir(run_path)
    run.check_manifest()
    run.check_files(run.config)
    if not run.config.exists():
        raise UserError(f"{run_path}: is not a run directory; it holds no config.yaml.")
    return run, load_config(run.config, overrides_of_older_run(run))


def overrides_of_older_run(run: RunDir) -> list[str]:
    """Return the settings that were in force when a run of an older version began, where they are not the defaults.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    split = ["data.near_duplicates=ignore"] if splits_without_near_copies(run) else []
    return [*split, *(["align.validate_every=null"] if keeps_last_step(run) else [])]


def splits_without_near_copies(run: RunDir) -> bool:
    """Return whether a run's config.yaml is older than `data.near_duplicates`, so that its split ignored near-copies.

    Every other key that is newer than a run has the default that was in force when it began.

    Raises:
        UserError: the file cannot be read.
    """
    values = read_yaml(run.config)
    data = values.get("data") if isinstance(values, dict) else None
    return isinstance(data, dict) and "near_duplicates" not in data


def keeps_last_step(run: RunDir) -> bool:
    """Return whether Stage II of a run began before `align.validate_every` was there, so that it keeps the last step.

    Raises:
        UserError: its config.yaml cannot be read.
    """
    if "align" not in run.begun_stages() or not run.config.exists():
        return False
    values = read_yaml(run.config)
    align = values.get("align") if isinstance(values, dict) else None
    return isinstance(align, dict) and "validate_every" not in align


def check_shared_disk(run: RunDir, text: str) -> None:
    """Check that every process of a job sees config.yaml as rank 0 has written it.

    Raises:
        UserError: one does not, because its machine has another disk there.
    """
    started = time.monotonic()
    while ranks.count() > 1 and not (run.config.exists() and run.config.read_text(encoding="utf-8") == text):
        if time.monotonic() - started > _NETWORK_DISK_DELAY:
            raise UserError(
                f"{run.path}: this machine does not see what process 0 wrote there; give a --run-dir on a disk that "
                "all machines share."
            )
        time.sleep(1.0)


@dataclass(frozen=True)
class FinalModel:
    """The model that a run ends with.

    Attributes:
        name: its name in results.json and under generations/.
        parent: the name of the model that its training started from.
        stage: the stage that trains it, `align` or `sft`.
    """

    name: str
    parent: str
    stage: str

    def folder(self, run: RunDir) -> Path:
        """Return the directory of its weights in `run`."""
        return run.align if self.stage == "align" else run.sft


def final_model(method: str) -> FinalModel:
    """Return the final model of a run by `method` (`align.method`): that of Stage II if the method has one, else `sft`.

    A method that is not known, as in a run of another version, counts as one with Stage II.
    """
    if not has_stage_two(method):
        return FinalModel("sft", parent="base", stage="sft")
    return FinalModel(method, parent="sft", stage="align")
