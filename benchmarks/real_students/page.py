"""Make the tables of docs/results-real.md from the rows of finished cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mini.stats import over_seeds

from purld.evaluation.accuracy import PairedDifference, paired_difference

Row = Mapping[str, Any]

HEADER = (
    "method",
    "settings",
    "sampled",
    "greedy",
    "sampled − SFT, over problems",
    "over seeds",
    "by seed",
    "KL",
    "prompts per hour of Stage II",
)


def method_table(rows: Sequence[Row], student: str, split: str) -> str:
    """Return one student's table: a method's shares of right answers, and its difference from p_sft.

    Args:
        rows: finished cells; those of other students and splits are left out.
        student: the student's name.
        split: `validation` or `test`.
    """
    chosen = [row for row in rows if row["student"] == student and row["split"] == split]
    p_sft = p_sft_by_seed(chosen)
    lines = [" | ".join(HEADER), " | ".join(["---"] * len(HEADER))]
    lines += [" | ".join(cells) for cells in _lines(chosen, p_sft)]
    return "\n".join(f"| {line} |" for line in lines)


def on_validation(rows: Sequence[Row]) -> list[Row]:
    """Return rows with their right answers to the validation problems in the place of those to the test problems."""
    return [{**row, **row["validation"]} for row in rows if "validation" in row]


def p_sft_by_seed(rows: Sequence[Row]) -> dict[tuple[int, str], Row]:
    """Return p_sft's cells of one student and split by seed and pool, which every difference is from.

    Raises:
        ValueError: two cells have the same seed and pool, so that it is not known which one a method started from.
    """
    cells = [row for row in rows if row["method"] == "SFT"]
    found = {(row["seed"], row["pool"]): row for row in cells}
    if len(found) < len(cells):
        raise ValueError(f"two cells of SFT on one seed among {[row['id'] for row in cells]}")
    return found


def best_on_validation(rows: Sequence[Row]) -> list[Row]:
    """Return p_sft's rows, and of each method those of the settings that answer most validation problems right.

    Answers to the test problems are not looked at. Settings are compared on the seeds that all of a method's settings
    have: the seeds' p_sft differ.

    Args:
        rows: cells of one student and split; older ones without answers to validation problems are left out.
    """
    rows = [row for row in rows if "validation" in row]
    shares: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        of_settings = shares.setdefault(row["method"], {}).setdefault(_settings(row), {})
        of_settings[row["seed"]] = float(np.mean(row["validation"]["right"]))
    best = {method: _best_settings(tried) for method, tried in shares.items()}
    return [row for row in rows if _settings(row) == best[row["method"]]]


def _best_settings(tried: Mapping[str, Mapping[int, float]]) -> str:
    """Return the settings with the highest mean over the seeds that all settings have.

    Without such a seed these are the settings with the most seeds.
    """
    shared = set.intersection(*(set(by_seed) for by_seed in tried.values()))
    if not shared:
        return max(tried, key=lambda settings: len(tried[settings]))
    return max(tried, key=lambda settings: np.mean([tried[settings][seed] for seed in shared]))


def _lines(rows: Sequence[Row], p_sft: Mapping[tuple[int, str], Row]) -> Iterator[list[str]]:
    """Yield the cells of every method with settings of its own, averaged over its seeds."""
    names = {(row["method"], _settings(row)): None for row in rows}
    for name in names:
        of_name = [row for row in rows if (row["method"], _settings(row)) == name]
        sampled, greedy = (np.mean([row[key] for row in of_name]) for key in ("right", "greedy"))
        yield [*name, f"{sampled:.3f}", f"{greedy:.3f}", *_differences(of_name, p_sft), *_costs(of_name)]


def _settings(row: Row) -> str:
    """Return what tells rows of one method apart."""
    return ", ".join(f"{key}={value}" for key, value in row["changed"].items())


def mean_difference(pairs: Sequence[tuple[Row, Row]], key: str) -> PairedDifference:
    """Return the difference of two cells' shares of right answers, means over seeds, paired over problems.

    Args:
        pairs: a cell and p_sft's of its seed, of every seed.
        key: `right` for the sampled answers, `greedy` for the greedy one.
    """
    ours, theirs = (np.mean([pair[side][key] for pair in pairs], axis=0)[:, None] for side in (0, 1))
    return paired_difference(ours, theirs)


def pairs_with_p_sft(rows: Sequence[Row], p_sft: Mapping[tuple[int, str], Row]) -> list[tuple[Row, Row]]:
    """Return cells, by seed, each with p_sft's cell that it started from; those without one are left out."""
    of_seed = sorted(rows, key=lambda row: row["seed"])
    return [(row, p_sft[row["seed"], row["pool"]]) for row in of_seed if (row["seed"], row["pool"]) in p_sft]


def differences_from_p_sft(rows: Sequence[Row]) -> dict[str, dict[str, PairedDifference]]:
    """Return each method's differences from p_sft, by the problems and the way of answering them.

    Args:
        rows: cells of one student on the test problems, of one setting for every method.
    """
    found: dict[str, dict[str, PairedDifference]] = {}
    for problems, measured in (("validation", on_validation(rows)), ("test", rows)):
        p_sft = p_sft_by_seed(measured)
        for method in dict.fromkeys(row["method"] for row in measured if row["method"] != "SFT"):
            pairs = pairs_with_p_sft([row for row in measured if row["method"] == method], p_sft)
            for answers, key in (("sampled", "right"), ("greedy", "greedy")):
                found.setdefault(method, {})[f"{problems} problems, {answers}"] = mean_difference(pairs, key)
    return found


def _differences(rows: Sequence[Row], p_sft: Mapping[tuple[int, str], Row]) -> list[str]:
    """Return the paired difference from p_sft over problems, over seeds, and of every seed."""
    pairs = pairs_with_p_sft(rows, p_sft)
    if not pairs or rows[0]["method"] == "SFT":
        return ["", "", ""]
    paired = mean_difference(pairs, "right")
    by_seed = [float(np.mean(row["right"]) - np.mean(base["right"])) for row, base in pairs]
    mean = over_seeds(by_seed)
    seeds = "" if mean.low is None else f"[{mean.low:+.3f}, {mean.high:+.3f}]"
    low, high = paired.interval
    return [f"{paired.mean:+.3f} [{low:+.3f}, {high:+.3f}]", seeds, ", ".join(f"{value:+.3f}" for value in by_seed)]


def _costs(rows: Sequence[Row]) -> list[str]:
    """Return the divergence from p_sft at the end and the prompts per hour of the stage."""
    divergences = [row["kl"] for row in rows if row["kl"] is not None]
    hours = [row["seconds"].get("align", 0.0) / 3600 for row in rows]
    prompts = [row["steps"] * row["prompts_per_step"] for row in rows if row["method"] != "SFT"]
    return [
        f"{np.mean(divergences):.3f}" if divergences else "",
        f"{sum(prompts) / sum(hours):.0f}" if prompts and sum(hours) else "",
    ]
