"""Convert an exported model directory to a GGUF file with llama.cpp's own converter, in a process of its own.

purld does not ship the converter: it changes with every architecture that llama.cpp learns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from purld.errors import UserError, one_line

CONVERTER = "convert_hf_to_gguf.py"
GGUF_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_FOLDERS = ("llama.cpp", "~/llama.cpp")
_REMEDY = "get it with `git clone https://github.com/ggml-org/llama.cpp` and name that folder by --converter"


def find_converter(given: Path | None) -> list[str]:
    """Return the command that runs llama.cpp's converter.

    Args:
        given: the script or the folder of llama.cpp; None looks on the PATH, in `./llama.cpp` and in `~/llama.cpp`.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        script = given / CONVERTER if given.is_dir() else given
        if not script.is_file():
            raise UserError(f"--converter {given}: holds no {CONVERTER}; {_REMEDY}.")
        return [sys.executable, str(script)]
    if installed := shutil.which(CONVERTER):
        return [installed]
    for folder in _FOLDERS:
        script = Path(folder).expanduser() / CONVERTER
        if script.is_file():
            return [sys.executable, str(script)]
    raise UserError(
        f"--gguf: llama.cpp's {CONVERTER} is neither on the PATH nor in {' or '.join(_FOLDERS)}; {_REMEDY}."
    )


def convert_to_gguf(
    converter: Sequence[str], model: Path, out: Path, gguf_type: str, name: str, end_token: str, projector: bool = False
) -> None:
    """Write the GGUF file `out` of a model directory.

    Args:
        converter: as `find_converter` returns it.
        model: the directory, with merged weights.
        out: the file to write.
        gguf_type: one of `GGUF_TYPES`; `auto` is the 16-bit type nearest to the weights.
        name: the model's name in the file.
        end_token: the token that ends a turn; it becomes the file's end of sequence.
        projector: write the vision part of a model that reads images, and not the language model.

    Raises:
        UserError: the converter fails or writes no GGUF file.
    """
    with tempfile.TemporaryDirectory() as folder:
        _link_files(model.resolve(), Path(folder), end_token)
        options = ["--outfile", str(out), "--outtype", gguf_type, "--model-name", name]
        command = [*converter, folder, *options, *(["--mmproj"] if projector else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        except OSError as error:
            raise UserError(f"{converter[-1]}: cannot be started ({error.strerror}).") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = one_line(said[-1], 300) if said else f"exit status {done.returncode}"
        raise UserError(f"{converter[-1]}: cannot convert this model: {reason.rstrip('.')}; export it without --gguf.")
    if not _is_gguf(out):
        raise UserError(f"{converter[-1]}: wrote no GGUF file {out.name}; update llama.cpp.")


def _link_files(model: Path, folder: Path, end_token: str) -> None:
    """Fill a folder with links to the model's files, and name the token that ends a turn as its end of sequence.

    A GGUF file has one end of sequence. The converter takes the tokenizer's, which may be another token than the chat
    template puts after an answer, and it passes over lists of several.
    """
    for file in model.iterdir():
        if file.suffix != ".gguf":
            (folder / file.name).symlink_to(file)
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        values = json.loads(settings.read_text(encoding="utf-8"))
        settings.unlink()
        settings.write_text(json.dumps(values | {"eos_token": end_token}, ensure_ascii=False), encoding="utf-8")


def _is_gguf(file: Path) -> bool:
    if not file.is_file() or os.path.getsize(file) < 4:
        return False
    with file.open("rb") as handle:
        return handle.read(4) == b"GGUF"
