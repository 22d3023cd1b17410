"""List the requests that a run would send, before it sends any: the bounds of the plan, and the dry run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from purld.clients.anchors import apply_thinking_policy
from purld.clients.answer_file import AnswerFileClient
from purld.clients.base import settled_reply
from purld.clients.folder import FolderLedgers
from purld.clients.ledger import BUDGETS, LedgerView, Request, Role, is_blank
from purld.clients.requests import (
    build_requests,
    max_image_tokens,
    token_cost,
    with_batch_prices,
    worst_case_tokens,
)
from purld.config.clients import AnswerFile, LocalModel, OpenAIEndpoint, TeacherAnchors
from purld.config.engines import VllmEngine, is_loopback
from purld.config.methods import StageTwoSettings, TeacherJudgeGrpo
from purld.config.schema import Config
from purld.model.encode import Encoder
from purld.pipeline.plan_sheet import Plan
from purld.pipeline.preflight import check_ledger
from purld.pipeline.prompt_pools import PromptPools
from purld.pipeline.stage_two_split import split_of_run
from purld.records import Prompt
from purld.runs.run_dir import RunDir
from purld.templates import judge_turn, rating_turn
from purld.thinking import split_thinking

_HEADING = "What leaves this machine"


@dataclass(frozen=True)
class PendingRequest:
    """A request to the teacher that has not been answered yet."""

    role: Role
    prompt: Prompt
    request: Request


def pending_requests(
    endpoint: OpenAIEndpoint, config: Config, pools: PromptPools, run: RunDir, resend_unknown: bool = False
) -> Iterator[PendingRequest]:
    """Yield the requests that `purld anchors` would send now, each once, in order.

    Requests that the ledger of this run or of a sibling run can answer, or that are in a batch, are left out. Once
    Stage I has begun, so are those for anchors, and the opponent's are sent by `purld evaluate`.

    Raises:
        UserError: the ledger cannot be read.
    """
    train = [] if "sft" in run.begun_stages() else pools.train
    asked: list[tuple[Role, Prompt]] = [("teacher", prompt) for prompt in train]
    if isinstance(config.evaluate.opponent, TeacherAnchors):
        asked += [("opponent", prompt) for prompt in pools.held_out]
    with FolderLedgers(run.ledger, with_own=True) as known:
        seen = set[str]()
        for (role, prompt), request in zip(
            asked, build_requests(endpoint, (prompt for _, prompt in asked)), strict=True
        ):
            if (key := request.key) in seen:
                continue
            seen.add(key)
            call = known.find_call(key)
            result = call.result() if call else None
            in_batch = call is not None and call.state == "batched"
            if not in_batch and (result is None or settled_reply(result, resend_unknown) is None):
                yield PendingRequest(role, prompt, request)


def write_dry_run(
    handle: IO[str], config: Config, pools: PromptPools, run: RunDir, resend_unknown: bool = False
) -> tuple[int, int]:
    """Write one line {"role", "url", "body"} per request that would be sent; `body` is byte for byte what is sent.

    With the batch API, the bodies are sent in the lines of a file.

    Returns:
        The number of requests, and the bytes of their bodies in total.
    """
    check_ledger(config, run)
    count = size = 0
    if isinstance(config.teacher, OpenAIEndpoint):
        for pending in pending_requests(config.teacher, config, pools, run, resend_unknown):
            request = pending.request
            path = "files" if config.teacher.batch else "chat/completions"
            url = json.dumps(f"{request.base_url}/{path}")
            # The body is written as it is and not dumped again, so that it stays byte for byte what is sent.
            handle.write(f'{{"role": "{pending.role}", "url": {url}, "body": {request.body}}}\n')
            count += 1
            size += len(request.body.encode())
    return count, size


def plan_requests(plan: Plan, config: Config, encoder: Encoder, pools: PromptPools, run: RunDir) -> None:
    """Add bounds on what each remote model will be sent; requests that a ledger can answer are not counted.

    Raises:
        UserError: the ledger or an answer file cannot be read.
    """
    match config.teacher:
        case OpenAIEndpoint() as endpoint:
            _plan_teacher(plan, endpoint, pools, pending_requests(endpoint, config, pools, run), _spent(run, "teacher"))
        case LocalModel(model=model):
            plan.add_lines(_HEADING, f"teacher: nothing; answers come from {model}")
        case AnswerFile(path=path) as file:
            plan.add_lines(_HEADING, f"teacher: nothing; answers come from {path}")
            plan.add_lines("Prompts", _describe_answers(file, config, encoder, pools.train, "teacher"))
            if isinstance(config.evaluate.opponent, TeacherAnchors):
                plan.add_lines("Prompts", _describe_answers(file, config, encoder, pools.held_out, "opponent"))
    if isinstance(config.evaluate.opponent, AnswerFile):
        plan.add_lines(
            "Prompts", _describe_answers(config.evaluate.opponent, config, encoder, pools.held_out, "opponent")
        )
    if isinstance(config.evaluate.judge, OpenAIEndpoint):
        _plan_judge(plan, config.evaluate.judge, config, encoder, pools)
    plan.add_lines(_HEADING, *_describe_open_batches(run))
    _plan_training_requests(plan, config, encoder, pools, run)
    if config.report_to:
        plan.add_lines(_HEADING, f"trackers: metrics to where {', '.join(config.report_to)} is set up to (report_to)")


def _describe_open_batches(run: RunDir) -> list[str]:
    """Return a line about each batch that was submitted before and whose results have not been collected."""
    if is_blank(run.ledger):
        return []
    with LedgerView(run.ledger) as ledger:
        return [
            f"  {batch.name} of {batch.calls:,} requests ({batch.role}) was submitted before and is collected"
            for batch in ledger.open_batches()
        ]


def _describe_answers(file: AnswerFile, config: Config, encoder: Encoder, prompts: list[Prompt], role: str) -> str:
    """Describe how many prompts an answer file answers, why not the others, and how many anchors are too long."""
    policy = config.anchors
    given = AnswerFileClient(file).ask(prompts)
    thinking = sum(reply.text is not None and split_thinking(reply.text).found for reply in given)
    replies = [apply_thinking_policy(reply, policy) for reply in given]
    remarks = Counter(reply.detail for reply in replies if reply.detail)
    texts = [reply.text for reply in replies if reply.text is not None]
    details = "".join(f"; {count:,} × {remark}" for remark, count in remarks.most_common())
    if thinking:
        details += f"; {thinking:,} answers with thinking (anchors.thinking: {policy.thinking})"
    if role == "teacher" and (cut := sum(encoder.encode_target(text).cut for text in texts)):
        anchors = f"{cut:,} anchors" if cut > 1 else "1 anchor"
        details += f"; {anchors} will be cut at {encoder.max_anchor_tokens} tokens (student.max_anchor_tokens)"
    return f"{role}: {file.path} answers {len(texts)} of {len(prompts)} prompts{details}"


def _plan_teacher(
    plan: Plan,
    endpoint: OpenAIEndpoint,
    pools: PromptPools,
    requests: Iterable[PendingRequest],
    spent: Mapping[str, float],
) -> None:
    calls, size, estimate, read, written, images = Counter[Role](), 0, 0, 0, 0, 0
    for pending in requests:
        images += len(pending.prompt.images)
        calls[pending.role] += 1
        size += len(pending.request.body.encode())
        estimate += pools.tokens[pending.prompt.id]
        bound = worst_case_tokens(endpoint, pending.prompt)
        read, written = read + bound[0], written + bound[1]
    held_out = f", {calls['opponent']:,} of them about held-out prompts" if calls["opponent"] else ""
    sent = f"{images:,} images, {size:,} bytes" if images else f"{size:,} bytes"
    plan.add_lines(
        _HEADING,
        f"teacher: {calls.total():,} calls to {endpoint.model} at {endpoint.base_url}{held_out}, {sent}"
        + _describe_batching(endpoint),
        f"  about {estimate:,} tokens in (by the student's tokenizer)"
        + _format_cost(endpoint, (estimate, written), "with answers of full length about"),
        f"  at most {read:,} tokens in and {written:,} out" + _format_cost(endpoint, (read, written), "at most"),
    )
    _plan_caps(plan, endpoint, calls.total(), read, written, spent)


def _plan_training_requests(plan: Plan, config: Config, encoder: Encoder, pools: PromptPools, run: RunDir) -> None:
    """Add what training sends: nothing, except by the method in which the teacher scores every candidate."""
    settings, teacher = config.align, config.teacher
    if isinstance(config.student.engine, VllmEngine):
        plan.add_lines(_HEADING, *_describe_engine(config.student.engine, run))
    if not isinstance(settings, TeacherJudgeGrpo) or not isinstance(teacher, OpenAIEndpoint):
        others = " else" if isinstance(config.student.engine, VllmEngine) else ""
        plan.add_lines(_HEADING, f"Stage I and Stage II: nothing{others}")
        return
    calls = settings.groups_drawn(len(split_of_run(config, pools, run).training)) * settings.drawn
    question_tokens = sum(
        len(encoder.encode_literal(rating_turn(p.question, ""))) + _image_tokens(teacher, p) for p in pools.align
    ) / len(pools.align)
    read, written = int(calls * (question_tokens + settings.max_new_tokens)), calls * settings.max_tokens_per_score
    single = teacher.model_copy(update={"batch": False})
    plan.add_lines(
        _HEADING,
        "Stage I: nothing",
        f"Stage II: at most {calls:,} calls to {teacher.model} at {teacher.base_url}, one per candidate"
        + (", none of them in a batch" if teacher.batch else ""),
        f"  about {read:,} tokens in with candidates of full length, at most {written:,} out"
        + _format_cost(single, (read, written), "about"),
    )
    _plan_caps(plan, single, len(pools.train) + calls, read, written)


def _describe_engine(engine: VllmEngine, run: RunDir) -> list[str]:
    """Say what goes to the server that draws from the student."""
    place = "on this machine" if is_loopback(engine.base_url) else "on another machine"
    key = f"with the key in {engine.api_key_env}" if engine.api_key_env else "without a key"
    return [
        f"rollout engine: vLLM at {engine.base_url}, {place}, {key}, past any proxy",
        "  it is sent every prompt, held-out ones included, as token ids, and returns the completions",
        f"  it reads adapters in {run.path.absolute()}, where they are written before each step; no weights are sent",
    ]


def _plan_judge(plan: Plan, judge: OpenAIEndpoint, config: Config, encoder: Encoder, pools: PromptPools) -> None:
    """Add an estimate of what the judge is sent; the answers that it will judge do not exist yet."""
    per_prompt = (2 if config.evaluate.both_orders else 1) * (3 if isinstance(config.align, StageTwoSettings) else 2)
    calls = per_prompt * len(pools.held_out)
    texts = sum(len(encoder.encode_literal(judge_turn(p.question, p.reference or "", "", ""))) for p in pools.held_out)
    answers = config.evaluate.max_new_tokens + config.student.max_anchor_tokens
    images = sum(_image_tokens(judge, p) for p in pools.held_out)
    read = per_prompt * (texts + images + answers * len(pools.held_out))
    written = calls * judge.max_tokens_per_answer
    plan.add_lines(
        _HEADING,
        f"judge: at most {calls} calls to {judge.model} at {judge.base_url}" + _describe_batching(judge),
        f"  about {read:,} tokens in with answers of full length, at most {written:,} out"
        + _format_cost(judge, (read, written), "about"),
    )
    if config.evaluate.judge_retries:
        retries = config.evaluate.judge_retries
        plan.add_lines(_HEADING, f"  up to {retries} more for each reply that is no verdict (evaluate.judge_retries)")
    _plan_caps(plan, judge, calls, read, written)


def _image_tokens(endpoint: OpenAIEndpoint, prompt: Prompt) -> int:
    """Return the largest number of tokens that a prompt's images can take; every model counts them differently."""
    return sum(max_image_tokens(endpoint, image) for image in prompt.images)


def _describe_batching(endpoint: OpenAIEndpoint) -> str:
    return f", in batches at {endpoint.batch_discount:.0%} off, answered within a day" if endpoint.batch else ""


def _format_cost(endpoint: OpenAIEndpoint, tokens: tuple[int, int], bound: str) -> str:
    """Return what input and output tokens cost: one call at a time, and in batches if they are asked for."""
    if not (endpoint.input_price or endpoint.output_price):
        return "; no prices are configured"
    single, batched = token_cost(endpoint, *tokens), token_cost(with_batch_prices(endpoint), *tokens)
    if endpoint.batch:
        return f", {bound} {batched:,.2f} in cost in batches ({single:,.2f} without)"
    return f", {bound} {single:,.2f} in cost"


def _spent(run: RunDir, budget: str) -> dict[str, float]:
    """Return what a run has spent from a budget so far, by the key of the cap on it."""
    if is_blank(run.ledger):
        return {}
    with LedgerView(run.ledger) as ledger:
        totals = [ledger.totals(role) for role, owner in BUDGETS.items() if owner == budget]
    parts = {
        "max_calls": ("calls",),
        "max_tokens": ("input_tokens", "output_tokens"),
        "max_cost": ("cost", "unsettled_cost"),
    }
    return {cap: sum(total[name] for total in totals for name in names) for cap, names in parts.items()}


def _plan_caps(
    plan: Plan, endpoint: OpenAIEndpoint, calls: int, read: int, written: int, spent: Mapping[str, float] | None = None
) -> None:
    """Add the caps, and which of them may be reached by calls that come on top of what is `spent`."""
    spent = spent or {}
    cost = token_cost(with_batch_prices(endpoint) if endpoint.batch else endpoint, read, written)
    needed = {"max_calls": calls, "max_tokens": read + written, "max_cost": cost}
    caps = {name: cap for name in needed if (cap := getattr(endpoint, name)) is not None}
    listed = ", ".join(f"{name} {cap:,}" for name, cap in caps.items())
    plan.add_lines(_HEADING, f"  hard caps: {listed or 'none'}")
    for name, cap in caps.items():
        if needed[name] and needed[name] + spent.get(name, 0) > cap:
            used = f", as {spent[name]:,.10g} of {cap:,} are spent" if spent.get(name) else ""
            later = "; what it holds back follows in further batches, as far as answers are cheaper" * endpoint.batch
            plan.add_lines(_HEADING, f"  the cap {name} may leave the last of these calls unsent{used}{later}")
    if endpoint.api_key_env and not os.environ.get(endpoint.api_key_env):
        plan.add_lines(_HEADING, f"  the environment variable {endpoint.api_key_env} is not set here")
