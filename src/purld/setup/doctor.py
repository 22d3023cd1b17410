"""Look at the machine, and with a configuration at everything that it names, line by line.

Nothing here imports torch before it was looked at, since an installation that is damaged is what this is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from purld.config.schema import Config
from purld.errors import reason_of
from purld.runs.run_dir import RunDir
from purld.setup.check_machine import (
    check_clock,
    check_devices,
    check_disk,
    check_locale,
    check_versions,
)
from purld.setup.finding import Finding


def examine_machine(run: Path) -> Iterator[Finding]:
    """Yield what is found on this machine; runs go to `run`."""
    yield from check_versions()
    yield from check_devices()
    yield from check_disk(run)
    yield check_clock()
    yield check_locale()


def examine_config(config: Config, run: RunDir) -> Iterator[Finding]:
    """Yield what is found about the student, the data, the memory and disk that training takes, and the endpoints."""
    try:
        from purld.setup.check_config import check_config
    except Exception as error:  # a damaged installation raises what it likes
        text = f"nothing in it can be looked at: {reason_of(error)}"
        yield Finding("wrong", "config", text, "mend what is wrong above")
        return
    yield from check_config(config, run)
