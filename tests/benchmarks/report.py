"""Writing the results: Markdown tables and SVG plots."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from measuring import Times

OURS = "usermetadata"
WIDTH = 6  # inches: text of 12 points is as large as the page's, and readable at 420 pixels
COLOURS = ["#0b6e4f", "#d1495b", "#30638e", "#edae49", "#7d5ba6", "#6b7280", "#2a9d8f"]

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
        "savefig.facecolor": "white",  # also on a dark page
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
            return f"{show(times[name])} ({relative(times, name):.{digits}f} ×)"

        names = next(iter(workloads.values()))
        rows = [[name, *(cell(times, name) for times in workloads.values())] for name in names]
        self.table(["", *workloads], rows)

    def bars(self, file: str, panels: Mapping[str, Mapping[str, float]], alt: str) -> None:
        """Add bars: how many times as long as ours each peer takes."""
        rows = sum(len(ratios) + 3 for ratios in panels.values())
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(WIDTH, 0.27 * rows), squeeze=False, sharex=True
        )
        figure.supxlabel("times as long as usermetadata (logarithmic)", fontsize=12)
        longest = max(max(ratios.values()) for ratios in panels.values())
        for axis, (title, ratios) in zip(axes[:, 0], panels.items(), strict=True):
            names = list(ratios)[::-1]
            values = [ratios[name] for name in names]
            colours = [COLOURS[0] if name == OURS else "#b8c4ce" for name in names]
            drawn = axis.barh(names, values, color=colours, height=0.65)
            axis.bar_label(
                drawn,
                [f"{value:.2g} ×" if value < 10 else f"{value:,.0f} ×" for value in values],
                padding=4,
            )
            axis.set_xscale("log")
            axis.set_xlim(0.5, longest * 6)
            axis.set_title(title)
            axis.tick_params(left=False)
            axis.xaxis.set_visible(False)
            axis.spines["bottom"].set_visible(False)
        self._save(file, alt)

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
            axis.grid(axis="y", color="#e5e7eb")
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
        self._save(file, alt)

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

    def _save(self, file: str, alt: str) -> None:
        plt.savefig(self.folder / file, metadata={"Date": None})
        plt.close()
        self.parts.append(f"```{{image}} _static/benchmarks/{file}\n:alt: {alt}\n```")

    def write(self, file: str) -> None:
        """Write the parts to a file, and start a new page."""
        text = "\n\n".join(self.parts) + "\n"
        (self.folder / file).write_text(text, encoding="utf-8")
        self.parts = []
