"""Check the rollout engine before anything is paid for: a trial of all that a run will ask of it."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

from transformers import AutoConfig

from purld.config.engines import VllmEngine
from purld.config.schema import Student
from purld.errors import PlainWarning, UserError
from purld.model.adapters import hash_adapter, write_blank_adapter
from purld.model.encode import Encoder
from purld.model.load import load_model
from purld.model.pretrained import load_part
from purld.model.sample import Completion
from purld.model.vision import EncodedPrompt
from purld.model.vllm_sampler import (
    NOTABLE_GAP,
    OTHER_MODEL_GAP,
    describe_gap,
    find_server,
    log_prob_gap,
    other_model_error,
)
from purld.model.vllm_server import Adapter, Draw, DrawSettings, VllmServer
from purld.model.weights import build_skeleton
from purld.records import Prompt

_TRIAL_DRAWS, _TRIAL_TOKENS = 4, 16


def check_engine(
    student: Student, encoder: Encoder, folder: Path, longest: int, stages: int, compare_weights: bool
) -> None:
    """Check that the student's engine can do what a run needs of it; nothing for transformers' `generate`.

    Args:
        student: `student` of the configuration.
        encoder: the run's encoder.
        folder: an existing folder near the run directory, in which a trial adapter is written and removed.
        longest: the most tokens of a prompt with its completion.
        stages: the stages whose adapters the server must add up.
        compare_weights: load the student, if this process can be expected to, and compare its log-probs with the
            server's.

    Raises:
        UserError: the server cannot be reached, holds another model, or does not take the run's adapters.
    """
    engine = student.engine
    if not isinstance(engine, VllmEngine):
        return
    if encoder.placeholders:
        raise UserError(
            f"student.engine: kind vllm draws for prompts of text alone, and {student.model} reads images; use kind "
            "generate."
        )
    server, name = find_server(engine), engine.model or student.model
    _check_served_model(server, name, student, longest)
    prompt = encoder.encode_prompt(Prompt.from_text("A question."))
    group = _try_adapter(server, name, student, encoder, prompt, folder, stages)
    if compare_weights and student.shard is None:  # divided weights may not fit this process; the sampler compares too
        gap = log_prob_gap(load_model(student, student.model), prompt, group, encoder.pad)
        if gap > OTHER_MODEL_GAP:
            raise other_model_error(server, name, gap)
        if gap > NOTABLE_GAP:
            warnings.warn(PlainWarning(describe_gap(gap)), stacklevel=2)


def _check_served_model(server: VllmServer, name: str, student: Student, longest: int) -> None:
    served = {model.name: model for model in server.list_models() if not model.is_adapter}
    if name not in served:
        raise server.error(
            f"serves {', '.join(served) or 'no model'} and not {name}",
            "give the name of the student's weights there as student.engine.model",
        )
    limit = served[name].max_length
    if limit is not None and longest > limit:
        raise server.error(
            f"reads {limit:,} tokens, and the longest prompt and its answer may have {longest:,}",
            "start it with a higher --max-model-len, or lower student.max_prompt_tokens or max_new_tokens",
        )
    size = load_part(AutoConfig, student.model).get_text_config().vocab_size
    if not server.has_token(name, size - 1) or server.has_token(name, size):
        raise server.error(
            f"holds another model under the name {name} than student.model, whose vocabulary has {size:,} tokens",
            f"start it with {student.model}",
        )


def _try_adapter(
    server: VllmServer,
    name: str,
    student: Student,
    encoder: Encoder,
    prompt: EncodedPrompt,
    folder: Path,
    stages: int,
) -> list[Completion]:
    """Let the server draw with an adapter like the run's that changes nothing, and return what it drew."""
    place = Path(tempfile.mkdtemp(prefix=".purld-trial-", dir=folder))
    try:
        place.chmod(0o755)  # the server may run as another user
        write_blank_adapter(student, build_skeleton(load_part(AutoConfig, student.model)), place, stages)
        adapter = Adapter(f"purld-trial-{hash_adapter(place)[:16]}-{place.name[-8:]}", place)
        server.load_adapter(adapter)
        draws = [Draw(prompt.ids, seed) for seed in range(_TRIAL_DRAWS)]
        drawn = server.draw(draws, DrawSettings(1.0, 1.0, _TRIAL_TOKENS, sorted(encoder.ends)), name, adapter)
        server.unload_adapters()
    finally:
        shutil.rmtree(place)
    return [Completion(d.ids, d.finished, d.log_probs) for d in drawn]
