"""The sampler that draws with a vLLM server, which the user starts: `student.engine.kind: vllm`.

Before each draw the server is given the model's adapter as a file, under a name made of its weights, and a reply counts
only if it bears that name: no candidate comes from an older policy. Every completion has a seed of its own, made of its
prompt's seed and its number, so it does not depend on what else is drawn, nor by which process.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from purld.config.engines import VllmEngine
from purld.errors import PlainWarning, UserError
from purld.model.adapters import hash_adapter, write_current_adapter
from purld.model.causal_lm import CausalLM
from purld.model.encode import Encoder
from purld.model.log_probs import token_log_probs
from purld.model.sample import Completion, Decoding, end_tokens, seed_from_content
from purld.model.vision import EncodedPrompt
from purld.model.vllm_server import Adapter, Draw, DrawSettings, VllmServer

NOTABLE_GAP = 0.05
"""Mean difference of log-probs between server and trainer, in nats per token, that is worth a warning."""
OTHER_MODEL_GAP = 0.5
"""The same, where no precision of numbers explains it: the server holds another model."""


class VllmSampler:
    """A sampler that asks a vLLM server.

    Args:
        engine: `student.engine` of the configuration.
        student: `student.model` of the configuration.
        encoder: the run's encoder.
        decoding: the settings of sampling.
        folder: where adapters are written for the server to read; made when it is needed.
    """

    def __init__(self, engine: VllmEngine, student: str, encoder: Encoder, decoding: Decoding, folder: Path) -> None:
        self._server = find_server(engine)
        self._base = engine.model or student
        self._encoder = encoder
        self._decoding = decoding
        self._folder = folder
        self._run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self._saved: dict[Path, Adapter] = {}  # those of finished stages
        self._compared = False

    def __call__(
        self, model: CausalLM, prompts: Sequence[EncodedPrompt], count: int, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Draw `count` completions for each prompt, with the log-probs that the server gave them.

        Raises:
            UserError: the server stayed away, does not take the adapter, or holds another model.
        """
        if any(prompt.images for prompt in prompts):
            raise UserError("student.engine: kind vllm draws for prompts of text alone; use kind generate.")
        pairs = zip(prompts, seeds, strict=True)
        draws = [Draw(p.ids, seed_from_content("draw", seed, number)) for p, seed in pairs for number in range(count)]
        settings = DrawSettings(
            self._decoding.temperature,
            self._decoding.top_p,
            self._decoding.max_new_tokens,
            sorted(end_tokens(model, self._encoder)),
        )
        drawn = self._server.draw(draws, settings, self._base, self._current_adapter(model))
        rows = [Completion(d.ids, d.finished, d.log_probs) for d in drawn]
        groups = [rows[i : i + count] for i in range(0, len(rows), count)]
        if groups and not self._compared:
            self._compared = True
            self._compare(model, prompts[0], groups[0])
        return groups

    def _current_adapter(self, model: CausalLM) -> Adapter | None:
        """Return the model's adapter as a file that stays as it is; None for the student's own weights."""
        written = self._folder / f".{uuid.uuid4().hex}"  # other processes of this run write beside it
        saved = write_current_adapter(model, written)
        if saved is None:
            return None
        if saved != written:
            if saved not in self._saved:
                self._saved[saved] = Adapter(self._adapter_name(saved), saved)
            return self._saved[saved]
        name = self._adapter_name(written)
        place = self._folder / name
        if place.exists():  # another process of this run has the same weights, or nothing was learned
            shutil.rmtree(written)
        else:
            _move_folder(written, place)
        return Adapter(name, place, temporary=True)

    def _adapter_name(self, folder: Path) -> str:
        """Return a name that stands for an adapter's weights, and for this run, as other runs take theirs back."""
        return f"purld-{self._run}-{hash_adapter(folder)[:16]}"

    def _compare(self, model: CausalLM, prompt: EncodedPrompt, group: Sequence[Completion]) -> None:
        """Compare the server's log-probs of a group with the model's own, once for each stage."""
        gap = log_prob_gap(model, prompt, group, self._encoder.pad)
        if gap > OTHER_MODEL_GAP:
            raise other_model_error(self._server, self._base, gap)
        if gap > NOTABLE_GAP:
            warnings.warn(PlainWarning(describe_gap(gap)), stacklevel=2)


@functools.lru_cache(maxsize=4)
def find_server(engine: VllmEngine) -> VllmServer:
    """Return the process's one object for a server, which knows the adapters that it was given."""
    return VllmServer(engine)


@torch.no_grad()
def log_prob_gap(model: CausalLM, prompt: EncodedPrompt, group: Sequence[Completion], pad: int) -> float:
    """Return the mean difference between an engine's log-probs of completions and the model's, in nats per token."""
    expected, mask = token_log_probs(model, prompt, [c.ids for c in group], pad)
    drawn = [torch.tensor(c.log_probs or [], dtype=torch.float32, device=expected.device) for c in group]
    given = torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True)
    return float(((given - expected).abs() * mask).sum() / mask.sum())


def describe_gap(gap: float) -> str:
    """Say that the engine and the trainer differ notably, and what to do."""
    return (
        f"the engine's log-probs of candidates differ from the trainer's by {gap:.3f} nats per token on average; serve "
        "the student in the trainer's precision (vllm serve --dtype), or set align.importance_cap to 2."
    )


def other_model_error(server: VllmServer, base: str, gap: float) -> UserError:
    """Return the error about a server whose weights are not the student's."""
    return server.error(
        f"holds other weights under the name {base} than student.model: log-probs of its own completions differ by "
        f"{gap:.2f} nats per token",
        "start it with student.model itself",
    )


def _move_folder(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(source)  # another process was first, with the same weights
