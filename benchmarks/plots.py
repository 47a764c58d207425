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
    """A model in the plot of size against quality."""

    label: str
    stored_bytes: int
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


def importance_plot(candidates: Sequence[Mapping[str, Any]], removed: Sequence[int]) -> str:
    """The score without each layer, one line a round; the layer that went is marked.

    Args:
        candidates: lines of importance.jsonl (round, layer, metric, score).
        removed: layers in the order they went.
    """
    candidates = [row for row in candidates if row.get("score") is not None]
    rounds = sorted({int(row["round"]) for row in candidates})
    metric = str(candidates[0]["metric"])

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for place, number in enumerate(rounds):
            rows = sorted((r for r in candidates if r["round"] == number), key=lambda r: r["layer"])
            shade = str(0.75 - 0.6 * place / max(1, len(rounds) - 1))
            layers, scores = [r["layer"] for r in rows], [r["score"] for r in rows]
            axes.plot(layers, scores, "-o", color=shade, markersize=3, linewidth=1)
            for row in rows:
                if place < len(removed) and row["layer"] == removed[place]:
                    axes.plot(row["layer"], row["score"], "o", color=_ACCENT, markersize=6)
                    axes.annotate(
                        f"round {place + 1}",
                        (row["layer"], row["score"]),
                        xytext=(4, 5),
                        textcoords="offset points",
                        fontsize=7,
                    )
        axes.set_xlabel("decoder layer left out (teacher's numbers)")
        axes.set_ylabel(f"{metric} without it")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Layer importance: the marked layer went, darker lines are later rounds")

    return _svg(draw)


def size_plot(points: Sequence[Point], metric: str) -> str:
    """Stored size against quality with the retention interval and the Pareto front."""

    def draw(axes: "Axes") -> None:
        front = pareto_front([(p.stored_bytes, p.score) for p in points])
        steps = sorted(points[index].stored_bytes for index in front)
        scores = [max(p.score for p in points if p.stored_bytes <= step) for step in steps]
        megabytes = [step / 1e6 for step in steps]
        axes.step(megabytes, scores, where="post", color=_MUTED, linewidth=1, label="Pareto front")
        for index, point in enumerate(points):
            low = point.score if point.low is None else min(point.low, point.score)
            high = point.score if point.high is None else max(point.high, point.score)
            axes.errorbar(
                point.stored_bytes / 1e6,
                point.score,
                yerr=[[point.score - low], [high - point.score]],
                fmt="o",
                capsize=3,
                color=_INK if index in front else _MUTED,
            )
            axes.annotate(
                point.label,
                (point.stored_bytes / 1e6, point.score),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xlabel("stored size in MB (whole directory)")
        axes.set_ylabel(metric)
        axes.set_xlim(left=0)
        axes.margins(x=0.2, y=0.15)
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw)


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
