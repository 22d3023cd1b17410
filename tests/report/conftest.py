"""Fixtures for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import Build, synthetic_run


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that writes a synthetic run below the test's folder; see `synthetic_run`."""
    return lambda name="clinic", **options: synthetic_run(tmp_path / name, **options)
