"""The ``spattn`` command: tune, distill, verify, explain, export, bench, plot, doctor.

Each command imports what it needs when it runs, so that ``--help`` is quick and a machine that only runs
kernels never loads the compiler.
"""

from __future__ import annotations

import enum
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .bands import BandLayout
    from .problem import AttentionProblem
    from .target import MachineTarget
    from .tuning.fleet import Fleet

app = typer.Typer(
    name="spattn",
    help="Banded sparse attention: search, ship, check and measure its kernels.",
    no_args_is_help=True,
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


# The common base of what typer says about options and arguments, which it exports by a subclass only.
_UsageError: Any = typer.BadParameter.__mro__[1]
# Seeds of NumPy and of the searches have 32 bits.
_LARGEST_SEED = 2**32 - 1


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"spattn-tvm {__version__}")
        raise typer.Exit


@app.callback()
def spattn(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Banded sparse attention: search, ship, check and measure its kernels."""


def _require_finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


class Dtype(str, enum.Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Direction(str, enum.Enum):
    forward = "forward"
    backward = "backward"
    both = "both"
    decode = "decode"


class Sharding(str, enum.Enum):
    contiguous = "contiguous"
    head_tail = "head_tail"


class Strategy(str, enum.Enum):
    evolutionary = "evolutionary"
    random = "random"


Shape = Annotated[
    str,
    typer.Option(
        help="B,H,N,D: batch, heads (16/4: 16 query, 4 key/value heads), length (512/4096: 512 queries, the "
        "last of 4096 keys), head dim."
    ),
]
Shapes = Annotated[
    list[str],
    typer.Option(
        "--shape",
        help="B,H,N,D (heads 16/4: 16 query, 4 key/value heads; N 512/4096: 512 queries, the last of 4096 "
        "keys); may be repeated.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Data type of q, k and v.")]
LayoutOption = Annotated[
    str,
    typer.Option(help="A layout's name, or its spec: spattention, causal, sliding_window:window=256, …"),
]
ContextOption = Annotated[
    int | None,
    typer.Option(min=1, help="Context length that the layout is made for; the sequence's own by default."),
]
DirectionOption = Annotated[
    Direction,
    typer.Option(
        help="What is computed; both are those of training. decode: N is the keys in the cache, or M/N for M "
        "queries (1 to 16) in place of one."
    ),
]
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
    """The problems of ``--shape``, one per shape and direction.

    The length N may be M/N: M queries, the last of N keys. Where that is so, and for decoding, a layout that
    follows the length gets N as its context.

    Raises
    ------
    ValueError
        A shape that is not four numbers, or values that `AttentionProblem` refuses.
    """
    from .problem import TRAINING, AttentionProblem

    problems = []
    for shape in shapes:
        parts = [part.strip() for part in shape.split(",")]
        try:
            batch, heads, length, head_dim = parts
            query_heads, slash, kv_heads = heads.partition("/")
            kv_heads = kv_heads if slash else query_heads
            queries, slash, keys = length.partition("/")
            if not slash:
                queries, keys = ("1" if direction == "decode" else length), length
            sizes = (int(batch), int(query_heads), int(kv_heads), int(queries), int(head_dim))
            kv_length = int(keys)
        except ValueError:
            raise ValueError(
                f"--shape is B,H,N,D such as 1,16,4096,64 or 1,16/4,4096,64, got {shape!r}"
            ) from None
        bands = parse_layout(layout, sizes[1], context)
        if not bands.is_autoregressive and (direction == "decode" or sizes[3] != kv_length):
            bands = parse_layout(layout, sizes[1], kv_length)
        directions = TRAINING if direction == "both" else (direction,)
        problems += [AttentionProblem(name, dtype, *sizes, bands, kv_length) for name in directions]
    return problems


# What is tuned where nothing is asked for: the shapes of the paper's models on a GPU, a small one on a CPU.
_DEFAULT_SHAPES = {"cpu": ["1,16,4096,64"], "cuda": ["4,16,4096,64", "4,16,4096,128"]}
_DEFAULT_DTYPE = {"cpu": Dtype.float32, "cuda": Dtype.bfloat16}


def parse_budget(text: str) -> tuple[int | None, float | None]:
    """``"64"`` → (64 trials, None); ``"8m"`` → (None, 8 minutes); ``"90s"`` → (None, 1.5).

    Raises
    ------
    ValueError
        For anything else, or nothing at all to spend.
    """
    match = re.fullmatch(r"([0-9]{1,9}|[0-9]{0,9}\.[0-9]{1,9})\s*(m|min|s)?", text.strip())
    if match is None or not float(match[1]) > 0 or (match[2] is None and "." in match[1]):
        raise ValueError(f"--budget is a number of trials (64) or a time (8m, 90s), got {text!r}")
    if match[2] is None:
        return int(match[1]), None
    return None, float(match[1]) / (60 if match[2] == "s" else 1)


def parse_shapes(text: str, layout: str) -> dict[str, list[str]]:
    """The shapes of ``--shapes-file`` by their layouts, in the order in which they come; ``layout`` is that
    of those without one.

    Raises
    ------
    ValueError
        For a line of more than two words, or no line at all.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 2:
            raise ValueError(f"line {number} is not B,H,N,D and a layout: {line!r}")
        if words:
            found.setdefault(words[1] if len(words) == 2 else layout, []).append(words[0])
    if not found:
        raise ValueError("the file names no shape: give B,H,N,D, such as 1,16,4096,64, in each line")
    return found


def _replace_head_dims(shapes: list[str], head_dims: str | None) -> list[str]:
    if head_dims is None:
        return shapes
    stems = list(dict.fromkeys(shape.rpartition(",")[0] for shape in shapes))
    return [f"{stem},{head_dim}" for stem in stems for head_dim in _names("--head-dims", head_dims)]


def _target_and_fleet(text: str, rpc: str | None, key: str | None) -> tuple[MachineTarget, Fleet | None]:
    from .target import parse_target

    if rpc is None:
        if key is not None:
            raise ValueError(f"--key {key!r} names servers of a tracker: give its address, --rpc HOST:PORT")
        return parse_target(text), None
    from .tuning.fleet import Fleet

    fleet = Fleet.parse(rpc, key)
    fleet.require_servers()
    if text.strip().lower() == "cuda":
        from .tuning.remote import RemoteDevice

        return RemoteDevice(fleet, "cuda").target(), fleet
    return parse_target(text), fleet


def _shapes_to_tune(
    shapes: list[str] | None, shapes_file: Path | None, layout: str, kind: str
) -> dict[str, list[str]]:
    """The shapes of each layout: those given, a file's, or a machine's default ones."""
    if shapes_file is None:
        return {layout: shapes or _DEFAULT_SHAPES[kind]}
    if shapes is not None:
        raise ValueError(
            f"give either --shape or --shapes-file, not both: {', '.join(shapes)}, {shapes_file}"
        )
    try:
        return parse_shapes(shapes_file.read_text(encoding="utf-8"), layout)
    except ValueError as error:
        raise ValueError(f"{shapes_file}: {error}") from error


@app.command(
    epilog="Example: spattn tune --target cuda --head-dims 64,128 --budget 8m   "
    "(stop with Ctrl-C, the same command goes on; on a fleet: --rpc 10.0.0.5:9190 --key h200)"
)
def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="B,H,N,D (heads 16/4: 16 query, 4 key/value heads); may be repeated. By default "
            "1,16,4096,64 on a CPU, 4,16,4096,64 and 4,16,4096,128 on a GPU."
        ),
    ] = None,
    shapes_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with B,H,N,D in each line, and behind it a layout where it is not --layout's; # "
            "begins a comment. In place of --shape."
        ),
    ] = None,
    head_dims: Annotated[
        str | None, typer.Option(help="Comma-separated, such as 64,128: in place of the shapes' own.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of q, k and v; float32 on a CPU, bfloat16 on a GPU.")
    ] = None,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    direction: DirectionOption = Direction.both,
    target: TargetOption = "cpu",
    budget: Annotated[
        str,
        typer.Option(
            help="Trials of each search (64), or time for the whole command (8m, 90s), with comparisons and "
            "checks. There is a search for each shape, direction and kernel family, and for each of them its "
            "control; they share the time equally."
        ),
    ] = "64",
    each: Annotated[
        bool, typer.Option("--each", help="The time of --budget is for each problem, not for all together.")
    ] = False,
    strategy: Annotated[
        Strategy, typer.Option(help="random samples the same space without a cost model: the control.")
    ] = Strategy.evolutionary,
    control: Annotated[
        bool,
        typer.Option(
            "--control", help="Search a second time with --strategy random, and compare what the two found."
        ),
    ] = False,
    family: Annotated[
        list[str] | None,
        typer.Option(help="Only this kernel family; may be repeated. All that run on the target by default."),
    ] = None,
    rpc: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a TVM RPC tracker: its servers measure instead of this machine."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Key that the servers were started with.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=_LARGEST_SEED, help="Seed of the search and of the data.")
    ] = 0,
    log_root: LogRoot = Path("autotune_logs"),
    distill: Annotated[
        bool, typer.Option("--distill/--no-distill", help="Put the winners into schedules/ afterwards.")
    ] = True,
    verify: Annotated[
        int,
        typer.Option(
            min=0, max=10**9, help="Check each winner on so many random problems, if it runs here; 0: don't."
        ),
    ] = 20,
    schedules: SchedulesOption = None,
) -> None:
    """Search the fastest decisions for problems, on this machine or a fleet, resuming what autotune_logs/
    holds.

    One search for each shape, direction and kernel family that runs on the target; then the best of each are
    compared side by side, the winners go to schedules/ and are checked on random problems.
    """
    from .workflows import tune as tune_problems

    machine, fleet = _target_and_fleet(target, rpc, key)
    name = (dtype or _DEFAULT_DTYPE[machine.kind]).value
    problems = [
        problem
        for named, shapes in _shapes_to_tune(shape, shapes_file, layout, machine.kind).items()
        for problem in parse_problems(
            _replace_head_dims(shapes, head_dims), name, named, context, direction.value
        )
    ]
    trials, minutes = parse_budget(budget)
    if each:
        if minutes is None:
            raise ValueError(f"--each is for a time: trials are of each search anyway, got --budget {budget}")
        minutes *= len(problems)
    tuning = tune_problems(
        problems,
        machine,
        trials=trials,
        minutes=minutes,
        strategy=strategy.value,
        control=control,
        families=family or None,
        fleet=fleet,
        seed=seed,
        log_root=log_root,
        distill=distill,
        verify_problems=verify,
        schedules=schedules,
        report=typer.echo,
        progress=True,
    )
    if tuning.interrupted:
        raise typer.Exit(130)
    if tuning.failures:
        raise typer.Exit(1)


@app.command(epilog="Example: spattn distill --target cpu")
def distill(
    target: TargetOption = "cpu",
    log_root: LogRoot = Path("autotune_logs"),
    schedules: SchedulesOption = None,
    top: Annotated[int, typer.Option(min=1, help="Candidates to compare for each problem and family.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each.")] = 9,
) -> None:
    """Time the best candidates of each logged search side by side and put the winners into schedules/."""
    from .target import parse_target
    from .tuning.distill import distill as distill_logs
    from .workflows import described_record

    records = distill_logs(
        log_root, target=parse_target(target), schedules=schedules, top=top, rounds=rounds, report=typer.echo
    )
    for record in records:
        typer.echo(described_record(record))


@app.command(epilog="Example: spattn verify --target cpu --problems 1000")
def verify(
    target: TargetOption = "cpu",
    problems: Annotated[int, typer.Option(min=1, max=10**9, help="Random problems in all.")] = 200,
    max_length: Annotated[int, typer.Option(min=1, max=2**17, help="Longest sequence.")] = 700,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=_LARGEST_SEED, help="Seed of the problems; a fresh one by default."),
    ] = None,
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


def _plan_of_ranks(problem: AttentionProblem, machine: MachineTarget, ranks: int, sharding: Sharding) -> str:
    from .distributed import Shards, plan_ranks
    from .distributed.planner import strategies_of
    from .problem import DTYPE_BYTES

    cut = {Sharding.contiguous: Shards.contiguous, Sharding.head_tail: Shards.head_tail}[sharding]
    itemsize = DTYPE_BYTES[problem.dtype]
    plan = plan_ranks(
        problem.layout,
        cut(problem.length, ranks),
        kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        itemsize=itemsize,
        available=strategies_of(machine),
    )
    return plan.describe(problem.batch * problem.head_dim * itemsize)


@app.command(
    epilog="Example: spattn explain --shape 1,16,4096,64 --target cpu   "
    "(on several cards: --shape 1,16,131072,128 --ranks 8)"
)
def explain(
    shape: Shape = "1,16,4096,64",
    dtype: DtypeOption = Dtype.float32,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    direction: DirectionOption = Direction.both,
    target: TargetOption = "cpu",
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only kernels with bitwise reproducible results.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Ranks that share the sequence: instead, what context parallelism would move, and why.",
        ),
    ] = None,
    sharding: Annotated[Sharding, typer.Option(help="With --ranks: who holds which rows.")] = (
        Sharding.contiguous
    ),
) -> None:
    """Which kernel would serve a problem on a target: tuned, nearest or untuned, and why."""
    from .target import parse_target

    problems = parse_problems([shape], dtype.value, layout, context, direction.value)
    machine = parse_target(target)
    if ranks is not None:
        typer.echo(_plan_of_ranks(problems[0], machine, ranks, sharding))
        return
    from .workflows import explain as explain_problem

    explained = [explain_problem(problem, machine, deterministic=deterministic) for problem in problems]
    typer.echo("\n\n".join(map(str, explained)))


@app.command(
    epilog="Example: spattn export bundle/ --shape 1,16,4096,64 --direction both --target cpu   "
    "(for GPUs that aren't here: --target sm_80,sm_89,nvidia/h200 --dtype bfloat16)"
)
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; an older bundle in it is replaced.")],
    shape: Shapes = ["1,16,4096,64"],  # noqa: B006  typer copies it
    dtype: DtypeOption = Dtype.float32,
    layout: LayoutOption = "spattention",
    context: ContextOption = None,
    direction: DirectionOption = Direction.both,
    target: Annotated[
        str,
        typer.Option(
            help="Comma-separated; each is cpu, cuda, an architecture (x86-64-v3, sm_90a) or a chip "
            "(nvidia/h200). A device takes the kernels of the nearest one."
        ),
    ] = "cpu",
) -> None:
    """Compile the kernels of problems into a folder that runs without any compiler."""
    from .bundle import MANIFEST
    from .export import export_bundle
    from .problem import AttentionProblem

    problems = parse_problems(shape, dtype.value, layout, context, direction.value)
    written = export_bundle(folder, problems, target)
    manifest = json.loads((written / MANIFEST).read_text(encoding="utf-8"))
    for kernel in manifest["kernels"]:
        key = AttentionProblem.from_json(kernel["problem"]).key
        parts = (kernel["family"], kernel["status"], kernel["reason"], kernel["resources"])
        typer.echo(f"{kernel['target']}, {key}: {', '.join(part for part in parts if part)}")
    size = sum(file["bytes"] for file in manifest["files"].values())
    typer.echo(f"written: {written} ({len(manifest['files'])} libraries, {size / 2**20:.1f} MiB)")
    typer.echo(
        f"run with it: SPATTN_BUNDLE={written} python ..., or spattn_tvm.load_bundle({str(written)!r})"
    )


@app.command(
    epilog="Example: spattn bench --shape 1,16,4096,64 --peers ours,sdpa,flex   "
    "(CUDA: --device cuda --dtype bfloat16 --steps forward,backward --shape 4,16,4096,128)"
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
            help="Comma-separated: ours, sdpa, flex (CPU); ours, cudnn, flash, fa4_dense, cudnn_flex, fa4, "
            "flex, flex_arithmetic, flex_flash, fsa, fsa_triton (CUDA); with --ranks one, heads, bands, "
            "all_gather, ring. All by default."
        ),
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key/value heads of shapes that don't say theirs.")
    ] = None,
    documents: Annotated[
        int,
        typer.Option(min=1, max=2**16, help="Documents packed into each row, of lengths as 1 to 2 to 3 …"),
    ] = 1,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only what gives the same bits twice.")
    ] = False,
    steps: Annotated[
        str,
        typer.Option(
            help="Comma-separated: forward, backward, forward_backward. Or decode, whose shapes are those of "
            "--direction decode and whose peers are ours, sdpa (CPU and CUDA), cudnn, flash, fa4, fsa (CUDA)."
            " Or generate: whole generate() calls of a Llama with these heads and this context; peers are "
            "banded, banded_static, paged, static, dense, dense_static."
        ),
    ] = "forward,forward_backward",
    rounds: Annotated[int, typer.Option(min=1, help="Timings per peer and step.")] = 15,
    budget: Annotated[
        float,
        typer.Option(
            min=0, callback=_require_finite, help="Seconds a step may take; at least 5 rounds are made."
        ),
    ] = 60.0,
    idle_ms: Annotated[
        float,
        typer.Option(
            min=0, max=60_000, callback=_require_finite, help="Idle time before each CPU timing, ms."
        ),
    ] = 80.0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="CPU threads; PyTorch's choice by default.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=_LARGEST_SEED, help="Seed of the inputs; a fresh one by default."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=64,
            help="Ranks that share the sequence, each with a GPU of its own or a share of the CPU's cores.",
        ),
    ] = None,
    sharding: Annotated[Sharding, typer.Option(help="With --ranks: who holds which rows.")] = (
        Sharding.contiguous
    ),
    parts: Annotated[
        int | None, typer.Option(min=1, help="With --ranks: in how many parts the heads travel.")
    ] = None,
    layers: Annotated[
        int, typer.Option(min=1, max=1024, help="With --steps generate: layers of the model.")
    ] = 8,
    vocabulary: Annotated[
        int, typer.Option(min=1, max=2**24, help="With --steps generate: tokens of its vocabulary.")
    ] = 8192,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="With --steps generate: tokens that a timed call generates.")
    ] = 16,
    log_root: LogRoot = Path("autotune_logs"),
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write the JSON report.")] = True,
) -> None:
    """Check and time ours and its peers in one run; the report goes to autotune_logs/TARGET/benchmarks/."""
    timed = _names("--steps", steps)
    decodes, generates = "decode" in timed, "generate" in timed
    if (decodes or generates) and (len(timed) > 1 or documents != 1):
        raise ValueError(
            f"{'decode' if decodes else 'generate'} is benchmarked alone and unpacked, got --steps {steps}"
        )
    if ranks is not None and (decodes or generates or documents != 1 or deterministic or threads is not None):
        raise ValueError(
            "--ranks goes with neither --steps decode or generate nor --documents nor --deterministic "
            "nor --threads"
        )
    shapes = [_with_kv_heads(text, kv_heads) for text in shape]
    direction = "decode" if decodes or generates else "forward"
    problems = parse_problems(shapes, dtype.value, layout, context, direction)
    root = log_root if save else None
    settings: dict[str, Any] = {
        "peers": None if peers is None else _names("--peers", peers),
        "device": device,
        "rounds": rounds,
        "seed": random.randrange(_LARGEST_SEED) if seed is None else seed,
    }
    of_one_rank = settings | {"idle_ms": idle_ms, "threads": threads}
    if ranks is not None:
        dealt = {"shardings": [sharding.value], "parts": parts}
        _bench_ranks(problems, ranks, root, steps=timed, **dealt, **settings)
    elif generates:
        _bench_generation(problems, layers, vocabulary, root, tokens=new_tokens, **of_one_rank)
    elif decodes:
        _bench_decode(problems, root, **of_one_rank)
    else:
        packing = {"documents": documents, "deterministic": deterministic}
        _bench_attention(problems, root, steps=timed, budget_s=budget, **packing, **of_one_rank)


def _with_kv_heads(shape: str, kv_heads: int | None) -> str:
    """A shape as B,H/K,N,D, where it is B,H,N,D and K is given."""
    batch, comma, rest = shape.partition(",")
    heads, second_comma, rows = rest.partition(",")
    if kv_heads is None or "/" in heads:
        return shape
    return f"{batch}{comma}{heads}/{kv_heads}{second_comma}{rows}"


def _bench_attention(problems: list[AttentionProblem], log_root: Path | None, **settings: Any) -> None:
    """`bench` of forward and backward."""
    from rich.console import Console

    from .bench.report import tables
    from .workflows import benchmark

    with Console(stderr=True).status("starting") as status:
        report = benchmark(problems, report=status.update, **settings)
    kernels = [
        f"{result['shape']} {step}: {chosen['status']}, {chosen['reason']}"
        for result in report["results"]
        for step, chosen in result["schedule"].items()
    ]
    _finish_benchmark(report, tables(report), "benchmarks", log_root, lambda e: e["peer"] == "ours", kernels)


def _bench_decode(problems: list[AttentionProblem], log_root: Path | None, **settings: Any) -> None:
    """`bench` of steps of decoding."""
    from rich.console import Console

    from .bench.decode import decode_table
    from .workflows import benchmark

    with Console(stderr=True).status("starting") as status:
        report = benchmark(problems, report=status.update, **settings)
    tables = [decode_table(report)]
    _finish_benchmark(report, tables, "decode_benchmarks", log_root, lambda entry: entry["peer"] == "ours")


def _bench_ranks(
    problems: list[AttentionProblem], ranks: int, log_root: Path | None, **settings: Any
) -> None:
    """`bench` of sequences that ranks share."""
    from .bench.peers import OUR_STRATEGIES
    from .bench.ranks import benchmark_ranks, rank_tables

    report = benchmark_ranks(problems, ranks, **settings)
    ours = ("one", *OUR_STRATEGIES)
    _finish_benchmark(
        report, rank_tables(report), "rank_benchmarks", log_root, lambda entry: entry["peer"] in ours
    )


def _bench_generation(
    problems: list[AttentionProblem],
    layers: int,
    vocabulary: int,
    log_root: Path | None,
    **settings: Any,
) -> None:
    """`bench` of whole ``generate()`` calls."""
    from rich.console import Console

    from .bench.generation import ModelSizes, benchmark_generation, generation_tables

    sizes = ModelSizes(layers, vocabulary)
    with Console(stderr=True).status("starting") as status:
        report = benchmark_generation(problems, sizes, report=status.update, **settings)
    tables = generation_tables(report)
    _finish_benchmark(report, tables, "generation_benchmarks", log_root, lambda entry: entry["same_mask"])


def _finish_benchmark(
    report: dict[str, Any],
    tables: Iterable[Any],
    folder: str,
    log_root: Path | None,
    must_hold: Callable[[dict[str, Any]], bool],
    remarks: Iterable[str] = (),
) -> None:
    """Print a report and, where there is a `log_root`, write it; exit code 1 when an entry of ours failed."""
    from rich.console import Console

    from .bench.report import write_report

    console = Console()
    if not console.is_terminal:  # a file or a log, where a table may be as wide as it is
        console.width = 140
    for table in tables:
        console.print(table)
    for remark in remarks:
        console.print(remark, markup=False, highlight=False)
    if log_root is not None:
        path = write_report(report, log_root, folder)
        console.print(f"written: {path}", markup=False, highlight=False)
    entries = [entry for result in report["results"] for entry in result["entries"]]
    if any(entry["status"] != "ok" for entry in entries if must_hold(entry)):
        raise typer.Exit(1)


def _names(option: str, text: str) -> list[str]:
    """The different names of a comma-separated option."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{option} is a comma-separated list, got {text!r}")
    return list(dict.fromkeys(names))


Heads = Annotated[int, typer.Option(min=1, max=1024, help="Query heads.")]
DrawnContext = Annotated[int, typer.Option(min=1, help="Context length.")]
DrawnLength = Annotated[int | None, typer.Option(min=1, help="Sequence length; the context by default.")]


@app.command("layout", epilog="Example: spattn layout --layout equal_area --heads 16 --context 4096 --json")
def describe_layout(
    layout: LayoutOption = "spattention",
    heads: Heads = 16,
    context: DrawnContext = 4096,
    length: DrawnLength = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of the table.")] = False,
) -> None:
    """A layout's bands, pairs and load for each head, its work and coverage; `plot layout` draws them."""
    bands = parse_layout(layout, heads, context)
    bands.check_length(length or context)
    if as_json:
        typer.echo(json.dumps(_layout_facts(bands, length or context), indent=1))
    else:
        _print_layout(bands, length or context)


def _layout_facts(layout: BandLayout, length: int) -> dict[str, Any]:
    """A layout's numbers at a length, JSON-ready."""
    coverage, pairs = layout.coverage(length), layout.pairs(length)
    per_head = zip(layout.bands(length), layout.pairs_per_head(length), layout.load(length), strict=True)
    return {
        "layout": layout.spec,
        "length": length,
        "pairs": pairs,
        "of_dense_causal": pairs / (layout.num_heads * length * (length + 1) // 2),
        "is_autoregressive": layout.is_autoregressive,
        "coverage": {
            "distances": coverage.distances,
            "seen": coverage.seen,
            "seen_once": coverage.seen_once,
        },
        "heads": [
            {"head": head, "bands": [list(band) for band in intervals], "pairs": count, "load": load}
            for head, (intervals, count, load) in enumerate(per_head)
        ],
    }


def _print_layout(layout: BandLayout, length: int) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = _layout_facts(layout, length)
    table = Table(title=facts["layout"])
    for title in ("head", "near", "far", "pairs", "load"):
        table.add_column(title, justify="right")
    for head in facts["heads"]:
        near, far = (*(f"{lo}-{hi}" for lo, hi in head["bands"]), "", "")[:2]
        table.add_row(str(head["head"]), near, far, f"{head['pairs']:,}", f"{head['load']:.1%}")
    console = Console()
    console.print(table)
    coverage = facts["coverage"]
    console.print(
        f"{facts['pairs']:,} pairs, {facts['of_dense_causal']:.3f} of dense causal; "
        f"of {coverage['distances']:,} distances {coverage['seen']:,} are seen, "
        f"{coverage['seen_once']:,} by exactly one head",
        highlight=False,
    )


@plot_app.command(
    "layout",
    epilog="Example: spattn plot layout --layout spattention --heads 16 --context 4096 --out bands.png",
)
def plot_layout(
    layout: LayoutOption = "spattention",
    heads: Heads = 16,
    context: DrawnContext = 4096,
    length: DrawnLength = None,
    out: Annotated[Path, typer.Option(help="PNG, SVG or PDF to write.")] = Path("layout.png"),
) -> None:
    """Draw a layout's bands and per-head load, and print its work and coverage."""
    from . import plotting

    bands = parse_layout(layout, heads, context)
    path = plotting.plot_layout(bands, out, length or context)
    _print_layout(bands, length or context)
    typer.echo(f"written: {path}")


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
    from .problem import AttentionProblem
    from .tuning import curve, find_logs
    from .tuning.log import read_run

    searches = []
    for root in logs:
        for folder in find_logs(root):
            run = read_run(folder)
            points = list(zip(*curve(folder), strict=True))
            if points:
                searches.append((AttentionProblem.from_json(run["problem"]), run["strategy"], points))
    if not searches:
        raise ValueError(f"no measurements under {', '.join(map(str, logs))}")
    typer.echo(f"written: {plotting.plot_searches(searches, out)}")


@plot_app.command(
    "lengths",
    epilog="Example: spattn plot lengths autotune_logs/TARGET/benchmarks/DATE.json --out lengths.png",
)
def plot_lengths(
    report: Annotated[Path, typer.Argument(help="JSON report of spattn bench.")],
    out: Annotated[Path, typer.Option(help="PNG, SVG or PDF to write.")] = Path("lengths.png"),
) -> None:
    """Draw a benchmark report's useful TFLOP/s against the length."""
    from . import plotting

    typer.echo(f"written: {plotting.plot_lengths(report, out)}")


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


# Letters of an error's line; what is cut out is a value that nobody typed.
_LONGEST_MESSAGE = 2000


def _shortened(message: str) -> str:
    if len(message) <= _LONGEST_MESSAGE:
        return message
    half = _LONGEST_MESSAGE // 2
    return f"{message[:half]}… ({len(message) - 2 * half} letters) …{message[-half:]}"


def _with_given(message: str, error: Any) -> str:
    """The message of a wrong value with that value, which a number out of range is refused without."""
    arguments, names = sys.argv[1:], getattr(getattr(error, "param", None), "opts", ())
    given = [value for name, value in itertools.pairwise(arguments) if name in names]
    given += [each.partition("=")[2] for each in arguments if each.partition("=")[0] in names and "=" in each]
    if not given or repr(given[-1]) in message:
        return message
    return f"{message.rstrip('.')}, got {given[-1]!r}"


def main() -> None:
    """Entry point: mistakes of the user end in one line, not in a traceback."""
    try:
        code = app(prog_name="spattn", standalone_mode=False)
    except _UsageError as error:
        message = _with_given(error.format_message(), error)
        if message:  # else it is the help, which was printed
            print(f"error: {_shortened(message)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(1)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        # PyTorch appends where in its C++ code an error was raised.
        message, _, _ = str(error).partition("\nException raised from")
        print(f"error: {_shortened(message)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
