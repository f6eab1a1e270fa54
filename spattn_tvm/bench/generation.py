"""Time whole ``generate()`` calls of a Hugging Face model: with bands over each cache, and dense with SDPA.

The model is Llama's, with random weights; its context is a problem's keys. Of each peer the prompt is
generated from once (prefill), then `rounds` calls go on from there, `tokens` each, up to the end of the
context: so the cache is all but full, and a call has whatever transformers does around a step. Peers are
timed in turns. Afterwards the logits of the last call are compared with those that the same attention gives
of the whole sequence without a cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spattn_tvm.extras import install_hint
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu, detect_cuda

from .report import report_head
from .run import find_device

if TYPE_CHECKING:
    import torch
    from rich.table import Table

_VERSIONED_PACKAGES = ("spattn-tvm", "torch", "transformers", "apache-tvm", "apache-tvm-ffi")


@dataclass(frozen=True)
class ModelSizes:
    """What a problem does not say of a model: layers, tokens of the vocabulary, and columns of the
    feed-forward layers (``None``: 8/3 of the hidden size, rounded up to a multiple of 256).
    """

    layers: int = 8
    vocabulary: int = 8192
    intermediate: int | None = None

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")


@dataclass(frozen=True)
class GenerationPeer:
    """A model's attention and its cache: ``kind`` as ``make_cache`` takes it, or ``"dynamic"`` and
    ``"static"`` of transformers' own."""

    title: str
    same_mask: bool
    kind: str
    is_static: bool = False


GENERATION_PEERS: Mapping[str, GenerationPeer] = {
    "banded": GenerationPeer("bands, BandedCache", True, "banded"),
    "banded_static": GenerationPeer("bands, BandedCache, static", True, "banded", is_static=True),
    "paged": GenerationPeer("bands, PagedCache", True, "paged"),
    "static": GenerationPeer("bands, StaticCache", True, "static", is_static=True),
    "dense": GenerationPeer("dense SDPA, DynamicCache", False, "dynamic"),
    "dense_static": GenerationPeer("dense SDPA, StaticCache", False, "static", is_static=True),
}

# Of the largest logit: what layers make of half a unit of the attention's result.
_ALLOWED = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}


def _make_model(problem: AttentionProblem, sizes: ModelSizes, device: torch.device, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = problem.query_heads * problem.head_dim
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=hidden,
        intermediate_size=sizes.intermediate or -(-hidden * 8 // 3 // 256) * 256,
        num_hidden_layers=sizes.layers,
        num_attention_heads=problem.query_heads,
        num_key_value_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        max_position_embeddings=problem.keys,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=problem.dtype,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device, getattr(torch, problem.dtype)).eval()


def _use(model: Any, problem: AttentionProblem, peer: GenerationPeer) -> None:
    from spattn_tvm.integrations.transformers import set_layout

    if peer.same_mask:
        set_layout(model, problem.layout)
    else:
        model.set_attn_implementation("sdpa")


def _make_cache(model: Any, problem: AttentionProblem, peer: GenerationPeer) -> Any:
    from transformers import DynamicCache, StaticCache

    from spattn_tvm.integrations.transformers import make_cache

    if peer.kind == "dynamic":
        return DynamicCache(config=model.config)
    if peer.kind == "static":
        return StaticCache(config=model.config, max_cache_len=problem.keys)
    return make_cache(model, peer.kind, max_length=problem.keys, is_static=peer.is_static)


def _cache_bytes(cache: Any) -> int:
    memories = [getattr(layer, "cache", layer) for layer in cache.layers]
    return sum(memory.keys.nbytes + memory.values.nbytes for memory in memories)


@dataclass
class _Run:
    """One peer's cache and what it has generated so far."""

    peer: GenerationPeer
    cache: Any
    sequences: torch.Tensor
    prefill_ms: float
    samples_ms: list[float]
    logits: Any = None


def _waited(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _generate(model: Any, run: _Run, tokens: int, idle_ms: float) -> float:
    """Milliseconds of a call that goes on with `tokens` tokens."""
    device = run.sequences.device
    if device.type == "cpu":
        time.sleep(idle_ms * 1e-3)
    _waited(device)
    begin = time.perf_counter()
    result = model.generate(
        run.sequences,
        cache=run.cache,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    _waited(device)
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    run.sequences, run.logits = result.sequences, result.logits
    return elapsed_ms


def _error(model: Any, problem: AttentionProblem, run: _Run) -> float:
    """Of the last call's logits, against those of the whole sequence at once, over the largest of these."""
    import torch

    _use(model, problem, run.peer)
    last = torch.stack(run.logits, 1).float()
    whole = model(run.sequences, use_cache=False, logits_to_keep=last.shape[1] + 1).logits[:, :-1].float()
    return float((last - whole).abs().max() / whole.abs().max())


def _time_problem(
    problem: AttentionProblem,
    names: Sequence[str],
    sizes: ModelSizes,
    device: torch.device,
    tokens: int,
    rounds: int,
    idle_ms: float,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    import torch

    model = _make_model(problem, sizes, device, seed)
    prompt_length = problem.keys - 1 - tokens * (rounds + 1)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(sizes.vocabulary, (problem.batch, prompt_length), generator=generator).to(device)
    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, _Run] = {}

    def refuse(name: str, error: Exception) -> None:  # the other peers go on
        entries[name] |= {"status": "not available", "reason": f"{type(error).__name__}: {error}"}
        runs.pop(name, None)

    for name in names:
        peer = GENERATION_PEERS[name]
        entries[name] = {"peer": name, "title": peer.title, "same_mask": peer.same_mask}
        report(f"{problem.key}: {peer.title}, prompt of {prompt_length}")
        try:
            _use(model, problem, peer)
            # What is made once, kernels among it, is not the prompt's time.
            warm = _Run(peer, _make_cache(model, problem, peer), prompt[:, :2], 0.0, [])
            _generate(model, warm, 3, 0.0)
            del warm
            run = _Run(peer, _make_cache(model, problem, peer), prompt, 0.0, [])
            run.prefill_ms = _generate(model, run, 1, idle_ms)
            _generate(model, run, tokens, 0.0)
            runs[name] = run
        except Exception as error:
            refuse(name, error)
    for round_index in range(rounds):
        report(f"{problem.key}: round {round_index + 1} of {rounds}")
        for name, run in list(runs.items()):
            try:
                _use(model, problem, run.peer)
                run.samples_ms.append(_generate(model, run, tokens, idle_ms) / tokens)
            except Exception as error:
                refuse(name, error)
    for name, run in runs.items():
        report(f"{problem.key}: checking {run.peer.title}")
        found = _error(model, problem, run)
        entries[name] |= {"error": found, "status": "ok" if found <= _ALLOWED[problem.dtype] else "wrong"}
    timed = {name: run for name, run in runs.items() if entries[name]["status"] == "ok"}
    medians = {name: statistics.median(run.samples_ms) for name, run in timed.items()}
    dense = min((medians[name] for name in timed if not GENERATION_PEERS[name].same_mask), default=None)
    row_bytes = 2 * problem.kv_heads * problem.head_dim * getattr(torch, problem.dtype).itemsize
    dense_bytes = sizes.layers * problem.batch * problem.keys * row_bytes
    for name, run in timed.items():
        entries[name] |= {
            "prefill_ms": run.prefill_ms,
            "prefill_tokens_s": problem.batch * prompt_length / run.prefill_ms * 1e3,
            "token_ms": medians[name],
            "min_token_ms": min(run.samples_ms),
            "tokens_s": problem.batch / medians[name] * 1e3,
            "of_dense": None if dense is None else dense / medians[name],
            "cache_bytes": _cache_bytes(run.cache),
            "cache_of_dense": _cache_bytes(run.cache) / dense_bytes,
        }
    return {
        "problem": problem.to_json(),
        "model": {
            **asdict(sizes),
            "intermediate": model.config.intermediate_size,
            "hidden": model.config.hidden_size,
            "parameters": model.num_parameters(),
        },
        "prompt": prompt_length,
        "entries": list(entries.values()),
    }


def benchmark_generation(
    problems: Sequence[AttentionProblem],
    sizes: ModelSizes | None = None,
    *,
    peers: Sequence[str] | None = None,
    device: str = "cpu",
    tokens: int = 16,
    rounds: int = 5,
    idle_ms: float = 80.0,
    threads: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time ``generate()`` of a model for each problem.

    Parameters
    ----------
    problems : sequence of AttentionProblem
        Of the direction ``"decode"`` and one query: batch, heads, head dim and layout of the model's
        attention, and as `keys` its context, which the last call fills.
    sizes : ModelSizes, optional
        The rest of the model.
    peers : sequence of str, optional
        Names in `GENERATION_PEERS`; all when omitted.
    device : str
    tokens : int
        Generated by each call.
    rounds : int
        Calls that are timed.
    idle_ms : float
        Idle milliseconds before each on the CPU.
    threads : int, optional
        CPU threads of PyTorch and of our kernels; PyTorch's setting when omitted.
    seed : int
        Of weights and prompts.
    report : callable
        Called with a line of progress.

    Returns
    -------
    dict
        Of JSON values: for each problem the ``model``, the length of its ``prompt``, and for each peer
        ``prefill_ms`` (measured once), ``prefill_tokens_s``, ``token_ms`` (a step of the whole batch, median
        over the calls), ``tokens_s``, ``of_dense`` (the tokens/s over those of the fastest dense peer),
        ``cache_bytes``, ``cache_of_dense`` (over those of a dense cache of the context) and ``error``.

    Raises
    ------
    ValueError
        For an unknown peer, a problem of another kind or too short for its calls, or none.
    ImportError
        Without transformers.
    """
    import torch

    try:
        import spattn_tvm.integrations.transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"generation is that of transformers ({error}): {install_hint('hf')}") from error
    if not problems or any(problem.direction != "decode" or problem.length != 1 for problem in problems):
        raise ValueError("a benchmark of generation needs problems of the direction decode with one query")
    unknown = sorted(set(peers or ()) - set(GENERATION_PEERS))
    if unknown:
        raise ValueError(f"unknown peer {unknown[0]!r}; known: {', '.join(GENERATION_PEERS)}")
    if tokens < 1 or rounds < 1:
        raise ValueError(f"tokens and rounds must be at least 1, got {tokens} and {rounds}")
    least = tokens * (rounds + 1) + 3
    for problem in problems:
        problem.layout.require_autoregressive("generation")
        if problem.head_dim % 8 or not 32 <= problem.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 from 32 to 256, got {problem.head_dim}")
        if problem.keys < least:
            raise ValueError(
                f"{rounds} calls of {tokens} tokens need a context of {least}, got {problem.keys}"
            )
    place = find_device(device)
    target = detect_cpu() if place.type == "cpu" else detect_cuda(place.index or 0)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with torch.no_grad():
            results = [
                _time_problem(
                    problem,
                    peers or list(GENERATION_PEERS),
                    sizes or ModelSizes(),
                    place,
                    tokens,
                    rounds,
                    idle_ms,
                    seed,
                    report,
                )
                for problem in problems
            ]
        return {
            **report_head(1, target, place, _VERSIONED_PACKAGES),
            "threads": torch.get_num_threads(),
            "method": {"rounds": rounds, "tokens": tokens, "seed": seed, "statistic": "median"},
            "results": results,
        }
    finally:
        torch.set_num_threads(threads_before)


def generation_tables(report: Mapping[str, Any]) -> list[Table]:
    """A rich table for each problem of a report."""
    from rich.table import Table

    tables = []
    for result in report["results"]:
        model = result["model"]
        table = Table(
            title=f"{AttentionProblem.from_json(result['problem']).key}, {model['layers']} layers, "
            f"{model['parameters'] / 1e6:.0f} M parameters, prompt of {result['prompt']}"
        )
        table.add_column("attention and cache")
        for title in ("tokens/s", "of dense", "prefill tokens/s", "cache MiB", "of a dense one", "error"):
            table.add_column(title, justify="right")
        for entry in result["entries"]:
            if entry["status"] != "ok":
                table.add_row(entry["title"], entry["status"], entry.get("reason", ""))
                continue
            table.add_row(
                entry["title"],
                f"{entry['tokens_s']:.4g}",
                "" if entry["of_dense"] is None else f"{entry['of_dense']:.2f}",
                f"{entry['prefill_tokens_s']:.4g}",
                f"{entry['cache_bytes'] / 2**20:.4g}",
                f"{entry['cache_of_dense']:.3f}",
                f"{entry['error']:.1e}",
            )
        tables.append(table)
    return tables
