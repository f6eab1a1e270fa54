"""Fill the measured parts of README.md and of the pages in docs/ from the reports that measurements left,
write docs/performance.md with all that was measured, and draw docs/*.png.

A block of a page between ``<!-- measured: NAME -->`` and ``<!-- end -->`` is replaced:

- ``benchmark cpu``, ``benchmark cuda``: each problem's newest ``spattn bench`` result in ``autotune_logs/``,
  from reports of one device and one set of versions, of the device with the most problems; ten rows at most,
  docs/performance.md has all of them and all devices
- ``generation cpu``, ``generation cuda``: the newest of ``spattn bench --steps generate``
- ``ranks cuda``: the newest of ``spattn bench --ranks``
- ``gains``: of each GPU problem that a search's winners were compared for, what they gained over the default
- ``search``: what ``scripts/compare_strategies.py`` measured of searches and their random controls
- ``language model``: ``results/quickstart/byte_lm.json`` of ``scripts/quickstart``
- ``training quality``, ``training throughput``: ``scripts/pretrain/tables.py`` of all logs in
  ``autotune_logs/*/training/quality/*/`` and of ``autotune_logs/*/training/throughput/*.jsonl``

A block whose measurement is missing stays as it is.

    python scripts/update_readme.py            writes README.md and docs/
    python scripts/update_readme.py --check    only says whether README.md or a page of docs/ would change
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from spattn_tvm.bands import BandLayout
from spattn_tvm.bench.case import Case
from spattn_tvm.bench.peers import OURS, is_ours
from spattn_tvm.bench.report import plan_text
from spattn_tvm.families.kernel import KernelSpec
from spattn_tvm.plotting import plot_benchmark, plot_layout, plot_lengths, plot_searches
from spattn_tvm.problem import TRAINING, AttentionProblem
from spattn_tvm.target import parse_target
from spattn_tvm.tuning.log import comparable_measurements, curve, read_measurements, read_run

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "autotune_logs"
DOCS = ROOT / "docs"
LANGUAGE_MODEL = ROOT / "results" / "quickstart" / "byte_lm.json"
PAGE = "performance.md"
# Of a table in the README; the page has the rest.
MOST_ROWS = 10
# What docs/layouts.md shows.
PICTURED = [
    BandLayout.spattention(8, 1024),
    BandLayout.exclusive(8, 1024),
    BandLayout.local_only(8, 1024),
    BandLayout.gapped(8, 1024),
    BandLayout.equal_area(8, 1024),
    BandLayout.sliding_window(8, 256, 1024),
    BandLayout.custom([[(0, 63)]] * 4 + [[(0, 31), (128 * h, 128 * h + 63)] for h in range(1, 5)], 1024),
]
BLOCK = re.compile(r"(<!-- measured: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def results_by_device(
    kind: str, folder: str = "benchmarks"
) -> list[tuple[dict[str, Any], dict[Path, list[str]]]]:
    """For each device of a kind, that with the newest report first: that report, with each problem's newest
    result from all reports of the same device and versions, and the problems taken from each of those. Names
    are dates, so the last is the newest.
    """
    paths = sorted(LOGS.glob(f"{kind}-*/{folder}/*.json"), key=lambda path: path.name)
    reports = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    newest_of = {}
    for _, report in reversed(reports):
        newest_of.setdefault(report["device"]["name"], report)
    # A GPU's times do not hang on how many threads its host has.
    comparable = ("device", "versions") if kind == "cuda" else ("device", "versions", "threads")
    devices = []
    for newest in newest_of.values():
        results = {}
        for path, report in reports:
            if all(report.get(key) == newest.get(key) for key in comparable):
                results |= {
                    result.get("shape") or AttentionProblem.from_json(result["problem"]).key: (path, result)
                    for result in report["results"]
                }
        merged = {**newest, "results": [result for _, result in results.values()]}
        taken: dict[Path, list[str]] = {}
        for problem, (path, _) in sorted(results.items(), key=lambda item: item[1][0]):
            taken.setdefault(path, []).append(problem.partition(" ")[0])
        devices.append((merged, taken))
    return devices


def newest_results(kind: str, folder: str) -> tuple[dict[str, Any], dict[Path, list[str]]] | None:
    """Of :func:`results_by_device` those of the device with the newest report."""
    return next(iter(results_by_device(kind, folder)), None)


def benchmarks_by_problems(kind: str) -> list[tuple[dict[str, Any], dict[Path, list[str]]]]:
    """Of :func:`results_by_device` the device with the most problems first."""
    return sorted(results_by_device(kind), key=lambda device: -len(device[0]["results"]))


def _where(report: dict[str, Any], taken: dict[Path, list[str]], folder: Path) -> str:
    """What a report was measured on, and links to its files from a folder: of those before the last with what
    they gave, for it was measured on kernels as they were then.
    """
    cuda = report["target"].startswith("cuda")
    where = report["device"]["name"] + ("" if cuda else f", {report['threads']} threads")
    if cuda and report["device"].get("driver"):
        where += f", driver {report['device']['driver']}"
    versions = report["versions"]
    compiler = f"TVM {versions['apache-tvm']}" if versions["apache-tvm"] else "kernels from a bundle"
    *earlier, last = (f"[{path.name}]({os.path.relpath(path, folder)})" for path in taken)
    before = "".join(
        f"; {', '.join(problems)} before, with the kernels of then ({link})"
        for link, problems in zip(earlier, taken.values(), strict=False)
    )
    made = f"{report['date'][:10]}, PyTorch {versions['torch']}, {compiler} ({last})"
    return f"Measured on {where}, {made}{before}."


def _unit(kind: str) -> tuple[str, float]:
    return ("TFLOP/s", 1.0) if kind == "cuda" else ("GFLOP/s", 1e3)


def _best(entries: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of those that were timed."""
    timed = [entry for entry in entries if entry["median_ms"] is not None]
    return min(timed, key=lambda entry: entry["median_ms"], default=None)


def benchmark_block(kind: str) -> str | None:
    """Ours against the fastest peer with the same mask and the fastest dense one, on the device with the most
    problems: one row per shape and direction, the first `MOST_ROWS`.
    """
    devices = benchmarks_by_problems(kind)
    if not devices:
        return None
    report, taken = devices[0]
    picture = DOCS / f"benchmark-{kind}.png"
    plot_benchmark(report, picture)
    unit, factor = _unit(kind)
    titles = ["(B,H,N,D)", "direction", "ours, ms", f"useful {unit}", "of matmul rate"]
    titles += ["fastest peer, same mask", "its time / ours", "fastest dense causal", "its time / ours"]
    rows = []
    for result in report["results"]:
        for direction in dict.fromkeys(entry["direction"] for entry in result["entries"]):
            entries = [entry for entry in result["entries"] if entry["direction"] == direction]
            ours = _best(entry for entry in entries if entry["peer"] == OURS)
            if ours is None:
                continue
            row = [
                result["shape"],
                direction.replace("_", " + "),
                f"**{ours['median_ms']:.4g}**",
                f"{ours['useful_tflops'] * factor:.4g}",
                f"{ours['matmul_share']:.0%}",
            ]
            for same_mask in (True, False):
                peer = _best(e for e in entries if e["same_mask"] == same_mask and not is_ours(e["peer"]))
                if peer is None:
                    row += ["", ""]
                else:
                    row += [
                        f"{peer['title'].partition(',')[0]}, {peer['median_ms']:.4g} ms",
                        f"{peer['median_ms'] / ours['median_ms']:.2f}",
                    ]
            rows.append(row)
    lines = [
        *_table(titles, rows[:MOST_ROWS]),
        "",
        f"{_where(report, taken, ROOT)} Every implementation: [{PAGE}]({(DOCS / PAGE).relative_to(ROOT)}).",
        "",
        f"![Benchmark]({picture.relative_to(ROOT)})",
    ]
    return "\n".join(lines)


def _is_ours(entry: dict[str, Any]) -> bool:
    return is_ours(entry["peer"])


def _entry_rows(
    titles: list[str],
    entries: list[dict[str, Any]],
    is_bold: Callable[[dict[str, Any]], bool],
    cells: Callable[[dict[str, Any]], list[str]],
) -> list[list[str]]:
    """A row for each entry of a report: its title and its cells; of one that failed, what became of it."""
    rows = []
    for entry in entries:
        if entry["status"] == "ok":
            rows.append([f"**{entry['title']}**" if is_bold(entry) else entry["title"], *cells(entry)])
        else:
            rows.append([entry["title"], entry["status"], *[""] * (len(titles) - 2)])
    return rows


def _benchmark_cells(entry: dict[str, Any], result: dict[str, Any], kind: str) -> list[str]:
    spread = "" if entry["p25_ms"] is None else f"{entry['p25_ms']:.4g}-{entry['p75_ms']:.4g}"
    ratio = entry["ratio_to_dense"]
    _, factor = _unit(kind)
    return [
        f"{entry['median_ms']:.4g}",
        spread,
        f"{entry['useful_tflops'] * factor:.4g}",
        f"{entry['matmul_share']:.0%}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{max(entry['errors'].values()):.1e}",
        *([f"{entry['peak_memory_mib']:.0f}"] if kind == "cuda" else []),
        plan_text(result["plans"].get(entry["peer"])),
    ]


def performance_page() -> str:
    """All that the newest benchmarks measured, as Markdown."""
    parts = [
        "# Measured performance",
        "",
        "Made by `scripts/update_readme.py` from the reports of `spattn bench`, which checks every",
        "implementation against float64 at sampled rows and keys and then times them in turns; medians.",
        "*Useful* operations are those of the implementation's own mask, *of matmul rate* is their rate over",
        "that of a product of two large square matrices of the dtype in the same run, *of dense* is the time",
        "over that of the fastest dense causal attention, and the last column says what must be made anew",
        "for another length: time, and memory on the device.",
    ]
    devices = [
        (kind, number, *device)
        for kind in ("cuda", "cpu")
        for number, device in enumerate(benchmarks_by_problems(kind))
    ]
    for kind, number, report, taken in devices:
        unit, _ = _unit(kind)
        titles = ["implementation", "median ms", "p25-p75", f"useful {unit}", "of matmul rate", "of dense"]
        titles += ["largest error"] + (["peak MiB"] if kind == "cuda" else []) + ["made for one length"]
        parts += ["", f"## {report['device']['name']}", "", _where(report, taken, DOCS)]
        if number == 0 and len({result["problem"]["length"] for result in report["results"]}) > 1:
            picture = plot_lengths(report, DOCS / f"lengths-{kind}.png")
            parts += ["", f"![Useful {unit} against the length]({picture.name})"]
        for result in report["results"]:
            for direction in dict.fromkeys(entry["direction"] for entry in result["entries"]):
                entries = [entry for entry in result["entries"] if entry["direction"] == direction]
                parts += ["", f"### {result['shape']}, {direction.replace('_', ' + ')}", ""]
                cells = partial(_benchmark_cells, result=result, kind=kind)
                parts += _table(titles, _entry_rows(titles, entries, _is_ours, cells))
                reasons = [f"- {e['title']}: {e['reason']}" for e in entries if e["reason"]]
                parts += ["", *reasons] if reasons else []
        for title, measured in (
            ("Steps of decoding", decode_tables(kind, DOCS)),
            ("generate()", generation_tables(kind, DOCS)),
        ):
            parts += ["", f"### {title}", "", *measured] if number == 0 and measured else []
    return "\n".join(parts) + "\n"


def decode_tables(kind: str, folder: Path) -> list[str]:
    """Steps of decoding, as Markdown with links from a folder; nothing where none were measured."""
    newest = newest_results(kind, "decode_benchmarks")
    if newest is None:
        return []
    report, taken = newest
    parts = [
        f"{_where(report, taken, folder)} Copies of memory ran at {report['copy_gb_s']:.4g} GB/s, read and "
        "written; *needed* are the bytes that a step of the layout can't do without, whatever was read.",
    ]
    for result in report["results"]:
        titles = ["implementation", "median ms", "needed GB/s", "of copies", "of dense", "largest error"]
        rows = _entry_rows(titles, result["entries"], _is_ours, _decode_cells)
        parts += ["", f"`{AttentionProblem.from_json(result['problem']).key}`", "", *_table(titles, rows)]
    return parts


def _decode_cells(entry: dict[str, Any]) -> list[str]:
    return [
        f"{entry['median_ms']:.4g}",
        f"{entry['needed_gb_s']:.4g}",
        f"{entry['of_copy']:.0%}",
        "" if entry["of_dense"] is None else f"{entry['of_dense']:.3f}",
        f"{entry['error']:.1e}",
    ]


def generation_tables(kind: str, folder: Path) -> list[str]:
    """Whole calls of ``generate()``, as `decode_tables`."""
    newest = newest_results(kind, "generation_benchmarks")
    if newest is None:
        return []
    report, taken = newest
    parts = [_where(report, taken, folder)]
    for result in report["results"]:
        problem, model = AttentionProblem.from_json(result["problem"]), result["model"]
        heads = f"{problem.query_heads} heads"
        if problem.kv_heads != problem.query_heads:
            heads += f" ({problem.kv_heads} of keys)"
        parts += [
            "",
            f"{model['layers']} layers, hidden size {model['hidden']}, {heads} of {problem.head_dim}, "
            f"vocabulary {model['vocabulary']}, {model['parameters'] / 1e6:.0f} M parameters, "
            f"{problem.dtype}; batch {problem.batch}, a context of {problem.keys} tokens, prompt of "
            f"{result['prompt']}, `{problem.layout.spec}`.",
            "",
        ]
        titles = ["attention and cache", "tokens/s", "of the fastest dense", "prefill tokens/s"]
        titles += ["cache MiB", "of a dense cache"]
        rows = _entry_rows(titles, result["entries"], itemgetter("same_mask"), _generation_cells)
        parts += _table(titles, rows)
    return parts


def _generation_cells(entry: dict[str, Any]) -> list[str]:
    return [
        f"{entry['tokens_s']:.4g}",
        "" if entry["of_dense"] is None else f"{entry['of_dense']:.2f}",
        f"{entry['prefill_tokens_s']:.4g}",
        f"{entry['cache_bytes'] / 2**20:.4g}",
        f"{entry['cache_of_dense']:.3f}",
    ]


def generation_block(kind: str) -> str | None:
    return "\n".join(generation_tables(kind, ROOT)) or None


def ranks_block(kind: str) -> str | None:
    """Sequences that ranks share, beside one rank and the peers."""
    newest = newest_results(kind, "rank_benchmarks")
    if newest is None:
        return None
    report, taken = newest
    picture = DOCS / f"ranks-{kind}.png"
    drawn = [
        {**each, "shape": each["shape"].replace(f" {each['problem']['dtype']}", "")}
        for each in report["results"]
    ]
    plot_benchmark({**report, "results": drawn}, picture)
    titles = ["(B,H,N,D), layout, ranks, shards", "step", "attention", "ms", "one rank's time / its"]
    titles += ["received, MiB", "by closed form", "balance", "parts"]
    rows = [
        [result["shape"], entry["direction"].replace("_", " + "), entry["title"], *_rank_cells(entry)]
        for result in report["results"]
        for entry in sorted(result["entries"], key=lambda entry: entry["direction"])
    ]
    link = f"![Attention of sequences that ranks share]({picture.relative_to(ROOT)})"
    return "\n".join([*_table(titles, rows), "", _where(report, taken, ROOT), "", link])


def _rank_cells(entry: dict[str, Any]) -> list[str]:
    """Bytes are those of the rank that receives most."""
    if entry["median_ms"] is None:
        return [f"{entry['status']}: {entry['reason']}", "", "", "", "", ""]
    received, planned = (
        f"{max(entry[name]) / 2**20:,.0f}" if any(entry.get(name, ())) else ""
        for name in ("received_bytes", "planned_bytes")
    )
    return [
        f"{entry['median_ms']:.4g}",
        f"{entry['speed_up']:.2f}",
        received,
        planned,
        f"{entry['balance']:.2f}" if "balance" in entry else "",
        str(entry.get("parts", "")),
    ]


def gains_block() -> str | None:
    """What the searches on GPUs gained over the untuned defaults: a row for each problem, both directions."""
    gains: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    trials, rounds, sources, proposed = [], [], set(), set()
    for path in LOGS.glob("cuda-*/*/distilled-*.json"):
        compared = json.loads(path.read_text(encoding="utf-8"))
        run, family = read_run(path.parent), path.stem.partition("-")[2]
        problem = AttentionProblem.from_json(run["problem"])
        timed = [kernel for kernel in compared["kernels"] if kernel["latency_us"] is not None]
        default_us = next((kernel["latency_us"] for kernel in timed if kernel["is_default"]), None)
        if default_us is None:  # it was wrong, or could not be run
            continue
        found = min((kernel for kernel in timed if kernel["is_recorded"]), key=itemgetter("latency_us"))
        order = (run["target"], problem.layout.name, problem.head_dim, problem.kv_heads, problem.length)
        gains.setdefault((*order, f"{Case(problem).describe()} {family}"), {})[problem.direction] = [
            f"{default_us / 1e3:.4g}",
            "the default" if found["is_default"] else f"{found['latency_us'] / 1e3:.4g}",
            f"{default_us / found['latency_us']:.3f}",
        ]
        logged = comparable_measurements(path.parent)
        trials.append(sum(measured.kernel.family == family for measured in logged))
        rounds.append(compared["rounds"])
        sources.add(f"{compared['device']}, {compared['date'][:10]}")
        proposed.add(run["sessions"][-1].get("candidates", "the cost model's"))
    if not gains:
        return None
    titles = ["target", "(B,H,N,D)"]
    for direction in TRAINING:
        titles += [f"{direction}: default, ms", "best of search, ms", "default / best"]
    rows = [
        [target, shown, *(cell for name in TRAINING for cell in found.get(name, [""] * 3))]
        for (target, *_, shown), found in sorted(gains.items())
    ]
    text = (
        f"Each [search](docs/tuning.md) for [these problems](scripts/lengths.txt) timed {min(trials)} to "
        f"{max(trials)} kernels: the untuned default, which was chosen by hand from measurements, and others "
        f"({', '.join(sorted(proposed))}). Its best four are timed again beside the default and the record "
        f"so far, in {min(rounds)} to {max(rounds)} turns; medians. One that is less than 1% faster than the "
        f"default has gained nothing: the default is recorded. Measured on {'; '.join(sorted(sources))}."
    )
    return "\n".join([*_table(titles, rows), "", text])


def best_but_untuned_us(log: Path, family: str, until: str) -> float:
    """The least latency that a search logged for other decisions than the untuned default, in sessions that
    began before a date.
    """
    run = read_run(log)
    later = [session["first_trial"] for session in run["sessions"] if session["started"] > until]
    problem, target = AttentionProblem.from_json(run["problem"]), parse_target(run["target"])
    untuned = KernelSpec.untuned(family, problem, target).decisions
    return min(
        measurement.latency_us
        for measurement in read_measurements(log)[: min(later, default=None)]
        if measurement.kernel.family == family
        and measurement.kernel.decisions != untuned
        and measurement.latency_us is not None
    )


def search_block() -> str | None:
    rows = []
    series = []
    for path in sorted(LOGS.rglob("comparison*.json")):
        comparison = json.loads(path.read_text(encoding="utf-8"))
        run = read_run(path.parent)
        problem = AttentionProblem.from_json(run["problem"])
        family = comparison.get("family", next(iter(run["families"])))
        latency_us, trials = comparison["latency_us"], comparison["trials"]
        logs = {"evolutionary": path.parent, "random": path.parent / "random"}
        rows.append(
            [
                run["target"],
                f"{problem.key} {family}",
                " / ".join(str(trials[name]) for name in logs),
                *(f"{latency_us[name] / 1e3:.4g}" for name in ("untuned", *logs)),
                f"{latency_us['untuned'] / latency_us['evolutionary']:.3f}",
                f"{latency_us['random'] / latency_us['evolutionary']:.3f}",
            ]
        )
        if run["target"].startswith("cuda"):
            rows[-1].append(
                " / ".join(
                    f"{best_but_untuned_us(log, family, comparison['date']) / 1e3:.4g}"
                    for log in logs.values()
                )
            )
        else:
            # Times of different searches don't compare on a shared machine.
            rows[-1].append("")
            for label, log in zip(("cost model", "random"), logs.values(), strict=True):
                series.append((problem, label, list(zip(*curve(log), strict=True))))
    if not rows:
        return None
    plot_searches(series[:4], DOCS / "tuning.png", relative=True)
    titles = [
        "target",
        "problem",
        "trials",
        "untuned ms",
        "cost model ms",
        "random ms",
        "faster than untuned",
        "than random",
        "logged besides the default",
    ]
    text = (
        "The three kernels of a row are timed in turns in one process after both searches; medians. Each "
        "search measures the untuned default first; the last column is the best that it logged besides that, "
        "cost model / random, where the machine's speed is steady. A factor of 1.00 is a draw, below it the "
        "search lost. The H200's defaults were chosen by hand from such measurements on that chip, so there "
        "is little to find; elsewhere nobody has measured them. The curves are the CPU's, relative to the "
        "default."
    )
    return "\n".join([*_table(titles, rows), "", text, "", "![Tuning curves](docs/tuning.png)"])


def language_model_block() -> str | None:
    if not LANGUAGE_MODEL.exists():
        return None
    summary = json.loads(LANGUAGE_MODEL.read_text(encoding="utf-8"))
    (DOCS / "byte_lm.png").write_bytes(LANGUAGE_MODEL.with_suffix(".png").read_bytes())
    sizes = summary["sizes"]
    rows = [
        [
            name,
            f"{model['tokens_per_second']:,.0f}",
            f"{model['final_training_bits_per_byte']:.3f}",
            f"{model['held_out_bits_per_byte']:.3f}",
        ]
        for name, model in summary["models"].items()
    ]
    titles = ["attention", "tokens/s", "training bits/byte", "held-out bits/byte"]
    text = (
        f"{sizes['parameters'] / 1e6:.1f} M parameters, {sizes['layers']} layers, {sizes['heads']} heads of "
        f"{sizes['head_dim']}, context {sizes['context']}, {summary['tokens'] / 1e6:.2f} M bytes seen by "
        f"each, {summary['threads']} threads."
    )
    return "\n".join([*_table(titles, rows), "", text, "", "![Loss curves](docs/byte_lm.png)"])


def _training_block(pattern: str, what: str, pictures: dict[str, tuple[str, str]]) -> str | None:
    """What ``scripts/pretrain/tables.py`` makes of logs, by option the name and title of its pictures too."""
    paths = sorted(LOGS.glob(f"*/training/{pattern}"))
    if not paths:
        return None
    script = Path(__file__).parent / "pretrain" / "tables.py"
    folders = [path.parent if path.name == "log.jsonl" else path for path in paths]
    options = [text for option, (name, _) in pictures.items() for text in (option, str(DOCS / name))]
    made = subprocess.run(
        [sys.executable, str(script), *map(str, folders), *options],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    links = (
        f"[{folder.stem}]({path.relative_to(ROOT)})" for folder, path in zip(folders, paths, strict=True)
    )
    shown = (f"![{text}]({(DOCS / name).relative_to(ROOT)})" for name, text in pictures.values())
    return "\n\n".join([made.stdout.strip(), f"{what}: {', '.join(links)}.", *shown])


def training_quality_block() -> str | None:
    pictures = {
        "--plot": ("training-quality.png", "Held-out loss over steps"),
        "--plot-distances": ("training-copies.png", "What copies cost more than the text, by distance"),
    }
    return _training_block(
        "quality/*/log.jsonl", "Logs of the runs, with their configurations and versions", pictures
    )


def training_throughput_block() -> str | None:
    pictures = {"--plot-lengths": ("training-throughput.png", "Rates over dense attention's, by length")}
    return _training_block(
        "throughput/*.jsonl", "Measurements, with their configurations and versions", pictures
    )


def _table(titles: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


BLOCKS: dict[str, Callable[[], str | None]] = {
    "benchmark cpu": lambda: benchmark_block("cpu"),
    "benchmark cuda": lambda: benchmark_block("cuda"),
    "generation cpu": lambda: generation_block("cpu"),
    "generation cuda": lambda: generation_block("cuda"),
    "ranks cuda": lambda: ranks_block("cuda"),
    "gains": gains_block,
    "search": search_block,
    "language model": language_model_block,
    "training quality": training_quality_block,
    "training throughput": training_throughput_block,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    DOCS.mkdir(exist_ok=True)
    plot_layout(BandLayout.spattention(16, 4096), DOCS / "bands.png")
    for layout in PICTURED:
        plot_layout(layout, DOCS / f"layout-{layout.name}.png")

    def fill(match: re.Match[str], page: Path) -> Any:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"{page.name} has a block {name!r}; known: {', '.join(BLOCKS)}")
        text = BLOCKS[name]()
        if text is None:
            print(f"{name}: nothing measured, left as it is")
            return match[0]
        print(f"{name}: filled in {page.name}")
        # Blocks link from the repository's root.
        text = re.sub(
            r"\]\((?!\w+:)([^)]+)\)", lambda link: f"]({os.path.relpath(ROOT / link[1], page.parent)})", text
        )
        return f"{match[1]}{text}\n{match[3]}"

    pages = {DOCS / PAGE: performance_page()}
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        if path not in pages:
            pages[path] = BLOCK.sub(partial(fill, page=path), path.read_text(encoding="utf-8"))
    if check:
        sys.exit(
            int(any(not path.exists() or path.read_text("utf-8") != text for path, text in pages.items()))
        )
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
