"""The charts of the studies, in the style of the other benchmarks', each as a line of Markdown that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import charts
from benchmarks.results import Spread

Point = tuple[float, float, float]  # the lowest, the middle, the highest


class Charts:
    """Writes charts as SVG and PNG.

    Parameters
    ----------
    folder
        Where to; it exists.
    caption
        What stands below each chart.
    """

    def __init__(self, folder: Path, caption: str) -> None:
        self._charts = charts.Charts(folder, caption)

    @property
    def names(self) -> list[str]:
        """The charts so far."""
        return self._charts.names

    def lines(
        self,
        name: str,
        title: str,
        x_label: str,
        y_label: str,
        series: Mapping[str, Iterable[tuple[float, float, float, float]]],
        *,
        limit: float | None = None,
        limit_label: str = "chance",
    ) -> str:
        """Draw lines through points of x, lowest, middle and highest y, and a dashed level."""
        points = {label: {x: Spread(*spread) for x, *spread in each} for label, each in series.items()}
        level = None if limit is None else (limit_label, limit)
        return _image(title, self._charts.lines(name, title, x_label, y_label, points, limit=level))

    def bars(
        self,
        name: str,
        title: str,
        label: str,
        groups: Mapping[str, Mapping[str, Point]],
        *,
        limit: float | None = None,
    ) -> str:
        """Draw horizontal bars with their ranges by row and by series, and a dashed line."""
        spreads = {row: {series: Spread(*each) for series, each in bars.items()} for row, bars in groups.items()}
        return _image(title, self._charts.bars(name, title, [(label, spreads)], limit=limit))

    def histograms(
        self, name: str, title: str, panels: Mapping[str, tuple[Mapping[str, Sequence[float]], float | None]]
    ) -> str:
        """Draw histograms: for each panel its values by series, and where to put a dashed line."""
        parts = [(label, series, limit) for label, (series, limit) in panels.items()]
        return _image(title, self._charts.histograms(name, title, parts))


def _image(title: str, file: str) -> str:
    return f"![{title}]({file})"
