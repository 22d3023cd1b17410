"""The prompts of a run: which are trained on, in which stage, and which are only evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from purld.config.schema import Config, Data
from purld.data.prompts import LoadedPrompts, exclude_prompts, load_prompts, split_pool
from purld.errors import UserError
from purld.model.encode import Encoder
from purld.records import Prompt, content_hash
from purld.tasks.registry import load_task

Say = Callable[[str], None]


@dataclass(frozen=True)
class PromptPools:
    """The prompts of a run, without duplicates and without a prompt both trained and evaluated on.

    The teacher is asked about `train`. Its anchors serve Stage I for `sft` and Stage II for `align`: each the whole
    of `train`, or with `data.sft_fraction` two parts of it that do not overlap. `rows` were read, `duplicates` of
    them repeated a prompt. `tokens` has the length of each prompt, by its id.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    sft: list[Prompt]
    align: list[Prompt]
    rows: int
    duplicates: int
    tokens: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Changes when a prompt is added, removed or edited."""
        return content_hash([[p.id for p in self.train], [p.id for p in self.held_out]])


def load_prompt_pools(config: Config, encoder: Encoder, say: Say) -> PromptPools:
    """The prompts of a run, limited as the configuration says; what is left out is said.

    Raises:
        UserError: a file is missing, a row is bad, or a pool is empty.
    """
    data = config.data
    loaded, published = _load(data)
    for part in filter(None, (loaded, published)):
        _tell(part, data.source if part is loaded else data.eval_prompts or data.source, say)
    train, held_out = _part(config, loaded, published, say)
    limit = config.student.max_prompt_tokens
    measured = _measured(train + held_out, encoder, data, say)
    train, held_out = ([prompt for prompt in part if prompt.id in measured] for part in (train, held_out))
    if data.bad_rows == "fail":
        _check_images_fit(train + held_out, measured, limit)
    train = _that_fit(train, measured, limit, "training", say)[: data.max_prompts]
    held_out = _that_fit(held_out, measured, limit, "held-out", say)[: data.max_eval_prompts]
    if not train:
        raise UserError(f"{data.source}: no prompts are left to train on.")
    if not held_out:
        raise UserError(
            f"{data.source}: no prompts are held out; give data.eval_prompts or a larger data.eval_fraction."
        )
    parts = [loaded] if published is None else [loaded, published]
    rows, duplicates = sum(p.rows for p in parts), sum(p.duplicates for p in parts)
    tokens = {prompt.id: measured[prompt.id] for prompt in train + held_out}
    return PromptPools(train, held_out, *_stages(config, train), rows, duplicates, tokens)


def _load(data: Data) -> tuple[LoadedPrompts, LoadedPrompts | None]:
    """What the training prompts' source holds, and what is held out apart from it."""
    if data.task is not None:
        return load_task(data.task, data.source, data.bad_rows)
    loaded = load_prompts(data.source, data.columns, data.bad_rows)
    if data.eval_prompts is None:
        return loaded, None
    return loaded, load_prompts(data.eval_prompts, data.columns, data.bad_rows)


def _tell(loaded: LoadedPrompts, source: str, say: Say) -> None:
    if loaded.duplicates:
        say(f"{source}: {loaded.duplicates} rows repeat a prompt and were dropped.")
    if loaded.skipped:
        say(f"{source}: {loaded.skipped} bad rows were skipped, first: {loaded.first_skipped}")


def _part(
    config: Config, loaded: LoadedPrompts, published: LoadedPrompts | None, say: Say
) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and held-out ones; a prompt that would be both is only held out."""
    if published is None:
        return split_pool(loaded.prompts, config.data.eval_fraction, config.seed)
    train = exclude_prompts(loaded.prompts, published.prompts)
    if both := len(loaded.prompts) - len(train):
        say(f"{both} training prompts are also held out; they are only evaluated on.")
    return train, published.prompts


def _stages(config: Config, train: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts of Stage I and those of Stage II."""
    fraction = config.data.sft_fraction
    if fraction is None:
        return train, train
    # Not the seed's own hash: that one has already drawn the held-out set.
    align, sft = split_pool(train, fraction, f"stages {config.seed}")
    if not sft or not align:
        raise UserError(f"{config.data.source}: one training prompt cannot be split by data.sft_fraction.")
    return sft, align


def _check_images_fit(prompts: list[Prompt], tokens: dict[str, int], limit: int) -> None:
    """An image's tokens are set by the configuration and not by its row: without a word, a whole pool could go.

    Raises:
        UserError: names the first row whose prompt has images and is too long.
    """
    for prompt in prompts:
        if prompt.images and tokens[prompt.id] > limit:
            raise UserError(
                f"{prompt.place}: the prompt has {tokens[prompt.id]:,} tokens with its {len(prompt.images)} image(s), "
                f"more than {limit:,}; raise student.max_prompt_tokens, lower student.max_image_pixels, or leave such "
                "rows out with data.bad_rows=skip."
            )


def _measured(prompts: list[Prompt], encoder: Encoder, data: Data, say: Say) -> dict[str, int]:
    """The length of each prompt in tokens, by its id; those that this student cannot be asked are bad rows.

    Raises:
        UserError: there is such a prompt, and bad rows are not to be skipped.
    """
    tokens: dict[str, int] = {}
    problems: list[UserError] = []
    for prompt in prompts:
        try:
            tokens[prompt.id] = len(encoder.prompt(prompt))
        except UserError as problem:
            if data.bad_rows == "fail":
                raise
            problems.append(problem)
    if problems:
        say(f"{data.source}: {len(problems)} rows that this student cannot read were skipped, first: {problems[0]}")
    return tokens


def _that_fit(prompts: list[Prompt], tokens: dict[str, int], limit: int, kind: str, say: Say) -> list[Prompt]:
    """Leave out prompts that are too long before a teacher is paid for them: a cut question is another one."""
    fitting = [p for p in prompts if tokens[p.id] <= limit]
    if len(fitting) < len(prompts):
        say(
            f"{len(prompts) - len(fitting)} of {len(prompts)} {kind} prompts have more than {limit} tokens "
            "(student.max_prompt_tokens) and were left out."
        )
    return fitting
