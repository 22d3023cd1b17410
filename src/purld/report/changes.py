"""Draw what training changed, prompt by prompt: right and wrong from model to model, and wins, ties and losses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path

from purld.display.titles import model_title
from purld.evaluation.judge import average_preferences
from purld.evaluation.recorded import Row, rows_to_verdicts
from purld.report.figures import COLOURS, STYLE, ReportFigure, figure_to_svg
from purld.report.markup import PageSection, escape_text, figure_grid
from purld.report.run_data import RunData
from purld.runs.open import final_model

# The states of a prompt from best to worst, with their colours.
_ONE_ANSWER = {"right": "right", "wrong": "wrong"}
_SEVERAL_ANSWERS = {"all right": "right", "some right": "labels", "none right": "wrong"}
_OUTCOMES = {"win": "right", "tie": "grid", "loss": "wrong"}
_SIZE = (4.2, 2.7)  # inches, as the small figures of training
_BAR = 0.2  # of the distance between two models
_GAP = 0.03  # between states, of a model's height
_LABELLED_FROM = 0.07  # of a bar's length; a shorter part has no number in it


def changes_section(runs: Sequence[RunData]) -> PageSection:
    """Return the section with the pictures of every run; empty where nothing was checked or judged."""
    parts = []
    for index, run in enumerate(runs):
        grid = figure_grid(draw_changes(run, f"changes{index}"))
        parts.append(f"<h3>{escape_text(run.name)}</h3>\n{grid}" if grid and len(runs) > 1 else grid)
    return PageSection("changes", "What training changed", "".join(parts))


def draw_changes(run: RunData, prefix: str) -> list[ReportFigure]:
    """Return the flow of greedy answers, that of sampled ones, and the judged outcomes, as far as they were measured.

    Args:
        run: the run.
        prefix: starts the ids of the figures.
    """
    models = _trained_models(run)
    figures = []
    for kind, answers in (("Greedy", run.greedy), ("Sampled", run.answers)):
        states = {model: _states(answers[model]) for model in models if model in answers}
        flow = {model: found for model, found in states.items() if found}
        if len(flow) > 1:
            svg = figure_to_svg(draw_flow(flow), f"{prefix}-{kind.lower()}")
            heading = f"{kind} answers, from model to model"
            figures.append(ReportFigure(heading, describe_flow(flow), svg))
    outcomes = {model: _count_outcomes(run.verdicts[model]) for model in models if model in run.verdicts}
    if any(counts.total() for counts in outcomes.values()):
        figures.append(_draw_outcomes(outcomes, prefix))
    return figures


def _trained_models(run: RunData) -> list[str]:
    """Return the run's models in the order of their training, the final one last."""
    models = ["base", "sft"] if run.method is None else ["base", "sft", final_model(run.method).name]
    return list(dict.fromkeys(models))


def _states(rows: Sequence[Row]) -> dict[str, str]:
    """Return the state of each prompt by its answers; empty if they were not checked."""
    checked: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if "correct" in row:
            checked[row["prompt_id"]].append(row["correct"])
    if any(len(right) > 1 for right in checked.values()):
        every, some, none = _SEVERAL_ANSWERS
        return {i: every if all(right) else some if any(right) else none for i, right in checked.items()}
    right_name, wrong_name = _ONE_ANSWER
    return {i: right_name if right[0] else wrong_name for i, right in checked.items()}


def _names_of_states(flow: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the names and colours of the states, from best to worst."""
    found = {state for states in flow.values() for state in states.values()}
    return _ONE_ANSWER if found <= _ONE_ANSWER.keys() else _SEVERAL_ANSWERS


def describe_flow(flow: Mapping[str, Mapping[str, str]]) -> str:
    """Describe in a sentence per step of training how many prompts it improved and how many it worsened."""
    order = list(_names_of_states(flow))
    sentences = []
    for before, after in pairwise(flow):
        shared = flow[before].keys() & flow[after].keys()
        moves = [order.index(flow[before][i]) - order.index(flow[after][i]) for i in shared]
        better, worse = sum(move > 0 for move in moves), sum(move < 0 for move in moves)
        names = f"{model_title(before)} to {model_title(after)}"
        sentences.append(f"{names}: {better} of {len(moves)} prompts better, {worse} worse.")
    return " ".join(sentences)


def draw_flow(flow: Mapping[str, Mapping[str, str]]) -> Figure:
    """Draw a column of states per model, and between columns how many prompts went from state to state.

    Args:
        flow: by model, in the order of training, the state of each prompt.
    """
    colours = _names_of_states(flow)
    with rc_context(STYLE):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-0.7, len(flow) - 1 + 0.15)
        axes.set_ylim(1.01 + _GAP * (len(colours) - 1), -0.11)  # the best state on top
        for column, (model, states) in enumerate(flow.items()):
            tops = _tops(Counter(states.values()), colours)
            _draw_column(axes, column, Counter(states.values()), tops, colours)
            last = column == len(flow) - 1
            edge = column + _BAR / 2 if last else column
            axes.text(edge, -0.03, model_title(model), ha="right" if last else "center", va="bottom", weight="bold")
            if column == 0:
                _name_states(axes, Counter(states.values()), tops)
        for column, (before, after) in enumerate(pairwise(flow.values())):
            _draw_ribbons(axes, column, before, after, colours)
    return figure


def _tops(counts: Counter[str], order: Mapping[str, str]) -> dict[str, float]:
    """Return where each state of a column begins, downwards; a column is 1 high without its gaps."""
    tops, position = {}, 0.0
    for state in order:
        tops[state] = position
        position += counts[state] / counts.total() + _GAP
    return tops


def _draw_column(
    axes: Axes, column: int, counts: Counter[str], tops: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    for state, role in colours.items():
        height = counts[state] / counts.total()
        axes.add_patch(
            Rectangle((column - _BAR / 2, tops[state]), _BAR, height, facecolor=COLOURS[role], linewidth=0, zorder=2)
        )
        if height >= _LABELLED_FROM:
            middle = tops[state] + height / 2
            axes.text(
                column, middle, str(counts[state]), ha="center", va="center", color=COLOURS["paper"], weight="bold"
            )


def _name_states(axes: Axes, counts: Counter[str], tops: Mapping[str, float]) -> None:
    """Write the names of the states to the left of the first column, apart even where a state is empty."""
    lowest = -1.0
    for state, top in tops.items():
        lowest = max(top + counts[state] / counts.total() / 2, lowest + 0.1)
        axes.text(-_BAR / 2 - 0.06, lowest, state, ha="right", va="center", color=COLOURS["muted"])


def _draw_ribbons(
    axes: Axes, column: int, before: Mapping[str, str], after: Mapping[str, str], order: Mapping[str, str]
) -> None:
    """Draw how the prompts of one column's states spread over the next one's: changes in colour, the rest in grey."""
    shared = [i for i in before if i in after]
    flows = Counter((before[i], after[i]) for i in shared)
    starts = _tops(Counter(before.values()), order)
    ends = _tops(Counter(after.values()), order)
    ranks = {state: rank for rank, state in enumerate(order)}
    left, right = column + _BAR / 2, column + 1 - _BAR / 2
    for origin in order:
        for target in order:
            width = flows[origin, target] / len(shared) if shared else 0.0
            if width == 0:
                continue
            move = ranks[origin] - ranks[target]
            role = "right" if move > 0 else "wrong" if move < 0 else "grid"
            patch = PathPatch(
                _ribbon(left, starts[origin], right, ends[target], width),
                facecolor=COLOURS[role],
                alpha=0.45 if move else 0.9,
                linewidth=0,
                zorder=1.5 if move else 1,
            )
            axes.add_patch(patch)
            starts[origin] += width
            ends[target] += width


def _ribbon(left: float, top_left: float, right: float, top_right: float, width: float) -> Path:
    middle = (left + right) / 2
    corners = [
        (left, top_left),
        *((middle, top_left), (middle, top_right), (right, top_right)),
        (right, top_right + width),
        *((middle, top_right + width), (middle, top_left + width), (left, top_left + width)),
        (left, top_left),
    ]
    curve = [Path.CURVE4] * 3
    return Path(corners, [Path.MOVETO, *curve, Path.LINETO, *curve, Path.CLOSEPOLY])


def _count_outcomes(rows: Sequence[Row]) -> Counter[str]:
    """Count a model's judged prompts by outcome; both orders of an answer, and all samples of a prompt, are one."""
    wins = average_preferences(rows_to_verdicts(rows)).wins.values()
    return Counter("tie" if won == 0.5 else "win" if won > 0.5 else "loss" for won in wins if won is not None)


def _draw_outcomes(outcomes: Mapping[str, Counter[str]], prefix: str) -> ReportFigure:
    """Draw a bar of wins, ties and losses per model."""
    with rc_context(STYLE):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(len(outcomes) - 0.6, -1.1)
        for row, (model, counts) in enumerate(outcomes.items()):
            axes.text(0, row - 0.3, model_title(model), ha="left", va="bottom", weight="bold")
            _draw_outcome_bar(axes, row, counts)
        handles = [Patch(color=COLOURS[role], label=name) for name, role in _OUTCOMES.items()]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1.0), ncols=3, handlelength=0.8)
    judged = max(counts.total() for counts in outcomes.values())
    caption = f"Answers to {judged} prompts against the opponent's. An answer that wins in one order only is a tie."
    return ReportFigure("Wins, ties and losses", caption, figure_to_svg(figure, f"{prefix}-outcomes"))


def _draw_outcome_bar(axes: Axes, row: int, counts: Counter[str]) -> None:
    start = 0.0
    for name, role in _OUTCOMES.items():
        share = counts[name] / max(1, counts.total())
        axes.barh(row, share, left=start, height=0.5, color=COLOURS[role])
        if share >= _LABELLED_FROM:
            ink = COLOURS["ink" if role == "grid" else "paper"]
            axes.text(start + share / 2, row, f"{share:.0%}", ha="center", va="center", color=ink, weight="bold")
        start += share
