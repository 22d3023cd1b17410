"""Several processes that work on one run, started by a launcher of the torch ecosystem; purld has none of its own.

Inside `together` the processes (ranks) of a job work as one: rank 0 alone locks, pays, writes and prints; the others
compute their share and meet it in the functions below. With one process these cost nothing. An error in one rank ends
all of them (`purld.ranks.board`).

The libraries below (accelerate, transformers) are not told of the other processes: every rank runs the same trainer on
the same batches and takes its share of each, so checkpoints do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from purld.errors import UserError, reason_of
from purld.ranks.board import Board
from purld.ranks.launch import (
    PLACES,
    Place,
    UnconnectedError,
    connect_group,
    meet_others,
    read_place,
    refuse_other_sharding,
)
from purld.ranks.lockstep import LockStep
from purld.signals import Stopped, ignored_signals

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

T = TypeVar("T")

_PATIENCE = 5.0  # seconds to wait for what another rank says of its failure, where a connection is lost
_BUCKET = 2**26  # numbers that are summed in one message, 256 MiB in float32
_LOST_PEER = re.compile(r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|TCPStore")

Describe = Callable[[BaseException], tuple[str, int]]
"""Returns the sentence about an error and the exit status."""


class PeerError(UserError):
    """Another process of the job has failed; the message is its sentence.

    Args:
        sentence: what it said.
        status: its exit status.
    """

    def __init__(self, sentence: str, status: int = 2) -> None:
        super().__init__(sentence)
        self.status = status


_job: _Job | None = None
_alone = 0  # how many blocks of `working_alone` this process is in
_silent = False  # whether another process says how the job ended
_broken = False  # whether the job failed, so that the libraries may hang when the interpreter exits


def _meeting() -> _Job | None:
    """Return the job whose ranks meet here; None in a process that works alone."""
    return None if _alone else _job


def count() -> int:
    """Return the number of processes that share the work."""
    job = _meeting()
    return 1 if job is None else job.place.world


def index() -> int:
    """Return this process's rank, from 0."""
    job = _meeting()
    return 0 if job is None else job.place.rank


def is_first() -> bool:
    """Return whether this process is rank 0, which alone locks, pays, writes and prints."""
    return index() == 0


@contextlib.contextmanager
def working_alone() -> Iterator[None]:
    """Let the functions of this module be those of a single process in the block: no other rank takes part in it."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def my_share(length: int) -> slice:
    """Return this rank's part of `length` things; parts differ by one thing at most, and some may be empty."""
    return slice(length * index() // count(), length * (index() + 1) // count())


def on_first(work: Callable[[], T]) -> T:
    """Call `work` in rank 0, which works alone in it, and return its value in every rank; all wait for it.

    Raises:
        PeerError: it failed in rank 0, which raises the error itself.
    """
    job = _meeting()
    return work() if job is None else job.on_first(work)


def gather_rows(rows: Sequence[T]) -> list[T]:
    """Return every rank's rows, in the order of the ranks; tensors in them are then on this rank's device."""
    job = _meeting()
    return list(rows) if job is None else job.gather(rows)


def gather_with_offset(rows: Sequence[T]) -> tuple[int, list[T]]:
    """Return every rank's rows in the order of the ranks, and the place there of this rank's first one."""
    counts = gather_rows([len(rows)])
    return sum(counts[: index()]), gather_rows(rows)


def barrier() -> None:
    """Wait until every rank is here."""
    gather_rows(())


def lock_step() -> LockStep:
    """Return the meeting of the ranks before each collective of a model whose weights are sharded.

    Raises:
        RuntimeError: this process works alone, and the other ranks take part in nothing.
    """
    job = _meeting()
    if job is None:
        raise RuntimeError("a model that is sharded over the ranks was used in one of them alone")
    return job.lock_step


@contextlib.contextmanager
def shown_to_libraries() -> Iterator[None]:
    """Tell libraries of the other ranks for the block, as a launcher does, so that they divide what they load."""
    job = _meeting()
    if job is None:
        yield
        return
    with job.shown_to_libraries():
        yield


def is_sharded(values: object) -> bool:
    """Return whether something is a tensor of which every rank holds a part."""
    return hasattr(values, "device_mesh")


def local_part(values: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is sharded over the ranks; any other tensor as it is."""
    return cast("Tensor", cast(Any, values).to_local()) if is_sharded(values) else values


def sum_tensor(values: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    job = _meeting()
    if job is not None:
        job.reduce(values)
    return values


def sum_gradients(weights: Iterable[Parameter]) -> None:
    """Sum the gradients of trained weights over the ranks.

    A rank without a gradient, because its groups were left out, adds zeros; a weight without one in every rank keeps
    none, as in a single process. Weights that are sharded over the ranks are left alone: their gradients are summed in
    the backward pass, and are whole when this returns.
    """
    job = _meeting()
    if job is not None:
        job.lock_step.settle()
        _sum_gradients([w for w in weights if w.requires_grad and not is_sharded(w)])


def _sum_gradients(weights: Sequence[Parameter]) -> None:
    import torch

    if not weights:
        return
    found = torch.tensor([w.grad is not None for w in weights], dtype=torch.int32, device=weights[0].device)
    used = [w for w, number in zip(weights, sum_tensor(found).tolist(), strict=True) if number]
    for bucket in _buckets(used):
        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in bucket]
        summed = sum_tensor(torch.cat([part.reshape(-1) for part in parts]))
        for weight, part in zip(bucket, summed.split([w.numel() for w in bucket]), strict=True):
            weight.grad = part.view_as(weight)


def _buckets(weights: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Yield neighbouring weights of one dtype and device, together no larger than a bucket if several."""
    bucket: list[Parameter] = []
    for weight in weights:
        size = sum(w.numel() for w in bucket) + weight.numel()
        if bucket and (size > _BUCKET or (weight.dtype, weight.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def check_same_weights(weights: Iterable[Parameter]) -> None:
    """Check that the trained weights are the same in every rank, by their sums; sharded ones are left out.

    Raises:
        UserError: they are not.
    """
    if count() > 1:
        check_same(
            "the trained weights",
            [float(w.detach().double().sum()) for w in weights if w.requires_grad and not is_sharded(w)],
        )


def check_same(what: str, value: object) -> None:
    """Check that a value is the same in every rank.

    Raises:
        UserError: it is not; `what` is the subject of the sentence, in the plural.
    """
    if count() == 1:
        return
    values = gather_rows([value])
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise UserError(
            f"{what} differ between process 0 and process {others[0]} of {count()}; give every machine the same files "
            "and the same versions of the libraries."
        )


@contextlib.contextmanager
def together(describe: Describe | None = None, interrupt: bool = False) -> Iterator[None]:
    """Join the other processes of the job for the block, and end with them.

    An error in one of them is raised in all: where it happened as it is, elsewhere as `PeerError`. A process that
    works alone, or has joined already, only runs the block.

    Args:
        describe: returns the sentence and the exit status that the others hear of an error in this process.
        interrupt: end the work of this process by SIGTERM when another one has failed, whose handler must raise.

    Raises:
        UserError: the others cannot be reached.
    """
    global _broken, _job, _silent
    place = read_place() if _job is None else None
    if place is None:
        yield
        return
    _broken = _silent = False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it prints a stack for every connection that ends
    job = _Job(place, interrupt)
    try:
        with job.hidden_from_libraries():
            refuse_other_sharding()
            _job = job
            yield
            barrier()
    except BaseException as error:
        told = _end_job(job, error, describe or _describe_plainly)
        if told is error:
            raise
        raise told from None
    finally:
        _job = None
        with ignored_signals():
            job.close()


def _end_job(job: _Job, error: BaseException, describe: Describe) -> BaseException:
    try:
        with ignored_signals():
            return job.fail(error, describe)
    except Stopped:  # a signal came in the moment before
        with ignored_signals():
            return job.fail(error, describe)


def _describe_plainly(error: BaseException) -> tuple[str, int]:
    return (str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason_of(error)}"), 2


def _give_up(error: UnconnectedError) -> None:
    """Note that the job failed before it began, and whether another process says so."""
    global _broken, _silent
    _broken, _silent = True, not error.is_first


class _Job:
    """The processes of a job, from when they have met until they part."""

    def __init__(self, place: Place, interrupt: bool) -> None:
        import torch
        import torch.distributed

        dist: Any = torch.distributed  # its stubs leave out what it exports
        self.place = place
        self._owned = not dist.is_initialized()
        if self._owned:
            base = meet_others(place)
            if torch.cuda.is_available():
                torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        else:  # Ray Train and scripts of one's own have met before
            base = dist.distributed_c10d._get_default_store()
        try:
            self._objects = connect_group(place, base, self._owned)
        except UnconnectedError as error:
            _give_up(error)
            raise
        self.lock_step = LockStep(self._exchange)
        self._board = Board(base, place, interrupt, lambda: _alone > 0)

    @contextlib.contextmanager
    def hidden_from_libraries(self) -> Iterator[None]:
        """Hide the launcher's variables from libraries, and from commands that are started, for the block."""
        variables = [name for names in PLACES for name in names]
        hidden = {name: os.environ.pop(name) for name in variables if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(hidden)

    @contextlib.contextmanager
    def shown_to_libraries(self) -> Iterator[None]:
        """See `shown_to_libraries`."""
        import torch

        place, gpus = self.place, torch.cuda.device_count()
        local_rank = place.local_rank % gpus if gpus else place.local_rank
        shown = {"RANK": str(place.rank), "WORLD_SIZE": str(place.world), "LOCAL_RANK": str(local_rank)}
        os.environ.update(shown)
        try:
            yield
        finally:
            for name in shown:
                os.environ.pop(name, None)

    def _exchange(self, number: int) -> list[int]:
        """Return every rank's number."""
        import torch
        import torch.distributed

        dist: Any = torch.distributed
        numbers = torch.empty(self.place.world, dtype=torch.int64)
        dist.all_gather_single(numbers, torch.tensor([number]), group=self._objects)
        return cast("list[int]", numbers.tolist())

    def on_first(self, work: Callable[[], T]) -> T:
        """See `on_first`."""
        import torch.distributed as dist

        self.lock_step.settle()
        box: list[Any] = [None, True]
        if self.place.rank == 0:
            try:
                with working_alone():
                    box[0] = work()
            except BaseException:
                with contextlib.suppress(Exception):  # another rank may have ended as well
                    dist.broadcast_object_list([None, False], src=0, group=self._objects)
                raise
        dist.broadcast_object_list(box, src=0, group=self._objects)
        if not box[1]:
            raise PeerError("process 0 has failed")
        return cast(T, box[0])

    def gather(self, rows: Sequence[T]) -> list[T]:
        """See `gather_rows`."""
        import torch
        import torch.distributed as dist

        self.lock_step.settle()
        packed = io.BytesIO()
        torch.save(list(rows), packed)  # unlike pickle, it lets the reader choose a tensor's device
        parts: list[Any] = [None] * self.place.world
        dist.all_gather_object(parts, packed.getvalue(), group=self._objects)
        return [row for part in parts for row in torch.load(io.BytesIO(part), _to_own_device, weights_only=False)]

    def reduce(self, values: Tensor) -> None:
        """See `sum_tensor`."""
        import torch.distributed as dist

        self.lock_step.settle()
        dist.all_reduce(values, group=self._objects if values.device.type == "cpu" else None)

    def fail(self, error: BaseException, describe: Describe) -> BaseException:
        """Tell the others of an error, or learn of theirs, and return the error to raise here."""
        global _broken, _silent
        _broken = True
        self._board.stop_interrupting()
        if not isinstance(error, UserError) or isinstance(error, PeerError):
            # A lost connection is what a failure elsewhere looks like; a signal may come from our own watch.
            told = self._board.wait_for_failure(_PATIENCE if isinstance(error, Exception) else 0.0)
            if told is not None:
                _silent = self.place.rank != 0
                return PeerError(*told)
        if isinstance(error, Exception) and not isinstance(error, UserError) and _LOST_PEER.search(str(error)):
            error = UserError(
                "another process of this job has ended without a word, as one does that is killed, by hand or for its "
                "memory; the system's log says why, and the same command continues."
            )
        sentence, status = describe(error)
        _silent = self._board.announce(sentence, status) and self.place.rank != 0
        return error

    def close(self) -> None:
        """Leave the group, unless somebody else made it; a rank that waits for this one in it hears that it is gone."""
        import torch
        import torch.distributed as dist

        waits = _broken and torch.cuda.is_available()  # NCCL would wait for the others before it leaves
        if self._owned and not waits:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        self._board.part()


def _to_own_device(storage: Any, location: str) -> Any:
    return storage if location == "cpu" else storage.cuda()


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Drop what this process prints in the block if a launcher started it as another rank than 0."""
    place = read_place()
    if place is None or place.rank == 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(null))
        stack.enter_context(contextlib.redirect_stderr(null))
        yield


def print_ending(sentence: str) -> None:
    """Print how the command ended, unless another process says it."""
    if not _silent:
        print(sentence, file=sys.stderr)


def exit_process(status: int) -> NoReturn:
    """End the process; after a failure without waiting for libraries whose collectives will never end."""
    if _broken:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
