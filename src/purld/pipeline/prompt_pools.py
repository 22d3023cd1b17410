"""Split the prompts of a run into training and held-out pools, and the training pool between the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from purld.config.clients import AnswerFile
from purld.config.schema import Columns, Config, Data
from purld.data.near_duplicates import near_copies
from purld.data.prompts import LoadedPrompts, exclude_prompts, split_pool
from purld.errors import UserError
from purld.model.encode import Encoder
from purld.records import Prompt, content_hash
from purld.tasks.registry import load_data

Say = Callable[[str], None]

_COLUMNS_NAMED = 12


@dataclass(frozen=True)
class PromptPools:
    """The prompts of a run, without duplicates; no prompt is both trained and evaluated on.

    Attributes:
        train: prompts that the teacher is asked about.
        held_out: prompts that are only evaluated on.
        sft: the part of `train` for Stage I; all of it unless `data.sft_fraction` splits it.
        align: the part of `train` for Stage II; all of it unless `data.sft_fraction` splits it.
        rows: the number of rows read.
        duplicates: how many of them repeated a prompt.
        tokens: the length of each prompt in tokens, by its id.
        formats: what each file was read as, a sentence each.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    sft: list[Prompt]
    align: list[Prompt]
    rows: int
    duplicates: int
    tokens: dict[str, int]
    formats: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Return a hash that changes when a prompt is added, removed or edited."""
        return content_hash([[p.id for p in self.train], [p.id for p in self.held_out]])


def load_prompt_pools(config: Config, encoder: Encoder, say: Say) -> PromptPools:
    """Load the prompts of a run, within the configuration's limits; report what is left out through `say`.

    What becomes of the thinking that the student's chat template provides for is reported as well.

    Raises:
        UserError: a file is missing, a row is bad, or a pool is empty.
    """
    data = config.data
    if encoder.thinking_note is not None:
        say(encoder.thinking_note)
    loaded, published = load_data(data)
    sources = [(data.source, loaded)]
    if published is not None:
        sources.append((data.eval_prompts or data.source, published))
    for source, part in sources:
        _report_left_out(part, source, say)
    check_named_columns(data, [part for _, part in sources])
    train, held_out = _split_held_out(config, loaded, published, say)
    limit = config.student.max_prompt_tokens
    measured = _prompt_lengths(train + held_out, encoder, data, say)
    train, held_out = ([prompt for prompt in part if prompt.id in measured] for part in (train, held_out))
    if data.bad_rows == "fail":
        _check_images_fit(train + held_out, measured, limit)
    train = _within_limit(train, measured, limit, "training", say)[: data.max_prompts]
    held_out = _within_limit(held_out, measured, limit, "held-out", say)[: data.max_eval_prompts]
    if not train:
        raise UserError(f"{data.source}: no prompts are left to train on.")
    if not held_out:
        raise UserError(
            f"{data.source}: no prompts are held out; give data.eval_prompts or a larger data.eval_fraction."
        )
    if config.evaluate.judge is not None:
        _report_missing_references(data, held_out, say)
    rows, duplicates = (sum(getattr(part, name) for _, part in sources) for name in ("rows", "duplicates"))
    tokens = {prompt.id: measured[prompt.id] for prompt in train + held_out}
    formats = tuple(_describe_format(config, source, part) for source, part in sources if part.format)
    return PromptPools(train, held_out, *_split_stages(config, train), rows, duplicates, tokens, formats)


def check_named_columns(data: Data, parts: Sequence[LoadedPrompts]) -> None:
    """Check that a column that the configuration names for gold or images is in the data.

    Raises:
        UserError: no row has anything in it.
    """
    prompts = [prompt for part in parts for prompt in part.prompts]
    found = {
        "reference": any(prompt.reference is not None for prompt in prompts),
        "images": any(prompt.images for prompt in prompts),
    }
    for key, is_there in found.items():
        name, usual = getattr(data.columns, key), getattr(Columns(), key)
        if name != usual and not is_there:
            raise UserError(
                f"{data.source}: no row has anything in the column {name!r}, which data.columns.{key} names; "
                "correct the name, or leave the key out."
            )


def _report_missing_references(data: Data, held_out: list[Prompt], say: Say) -> None:
    lacking = sum(prompt.reference is None for prompt in held_out)
    if lacking:
        count = "no held-out prompt has" if lacking == len(held_out) else f"{lacking} of {len(held_out)} lack"
        say(
            f"{data.eval_prompts or data.source}: {count} a reference (data.columns.reference is "
            f"{data.columns.reference!r}); the judge compares their answers without one."
        )


def _describe_format(config: Config, source: str, loaded: LoadedPrompts) -> str:
    """Describe what a file was read as, and the columns in it that nothing reads."""
    teacher, used = config.teacher, set()
    if isinstance(teacher, AnswerFile):
        used.add("id")
        if teacher.path == source:
            used.add(teacher.columns.answer)
    if config.data.check == "choice":
        used.add("choices")
    unused = dict.fromkeys(name for prompt in loaded.prompts for name in prompt.metadata if name not in used)
    others = ", ".join(name if name.isprintable() else repr(name) for name in list(unused)[:_COLUMNS_NAMED])
    more = f" and {len(unused) - _COLUMNS_NAMED} more" if len(unused) > _COLUMNS_NAMED else ""
    return f"{source} is {loaded.format}" + (f"; columns that are not used: {others}{more}" if unused else "")


def _report_left_out(loaded: LoadedPrompts, source: str, say: Say) -> None:
    if loaded.duplicates:
        say(f"{source}: {loaded.duplicates} rows repeat a prompt and were dropped.")
    if loaded.notice:
        say(f"{source}: {loaded.notice}")
    if loaded.repeated_ids:
        say(
            f"{source}: {loaded.repeated_ids} rows have an id that another prompt has too (the first is "
            f"{loaded.first_repeated_id}); answers are not matched by such an id."
        )
    if loaded.skipped:
        say(f"{source}: {loaded.skipped} bad rows were skipped, first: {loaded.first_skipped}")


def _split_held_out(
    config: Config, loaded: LoadedPrompts, published: LoadedPrompts | None, say: Say
) -> tuple[list[Prompt], list[Prompt]]:
    """Separate training and held-out prompts; one that would be both, or nearly so, is only held out."""
    held_out = [] if published is None else published.prompts
    train = exclude_prompts(loaded.prompts, held_out)
    if both := len(loaded.prompts) - len(train):
        say(f"{both} training prompts are also held out; they are only evaluated on.")
    groups = _groups_of_copies(config, train + held_out, say)
    if published is None:
        return split_pool(train, config.data.eval_fraction, config.seed, groups)
    return _without_copies(train, held_out, groups, say), held_out


def _groups_of_copies(config: Config, prompts: list[Prompt], say: Say) -> list[list[Prompt]]:
    """Return the groups of prompts that are near-copies of each other, and report how many there are."""
    if config.data.near_duplicates == "ignore":
        return []
    groups = [[prompts[index] for index in group] for group in near_copies(prompts)]
    if groups:
        copies = sum(map(len, groups)) - len(groups)
        say(
            f"{copies} prompts are near-copies of others, {len(groups)} questions in several wordings "
            f"(for example {_place(groups[0][0])} and {_place(groups[0][1])}); no question is both trained and "
            "evaluated on. data.near_duplicates=ignore looks for equal prompts only."
        )
    return groups


def _without_copies(train: list[Prompt], held_out: list[Prompt], groups: list[list[Prompt]], say: Say) -> list[Prompt]:
    """Return the training prompts that are not near-copies of held-out ones, and report how many are left out."""
    held_out_ids = {prompt.id for prompt in held_out}
    crossing = [group for group in groups if held_out_ids & {prompt.id for prompt in group}]
    copies = {prompt.id: group for group in crossing for prompt in group if prompt.id not in held_out_ids}
    if copies:
        first = next(prompt for prompt in train if prompt.id in copies)
        other = next(prompt for prompt in copies[first.id] if prompt.id in held_out_ids)
        say(
            f"{len(copies)} training prompts are near-copies of held-out ones and are left out of training "
            f"(for example {_place(first)}, of {_place(other)})."
        )
    return [prompt for prompt in train if prompt.id not in copies]


def _place(prompt: Prompt) -> str:
    return prompt.location or f"prompt {prompt.id}"


def _split_stages(config: Config, train: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Split the training prompts between Stage I and Stage II."""
    fraction = config.data.sft_fraction
    if fraction is None:
        return train, train
    # Salted: the hash of the seed alone has already drawn the held-out set.
    align, sft = split_pool(train, fraction, f"stages {config.seed}")
    if not sft or not align:
        raise UserError(f"{config.data.source}: one training prompt cannot be split by data.sft_fraction.")
    return sft, align


def _check_images_fit(prompts: list[Prompt], tokens: dict[str, int], limit: int) -> None:
    """Refuse image prompts that are too long.

    The configuration sets the number of an image's tokens, so leaving such prompts out could silently empty a pool.

    Raises:
        UserError: a prompt with images is too long; the message names its row.
    """
    for prompt in prompts:
        if prompt.images and tokens[prompt.id] > limit:
            raise UserError(
                f"{prompt.location}: the prompt has {tokens[prompt.id]:,} tokens with its {len(prompt.images)} "
                f"image(s), more than {limit:,}; raise student.max_prompt_tokens, lower student.max_image_pixels, or "
                "leave such rows out with data.bad_rows=skip."
            )


def _prompt_lengths(prompts: list[Prompt], encoder: Encoder, data: Data, say: Say) -> dict[str, int]:
    """Return the length of each prompt in tokens, by its id; a prompt that the student cannot read is a bad row.

    Raises:
        UserError: there is such a prompt, and `data.bad_rows` is `fail`.
    """
    tokens: dict[str, int] = {}
    problems: list[UserError] = []
    for prompt in prompts:
        try:
            tokens[prompt.id] = len(encoder.encode_prompt(prompt))
        except UserError as problem:
            if data.bad_rows == "fail":
                raise
            problems.append(problem)
    if problems:
        say(f"{data.source}: {len(problems)} rows that this student cannot read were skipped, first: {problems[0]}")
    return tokens


def _within_limit(prompts: list[Prompt], tokens: dict[str, int], limit: int, kind: str, say: Say) -> list[Prompt]:
    """Leave out prompts that are too long, before a teacher is paid for them: a cut question is another question."""
    fitting = [p for p in prompts if tokens[p.id] <= limit]
    if len(fitting) < len(prompts):
        say(
            f"{len(prompts) - len(fitting)} of {len(prompts)} {kind} prompts have more than {limit} tokens "
            "(student.max_prompt_tokens) and were left out."
        )
    return fitting
