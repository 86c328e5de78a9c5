"""Writing the results: Markdown tables and SVG plots."""

from __future__ import annotations

from io import StringIO
from statistics import median
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from measuring import Times

OURS = "usermetadata"
WIDTH = 6  # inches: text of 12 points is as large as the page's, and readable at 420 pixels
COLOURS = ["#0b6e4f", "#d1495b", "#30638e", "#edae49", "#7d5ba6", "#6b7280", "#2a9d8f"]
PEER, GRID = "#b8c4ce", "#e5e7eb"
DARK = {
    "#ffffff": "#1a1c1e",
    "#000000": "#9aa5b1",
    GRID: "#3a3f45",
    PEER: "#5b6670",
    **dict(
        zip(
            COLOURS,
            ["#4cc38a", "#f0808d", "#6ea8dc", "#edae49", "#b79ae0", "#9aa5b1", "#4fd1c0"],
            strict=True,
        )
    ),
}

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "usermetadata",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "savefig.facecolor": "white",  # DARK replaces it on a dark page
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.1,  # space for wider fonts
        "figure.constrained_layout.w_pad": 0.15,
    }
)


def microseconds(times: Sequence[float]) -> str:
    """Show the median, with only significant digits."""
    us = median(times) * 1e6
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def per_second(times: Sequence[float]) -> str:
    """Show the median as a rate."""
    return f"{1 / median(times):,.0f}"


def relative(times: Times, name: str, base: str = OURS) -> float:
    """Return how many times as long ``name`` takes as ``base``: the median over the rounds."""
    return median(mine / its for mine, its in zip(times[name], times[base], strict=True))


def with_dark_colours(svg: str) -> str:
    """Add a style with the colours for dark pages to a picture of matplotlib."""
    rules = "".join(
        f'[style*="{paint}: {light}"] {{ {paint}: {dark} !important }}\n'
        for light, dark in DARK.items()
        for paint in ("fill", "stroke")
    )
    style = (
        "<style>@media (prefers-color-scheme: dark) {\n"
        f"text {{ fill: #e4e7eb }}\n{rules}}}</style>\n</svg>"
    )
    return svg.replace("</svg>", style)


def tasks(count: int) -> str:
    """Show a number of tasks."""
    return "1 task" if count == 1 else f"{count} tasks"


class Report:
    """The page of results, in the order of the measurements."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Add a paragraph or a heading."""
        self.parts.append(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        self.parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def compare(
        self, workloads: Mapping[str, Times], *, rate: bool = False, digits: int = 1
    ) -> None:
        """Add a table of peers by workloads: a time or rate, and its ratio to ours."""
        show = per_second if rate else microseconds

        def cell(times: Times, name: str) -> str:
            if name not in times:
                return "-"
            if name == OURS:
                return show(times[name])
            return f"{show(times[name])} ({relative(times, name):.{digits}f}\u00a0×)"

        names = next(iter(workloads.values()))
        rows = [[name, *(cell(times, name) for times in workloads.values())] for name in names]
        self.table(["", *workloads], rows)

    def ratios(self, file: str, panels: Mapping[str, Mapping[str, float]], alt: str) -> None:
        """Add bars: how many times as long as ours each peer takes."""
        label = "times as long as usermetadata (logarithmic)"
        longest = max(max(ratios.values()) for ratios in panels.values())

        def show(ratio: float) -> str:
            return f"{ratio:.2g} ×" if ratio < 10 else f"{ratio:,.0f} ×"

        self._bars(file, panels, (label, "log", 0.5, longest * 6), show)
        self.parts.append(f"![{alt}]({file})")

    def rates(self, file: str, panels: Mapping[str, Mapping[str, float]], label: str) -> None:
        """Draw bars for the head of the page: how often in a second each peer does something."""
        most = max(max(rates.values()) for rates in panels.values())
        self._bars(file, panels, (label, "linear", 0, most * 1.25), lambda rate: f"{rate:,.0f}")

    def _bars(
        self,
        file: str,
        panels: Mapping[str, Mapping[str, float]],
        axis_of: tuple[str, str, float, float],
        show: Callable[[float], str],
    ) -> None:
        label, scale, least, most = axis_of
        rows = sum(len(values) + 3 for values in panels.values())
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(WIDTH, 0.27 * rows), squeeze=False, sharex=True
        )
        figure.supxlabel(label, fontsize=12)
        for axis, (title, by_name) in zip(axes[:, 0], panels.items(), strict=True):
            names = list(by_name)[::-1]
            values = [by_name[name] for name in names]
            colours = [COLOURS[0] if name == OURS else PEER for name in names]
            drawn = axis.barh(names, values, color=colours, height=0.65)
            axis.bar_label(drawn, [show(value) for value in values], padding=4)
            axis.set_xscale(scale)
            axis.set_xlim(least, most)
            axis.set_title(title)
            axis.tick_params(left=False)
            axis.xaxis.set_visible(False)
            axis.spines["bottom"].set_visible(False)
        self._save(file)

    def lines(  # noqa: PLR0913 - a plot has that many
        self,
        file: str,
        panels: Mapping[str, Mapping[str, Sequence[float]]],
        points: Sequence[int],
        labels: tuple[str, str],
        alt: str,
        *,
        scale: str = "log",
    ) -> None:
        """Add lines over powers of two or ten, one for each peer."""
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(WIDTH, 3 * len(panels) + 1.2), squeeze=False
        )
        for axis, (title, lines) in zip(axes[:, 0], panels.items(), strict=True):
            for colour, (name, values) in zip(COLOURS, lines.items(), strict=False):
                width = 2.5 if name == OURS else 1.5
                axis.plot(points, values, "o-", color=colour, label=name, lw=width, ms=4)
            axis.set_xscale("log")
            axis.set_yscale(scale)
            if scale == "linear":
                axis.set_ylim(0, 1.2 * max(max(values) for values in lines.values()))
            axis.set_xticks(points, [f"{point:,}" for point in points])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_title(title)
            axis.set_xlabel(labels[0])
            axis.set_ylabel(labels[1])
            axis.grid(axis="y", color=GRID)
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
        self._save(file)
        self.parts.append(f"![{alt}]({file})")

    def by_tasks(
        self,
        file: str,
        results: Mapping[str, Mapping[int, Times]],
        plotted: Sequence[str],
        alt: str,
    ) -> None:
        """Add calls per second by the number of tasks: lines for some workloads, tables for all."""
        self.lines(
            file,
            {
                workload: {
                    name: [1 / median(times[name]) for times in results[workload].values()]
                    for name in next(iter(results[workload].values()))
                }
                for workload in plotted
            },
            list(next(iter(results.values()))),
            ("concurrent tasks", "calls per second"),
            alt,
        )
        for workload, by_count in results.items():
            self.say(f"`{workload}`, calls per second in all, by the number of tasks:")
            self.compare({tasks(count): times for count, times in by_count.items()}, rate=True)

    def _save(self, file: str) -> None:
        svg = StringIO()
        plt.savefig(svg, metadata={"Date": None})
        plt.close()
        (self.folder / file).write_text(with_dark_colours(svg.getvalue()), encoding="utf-8")

    def write(self, file: str) -> None:
        """Write the parts to a file, and start a new page."""
        text = "\n\n".join(self.parts) + "\n"
        (self.folder / file).write_text(text, encoding="utf-8")
        self.parts = []
