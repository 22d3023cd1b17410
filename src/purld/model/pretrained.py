"""Load a part of a model directory by transformers' auto classes: the one place that does.

A model directory may contain Python files for transformers to run. purld never runs them: every part is loaded with
`trust_remote_code=False`, which transformers would otherwise ask about at the terminal.
"""

from __future__ import annotations

from typing import Any


class OwnCodeError(ValueError):
    """A part of a model directory that only the directory's own Python files can load."""


def load_part(auto_class: Any, model: str, **options: Any) -> Any:
    """Return what `auto_class.from_pretrained` loads from a model directory or hub id, without running its code.

    Args:
        auto_class: a class of transformers, such as `AutoConfig`.
        model: a model directory or hub id.
        options: further arguments of `from_pretrained`.

    Raises:
        OwnCodeError: it cannot be loaded without Python files of its own.
        OSError, ValueError, KeyError, ImportError, RuntimeError: it cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(model, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise OwnCodeError(
            "it needs Python code of its own, which purld never runs; use a model that transformers itself knows"
        ) from None
