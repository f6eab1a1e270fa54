"""What the pictures show: drawn shapes and bars against the masks and numbers they stand for."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from spattn_tvm import plotting
from spattn_tvm.bands import BandLayout
from spattn_tvm.plotting import (
    plot_benchmark,
    plot_layout,
    plot_lengths,
    plot_loss_curves,
    plot_searches,
    plot_tuning_curve,
)
from spattn_tvm.problem import AttentionProblem

pytest.importorskip("matplotlib")

from matplotlib.text import Text

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
LAYOUTS = [
    BandLayout.spattention(4, 24),
    BandLayout.spattention(5, 24),
    BandLayout.spattention(30, 24),
    BandLayout.equal_area(3, 24),
    BandLayout.gapped(3, 24),
    BandLayout.exclusive(1, 24),
    BandLayout.causal(2, 24),
    BandLayout.custom([[(0, 2), (5, 6)], [], [(6, 90)]], 24),
    BandLayout.sliding_window(2, 100),
    BandLayout.spattention(6, 24).heads([4, 1, 2]),
    BandLayout.equal_area(6).heads(3, 6),
]


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """Calls a plot function, checks its PNG, and returns the figure."""
    saved = []
    save = plotting._save
    monkeypatch.setattr(plotting, "_save", lambda figure, path: saved.append(figure) or save(figure, path))

    def draw(plot, *arguments, **keywords):
        path = tmp_path / "new" / "picture.png"
        arguments = [path if argument is ... else argument for argument in arguments]
        assert plot(*arguments, **keywords) == path
        assert path.read_bytes().startswith(PNG_MAGIC)
        return saved[-1]

    return draw


@pytest.mark.parametrize("length", [24, 17])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.spec)
def test_layout_picture_shows_the_bands(figure_of, layout, length):
    from matplotlib.colors import same_color

    figure = figure_of(plot_layout, layout, ..., length)
    pairs, distances, load = figure.axes
    colours = plotting._head_colours(layout.num_heads)
    bands = layout.bands(length)
    for i in range(length):
        for j in range(i + 1):
            viewers = [h for h, head in enumerate(bands) if any(lo <= i - j <= hi for lo, hi in head)]
            # Inside the pair's cell, off its diagonal: where y - x is i - j + 1/2.
            shown = [p for p in pairs.patches if p.get_path().contains_point((j + 0.25, i + 0.75))]
            assert len(shown) == bool(viewers), (i, j)
            if viewers:
                expected = colours[viewers[0]] if len(viewers) == 1 else plotting._SHARED
                assert same_color(shown[0].get_facecolor(), expected)
    drawn = [
        [
            (box.x0, box.x1)
            for box in (path.get_extents() for path in collection.get_paths())
            if box.x1 > box.x0
        ]
        for collection in distances.collections
    ]
    assert drawn == [[(lo, min(hi + 1, length)) for lo, hi in head if lo < length] for head in bands]
    widths = [bar.get_width() / 100 for bar in load.patches]
    assert widths == pytest.approx(layout.load(length))


def test_layout_picture_says_how_much_work_is_left(figure_of):
    figure = figure_of(plot_layout, BandLayout.spattention(16, 4096), ...)
    assert figure.get_suptitle() == (
        "spattention: 16 heads, length 4,096 — 17.6% of the dense causal work (5.67× less)"
    )
    figure = figure_of(plot_layout, BandLayout.causal(1, 64), ..., 10)
    assert figure.get_suptitle() == "causal: 1 head, length 10, context 64 — 100.0% of the dense causal work"
    figure = figure_of(plot_layout, BandLayout.exclusive(4, 64).heads([0, 3]), ...)
    assert figure.get_suptitle().startswith("exclusive: 2 heads of 4, length 64 — ")


def test_layout_picture_needs_a_length_that_fits(tmp_path):
    with pytest.raises(ValueError, match="spattention:heads=4 needs a length of at least 1"):
        plot_layout(BandLayout.spattention(4), tmp_path / "a.png")
    with pytest.raises(ValueError, match="a sequence of 9 is longer"):
        plot_layout(BandLayout.spattention(4, 8), tmp_path / "a.png", 9)
    assert not list(tmp_path.iterdir())


def test_tuning_curve_shows_the_points_and_the_best(figure_of):
    axes = figure_of(
        plot_tuning_curve,
        [("model", [(1, 900.0), (5, 400.0)]), ("none", []), ("random", [(1, 800.0), (9, 500.0)])],
        ...,
    ).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[1, 900], [5, 400]],
        [[1, 800], [9, 500]],
    ]
    assert {line.get_drawstyle() for line in axes.lines} == {"steps-post"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "model: 400 µs",
        "random: 500 µs",
        "untuned default",
    ]
    assert axes.collections[0].get_offsets().tolist() == [[1, 900], [1, 800]]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0


def test_relative_tuning_curves_start_at_their_first_trial(figure_of):
    series = [("fast", [(1, 200.0), (9, 100.0)]), ("slow", [(1, 400.0), (7, 300.0)])]
    axes = figure_of(plot_tuning_curve, series, ..., relative=True).axes[0]
    lines = [list(line.get_ydata()) for line in axes.get_lines()]
    assert [(line[0], line[-1]) for line in lines] == [(1.0, 0.5), (1.0, 0.75)]
    assert axes.get_ylabel() == "best latency so far, of untuned"


def test_tuning_curve_of_slow_kernels_is_in_ms_and_of_wide_range_logarithmic(figure_of):
    axes = figure_of(plot_tuning_curve, [("model", [(1, 90000.0), (5, 4000.0)])], ...).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 90], [5, 4]]
    assert axes.get_legend().get_texts()[0].get_text() == "model: 4 ms"
    assert axes.get_yscale() == "log"


def test_loss_curves(figure_of):
    curve = [(0, 8.0), (10, 2.5)]
    axes = figure_of(plot_loss_curves, [("SPAttention", curve)], ..., y_label="bits per byte").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 8], [10, 2.5]]
    assert axes.get_ylabel() == "bits per byte" and axes.get_xlabel() == "training step"


def entry(peer, direction, median_ms, **more):
    return {
        "peer": peer,
        "title": peer.upper(),
        "direction": direction,
        "median_ms": median_ms,
        "status": "ok",
        **more,
    }


REPORT = {
    "results": [
        {
            "shape": "(1,16,4096,64) float32 spattention",
            "entries": [
                entry("ours", "forward", 10.0, p25_ms=9.0, p75_ms=12.0, ratio_to_dense=0.25),
                entry("sdpa", "forward", 40.0, p25_ms=None, p75_ms=None, ratio_to_dense=1.0),
                {**entry("flex", "forward", None), "status": "not available"},
                entry("ours", "forward_backward", 30.0),
            ],
        }
    ]
}


@pytest.mark.parametrize("form", ["report", "rows", "file"])
def test_benchmark_bars_are_the_medians(figure_of, tmp_path, form):
    report = REPORT
    if form == "rows":
        shape = REPORT["results"][0]["shape"]
        report = [{**row, "shape": shape} for row in REPORT["results"][0]["entries"]]
    elif form == "file":
        report = tmp_path / "report.json"
        report.write_text(json.dumps(REPORT))
    figure = figure_of(plot_benchmark, report, ...)
    forward, both = figure.axes
    assert figure.get_suptitle() == "(1,16,4096,64) float32 spattention"
    assert forward.get_title(loc="left") == "forward" and both.get_title(loc="left") == "forward + backward"
    assert [bar.get_width() for bar in forward.patches] == [10, 40]
    assert [label.get_text() for label in forward.get_yticklabels()] == ["OURS", "SDPA", "FLEX"]
    texts = [text.get_text() for text in forward.texts]
    assert texts == ["10 ms  (0.25 of dense)", "40 ms", "not available"]
    assert list(forward.lines[0].get_xdata()) == [9, 12]
    assert [bar.get_width() for bar in both.patches] == [30]


def test_bars_of_ours_have_a_colour_of_their_own(figure_of):
    """Those of a family and of our ways to share a sequence, too."""
    peers = ("ours", "cpu", "heads", "bands", "sdpa", "all_gather", "ring")
    rows = [{**entry(peer, "forward", 1.0), "peer": peer, "shape": "(1,4,64,32)"} for peer in peers]
    (axes,) = figure_of(plot_benchmark, rows, ...).axes
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert len(set(colors[:4])) == len(set(colors[4:])) == 1 and colors[0] != colors[-1]


def test_rates_against_the_length(figure_of):
    def result(batch, length, head_dim, **rates):
        entries = [
            {**entry(peer, "forward", 1.0), "useful_tflops": rate, "peer": peer}
            for peer, rate in rates.items()
        ]
        problem = {"batch": batch, "query_heads": 16, "length": length, "head_dim": head_dim}
        return {"shape": f"{batch} {length} {head_dim}", "problem": problem, "entries": entries}

    results = [
        result(4, 4096, 128, ours=300.0, fa4=200.0, fsa=None),
        result(1, 4096, 128, ours=1.0, fa4=2.0),
        result(1, 65536, 128, ours=600.0),
        result(4, 1000, 64, ours=250.0),
    ]
    wide, narrow = figure_of(plot_lengths, {"results": results}, ...).axes
    assert wide.get_title(loc="left") == "forward, head dim 128"
    assert [line.get_label() for line in wide.lines] == ["OURS", "FA4"]
    assert wide.lines[0].get_xydata().tolist() == [[4096, 300], [65536, 600]]
    assert wide.lines[1].get_xydata().tolist() == [[4096, 200]]
    assert [text.get_text() for text in wide.get_xticklabels()] == ["4k", "64k"]
    assert narrow.lines[0].get_xydata().tolist() == [[1000, 250]]


def test_nothing_to_plot(tmp_path):
    for plot in (plot_tuning_curve, plot_loss_curves):
        with pytest.raises(ValueError, match="nothing to plot"):
            plot([("empty", [])], tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_benchmark({"results": []}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing in the report was measured"):
        plot_lengths({"results": []}, tmp_path / "a.png")


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]'"):
        plot_layout(BandLayout.causal(1, 8), tmp_path / "a.png")


def test_plotting_needs_neither_pyplot_nor_torch(tmp_path):
    code = (
        "import sys; from spattn_tvm import plotting; assert 'matplotlib' not in sys.modules; "
        f"plotting.plot_layout(plotting.BandLayout.causal(1, 8), {str(tmp_path / 'a.svg')!r}); "
        "assert not {'matplotlib.pyplot', 'torch', 'tvm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_searches_are_named_by_what_they_don_t_have_in_common(figure_of):
    forward = AttentionProblem("forward", "float32", 1, 16, 4, 4096, 64, BandLayout.spattention(16))
    backward = dataclasses.replace(forward, direction="backward")
    points = [(1, 900.0), (5, 400.0)]
    searches = [(forward, "evolutionary", points), (backward, "random", points)]
    axes = figure_of(plot_searches, searches, ...).axes[0]
    assert axes.get_title(loc="left") == "(1,16/4,4096,64) float32 spattention: best so far"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[:2] == ["forward evolutionary: 400 µs", "backward random: 400 µs"]
    longer = dataclasses.replace(forward, length=8192)
    axes = figure_of(plot_searches, [*searches, (longer, "random", points[1:])], ..., relative=True).axes[0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[2] == "(1,16/4,8192,64) float32 spattention forward random: 1 of untuned"
    assert len(axes.collections[0].get_offsets()) == 2  # the third's first trial is not its first success


def outside(figure):
    """Texts that leave the figure, or those inside axes that leave them."""
    figure.draw_without_rendering()
    found = []
    beyond = []  # labels of ticks beyond the limits, which are not drawn
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not min(limits) <= tick.get_loc() <= max(limits):
                    beyond += [tick.label1, tick.label2]
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text().strip() or text in beyond:
            continue
        axes = text.axes
        own = axes is not None and text in axes.texts
        box = (axes if own else figure).get_window_extent()
        extent = text.get_window_extent()
        sides = (box.x0 - extent.x0, extent.x1 - box.x1, box.y0 - extent.y0, extent.y1 - box.y1)
        if max(sides) > 1:
            found.append((text.get_text(), sides))
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None and legend.get_window_extent().width > axes.bbox.width + 1:
            found.append(("legend", axes.get_title(loc="left")))
    return found


def crowded_report(text):
    entries = [
        entry("ours", "forward", 1e-3, ratio_to_dense=0.017),
        entry("sdpa", "forward", 12345.6, p25_ms=9000.0, p75_ms=20000.0, ratio_to_dense=1.01),
        {**entry("flex", "forward", None), "title": text[:40], "status": text},
        entry("ours", "backward", 1.0),
        entry("sdpa", "backward", 1.0, ratio_to_dense=0.99),
    ]
    return {"results": [{"shape": f"(1,16,4096,64) float32 {text}", "entries": entries}]}


@pytest.mark.parametrize("words", [1, 30])
def test_no_text_leaves_its_place(figure_of, words):
    rng = random.Random(words)
    text = " ".join("".join(rng.choices("abcmw,_", k=rng.randrange(3, 9))) for _ in range(words))
    assert outside(figure_of(plot_benchmark, crowded_report(text), ...)) == []
    bands = BandLayout.custom([[(0, 2), (5, 6)]] * 7, 24)
    assert outside(figure_of(plot_layout, bands, ...)) == []
    assert outside(figure_of(plot_layout, BandLayout.spattention(64, 131072).heads(3, 60), ...)) == []
    curves = [(f"{text} {index}", [(1, 900.0), (5, 4.0 + index)]) for index in range(2)]
    assert outside(figure_of(plot_tuning_curve, curves[:words], ..., title=text)) == []
    assert outside(figure_of(plot_loss_curves, curves, ..., title=text, y_label="loss")) == []


def test_a_text_that_leaves_its_axes_is_seen(figure_of, monkeypatch):
    monkeypatch.setattr(plotting, "_fit_texts", lambda figure: None)
    found = outside(figure_of(plot_benchmark, crowded_report("word " * 30), ...))
    assert len(found) >= 2
