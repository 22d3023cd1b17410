"""Go through hours of cases that can be stopped and go on.

PURLD_TEST_CASES names a file that gets one line for each case, {"test", "case", "wrong"}; cases that were right are not
run again. Without it, all run. Of cases that repeat each other, tests take some; PURLD_TEST_REPEATED asks for `all` of
them, or for `one` of each class.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

REPEATED = os.environ.get("PURLD_TEST_REPEATED", "some")
Case = Sequence[object]


def wrong_cases(test: str, cases: Iterable[Case], check: Callable[..., object]) -> list[str]:
    """Call `check` with each case that was not right before; return a line for each that raised.

    Args:
        test: the name under which the cases are kept.
        cases: the arguments of `check`, of JSON's types.
        check: raises if something is wrong.
    """
    log = Path(os.environ.get("PURLD_TEST_CASES", os.devnull))
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    right = {tuple(row["case"]) for row in rows if row["test"] == test and not row["wrong"]}
    found = []
    for case in (case for case in cases if tuple(case) not in right):
        wrong = None
        try:
            check(*case)
        except (Exception, AssertionError) as error:
            wrong = f"{type(error).__name__}: {str(error)[:900]}"
            found.append(f"{case}: {wrong}")
        with log.open("a") as handle:
            handle.write(json.dumps({"test": test, "case": list(case), "wrong": wrong}) + "\n")
    return found
