"""Processes that work as one: what each computes meets in order, rank 0 alone acts, and an error ends all of them."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from rank_processes import run_ranks

from purld import ranks
from purld.errors import UserError
from purld.ranks import launch
from purld.ranks.launch import Place, first_host, read_place


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "2"}, None),  # left over in a shell: no launcher sets it alone
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(3, 4, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # in the script of sbatch itself
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, Place(2, 4, 0)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Place(1, 2, 1)),
    ],
)
def test_a_place_as_each_launcher_names_it(environment, place):
    assert read_place(environment) == place


def test_a_place_that_is_no_number_is_told():
    with pytest.raises(UserError, match="RANK=a, WORLD_SIZE=2"):
        read_place({"RANK": "a", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu7", "gpu7"), ("gpu[03-05,9],login", "gpu03"), ("a-1,b", "a-1"), ("n[1-2].x.org", "n1.x.org")],
)
def test_the_first_host_of_slurms_list(nodes, host):
    assert first_host(nodes) == host


def test_a_single_process_only_does_its_work():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = gradient = torch.full((2,), 3.0)
    with ranks.together():
        assert (ranks.count(), ranks.index(), ranks.my_share(5)) == (1, 0, slice(0, 5))
        assert ranks.on_first(lambda: 7) == 7 and ranks.gather_rows([1, 2]) == [1, 2]
        ranks.sum_gradients([weight])
    assert weight.grad is gradient


def shared_work():
    rank = ranks.index()
    shares = [list(range(n))[ranks.my_share(n)] for n in (5, 1)]
    both, one, none, frozen = (torch.nn.Parameter(torch.ones(size)) for size in (3, 2, 1, 1))
    frozen.requires_grad_(False)
    both.grad = torch.full((3,), float(rank + 1))
    if rank == 1:
        one.grad = torch.full((2,), 5.0)
    ranks.sum_gradients([both, one, none, frozen])
    offset, rows = ranks.gather_with_offset(["a", "b"] if rank == 0 else [torch.ones(1)])
    alone = ranks.on_first(lambda: (ranks.count(), ranks.gather_rows([rank]), ranks.on_first(lambda: "inside")))
    with pytest.raises(UserError, match=r"the prompts differ between process 0 and process 1 of 2"):
        ranks.check_same("the prompts", rank)
    ranks.check_same("the prompts", "equal")
    return {
        "shares": shares,
        "gradients": [None if w.grad is None else w.grad.tolist() for w in (both, one, none)],
        "offset": offset,
        "rows": [row if isinstance(row, str) else row.tolist() for row in rows],
        "alone": alone,
        "variables": [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ],
    }


def test_two_processes_share_work_and_meet():
    first, second = run_ranks(shared_work)
    assert (first["shares"], second["shares"]) == ([[0, 1], []], [[2, 3, 4], [0]])
    for outcome, offset in ((first, 0), (second, 2)):
        assert outcome["gradients"] == [[3.0] * 3, [5.0] * 2, None]
        assert (outcome["offset"], outcome["rows"]) == (offset, ["a", "b", [1.0]])
        assert outcome["alone"] == (1, [0], "inside")  # in it, rank 0 is a process of its own
        assert outcome["variables"] == []  # no library takes itself for one of several


def join_under_srun():
    """As srun starts a process: without RANK, WORLD_SIZE and LOCAL_RANK."""
    rank = os.environ.pop("RANK")
    os.environ |= {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": os.environ.pop("WORLD_SIZE"), "SLURM_LOCALID": rank}
    del os.environ["LOCAL_RANK"]
    with ranks.together():
        ranks.barrier()
    return read_place()


def test_a_process_keeps_the_place_that_its_launcher_gave_it():
    """By its rank on its machine it takes a GPU of its own, also the next time."""
    assert run_ranks(join_under_srun, joins=False) == [Place(rank, 2, rank) for rank in (0, 1)]


def failing_work(where, how):
    def work():
        ranks.barrier()  # while the group connects, whoever waits for a process that is gone is ended by the launcher
        if ranks.index() == where:
            how()
        ranks.gather_rows([torch.ones(1)])
        time.sleep(60)

    return work


def give_up():
    raise UserError("run.yaml: no such prompts.")


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_sentence(where):
    outcomes = run_ranks(failing_work(where, give_up))
    own, other = outcomes[where], outcomes[1 - where]
    assert type(own) is UserError and str(own) == "run.yaml: no such prompts."
    assert isinstance(other, ranks.PeerError) and other.status == 2
    assert str(other) == ("run.yaml: no such prompts." if where == 0 else str(other))
    assert where == 0 or ("process 1 of 2 on " in str(other) and str(other).endswith(": run.yaml: no such prompts."))


def test_an_error_of_rank_0_alone_reaches_those_who_wait_for_its_value():
    def work():
        ranks.on_first(give_up)

    own, other = run_ranks(work)
    assert type(own) is UserError and isinstance(other, ranks.PeerError)
    assert str(own) == str(other) == "run.yaml: no such prompts."


def test_a_process_that_is_killed_is_told_by_the_others():
    killed, other = run_ranks(failing_work(0, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert killed is None
    assert isinstance(other, UserError) and "ended without a word" in str(other)


@pytest.mark.parametrize(("gone", "connected"), [(2, "init_process_group"), (0, "new_group")])
def test_a_process_that_is_killed_while_they_connect_is_not_waited_for(gone, connected):
    """Of three, one ends when all have arrived, or in the middle of connecting; one of the others says so."""

    def work():
        launch._CONNECTING = timedelta(seconds=1)
        if int(os.environ["RANK"]) == gone:
            setattr(torch.distributed, connected, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        with ranks.together():
            return "connected"

    def tell():
        try:
            return work()
        except UserError as error:
            return str(error), ranks._silent

    started = time.monotonic()
    outcomes = run_ranks(tell, count=3, joins=False)
    assert time.monotonic() - started < 60 and outcomes.pop(gone) is None
    assert all("gone before all were connected" in sentence for sentence, _ in outcomes)
    # The one that is gone may have held the store, and then nobody can know what the others do.
    assert sorted(silent for _, silent in outcomes) in ([[False, True]] if gone else [[False, True], [False, False]])


def test_once_connected_they_wait_for_as_long_as_it_takes():
    def work():
        launch._CONNECTING = timedelta(seconds=1)
        with ranks.together():
            if ranks.is_first():
                time.sleep(2)
            ranks.sum_tensor(torch.ones(1))
            return ranks.gather_rows([ranks.index()])

    assert run_ranks(work, joins=False) == [[0, 1], [0, 1]]


def test_processes_that_have_met_already_work_together_and_stay_as_they_are():
    """As under Ray Train, or in a script of one's own that calls the Python API."""

    def work():
        group = torch.distributed
        store = group.TCPStore("127.0.0.1", int(os.environ["OTHER_PORT"]), 2, os.environ["RANK"] == "0")
        group.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
        with ranks.together():
            rows = ranks.gather_rows([ranks.index()])
        return rows, group.is_initialized(), os.environ["WORLD_SIZE"]

    assert run_ranks(work, joins=False) == [([0, 1], True, "2")] * 2


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "accelerate's FSDP")]
)
def test_other_ways_to_shard_are_refused(variable, name, monkeypatch):
    monkeypatch.setenv(variable, "true")
    for outcome in run_ranks(lambda: "never reached"):
        assert isinstance(outcome, UserError) and f"{name} is not supported" in str(outcome)
