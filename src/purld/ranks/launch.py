"""What a launcher tells a process of its job: its rank, the number of processes, and where they meet.

`torchrun`, `accelerate launch`, Ray Train and SkyPilot use RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
srun and mpirun name a rank in variables of their own, and leave the address open.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from purld.errors import UserError, reason_of

_ARRIVAL = 600.0  # seconds for all processes of a job to start
_POLL = 0.1  # seconds between two looks at who has arrived
_CONNECTING = timedelta(seconds=120)  # for processes that have arrived to connect to each other
_LAST_TO_GO = 5.0  # seconds that rank 0 waits for the others where they are not connected
_FOREVER = timedelta(days=30)  # rank 0 may ask a teacher for days, while the others wait
# Where a process finds its rank, the number of processes and its rank on its machine.
PLACES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate launch, Ray Train, SkyPilot, Kubeflow
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; sbatch alone sets no number of a step's tasks
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
)


@dataclass(frozen=True)
class Place:
    """This process's place in its job: its rank of `world` processes, and its rank among those of its machine."""

    rank: int
    world: int
    local_rank: int


def read_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that a launcher gave this process; None for a process that works alone.

    Raises:
        UserError: the variables of a launcher are no numbers.
    """
    for names in PLACES:
        if all(environment.get(name) for name in names[:2]):
            values = [environment.get(name) or "0" for name in names]
            if not all(value.isdigit() for value in values):
                raise UserError(f"{names[0]}={values[0]}, {names[1]}={values[1]}: a launcher sets these to numbers.")
            place = Place(*map(int, values))
            return place if place.world > 1 else None
    return None


def meet_others(place: Place) -> Any:
    """Return the key-value store of the job once every process has arrived there.

    Raises:
        UserError: the address is missing or cannot be reached, or a process is missing.
    """
    import torch.distributed

    dist: Any = torch.distributed  # its stubs leave out what it exports
    _set_address(place)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        arrival = timedelta(seconds=_ARRIVAL)
        store, _, _ = next(iter(dist.rendezvous("env://", place.rank, place.world, timeout=arrival)))
        arrivals = dist.PrefixStore("purld/arrivals", store)
        arrived, started = int(arrivals.add("arrived", 1)), time.monotonic()
        while arrived < place.world and time.monotonic() - started < _ARRIVAL:
            time.sleep(_POLL)
            arrived = int(arrivals.add("arrived", 0))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: process {place.rank} of {place.world} cannot meet the others at {address} "
            f"({reason_of(error)[:120]}); the launcher sets both, and the port must be free and open between machines."
        ) from None
    if arrived < place.world:
        raise UserError(
            f"only {arrived} of {place.world} processes (WORLD_SIZE) came to {address} in {_ARRIVAL / 60:.0f} minutes; "
            "start all of them."
        )
    return store


class UnconnectedError(UserError):
    """A process that had arrived, and ended before all were connected; `is_first` says who is to print it."""

    def __init__(self, place: Place, is_first: bool) -> None:
        super().__init__(
            f"one of the {place.world} processes of this job was gone before all were connected, as one is that was "
            "killed (or a port is closed between machines); start the job again, and the same command continues."
        )
        self.is_first = is_first


def connect_group(place: Place, store: Any, with_default: bool) -> Any:
    """Connect the processes that have met, and return their group for objects, which travel between CPUs.

    Connecting is waited for as long as it may take; once connected, the groups wait for as long as rank 0 needs.

    Args:
        place: this process's place.
        store: the job's key-value store.
        with_default: whether torch's default group is to be made as well.

    Raises:
        UnconnectedError: a process did not connect.
    """
    import torch.distributed

    dist: Any = torch.distributed  # its stubs leave out what it exports
    try:
        if with_default:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=dist.PrefixStore("purld/group", store),
                rank=place.rank,
                world_size=place.world,
                timeout=_CONNECTING,
            )
        objects = dist.new_group(backend="gloo", timeout=_CONNECTING)
    except RuntimeError:
        raise UnconnectedError(place, _is_first_to_tell(store, place)) from None
    for group in (None, objects) if with_default else (objects,):
        dist.distributed_c10d._set_pg_timeout(_FOREVER, group)
    return objects


def _is_first_to_tell(store: Any, place: Place) -> bool:
    """Return whether no other process has told yet that the job is not connected; rank 0 waits for the others to ask.

    Its process may hold the store.
    """
    import torch.distributed

    dist: Any = torch.distributed  # its stubs leave out what it exports
    asked = dist.PrefixStore("purld/unconnected", store)
    try:
        is_first, started = int(asked.add("asked", 1)) == 1, time.monotonic()
        while place.rank == 0 and int(asked.add("asked", 0)) < place.world - 1:
            if time.monotonic() - started > _LAST_TO_GO:
                break
            time.sleep(_POLL)
    except RuntimeError:  # it has ended with its process
        return True
    return is_first


def _set_address(place: Place) -> None:
    """Set MASTER_ADDR and MASTER_PORT where srun or mpirun have left them open."""
    environment = os.environ
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        on_one_machine = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(place.world)
        if nodes:
            environment["MASTER_ADDR"] = first_host(nodes)
        elif on_one_machine:
            environment["MASTER_ADDR"] = "127.0.0.1"
        else:
            raise UserError("MASTER_ADDR is not set: give the host of process 0, as torchrun does by itself.")
    # Two jobs on one machine need two ports; every process of a job must come to the same.
    job = environment.get("SLURM_JOB_ID", "")
    environment.setdefault("MASTER_PORT", str(20000 + int(job) % 10000 if job.isdigit() else 29500))


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's list of nodes, such as `node[03-05,9],login`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def refuse_other_sharding() -> None:
    """Refuse plugins of accelerate that would shard the model behind the trainers' back."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise UserError(
            "DeepSpeed is not supported: under ZeRO-3 the gradients through a shared prompt are wrong; choose plain "
            "data parallelism in accelerate's configuration, and for a student that one device cannot hold set "
            "student.shard=fsdp (docs/scaling.md)."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise UserError(
            "accelerate's FSDP is not supported: it fails in the backward pass of a shared prompt; choose plain data "
            "parallelism in accelerate's configuration and set student.shard=fsdp (docs/scaling.md)."
        )
