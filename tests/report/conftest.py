"""Fixtures of the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import Build, synthetic_run


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes a synthetic run below the test's folder; see `synthetic_run`."""
    return lambda name="clinic", **options: synthetic_run(tmp_path / name, **options)
