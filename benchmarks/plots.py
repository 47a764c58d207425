"""Plots of a report, as SVG text that is the same in every run."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halve.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _ACCENT = "#1b1f24", "#8a929c", "#b3261e"


@dataclass(frozen=True)
class Point:
    """A model in a plot of what it costs against its quality."""

    label: str
    cost: float
    """Stored megabytes, milliseconds a token, …"""
    score: float
    low: float | None = None
    """Ends of the score's interval: retention's, times the teacher's score."""
    high: float | None = None


def _svg(draw: Callable[["Axes"], None], width_in: float = 7.0, height_in: float = 4.0) -> str:
    """Draws on one pair of axes; no date and fixed ids, so that reports can be compared by hash."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "bench") from None
    with matplotlib.rc_context({"svg.hashsalt": "halve", "font.size": 9, "axes.edgecolor": _MUTED}):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def importance_plot(
    candidates: Sequence[Mapping[str, Any]],
    removed: Sequence[int],
    baseline: float | None = None,
) -> str:
    """The score without each layer, one line a round; the layers that went are marked.

    Candidates that a method settled early have hollow marks and no line: a bound lies above the true
    score, a race's score is of the segments seen.

    Args:
        candidates: lines of importance.jsonl (round, layer, metric, score; settled, better).
        removed: layers in the order they went.
        baseline: the score with every layer.
    """
    rows = [row for row in candidates if row.get("score") is not None]
    rounds = sorted({int(row["round"]) for row in rows})
    lower = rows[0].get("better") == "lower"
    what = "lower" if lower else "higher"

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        if baseline is not None:
            axes.axhline(
                baseline, color=_MUTED, linewidth=0.8, linestyle=":", label="every layer kept"
            )
        for place, number in enumerate(rounds):
            of_round = sorted((r for r in rows if r["round"] == number), key=lambda r: r["layer"])
            shade = str(0.75 - 0.6 * place / max(1, len(rounds) - 1))
            _draw_round(axes, of_round, _gone(rows, removed, rounds, place), shade, place + 1)
        axes.set_xlabel("decoder layer left out (teacher's numbers)")
        axes.set_ylabel(f"{rows[0]['metric']} without it ({what} goes first)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Layer importance: the marked layer went, darker lines are later rounds")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if handles:
            axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)

    return _svg(draw)


_SETTLED = {
    "bound": ("v", "settled: its score is at most this"),
    "race": ("o", "stopped early: score on the segments seen"),
}


def _gone(
    rows: Sequence[Mapping[str, Any]], removed: Sequence[int], rounds: Sequence[int], place: int
) -> set[int]:
    """The layers that went in a round; a block is marked where it begins."""
    if len(rounds) > 1 or len(removed) < 2 or rows[0]["metric"] == "angular":
        return set(removed[place : place + 1])
    return set(removed)


def _draw_round(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], gone: set[int], shade: str, number: int
) -> None:
    complete = [row for row in rows if "settled" not in row]
    axes.plot(
        [row["layer"] for row in complete],
        [row["score"] for row in complete],
        "-o",
        color=shade,
        markersize=3,
        linewidth=1,
    )
    for row in rows:
        point = (row["layer"], row["score"])
        if "settled" in row:
            marker, label = _SETTLED.get(row["settled"], ("s", str(row["settled"])))
            axes.plot(
                *point,
                marker,
                markerfacecolor="none",
                color=shade,
                markersize=4,
                linestyle="none",
                label=label,
            )
        if row["layer"] in gone:
            axes.plot(*point, "o", color=_ACCENT, markersize=6)
            axes.annotate(
                f"round {number}", point, xytext=(4, 5), textcoords="offset points", fontsize=7
            )


def tradeoff_plot(points: Sequence[Point], cost: str, metric: str) -> str:
    """What a model costs against its quality, with the retention interval and the Pareto front."""

    def draw(axes: "Axes") -> None:
        front = pareto_front([(p.cost, p.score) for p in points])
        steps = sorted(points[index].cost for index in front)
        scores = [max(p.score for p in points if p.cost <= step) for step in steps]
        axes.step(steps, scores, where="post", color=_MUTED, linewidth=1, label="Pareto front")
        for index, point in enumerate(points):
            low = point.score if point.low is None else min(point.low, point.score)
            high = point.score if point.high is None else max(point.high, point.score)
            axes.errorbar(
                point.cost,
                point.score,
                yerr=[[point.score - low], [high - point.score]],
                fmt="o",
                capsize=3,
                color=_INK if index in front else _MUTED,
            )
        _label(axes, points)
        axes.set_xlabel(cost)
        axes.set_ylabel(metric)
        axes.set_xlim(left=0)
        axes.margins(x=0.2, y=0.15)
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw)


def _label(axes: "Axes", points: Sequence[Point]) -> None:
    """Names beside the points; those of points that lie near each other go one above the other."""
    widest = max(point.cost for point in points) or 1.0
    spread = max(p.score for p in points) - min(p.score for p in points) or 1.0
    placed: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.cost, point.score)):
        x, y = point.cost / widest, point.score / spread
        lift = sum(
            abs(x - other_x) < 0.25 and abs(y - other_y) < 0.08 for other_x, other_y in placed
        )
        placed.append((x, y))
        axes.annotate(
            point.label,
            (point.cost, point.score),
            xytext=(6, 4 + 11 * lift),
            textcoords="offset points",
            fontsize=8,
        )


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points that no other beats: none is as small and better, or smaller and as good."""
    return {
        index
        for index, (cost, score) in enumerate(points)
        if not any(
            other_cost <= cost
            and other_score >= score
            and (other_cost, other_score) != (cost, score)
            for other_cost, other_score in points
        )
    }


def history_plot(rows: Sequence[Mapping[str, Any]], x: str, series: Sequence[str]) -> str:
    """Training curves: the first series on the left axis, the second on the right."""

    def draw(axes: "Axes") -> None:
        colours = (_INK, _ACCENT)
        panes = [axes, *(axes.twinx() for _ in series[1:2])]
        for pane, name, colour in zip(panes, series, colours, strict=False):
            known = [(row[x], row[name]) for row in rows if row.get(name) is not None]
            pane.plot(
                [k for k, _ in known], [v for _, v in known], "-", color=colour, linewidth=1.2
            )
            pane.set_ylabel(name, color=colour)
        axes.set_xlabel(x)

    return _svg(draw)


def bar_plot(labels: Sequence[str], values: Sequence[float], unit: str) -> str:
    """Horizontal bars, one a model."""

    def draw(axes: "Axes") -> None:
        places = range(len(labels))
        axes.barh(list(places), list(values), color=_MUTED)
        axes.set_yticks(list(places), list(labels))
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        for place, value in enumerate(values):
            axes.annotate(f" {value:.3g}", (value, place), va="center", fontsize=8, color=_INK)
        axes.margins(x=0.12)

    return _svg(draw, height_in=0.6 + 0.4 * len(labels))
