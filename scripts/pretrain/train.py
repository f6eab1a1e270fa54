"""Train a language model by a configuration, from the beginning or from where it stopped.

    python scripts/pretrain/train.py scripts/pretrain/configs/smoke.toml --out results/pretrain/smoke
    torchrun --nproc-per-node 8 scripts/pretrain/train.py CONFIG --out FOLDER --set train.parallel=fsdp2
    torchrun --nproc-per-node 8 scripts/pretrain/train.py CONFIG --out FOLDER --context-parallel 4

The folder gets ``log.jsonl``, TensorBoard's events if it is installed, the last two checkpoints and, at the
end, ``model``, which transformers loads. A run that was killed goes on from the last checkpoint when the same
command is given again: with the same batches and, on a CPU with as many threads, bitwise the same losses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from config import FREE_ON_RESUME, Config, ConfigError, add_arguments, load_arguments
from data import SEPARATOR, DataError, Tokens
from model import LanguageModel, attention_flops, document_lengths, matmul_flops_per_token, save_model
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from spattn_tvm.file_lock import LockedError, file_lock
from spattn_tvm.provenance import device_facts, installed_versions

KEPT_CHECKPOINTS = 2
# Dense bfloat16 in TFLOP/s, from NVIDIA's data sheets; a device's name begins with the key.
PEAK_TFLOPS = {"NVIDIA H100 80GB": 989.4, "NVIDIA H200": 989.4, "NVIDIA A100": 312.0}
PROBE_TOKENS, PROBE_CUE = 64, 16


# --- processes and devices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """This process among all of a run.

    Attributes
    ----------
    rank, world : int
        Of all processes.
    device : torch.device
    group : ProcessGroup or None
        Those that share sequences with this one: consecutive ranks.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def sharers(self) -> int:
        """How many processes work on one batch of sequences."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def batches(self) -> int:
        """How many micro batches all processes work on at a time."""
        return self.world // self.sharers

    @property
    def batch(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.sharers


def make_place(config: Config, rank: int, world: int, device: torch.device) -> Place:
    """A process of a run, on a mesh of data and context if sequences are shared."""
    sharers = config.train.context_parallel
    if sharers == 1:
        return Place(rank, world, device)
    mesh = init_device_mesh(device.type, (world // sharers, sharers), mesh_dim_names=("data", "context"))
    return Place(rank, world, device, mesh["context"].get_group())


@contextlib.contextmanager
def placed(config: Config) -> Iterator[Place]:
    """Joins the processes of a run, if torchrun started several.

    Raises
    ------
    ConfigError
        A device that is not there, or a number of processes that can't be shared out.
    """
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, and PyTorch finds no CUDA device")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world % config.train.context_parallel:
        raise ConfigError(
            f"train.context_parallel ({config.train.context_parallel}) does not divide the number of "
            f"processes ({world}): start them with torchrun --nproc-per-node"
        )
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield make_place(config, int(os.environ.get("RANK", 0)), world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def wrap(model: LanguageModel, config: Config, place: Place) -> nn.Module:
    """The model as it is run: alone, DDP or FSDP2."""
    precision = config.train.precision
    if precision == "bfloat16":
        for weight in model.parameters():  # not the rotary frequencies, which are buffers
            weight.data = weight.data.bfloat16()
    if place.world == 1:
        return model
    if config.train.parallel == "ddp":
        return DistributedDataParallel(
            model, device_ids=[place.device] if place.device.type == "cuda" else None
        )
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "autocast" else None, reduce_dtype=torch.float32
    )
    for layer in model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def autocast(config: Config, place: Place) -> Any:
    is_sharded = place.world > 1 and config.train.parallel == "fsdp2"
    if config.train.precision != "autocast" or is_sharded:  # there FSDP2's own policy casts
        return contextlib.nullcontext()
    return torch.autocast(place.device.type, torch.bfloat16)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW, without decay of vectors (norms)."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    settings = config.train
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate_at(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine down to a share of the peak."""
    settings = config.train
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    least = settings.final_learning_rate
    return settings.learning_rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress)))


# --- checkpoints ------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _options(model: nn.Module) -> StateDictOptions:
    is_sharded = hasattr(model, "unshard")
    return StateDictOptions(full_state_dict=True, cpu_offload=is_sharded, broadcast_from_rank0=is_sharded)


def save_checkpoint(folder: Path, step: int, run: Run) -> None:
    """Write ``step-N.pt`` under another name first; older ones but the last two go."""
    place = run.place
    weights, moments = get_state_dict(run.model, run.optimizer, options=_options(run.model))
    random: list[Any] = [None] * place.world
    mine = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(place.device)
    if place.world > 1:
        dist.all_gather_object(random, mine)
    else:
        random = [mine]
    if place.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "model": weights,
            "optimizer": moments,
            "random": random,
            "config": run.config.as_dict(),
            "data": run.training.meta["sha256"],
        }
        partial = folder / "partial"
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, RuntimeError):
                raise OSError(
                    f"{folder}: no checkpoint could be written, is the disk full? ({error})"
                ) from error
            raise
        partial.replace(folder / f"step-{step:08d}.pt")
        for old in _checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            old.unlink()
    if place.world > 1:
        dist.barrier()


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, entries in values.items() for name, value in entries.items()
    }


def load_checkpoint(path: Path, run: Run) -> int:
    """Continue from a checkpoint; returns the number of steps that were made.

    Raises
    ------
    ConfigError
        The run was another one: names the settings that differ.
    """
    config, place = run.config, run.place
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{path} is damaged ({str(error).splitlines()[0]}): delete it, and the run goes on from the one "
            "before"
        ) from error
    # Settings that there were not yet had the effect of their defaults.
    was, now = _flat(Config().as_dict()) | _flat(state["config"]), _flat(config.as_dict())
    differing = [name for name in now if name not in FREE_ON_RESUME and was[name] != now[name]]
    changes = [f"{name} was {was[name]!r}, is {now[name]!r}" for name in differing]
    if len(state["random"]) != place.world:
        changes.append(f"it had {len(state['random'])} processes, now {place.world}")
    if state["data"] != run.training.meta["sha256"]:
        changes.append(f"{config.data.folder} holds other tokens than then")
    if changes:
        raise ConfigError(
            f"{path} is of another run ({'; '.join(changes)}): resume it as it was, or give another --out"
        )
    if isinstance(run.model, DistributedDataParallel):
        # Its first backward pass says in which order gradients travel from then on, and that order is the one
        # in which more than two processes' gradients are summed.
        windows = run.training.at(0, config.train.micro_batch)
        _backward(run, torch.from_numpy(windows), torch.from_numpy(run.training.positions(windows)), 1)
        run.optimizer.zero_grad(set_to_none=True)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(run.model),
    )
    mine = state["random"][place.rank]
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], place.device)
    return state["step"]


# --- logs -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def occupied(out: Path, place: Place) -> Iterator[None]:
    """Keeps a run's folder from other runs.

    Raises
    ------
    ConfigError
        A run that is under way writes there, or one did whose checkpoints are gone.
    """
    if not place.is_first:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    run = next((line["run"] for line in read_log(out / "log.jsonl") if "run" in line), None)
    if run is not None and not _checkpoints(out / "checkpoints"):
        made = max(line.get("step", 0) for line in read_log(out / "log.jsonl"))
        # Steps behind the first checkpoint are logged once that is written.
        if made > run["config"]["train"]["checkpoint_every"]:
            raise ConfigError(
                f"{out} has the log of {made} steps and no checkpoint to go on from: give another --out, or "
                "delete log.jsonl to begin anew"
            )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(out / "lock", wait=False))
        except LockedError as error:
            raise ConfigError(f"another run writes into {out} ({error}): give another --out") from error
        yield


class Log:
    """``log.jsonl``, one object a line, and TensorBoard's events where that is installed.

    A run that resumes at a step forgets the lines behind it, which it writes again.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [line for line in read_log(path) if line.get("step", 0) <= resumed_at] if resumed_at else []
        partial = folder / "log.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self.file = path.open("a", encoding="utf-8")
        self.board: Any = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.board is not None and "step" in line:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one is left out where a killed run wrote half of it."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOP/s of a device; None where nobody knows, and there is no MFU then."""
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if name.startswith(known)), None)


def _on(device: torch.device, rows: Tensor) -> Tensor:
    """Rows of the host on a device, without waiting for what that is at, as copies of pageable memory do."""
    if device.type != "cuda":
        return rows
    # Expanded rows, which positions may be, can't be pinned.
    return rows.contiguous().pin_memory().to(device, non_blocking=True)


# --- evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def _nats(run: Run, windows: Tensor, positions: Tensor) -> Tensor:
    rows = zip(
        windows.split(run.config.train.micro_batch),
        positions.split(run.config.train.micro_batch),
        strict=True,
    )
    parts = []
    for tokens, places in rows:
        with autocast(run.config, run.place):
            parts.append(run.model(_on(run.place.device, tokens), _on(run.place.device, places))[1].cpu())
    return torch.cat(parts).double()


def _over_all(sums: Tensor, place: Place) -> Tensor:
    if place.world > 1:
        moved = sums.to(place.device)
        dist.all_reduce(moved)
        return moved.cpu()
    return sums


def evaluate(run: Run) -> dict[str, Any]:
    """Held-out loss in nats a token, in bits a byte, and by position within the document."""
    place, settings = run.place, run.config.train
    windows = run.held_out.first(settings.evaluate_sequences)
    each = len(windows) // place.batches
    windows = windows[place.batch * each : (place.batch + 1) * each]
    positions = torch.from_numpy(run.held_out.positions(windows))
    nats = _nats(run, torch.from_numpy(windows), positions)
    # Positions 0, 1, 2-3, 4-7, ...
    octave = torch.log2(positions.double().clamp(min=0.5)).floor().long() + 1
    octaves = int(run.config.data.context - 1).bit_length() + 1
    # Processes that share a batch count all of it: that is the same factor in both.
    sums = torch.bincount(octave.flatten(), nats.flatten(), octaves)
    counts = torch.bincount(octave.flatten(), minlength=octaves).double()
    sums, counts = _over_all(torch.stack([sums, counts]), place)
    loss = float(sums.sum() / counts.sum())
    by_position = {
        str(0 if index == 0 else 2 ** (index - 1)): float(sums[index] / counts[index])
        for index in range(octaves)
        if counts[index]
    }
    return {
        "held_out_loss": loss,
        "held_out_bits_per_byte": loss / math.log(2) / run.held_out.bytes_per_token(),
        "held_out_by_position": by_position,
    }


def probe_copies(run: Run) -> dict[str, Any]:
    """Is text known that stood `distance` tokens before? Nats a token of the copy and of the original.

    The last tokens of held-out windows are replaced by those that stood so far before; the first of them are
    the cue and don't count.
    """
    context, place = run.config.data.context, run.place
    windows = run.held_out.first(run.config.train.evaluate_sequences)
    each = len(windows) // place.batches
    original = torch.from_numpy(windows[place.batch * each : (place.batch + 1) * each])
    positions = torch.arange(context).expand(len(original), context)
    first = _nats(run, original, positions)
    found = {}
    distance = PROBE_TOKENS
    while distance + PROBE_TOKENS < context:
        copied = original.clone()
        end = context + 1 - distance
        copied[:, -PROBE_TOKENS:] = original[:, end - PROBE_TOKENS : end]
        counted = PROBE_TOKENS - PROBE_CUE
        copy = _nats(run, copied, positions)[:, -counted:]
        before = first[:, end - 1 - counted : end - 1]
        sums = _over_all(torch.stack([copy.sum(), before.sum()]), place)
        total = counted * each * place.world
        found[str(distance)] = {"copy": float(sums[0]) / total, "original": float(sums[1]) / total}
        distance *= 2
    return {"copies_by_distance": found}


# --- training ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that a step works on."""

    config: Config
    place: Place
    model: nn.Module
    optimizer: torch.optim.Optimizer
    training: Tokens
    held_out: Tokens
    pending: list[tuple[int, Tensor, Tensor, float]] = field(default_factory=list)


def start(config: Config, place: Place) -> Run:
    """A run at its first step.

    Raises
    ------
    ConfigError
        A batch that the processes can't share.
    DataError
        No data.
    """
    settings = config.train
    at_a_time = settings.micro_batch * place.batches
    if settings.batch % at_a_time:
        raise ConfigError(
            f"train.batch ({settings.batch}) is no multiple of micro_batch x processes / context_parallel "
            f"({at_a_time})"
        )
    if settings.deterministic or place.device.type == "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    folder = Path(config.data.folder)
    training = Tokens(folder, "train", config.data.context, settings.seed)
    held_out = Tokens(folder, "held_out", config.data.context)
    if min(settings.evaluate_sequences, held_out.windows) < place.batches:
        raise DataError(
            f"{min(settings.evaluate_sequences, held_out.windows)} held-out sequences for {place.batches} "
            "processes or groups of them: raise train.evaluate_sequences, or hold out more text"
        )
    torch.manual_seed(settings.seed)
    with place.device:
        model = LanguageModel(config, training.meta["vocabulary"], place.group)
    wrapped = wrap(model, config, place)
    return Run(config, place, wrapped, make_optimizer(wrapped, config), training, held_out)


def _backward(run: Run, windows: Tensor, positions: Tensor, batches: int) -> Tensor:
    """Add to the gradients those of one of so many micro batches; returns its tokens' losses."""
    device = run.place.device
    with autocast(run.config, run.place):
        loss, nats = run.model(_on(device, windows), _on(device, positions))
    (loss / batches).backward()
    return nats


def make_step(run: Run, step: int) -> int:
    """One step of all processes; returns the floating-point operations of all."""
    config, place, settings = run.config, run.place, run.config.train
    accumulated = settings.batch // (settings.micro_batch * place.batches)
    rate = learning_rate_at(step, config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    losses = torch.zeros((), device=place.device)
    flops = 0
    for part in range(accumulated):
        begin = step * settings.batch + (part * place.batches + place.batch) * settings.micro_batch
        windows = run.training.at(begin, settings.micro_batch)
        positions = torch.from_numpy(run.training.positions(windows))
        flops += attention_flops(config, document_lengths(config, positions))
        is_last = part == accumulated - 1
        waiting: Any = contextlib.nullcontext()
        if isinstance(run.model, DistributedDataParallel) and not is_last:
            waiting = run.model.no_sync()
        elif hasattr(run.model, "set_requires_gradient_sync"):
            run.model.set_requires_gradient_sync(is_last)
        with waiting:
            nats = _backward(run, torch.from_numpy(windows), positions, accumulated)
        losses += nats.mean() / accumulated
    norm: Any = nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.pending.append((step + 1, losses, norm.detach(), rate))
    tokens = settings.batch * config.data.context
    # Documents of the other batches are about as long.
    return flops * place.batches + tokens * matmul_flops_per_token(config, run.training.meta["vocabulary"])


def _steps_of(run: Run) -> list[dict[str, Any]]:
    """What is known of the steps since the last time; waits for the device."""
    losses = torch.stack([loss for _, loss, _, _ in run.pending])
    if run.place.world > 1:
        dist.all_reduce(losses)
        losses /= run.place.world
    lines = [
        {"step": step, "loss": loss, "gradient_norm": norm.item(), "learning_rate": rate}
        for (step, _, norm, rate), loss in zip(run.pending, losses.tolist(), strict=True)
    ]
    run.pending.clear()
    for line in lines:
        if not math.isfinite(line["loss"]) or not math.isfinite(line["gradient_norm"]):
            raise FloatingPointError(
                f"step {line['step']}: loss {line['loss']}, gradient norm {line['gradient_norm']}; a lower "
                "train.learning_rate or a longer train.warmup may help"
            )
    return lines


def export(run: Run, weights: dict[str, Any], folder: Path) -> None:
    """Write the trained model, and its tokenizer, for transformers."""
    meta, data = run.training.meta, Path(run.config.data.folder)
    if not save_model(run.config, meta["vocabulary"], weights, folder, meta["separator"]):
        return
    if meta["tokenizer"] == "bpe":
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(
            tokenizer_file=str(data / "tokenizer.json"), bos_token=SEPARATOR, eos_token=SEPARATOR
        ).save_pretrained(folder)


def train(config: Config, out: Path) -> None:
    """Train to the last step, from the last checkpoint in `out` if there is one."""
    settings = config.train
    with placed(config) as place, occupied(out, place):
        run = start(config, place)
        known = _checkpoints(out / "checkpoints")
        done = load_checkpoint(known[-1], run) if known else 0
        log = Log(out, done) if place.is_first else None
        if log is not None and not done:
            header = {
                "config": config.as_dict(),
                "label": config.label,
                "parameters": sum(weight.numel() for weight in run.model.parameters()),
                "data": run.training.meta,
                "processes": place.world,
                "batches_at_a_time": place.batches,
                "threads": torch.get_num_threads(),
                "device": device_facts(place.device),
                "versions": installed_versions(("torch", "transformers", "spattn-tvm", "apache-tvm")),
            }
            log.write({"run": header})
        tokens, peak = settings.batch * config.data.context, peak_flops(config, place.device)
        bar = tqdm(
            range(done, settings.steps), initial=done, total=settings.steps, disable=not place.is_first
        )
        began, made, flops = time.perf_counter(), 0, 0
        for step in bar:
            flops += make_step(run, step)
            made += 1
            is_end = step + 1 == settings.steps
            evaluates = is_end or (step + 1) % settings.evaluate_every == 0
            saves = is_end or (step + 1) % settings.checkpoint_every == 0
            if not (evaluates or saves or (step + 1) % settings.log_every == 0):
                continue
            lines = _steps_of(run)
            seconds = time.perf_counter() - began
            lines[-1] |= {
                "tokens": (step + 1) * tokens,
                "tokens_per_second": made * tokens / seconds,
                "mfu": flops / seconds / (peak * place.world) if peak else None,
                "peak_memory_bytes": peak_memory_bytes(place.device),
            }
            if evaluates:
                lines.append({"step": step + 1} | evaluate(run) | (probe_copies(run) if is_end else {}))
            if log is not None:
                for line in lines:
                    log.write(line)
                bar.set_postfix(
                    loss=f"{lines[0]['loss']:.3f}", tokens_per_s=f"{made * tokens / seconds:,.0f}"
                )
            if saves:
                save_checkpoint(out / "checkpoints", step + 1, run)
            began, made, flops = time.perf_counter(), 0, 0
        if log is not None:
            log.close()
        weights = get_model_state_dict(run.model, options=_options(run.model))
        if place.is_first:
            export(run, weights, out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; resumed if it has begun")
    arguments = parser.parse_args()
    try:
        train(load_arguments(arguments), arguments.out)
    except (ConfigError, DataError, FloatingPointError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error}. Once that is mended, the same command goes on from the last checkpoint")
    except KeyboardInterrupt:
        print("stopped: given again, the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
