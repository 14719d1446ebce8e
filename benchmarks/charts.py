"""The charts of a report, each as SVG and PNG.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.results import Spread, model_text, size_text

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#5D3A9B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_LIMIT_COLOUR = "#000000"
_BINS = 20
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "deeplock_kernels",
}
SPEED = "speed in GB/s (10⁹ bytes)"

Points = Mapping[Any, Spread]


class Charts:
    """Writes charts into a folder.

    Parameters
    ----------
    folder
        Where to; it exists.
    caption
        What stands below each chart: the environment.
    """

    def __init__(self, folder: Path, caption: str) -> None:
        self._folder, self._caption = folder, caption
        self.names: list[str] = []

    def against_models(
        self,
        name: str,
        title: str,
        models: Mapping[str, int],
        series: Mapping[str, Points],
        limit: Points,
        limit_name: str = "the limit: XOR in place",
    ) -> str:
        """Draw speeds over models by size, with the limit as a dashed line."""
        with matplotlib.rc_context(_STYLE):
            figure, axes = _figure(9.0, 5.0)
            places = {model: index for index, model in enumerate(models)}
            for index, (label, points) in enumerate(series.items()):
                _line(axes, index, label, {places[model]: spread for model, spread in points.items()})
            _limit(axes, limit_name, {places[model]: spread for model, spread in limit.items()})
            axes.set_xticks(
                list(places.values()),
                [model_text(model, nbytes, "\n") for model, nbytes in models.items()],
            )
            axes.set_xlabel("model, by the size of its tensors")
            axes.set_ylabel(f"{SPEED}, logarithmic")
            _logarithmic(axes)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
            return self._save(figure, axes, name, title)

    def against_bytes(
        self,
        name: str,
        title: str,
        series: Mapping[str, Points],
        *,
        ylabel: str,
        logarithmic: bool,
        dashed: tuple[str, Points] | None = None,
        mark: tuple[str, float] | None = None,
    ) -> str:
        """Draw something over a number of bytes."""
        with matplotlib.rc_context(_STYLE):
            figure, axes = _figure(7.5, 4.5)
            for index, (label, points) in enumerate(series.items()):
                _line(axes, index, label, points)
            if dashed is not None:
                _limit(axes, *dashed)
            if mark is not None:
                axes.axvline(mark[1], color=_LIMIT_COLOUR, linewidth=1, linestyle=":", label=mark[0])
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("length of the buffer")
            axes.set_ylabel(ylabel)
            if logarithmic:
                _logarithmic(axes)
            else:
                axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
            return self._save(figure, axes, name, title)

    def against_threads(
        self, name: str, title: str, series: Mapping[str, Points], limit: tuple[str, Points]
    ) -> str:
        """Draw speeds over numbers of threads."""
        with matplotlib.rc_context(_STYLE):
            figure, axes = _figure(7.5, 4.5)
            for index, (label, points) in enumerate(series.items()):
                _line(axes, index, label, points)
            _limit(axes, *limit)
            counts = sorted({count for points in series.values() for count in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("threads")
            axes.set_ylabel(SPEED)
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
            return self._save(figure, axes, name, title)

    def bars(
        self,
        name: str,
        title: str,
        panels: Sequence[tuple[str, Mapping[str, Mapping[str, Spread]]]],
        *,
        limit: float | None = None,
    ) -> str:
        """Draw horizontal bars: for each panel its axis label, and groups of bars by row and by series."""
        with matplotlib.rc_context(_STYLE):
            rows = max(len(groups) for _, groups in panels)
            most = max((len(bars) for _, groups in panels for bars in groups.values()), default=1)
            figure = Figure(
                figsize=(4.5 * len(panels) + 2.0, 0.9 + rows * (0.18 + 0.17 * most)), layout="constrained"
            )
            all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
            for axes, (label, groups) in zip(all_axes, panels, strict=True):
                _bars(axes, groups)
                axes.set_xlabel(label)
                axes.grid(axis="y", visible=False)
                if limit is not None:
                    axes.axvline(limit, color=_LIMIT_COLOUR, linewidth=1, linestyle="--")
            if most > 1:
                all_axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
            all_axes[0].invert_yaxis()
            return self._save(figure, all_axes[0], name, title)

    def lines(
        self,
        name: str,
        title: str,
        x_label: str,
        y_label: str,
        series: Mapping[str, Points],
        *,
        limit: tuple[str, float] | None = None,
    ) -> str:
        """Draw something over something else, with a dashed level."""
        with matplotlib.rc_context(_STYLE):
            figure, axes = _figure(7.5, 4.5)
            for index, (label, points) in enumerate(series.items()):
                _line(axes, index, label, points)
            if limit is not None:
                axes.axhline(limit[1], color=_LIMIT_COLOUR, linewidth=1, linestyle="--", label=limit[0])
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
            return self._save(figure, axes, name, title)

    def histograms(
        self, name: str, title: str, panels: Sequence[tuple[str, Mapping[str, Sequence[float]], float | None]]
    ) -> str:
        """Draw histograms: for each panel its axis label, values by series, and where to put a dashed line."""
        with matplotlib.rc_context(_STYLE):
            columns = min(len(panels), 3)
            rows = -(-len(panels) // columns)
            figure = Figure(figsize=(3.2 * columns + 0.8, 2.3 * rows + 0.6), layout="constrained")
            all_axes = figure.subplots(rows, columns, squeeze=False).flat
            for axes, (label, series, limit) in zip(all_axes, panels, strict=False):
                _histogram(axes, series)
                if limit is not None:
                    axes.axvline(limit, color=_LIMIT_COLOUR, linewidth=1, linestyle="--")
                axes.set_xlabel(label)
            for axes in all_axes[len(panels) :]:
                axes.set_visible(False)
            figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right lower")
            return self._save(figure, all_axes[0], name, title)

    def _save(self, figure: Figure, axes: Any, name: str, title: str) -> str:
        axes.set_title(title)
        caption = _wrapped(self._caption, int(figure.get_figwidth() * 19))
        figure.supxlabel(caption, fontsize=6, color="#555555", x=0.01, ha="left")
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            figure.savefig(self._folder / f"{name}.{kind}", **options)
            figure.set_layout_engine("none")  # laid out once is enough
        self.names.append(name)
        return f"{name}.svg"


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Any, index: int, label: str, points: Points) -> None:
    if not points:
        return
    places = sorted(points)
    middles = [points[place].middle for place in places]
    below = [points[place].middle - points[place].low for place in places]
    above = [points[place].high - points[place].middle for place in places]
    axes.errorbar(
        places,
        middles,
        yerr=[below, above],
        label=label,
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4.5,
        linewidth=1.5 if index else 2.4,  # the first series is what the chart is about
        elinewidth=1,
        capsize=2,
        linestyle="-" if index < len(_COLOURS) else "-.",
    )


def _limit(axes: Any, label: str, points: Points) -> None:
    places = sorted(points)
    axes.plot(
        places,
        [points[place].middle for place in places],
        label=label,
        color=_LIMIT_COLOUR,
        linestyle="--",
        linewidth=1.5,
    )


def _bars(axes: Any, groups: Mapping[str, Mapping[str, Spread]]) -> None:
    series = list(dict.fromkeys(label for bars in groups.values() for label in bars))
    height = 0.8 / max(len(series), 1)
    for index, label in enumerate(series):
        rows = [row for row, bars in enumerate(groups.values()) if label in bars]
        spreads = [bars[label] for bars in groups.values() if label in bars]
        axes.barh(
            [row + (index - (len(series) - 1) / 2) * height for row in rows],
            [spread.middle for spread in spreads],
            height,
            xerr=[
                [spread.middle - spread.low for spread in spreads],
                [spread.high - spread.middle for spread in spreads],
            ],
            label=label,
            color=_COLOURS[index % len(_COLOURS)],
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
        )
    axes.set_yticks(range(len(groups)), list(groups))


def _histogram(axes: Any, series: Mapping[str, Sequence[float]]) -> None:
    values = [value for each in series.values() for value in each]
    low, high = min(values), max(values)
    edges = [low + (high - low or 1.0) * index / _BINS for index in range(_BINS + 1)]
    for index, (label, each) in enumerate(series.items()):
        axes.hist(
            each,
            edges,
            weights=[1 / len(each)] * len(each),
            label=label,
            color=_COLOURS[index % len(_COLOURS)],
            histtype="step" if index else "stepfilled",
            alpha=1.0 if index else 0.5,
            linewidth=1.5,
        )


def _logarithmic(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
