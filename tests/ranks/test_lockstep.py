"""Ranks that need different collectives at different times take part in the same ones, in the same order."""

import random
import threading
from functools import partial

import pytest

from purld.ranks.lockstep import LockStep

COUNT = 3
KINDS = ("begin", "gather", "reduce")


class Exchange:
    """Ranks as threads: each tells its number, and all get those of all."""

    def __init__(self):
        self.barrier, self.numbers = threading.Barrier(COUNT, timeout=20), [0] * COUNT

    def of(self, rank):
        def exchange(number):
            self.numbers[rank] = number
            self.barrier.wait()
            numbers = list(self.numbers)
            self.barrier.wait()
            return numbers

        return exchange


class Unit:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def lend(self):
        self.log.append(("gather", self.name, False))

    def add_gradients(self):
        self.log.append(("reduce", self.name, False))


def run_passes(passes):
    """Return what each rank took part in (what, which unit, whether for itself), given each rank's requests."""
    exchange, logs = Exchange(), [[] for _ in range(COUNT)]

    def work(rank):
        log, steps = logs[rank], LockStep(exchange.of(rank))
        units = [Unit(number, log) for number in range(4)]
        numbers = [steps.add_unit(unit) for unit in units]
        for kind, unit in passes[rank]:
            done = ("reduce" if kind == "reduce" else "gather", unit, True)
            meet = steps.reduce if kind == "reduce" else steps.gather
            meet(numbers[unit], partial(log.append, done), *([True] if kind == "begin" else []))
        steps.settle()
        log.append("met")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [log.pop() for log in logs] == ["met"] * COUNT
    return logs


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_takes_part_in_the_same_collectives_and_runs_its_own_in_their_order(seed):
    draw = random.Random(seed)
    passes = [[(draw.choice(KINDS), draw.randrange(4)) for _ in range(draw.choice((0, 3, 30)))] for _ in range(COUNT)]
    logs = run_passes(passes)
    assert len({tuple((what, unit) for what, unit, _ in log) for log in logs}) == 1
    for log, wanted in zip(logs, passes, strict=True):
        own = [(what, unit) for what, unit, mine in log if mine]
        assert own == [("reduce" if kind == "reduce" else "gather", unit) for kind, unit in wanted]
    for taken in zip(*logs, strict=True):
        assert any(mine for _, _, mine in taken)  # nothing is gathered or summed for nobody


def test_ranks_that_begin_a_pass_together_gather_once_for_all():
    """Rank 0 is behind, in a backward pass; the others wait for it, and then all run the same layers."""
    forward = [("begin", 0), ("gather", 1), ("gather", 2)]
    logs = run_passes([[("gather", 2), ("gather", 1), *forward], forward, forward])
    assert [(what, unit) for what, unit, _ in logs[1]] == [("gather", unit) for unit in (2, 1, 0, 1, 2)]
