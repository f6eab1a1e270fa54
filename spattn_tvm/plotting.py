"""Pictures: a layout's bands and load, tuning curves, benchmark bars, loss curves.

matplotlib is imported on first use (extra ``plot``). Figures are drawn without pyplot, so that neither a
display nor a global backend is involved. The ending of the file name says the format: ``.png``, ``.svg``,
``.pdf``.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from .bands import BandLayout
from .bench.case import Case
from .bench.peers import is_ours
from .extras import install_hint
from .problem import AttentionProblem

Points = Sequence[tuple[float, float]]
Series = Iterable[tuple[str, Points]]

_TEXT = "#24292f"
_MUTED = "#6e7781"
_GRID = "#e6e8eb"
_SHARED = "#9aa3ad"
_LINES = ("#0b6bcb", "#d9480f", "#2b8a3e", "#862e9c", "#8a6d00", "#c2255c")
# Pixels between a text and the edge of its axes.
_MARGIN = 4.0
_OURS, _PEER = "#0b6bcb", "#b3bcc6"
_STYLE = {
    "font.size": 9.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _new_figure(width: float, height: float) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plotting needs matplotlib: {install_hint('plot')}") from error
    # Parts of a figure take their style when they are made; `_add_axes` applies it again.
    with matplotlib.rc_context(_STYLE):
        return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _add_axes(figure: Any, *arguments: Any, **keywords: Any) -> Any:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return figure.add_subplot(*arguments, **keywords)


def _save(figure: Any, path: str | PathLike[str]) -> Path:
    path = Path(path)
    # Without one of its endings matplotlib would write to another file than was said.
    endings = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.lower()[1:] not in endings:
        raise ValueError(
            "the name of a picture says its format, such as bands.png, bands.svg or bands.pdf; "
            f"got {str(path)!r}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _fit_texts(figure)
    figure.savefig(path)
    return path


def _fit_texts(figure: Any) -> None:
    """Break titles and legends, shorten labels or make room for them, where they would leave their place."""
    from matplotlib.text import Annotation

    # Before the first layout, which would give a long one the axes' room.
    for axes in figure.axes:
        for title in (axes.title, axes._left_title, axes._right_title):
            _break(title, title.get_window_extent().x0 + axes.get_window_extent().width)
        if axes.get_legend() is not None:
            axes.get_legend().set_in_layout(False)
    for title in figure.texts:
        _break(title, figure.bbox.x1)
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_window_extent()
        # Long labels have made the axes narrower than they were.
        for title in (axes.title, axes._left_title, axes._right_title):
            _break(title, box.x1)
        right = axes.get_xlim()[1]
        for text in axes.texts:
            extent = text.get_window_extent()
            if extent.x1 > box.x1 and isinstance(text, Annotation):
                # It stands behind a bar, whose end moves with the limit.
                shown = (text.xy[0] - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
                room = box.width - (extent.x1 - box.x0 - shown * box.width) - _MARGIN
                right = max(right, text.xy[0] * box.width / max(room, 0.25 * box.width))
            elif extent.x1 > box.x1:
                kept = int(len(text.get_text()) * (box.x1 - extent.x0 - _MARGIN) / extent.width) - 1
                text.set_text(text.get_text()[: max(0, kept)].rstrip() + "…")
        if right > axes.get_xlim()[1]:
            axes.set_xlim(right=right)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend is not None else ():
            _break(text, legend.get_window_extent().x0 + box.width - _MARGIN)


def _break(text: Any, edge: float) -> None:
    """Break a text's lines that reach beyond an edge, in pixels."""
    extent = text.get_window_extent()
    if not text.get_text() or extent.x1 <= edge:
        return
    longest = max(map(len, text.get_text().split("\n")))
    width = max(8, int(longest * (edge - extent.x0) / extent.width) - 1)
    lines = [part for line in text.get_text().split("\n") for part in textwrap.wrap(line, width)]
    text.set_text("\n".join(lines))


def _head_colours(num_heads: int) -> list[Any]:
    from matplotlib import colormaps

    steps = [0.02 + 0.93 * h / max(1, num_heads - 1) for h in range(num_heads)]
    return [colormaps["viridis"](step) for step in steps]


def _runs_of_viewers(layout: BandLayout, length: int) -> list[tuple[int, int, list[int]]]:
    """Distances below `length` as runs (first, last, heads) attended to by the same heads, of which some."""
    bands = layout.bands(length)
    cuts = {0, length}
    for head in bands:
        for lo, hi in head:
            cuts |= {min(lo, length), min(hi + 1, length)}
    runs = []
    for first, end in pairwise(sorted(cuts)):
        heads = [h for h, head in enumerate(bands) if any(lo <= first <= hi for lo, hi in head)]
        if heads:
            runs.append((first, end - 1, heads))
    return runs


def _band_outline(first: int, last: int, length: int) -> list[tuple[int, int]]:
    """Corners (key, query) of the pairs with a distance in [first, last], on the square of `length`."""
    end = min(last + 1, length)
    return [(0, first), (length - first, length), (length - end, length), (0, end)]


def _draw_pairs(axes: Any, layout: BandLayout, length: int, colours: Sequence[Any]) -> None:
    from matplotlib.patches import Patch, Polygon

    runs = _runs_of_viewers(layout, length)
    for first, last, heads in runs:
        colour = colours[heads[0]] if len(heads) == 1 else _SHARED
        axes.add_patch(Polygon(_band_outline(first, last, length), facecolor=colour, edgecolor="none"))
    axes.plot([0, length], [0, length], color=_MUTED, linewidth=0.8)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="key j", ylabel="query i")
    axes.set_title("Pairs by the head that attends", loc="left")
    viewers = {len(heads) for _, _, heads in runs}
    handles = []
    if 1 in viewers:
        handles.append(Patch(facecolor=colours[layout.num_heads // 2], label="one head, its colour"))
    if viewers - {1}:
        shared_by = "all heads" if viewers <= {1, layout.num_heads} else "several heads"
        handles.append(Patch(facecolor=_SHARED, label=shared_by))
    if not layout.coverage(length).is_complete:
        handles.append(Patch(facecolor="white", edgecolor=_MUTED, linewidth=0.8, label="nobody"))
    axes.legend(handles=handles, loc="upper right", frameon=False, fontsize=8.5)


def _draw_distances(axes: Any, layout: BandLayout, length: int, colours: Sequence[Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for head, bands in enumerate(layout.bands(length)):
        shown = [(lo, min(hi + 1, length) - lo) for lo, hi in bands if lo < length]
        axes.broken_barh(shown, (head - 0.4, 0.8), facecolors=colours[head])
    axes.set(xlim=(0, length), xlabel="distance d = i − j", ylabel="head")
    axes.set_ylim(layout.num_heads - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.set_title("Distances of each head", loc="left")


def _draw_load(axes: Any, layout: BandLayout, length: int, colours: Sequence[Any]) -> None:
    load = [100 * share for share in layout.load(length)]
    axes.barh(range(layout.num_heads), load, height=0.8, color=colours)
    even = 100 / layout.num_heads
    axes.axvline(even, color=_TEXT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(xlabel="share of all pairs, %", xlim=(0, 1.12 * max([even, *load])))
    axes.tick_params(labelleft=False)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.set_title("Load (dashed: even)", loc="left")


def plot_layout(layout: BandLayout, path: str | PathLike[str], length: int | None = None) -> Path:
    """Draw a layout: attended (i, j) pairs coloured by head, distances of each head, load of each head.

    Parameters
    ----------
    layout : BandLayout
    path : path
        Where to write; parent folders are made.
    length : int, optional
        Sequence length ``N``; the layout's context length by default.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ImportError
        matplotlib is missing; names the extra that installs it.
    ValueError
        No `length` for a layout without context length, or one that is too long for it.
    """
    if length is None:
        length = layout.context_length
    if length is None or length < 1:
        raise ValueError(f"{layout.spec} needs a length of at least 1 to be drawn, got {length}")
    layout.check_length(length)
    figure = _new_figure(11.5, 4.6)
    grid = figure.add_gridspec(1, 3, width_ratios=(1.25, 1.35, 0.7))
    colours = _head_colours(layout.num_heads)
    _draw_pairs(_add_axes(figure, grid[0]), layout, length, colours)
    distances = _add_axes(figure, grid[1])
    _draw_distances(distances, layout, length, colours)
    _draw_load(_add_axes(figure, grid[2], sharey=distances), layout, length, colours)
    dense, pairs = layout.num_heads * length * (length + 1) // 2, layout.pairs(length)
    less = f" ({dense / pairs:.3g}× less)" if 0 < pairs < dense else ""
    heads = "1 head" if layout.num_heads == 1 else f"{layout.num_heads} heads"
    if layout.of_heads is not None:
        heads += f" of {layout.of_heads}"
    context = "" if layout.context_length in (None, length) else f", context {layout.context_length:,}"
    figure.suptitle(
        f"{layout.name}: {heads}, length {length:,}{context} — "
        f"{pairs / dense:.1%} of the dense causal work{less}",
        fontsize=12, fontweight="bold", x=0.01, ha="left", color=_TEXT,
    )  # fmt: skip
    return _save(figure, path)


def _draw_series(axes: Any, series: Sequence[tuple[str, Points]], *, steps: bool) -> None:
    for index, (label, points) in enumerate(series):
        x, y = [point[0] for point in points], [point[1] for point in points]
        axes.plot(
            x, y, label=label, color=_LINES[index % len(_LINES)], linewidth=1.8,
            linestyle="-" if index < len(_LINES) else "--",
            drawstyle="steps-post" if steps else "default",
            marker="o" if len(points) == 1 else None,
        )  # fmt: skip
    defaults = [points[0] for _, points in series if points[0][0] == 1] if steps else []
    if defaults:
        axes.scatter(
            *zip(*defaults, strict=True),
            marker="D", s=26, facecolors="white", edgecolors=_TEXT, zorder=3, label="untuned default",
        )  # fmt: skip
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.legend(framealpha=0.85, edgecolor="none")


def _filled(series: Series) -> list[tuple[str, Points]]:
    filled: list[tuple[str, Points]] = [(label, list(points)) for label, points in series if len(points)]
    if not filled:
        raise ValueError("nothing to plot: each series needs a label and at least one point")
    return filled


def plot_tuning_curve(
    series: Series, path: str | PathLike[str], *, title: str = "Tuning", relative: bool = False
) -> Path:
    """Draw best-so-far latency over trials; the first one, which a search begins with, is marked as the
    untuned default.

    Parameters
    ----------
    series : iterable of (label, points)
        Points are (trial, best latency in µs so far), by rising trial; empty series are left out.
    path : path
        Where to write; parent folders are made.
    relative : bool
        Draw each series over its first point, which in a search is the untuned default: searches that ran
        while the machine was faster or slower can then be compared.

    Raises
    ------
    ImportError
        matplotlib is missing; names the extra that installs it.
    ValueError
        No series has a point.
    """
    shown = _filled(series)
    if relative:
        shown = [
            (label, [(trial, latency / points[0][1]) for trial, latency in points]) for label, points in shown
        ]
    in_ms = max(latency for _, points in shown for _, latency in points) >= 1e4
    unit, per_unit = ("ms", 1e3) if in_ms else ("µs", 1.0)
    if relative:
        unit = "of untuned"
    last_trial = max(points[-1][0] for _, points in shown)
    scaled = []
    for label, points in shown:
        best = points[-1][1] / per_unit
        # A best stays the best until the last trial, also where the log holds improvements only.
        line = [(trial, latency / per_unit) for trial, latency in points]
        if len(shown) == 1 and line[-1][0] < last_trial:
            line.append((last_trial, best))
        scaled.append((f"{label}: {best:.4g} {unit}", line))
    figure = _new_figure(7.5, 4.2)
    axes = _add_axes(figure)
    _draw_series(axes, scaled, steps=True)
    axes.set(xlabel="trial", ylabel=f"best latency so far, {unit}")
    axes.set_title(title, loc="left")
    lowest, highest = (pick(y for _, line in scaled for _, y in line) for pick in (min, max))
    if highest > 5 * lowest > 0:
        axes.set_yscale("log")
    elif not relative:
        axes.set_ylim(bottom=0)
    return _save(figure, path)


def plot_searches(
    searches: Sequence[tuple[AttentionProblem, str, Points]],
    path: str | PathLike[str],
    *,
    relative: bool = False,
) -> Path:
    """Draw tuning curves with their problems: what all have in common stands in the title, what one has alone
    in its label.

    Parameters
    ----------
    searches : sequence of (problem, strategy, points)
        Points as :func:`plot_tuning_curve` takes them, from :func:`spattn_tvm.tuning.curve`.
    path, relative
        As there.

    Raises
    ------
    ImportError
        matplotlib is missing; names the extra that installs it.
    ValueError
        No search has a point.
    """
    shapes = [Case(problem).describe() for problem, _, _ in searches]
    common = len(set(shapes)) == 1
    series = [
        (" ".join([*([] if common else [shape]), problem.direction, strategy]), points)
        for shape, (problem, strategy, points) in zip(shapes, searches, strict=True)
    ]
    title = f"{shapes[0]}: best so far" if common else "Best so far"
    return plot_tuning_curve(series, path, title=title, relative=relative)


def plot_loss_curves(
    series: Series,
    path: str | PathLike[str],
    *,
    x_label: str = "training step",
    y_label: str = "loss",
    title: str = "Training",
    log_x: bool = False,
) -> Path:
    """Draw curves of (x, y) points by label, such as loss over steps or bits per byte over seconds.

    With `log_x` the horizontal axis is logarithmic, to base 2.

    Raises
    ------
    ImportError
        matplotlib is missing; names the extra that installs it.
    ValueError
        No series has a point.
    """
    shown = [(f"{label}: {points[-1][1]:.4g}", points) for label, points in _filled(series)]
    figure = _new_figure(7.5, 4.2)
    axes = _add_axes(figure)
    _draw_series(axes, shown, steps=False)
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, loc="left")
    return _save(figure, path)


def _benchmark_rows(report: Any) -> list[Mapping[str, Any]]:
    """The rows of a report, or rows that were given as such.

    Raises
    ------
    ValueError
        Something that is neither.
    """
    try:
        if isinstance(report, Mapping):
            rows: list[Mapping[str, Any]] = [
                {**entry, "shape": result["shape"]}
                for result in report["results"]
                for entry in result["entries"]
            ]
        else:
            rows = [dict(row) for row in report]
        for row in rows:
            for name in ("shape", "direction"):
                if not isinstance(row[name], str):
                    raise TypeError(f"{name} is {row[name]!r}")
            for name in ("median_ms", "p25_ms", "p75_ms", "ratio_to_dense"):
                value = row[name] if name == "median_ms" else row.get(name)
                if value is not None and not isinstance(value, (int, float)):
                    raise TypeError(f"{name} is {value!r}")
            if row.get("p25_ms") is not None and row.get("p75_ms") is None:
                raise TypeError("p75_ms is missing")
    except KeyError as error:
        raise ValueError(f"no report of a benchmark: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"no report of a benchmark: {error}") from error
    return rows


def _read_report(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no report of a benchmark: it is no JSON ({error})") from error


def _draw_bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    ends = [row.get(name) for row in rows for name in ("median_ms", "p75_ms")]
    longest = max((end for end in ends if end is not None), default=1.0)
    for position, row in enumerate(rows):
        median = row["median_ms"]
        if median is None:
            axes.text(0.01 * longest, position, row.get("status", "not available"), va="center",
                      fontsize=8.5, color=_MUTED, style="italic", in_layout=False)  # fmt: skip
            continue
        axes.barh(position, median, height=0.7, color=_OURS if is_ours(row.get("peer", "")) else _PEER)
        end = median
        if row.get("p25_ms") is not None:
            end = max(median, row["p75_ms"])
            axes.plot([row["p25_ms"], row["p75_ms"]], [position] * 2, color=_TEXT, linewidth=1.2)
        ratio = row.get("ratio_to_dense")
        text = f"{median:.3g} ms" + (f"  ({ratio:.2f} of dense)" if ratio and ratio != 1 else "")
        axes.annotate(
            text, (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
            in_layout=False,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.get("title", row.get("peer", "")) for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=_TEXT)
    axes.set(xlim=(0, 1.45 * longest), ylim=(len(rows) - 0.45, -0.55))
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)


def plot_benchmark(
    report: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | PathLike[str], path: str | PathLike[str]
) -> Path:
    """Draw the medians of a benchmark as bars, one panel per problem and direction.

    Parameters
    ----------
    report : mapping, sequence of mappings, or path
        A report of `spattn_tvm.bench.benchmark`, its JSON file, or rows: entries of a report, each with its
        ``shape``, ``direction``, ``peer``, ``title`` and ``median_ms`` (None where there is none; then
        ``status`` is shown), and optionally ``p25_ms``, ``p75_ms`` and ``ratio_to_dense``.
    path : path
        Where to write; parent folders are made.

    Raises
    ------
    ImportError
        matplotlib is missing; names the extra that installs it.
    ValueError
        The report has no entries, or is none.
    """
    read = _read_report(Path(report)) if isinstance(report, (str, PathLike)) else report
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in _benchmark_rows(read):
        panels.setdefault((row["shape"], row["direction"]), []).append(row)
    if not panels:
        raise ValueError("nothing to plot: the benchmark report has no entries")
    shapes = {shape for shape, _ in panels}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(rows) for rows in panels.values())
    figure = _new_figure(6.2 * columns, lines * (1.2 + 0.36 * most) + 0.3)
    for index, ((shape, direction), rows) in enumerate(panels.items()):
        axes = _add_axes(figure, lines, columns, index + 1)
        _draw_bars(axes, rows)
        title = direction.replace("_", " + ")
        axes.set_title(title if len(shapes) == 1 else f"{shape}\n{title}", loc="left")
        if index >= len(panels) - columns:
            axes.set_xlabel("median time, ms")
    if len(shapes) == 1:
        figure.suptitle(*shapes, fontsize=12, fontweight="bold", x=0.01, ha="left", color=_TEXT)
    return _save(figure, path)


def plot_lengths(report: Mapping[str, Any] | str | PathLike[str], path: str | PathLike[str]) -> Path:
    """Draw the useful TFLOP/s of a benchmark against the length, one panel per direction and head dim.

    Parameters
    ----------
    report : mapping or path
        A report of `spattn_tvm.bench.benchmark`, or its JSON file. Of several results of one length that with
        the most rows and heads counts.
    path : path
        Where to write; parent folders are made.

    Raises
    ------
    ImportError
        matplotlib is missing; names the extra that installs it.
    ValueError
        The report has nothing measured, or is none.
    """
    read = _read_report(Path(report)) if isinstance(report, (str, PathLike)) else report
    _benchmark_rows(read)
    panels: dict[tuple[str, int], dict[tuple[str, str], dict[int, float]]] = {}
    try:
        for result in sorted(
            read["results"], key=lambda r: r["problem"]["batch"] * r["problem"]["query_heads"]
        ):
            problem = result["problem"]
            for entry in result["entries"]:
                if entry["useful_tflops"] is not None:
                    panel = panels.setdefault((entry["direction"], problem["head_dim"]), {})
                    line = panel.setdefault((entry["peer"], entry["title"]), {})
                    line[problem["length"]] = entry["useful_tflops"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no report of a benchmark: {error}") from error
    if not panels:
        raise ValueError("nothing to plot: nothing in the report was measured")
    titles = list(dict.fromkeys(key for panel in panels.values() for key in panel))
    others = [key for key in titles if not is_ours(key[0])]
    figure = _new_figure(6.2 * len(panels), 4.2)
    for index, ((direction, head_dim), panel) in enumerate(panels.items()):
        axes = _add_axes(figure, 1, len(panels), index + 1)
        for key, line in panel.items():
            ours = is_ours(key[0])
            colour = _OURS if ours else _LINES[1:][others.index(key) % len(_LINES[1:])]
            style = "-" if ours else ("--", ":")[others.index(key) // len(_LINES[1:]) % 2]
            lengths = sorted(line)
            axes.plot(
                lengths,
                [line[length] for length in lengths],
                style,
                marker="o",
                markersize=3.5,
                linewidth=2.2 if ours else 1.3,
                color=colour,
                label=key[1],
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({length for line in panel.values() for length in line})
        axes.set_xticks(
            ticks, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in ticks]
        )
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
        axes.set_title(f"{direction.replace('_', ' + ')}, head dim {head_dim}", loc="left")
        axes.set(xlabel="length, tokens", ylabel="useful TFLOP/s")
    axes.legend(fontsize=7.5, frameon=False)
    return _save(figure, path)
