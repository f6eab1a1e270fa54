"""The ``spattn`` command: tune, distill, verify, explain, export, bench, plot, doctor.

Each command imports what it needs when it runs, so that ``--help`` is quick and a machine that only runs
kernels never loads the compiler.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .bands import BandLayout
    from .problem import AttentionProblem
    from .store import ScheduleRecord

app = typer.Typer(
    name="spattn",
    help="Banded sparse attention: search, ship, check and measure its kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
plot_app = typer.Typer(
    help="Pictures: a layout's bands and load, a search, a benchmark.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="Example: spattn plot layout --heads 16 --context 4096 --out bands.png",
)
app.add_typer(plot_app, name="plot")


class Dtype(str, enum.Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Direction(str, enum.Enum):
    forward = "forward"
    backward = "backward"
    both = "both"


class Strategy(str, enum.Enum):
    evolutionary = "evolutionary"
    random = "random"


Shape = Annotated[
    str, typer.Option(help="B,H,N,D: batch, heads (16/4: 16 query, 4 key/value heads), length, head dim.")
]
Shapes = Annotated[
    list[str],
    typer.Option("--shape", help="B,H,N,D (heads 16/4: 16 query, 4 key/value heads); may be repeated."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Data type of q, k and v.")]
LayoutOption = Annotated[
    str,
    typer.Option(help="A layout's name, or its spec: spattention, causal, sliding_window:window=256, …"),
]
ContextOption = Annotated[
    int | None,
    typer.Option(help="Context length that the layout is made for; the sequence's own by default."),
]
DirectionOption = Annotated[Direction, typer.Option(help="Pass.")]
TargetOption = Annotated[
    str, typer.Option(help="cpu, cuda, an architecture (x86-64-v3, sm_90a) or a chip (nvidia/h200).")
]
LogRoot = Annotated[Path, typer.Option(help="Folder of the tuning logs.")]
SchedulesOption = Annotated[
    Path | None, typer.Option(help="Folder for the winners; the one that dispatch reads by default.")
]


def parse_layout(text: str, heads: int, context: int | None) -> BandLayout:
    """A layout from a spec in which ``heads=`` and ``context=`` may be missing.

    Raises
    ------
    ValueError
        As `BandLayout.from_spec` does.
    """
    from .bands import BandLayout

    name, _, rest = text.partition(":")
    fields = [part for part in rest.split(",") if part]
    if not any(part.startswith("heads=") for part in fields):
        fields.insert(0, f"heads={heads}")
    if context is not None and not any(part.startswith("context=") for part in fields):
        fields.append(f"context={context}")
    return BandLayout.from_spec(f"{name}:{','.join(fields)}")


def parse_problems(
    shapes: list[str], dtype: str, layout: str, context: int | None, direction: str
) -> list[AttentionProblem]:
    """The problems of ``--shape``, one per shape and pass.

    Raises
    ------
    ValueError
        A shape that is not four numbers, or values that `AttentionProblem` refuses.
    """
    from .problem import DIRECTIONS, AttentionProblem

    problems = []
    for shape in shapes:
        parts = [part.strip() for part in shape.split(",")]
        try:
            batch, heads, length, head_dim = parts
            query_heads, _, kv_heads = heads.partition("/")
            sizes = (int(batch), int(query_heads), int(kv_heads or query_heads), int(length), int(head_dim))
        except ValueError:
            raise ValueError(
                f"--shape is B,H,N,D such as 1,16,4096,64 or 1,16/4,4096,64, got {shape!r}"
            ) from None
        bands = parse_layout(layout, sizes[1], context)
        directions = DIRECTIONS if direction == "both" else (direction,)
        problems += [AttentionProblem(name, dtype, *sizes, bands) for name in directions]
    return problems


@app.command(
    epilog="Example: spattn tune --shape 1,16,4096,64 --direction both --minutes 5   "
    "(stop with Ctrl-C, the same command goes on)"
)
def tune(
    shape: Shape = "1,16,4096,64",
    dtype: DtypeOption = Dtype.float32,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    direction: DirectionOption = Direction.both,
    target: TargetOption = "cpu",
    trials: Annotated[int | None, typer.Option(help="Candidates to measure, per kernel family.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Search time instead, for each pass.")] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="random samples the same space without a cost model: the control.")
    ] = Strategy.evolutionary,
    family: Annotated[
        list[str] | None, typer.Option(help="Only this kernel family; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the data.")] = 0,
    log_root: LogRoot = Path("autotune_logs"),
    distill: Annotated[
        bool, typer.Option("--distill/--no-distill", help="Put the winners into schedules/ afterwards.")
    ] = True,
    schedules: SchedulesOption = None,
) -> None:
    """Search the fastest decisions for a problem on this machine, resuming what autotune_logs/ holds."""
    from .target import parse_target
    from .tuning import tune as search
    from .tuning.distill import distill as distill_logs

    machine = parse_target(target)
    for problem in parse_problems([shape], dtype.value, layout, context, direction.value):
        typer.echo(f"{problem.key} on {machine.folder}")
        result = search(
            problem,
            machine,
            trials=trials,
            minutes=minutes,
            seed=seed,
            strategy=strategy.value,
            log_root=log_root,
            families=family or None,
        )
        if result.latency_us is None:
            raise RuntimeError(f"none of {result.trials} candidates was correct; see {result.log_dir}")
        typer.echo(
            f"best of {result.trials} trials ({result.errors} failed): {result.latency_us:,.1f} us with "
            f"{result.family}, {_listed(result.decisions)}; log in {result.log_dir}"
        )
        if result.ended == "interrupted":
            typer.echo("interrupted: the same command goes on from here")
            raise typer.Exit(130)
        if distill:
            records = distill_logs(
                log_root, target=machine, problems=[problem], schedules=schedules, report=typer.echo
            )
            _print_records(records)


def _print_records(records: list[ScheduleRecord]) -> None:
    for record in records:
        decisions = _listed(record.decisions)
        typer.echo(f"{record.problem.key}: {record.latency_us:,.1f} us with {record.family}, {decisions}")


def _listed(decisions: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name}={value}" for name, value in (decisions or {}).items())


@app.command(epilog="Example: spattn distill --target cpu")
def distill(
    target: TargetOption = "cpu",
    log_root: LogRoot = Path("autotune_logs"),
    schedules: SchedulesOption = None,
    top: Annotated[int, typer.Option(help="Candidates to compare for each problem and family.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timings of each.")] = 9,
) -> None:
    """Time the best candidates of each logged search side by side and put the winners into schedules/."""
    from .target import parse_target
    from .tuning.distill import distill as distill_logs

    records = distill_logs(
        log_root, target=parse_target(target), schedules=schedules, top=top, rounds=rounds, report=typer.echo
    )
    _print_records(records)


@app.command(epilog="Example: spattn verify --target cpu --problems 1000")
def verify(
    target: TargetOption = "cpu",
    problems: Annotated[int, typer.Option(help="Random problems in all.")] = 200,
    max_length: Annotated[int, typer.Option(help="Longest sequence.")] = 700,
    seed: Annotated[int | None, typer.Option(help="Seed of the problems; a fresh one by default.")] = None,
) -> None:
    """Check shipped and untuned kernels on fresh random problems; exit code 1 when one is wrong."""
    from rich.console import Console

    from .target import parse_target
    from .verify import verify as check

    with Console(stderr=True).status("starting") as status:
        result = check(parse_target(target), problems, max_length=max_length, seed=seed, report=status.update)
    for failure in result.failures:
        typer.echo(failure)
    typer.echo(f"{result.passed} passed, {len(result.failures)} failed")
    if result.failures:
        raise typer.Exit(1)


@app.command(epilog="Example: spattn explain --shape 1,16,4096,64 --target cpu")
def explain(
    shape: Shape = "1,16,4096,64",
    dtype: DtypeOption = Dtype.float32,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    direction: DirectionOption = Direction.both,
    target: TargetOption = "cpu",
) -> None:
    """Which kernel would serve a problem on a target: tuned, nearest or untuned, and why."""
    from .dispatch import explain as explanation
    from .target import parse_target

    problems = parse_problems([shape], dtype.value, layout, context, direction.value)
    typer.echo("\n\n".join(explanation(problem, parse_target(target)) for problem in problems))


@app.command(epilog="Example: spattn export bundle/ --shape 1,16,4096,64 --direction both --target cpu")
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; an older bundle in it is replaced.")],
    shape: Shapes = ["1,16,4096,64"],  # noqa: B006  typer copies it
    dtype: DtypeOption = Dtype.float32,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    direction: DirectionOption = Direction.both,
    target: TargetOption = "cpu",
) -> None:
    """Compile the kernels of problems into a folder that runs without any compiler."""
    from .bundle import MANIFEST, export_bundle
    from .target import parse_target

    problems = parse_problems(shape, dtype.value, layout, context, direction.value)
    written = export_bundle(folder, problems, parse_target(target))
    manifest = json.loads((written / MANIFEST).read_text(encoding="utf-8"))
    for problem, kernel in zip(problems, manifest["kernels"], strict=True):
        typer.echo(f"{problem.key}: {kernel['family']}, {kernel['status']}, {kernel['reason']}")
    size = sum(file["bytes"] for file in manifest["files"].values())
    typer.echo(f"written: {written} ({len(manifest['files'])} libraries, {size / 2**20:.1f} MiB)")
    typer.echo(
        f"run with it: SPATTN_BUNDLE={written} python ..., or spattn_tvm.load_bundle({str(written)!r})"
    )


@app.command(
    epilog="Example: spattn bench --shape 1,16,4096,64 --peers ours,sdpa,flex   "
    "(CUDA: --device cuda --dtype bfloat16 --passes forward,backward --shape 4,16,4096,128)"
)
def bench(
    shape: Shapes = ["1,16,4096,64"],  # noqa: B006  typer copies it
    dtype: DtypeOption = Dtype.float32,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    peers: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: ours, sdpa, flex (CPU); ours, cudnn, flash, flex, fsa, fsa_triton (CUDA)."
        ),
    ] = None,
    passes: Annotated[
        str, typer.Option(help="Comma-separated: forward, backward, forward_backward.")
    ] = "forward,forward_backward",
    rounds: Annotated[int, typer.Option(help="Timings per peer and pass.")] = 15,
    budget: Annotated[
        float, typer.Option(help="Seconds a pass may take; at least 5 rounds are made.")
    ] = 60.0,
    idle_ms: Annotated[float, typer.Option(help="Idle time before each CPU timing, ms.")] = 80.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs; a fresh one by default.")] = None,
    log_root: LogRoot = Path("autotune_logs"),
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write the JSON report.")] = True,
) -> None:
    """Check and time ours and its peers in one run; the report goes to autotune_logs/TARGET/benchmarks/."""
    from rich.console import Console

    from . import bench as benchmarks

    problems = parse_problems(shape, dtype.value, layout, context, "forward")
    # Not a terminal: a file or a log, where a table may be as wide as it is.
    console = Console(width=None if sys.stdout.isatty() else 140)
    with Console(stderr=True).status("starting") as status:
        report = benchmarks.benchmark(
            problems,
            passes=_names(passes),
            peers=None if peers is None else _names(peers),
            device=device,
            rounds=rounds,
            budget_s=budget,
            idle_ms=idle_ms,
            threads=threads,
            seed=seed,
            report=status.update,
        )
    for table in benchmarks.tables(report):
        console.print(table)
    for result in report["results"]:
        for direction, chosen in result["schedule"].items():
            text = f"{result['shape']} {direction}: {chosen['status']}, {chosen['reason']}"
            console.print(text, markup=False, highlight=False)
    if save:
        console.print(f"written: {benchmarks.write_report(report, log_root)}", markup=False, highlight=False)
    ours = [e for result in report["results"] for e in result["entries"] if e["peer"] == "ours"]
    if any(entry["status"] != "ok" for entry in ours):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@plot_app.command(
    "layout",
    epilog="Example: spattn plot layout --layout spattention --heads 16 --context 4096 --out bands.png",
)
def plot_layout(
    layout: LayoutOption = "spattention",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 16,
    context: Annotated[int, typer.Option(help="Context length.")] = 4096,
    length: Annotated[int | None, typer.Option(help="Sequence length; the context by default.")] = None,
    out: Annotated[Path, typer.Option(help="PNG, SVG or PDF to write.")] = Path("layout.png"),
) -> None:
    """Draw a layout's bands and per-head load, and print its work and coverage."""
    from rich.console import Console
    from rich.table import Table

    from . import plotting

    bands = parse_layout(layout, heads, context)
    size = length or context
    path = plotting.plot_layout(bands, out, size)
    table = Table(title=bands.spec)
    for title in ("head", "near", "far", "pairs", "load"):
        table.add_column(title, justify="right")
    for head, (intervals, pairs, load) in enumerate(
        zip(bands.bands(size), bands.pairs_per_head(size), bands.load(size), strict=True)
    ):
        near, far = (*(f"{lo}-{hi}" for lo, hi in intervals), "", "")[:2]
        table.add_row(str(head), near, far, f"{pairs:,}", f"{load:.1%}")
    console = Console()
    console.print(table)
    coverage = bands.coverage(size)
    dense = bands.num_heads * size * (size + 1) // 2
    console.print(
        f"{bands.pairs(size):,} pairs, {bands.pairs(size) / dense:.3f} of dense causal; "
        f"of {coverage.distances:,} distances {coverage.seen:,} are seen, "
        f"{coverage.seen_once:,} by exactly one head",
        highlight=False,
    )
    console.print(f"written: {path}", highlight=False)


@plot_app.command(
    "tuning", epilog="Example: spattn plot tuning autotune_logs/cpu-x86-64-v4-amd-25-17/KEY --out curve.png"
)
def plot_tuning(
    logs: Annotated[
        list[Path], typer.Argument(help="Log folders, each one search; controls are found inside.")
    ],
    out: Annotated[Path, typer.Option(help="PNG, SVG or PDF to write.")] = Path("tuning.png"),
) -> None:
    """Draw best-so-far latency over trials, of a search and its random control."""
    from . import plotting
    from .tuning import curve, find_logs
    from .tuning.log import read_run

    series = []
    for root in logs:
        for folder in find_logs(root):
            run = read_run(folder)
            trials, best_us = curve(folder)
            if trials:
                label = f"{run['problem']['direction']} {run['strategy']}"
                series.append((label, list(zip(trials, best_us, strict=True))))
    if not series:
        raise ValueError(f"no measurements under {', '.join(map(str, logs))}")
    typer.echo(f"written: {plotting.plot_tuning_curve(series, out)}")


@plot_app.command(
    "bench", epilog="Example: spattn plot bench autotune_logs/TARGET/benchmarks/DATE.json --out bench.png"
)
def plot_bench(
    report: Annotated[Path, typer.Argument(help="JSON report of spattn bench.")],
    out: Annotated[Path, typer.Option(help="PNG, SVG or PDF to write.")] = Path("bench.png"),
) -> None:
    """Draw the medians of a benchmark report."""
    from . import plotting

    typer.echo(f"written: {plotting.plot_benchmark(report, out)}")


@app.command(epilog="Example: spattn doctor")
def doctor() -> None:
    """What this machine can run, which compilers and GPUs it has, what is missing and how to get it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .doctor import examine

    style = {"ok": "green", "note": "yellow", "missing": "red"}
    findings = examine()
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", "dim")
        table.add_row(Text(finding.status, style[finding.status]), finding.topic, text)
    Console().print(table)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: mistakes of the user end in one line, not in a traceback."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
