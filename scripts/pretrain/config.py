"""What a run is: a TOML file, checked before anything else happens.

A file may build on another (``extends = "base.toml"``, relative to itself); single values are set on the
command line (``--set train.seed=1``). What is unknown, of the wrong type or impossible is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib

BANDED = ("spattention", "exclusive", "local_only", "gapped", "equal_area", "sliding_window")
MASKED = ("longformer", "bigbird", "reformer")
ATTENTIONS = (*BANDED, "dense", *MASKED, "bound")
"""Attention by name; ``bound`` is ``q + repeat(k) + repeat(v)`` in its place, for the throughput table."""

SHAREABLE = tuple(name for name in ATTENTIONS if name not in MASKED)
"""Attentions of sequences that several processes share."""

IMPLEMENTATIONS = ("auto", "flex", "eager")


class ConfigError(ValueError):
    """A configuration that can't be run."""


@dataclass(frozen=True)
class Model:
    """Shape; ``olmoe`` is a mixture of experts, ``llama`` dense."""

    kind: str = "olmoe"
    hidden: int = 512
    layers: int = 8
    heads: int = 16
    kv_heads: int = 16
    intermediate: int = 512  # of one expert, or of the dense MLP
    experts: int = 16
    experts_per_token: int = 2
    experts_implementation: str = "grouped_mm"  # or "eager": a loop over the experts
    router_loss: float = 0.01  # coefficient of the load-balancing loss
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class Attention:
    """One name for all layers, or a list of one for each; ``auto`` is the fastest implementation there is."""

    name: str | tuple[str, ...] = "spattention"
    implementation: str = "auto"
    window: int | None = (
        None  # of sliding_window; by default 2 C / H keys, as many as spattention's queries see
    )


@dataclass(frozen=True)
class Data:
    """Where data.py wrote, and how documents are laid out."""

    folder: str = "results/pretrain/text"
    context: int = 4096
    documents: str = "separate"  # or "joined": attention crosses from a document to the next


@dataclass(frozen=True)
class Train:
    """Optimization, precision, parallelism and what is kept."""

    steps: int = 1000
    batch: int = 16  # sequences of a step, over all processes and accumulated micro batches
    micro_batch: int = 4  # sequences of a process at a time
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1  # as a share of the peak
    warmup: int = 100  # steps
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    precision: str = "autocast"  # bfloat16 over float32 weights; "bfloat16": weights too; "float32"
    parallel: str = "ddp"  # or "fsdp2"
    context_parallel: int = 1  # processes that share the sequences of a micro batch
    activation_checkpointing: bool = False
    loss_chunk: int = 2048  # tokens whose logits exist at a time
    deterministic: bool = False  # always on the CPU
    device: str = "auto"
    log_every: int = 10
    evaluate_every: int = 250
    evaluate_sequences: int = 64
    checkpoint_every: int = 250
    peak_tflops: float | None = None  # dense bfloat16, for MFU, where the device is not a known one


@dataclass(frozen=True)
class Config:
    """All of a run."""

    model: Model = field(default_factory=Model)
    attention: Attention = field(default_factory=Attention)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)

    @property
    def names(self) -> tuple[str, ...]:
        """The attention of each layer."""
        name = self.attention.name
        return (name,) * self.model.layers if isinstance(name, str) else name

    @property
    def label(self) -> str:
        """How tables call this attention; other attentions have other labels."""
        runs = [(name, len(list(group))) for name, group in itertools.groupby(self.names)]
        label = runs[0][0] if len(runs) == 1 else " + ".join(f"{count} {name}" for name, count in runs)
        if self.attention.window is not None:
            label += f" of {self.attention.window}"
        implementation = self.attention.implementation
        return label if implementation == "auto" else f"{label} ({implementation})"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Settings that a resumed run may change: none of them touches what is computed.
FREE_ON_RESUME = frozenset(
    f"train.{name}"
    for name in ("log_every", "evaluate_every", "evaluate_sequences", "checkpoint_every", "peak_tflops")
) | {"data.folder"}


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is the name of a file, got {base!r}")
    merged = _read(path.parent / base, (*seen, path.resolve()))
    for section, entries in values.items():
        if isinstance(entries, dict) and isinstance(merged.get(section), dict):
            merged[section] |= entries
        else:
            merged[section] = entries
    return merged


def _unknown(what: str, known: typing.Iterable[str]) -> ConfigError:
    known = sorted(known)
    near = difflib.get_close_matches(what.rpartition(".")[2], known, 1)
    return ConfigError(
        f"unknown setting {what}" + (f"; is {near[0]} meant?" if near else f"; there are {', '.join(known)}")
    )


def _fits(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, options[0]) for one in value)
    if options:
        return any(_fits(value, one) for one in options)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _section(name: str, kind: type, entries: Any) -> Any:
    if not isinstance(entries, dict):
        raise ConfigError(f"[{name}] is a section of settings, got {entries!r}")
    kinds = typing.get_type_hints(kind)
    values = {}
    for key, value in entries.items():
        if key not in kinds:
            raise _unknown(f"{name}.{key}", kinds)
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, kinds[key]):
            wanted = getattr(kinds[key], "__name__", None) if not typing.get_args(kinds[key]) else None
            raise ConfigError(f"{name}.{key} is {wanted or kinds[key]}, got {value!r}")
        values[key] = value
    return kind(**values)


def _check_context_parallel(config: Config) -> None:
    ranks, context = config.train.context_parallel, config.data.context
    masked = sorted(set(config.names) & set(MASKED))
    if masked:
        raise ConfigError(
            f"train.context_parallel ({ranks}) shares sequences by bands, and {', '.join(masked)} has a mask "
            f"of another kind, which runs with train.context_parallel=1; names that can be shared: "
            f"{', '.join(SHAREABLE)}"
        )
    if config.attention.implementation != "auto":
        raise ConfigError(
            f"train.context_parallel ({ranks}) goes with attention.implementation=auto, "
            f"got {config.attention.implementation!r}"
        )
    if context < 2 * ranks:
        raise ConfigError(
            f"data.context ({context}) is at least two tokens for each of train.context_parallel ({ranks})"
        )


# Numbers that may be zero; the others are above it.
_FROM_ZERO = ("warmup", "seed", "weight_decay", "final_learning_rate", "router_loss")


def _check_numbers(config: Config) -> None:
    for section in (config.model, config.data, config.train):
        for entry in dataclasses.fields(section):
            value = getattr(section, entry.name)
            name = f"{type(section).__name__.lower()}.{entry.name}"
            is_zero_fine = entry.name in _FROM_ZERO
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if "float" in str(entry.type):
                if not (value >= 0 if is_zero_fine else value > 0) or value == float("inf"):
                    raise ConfigError(f"{name} is {'at least' if is_zero_fine else 'above'} 0, got {value}")
            elif value < (least := 0 if is_zero_fine else 1):
                raise ConfigError(f"{name} is at least {least}, got {value}")
            elif value >= 2**31:
                raise ConfigError(f"{name} is below 2^31, got {value}")


def _check(config: Config) -> None:
    _check_numbers(config)
    model, attention, data, train = config.model, config.attention, config.data, config.train
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "model.kind": (model.kind, ("olmoe", "llama")),
        "model.experts_implementation": (model.experts_implementation, ("grouped_mm", "eager")),
        "attention.implementation": (attention.implementation, IMPLEMENTATIONS),
        "data.documents": (data.documents, ("separate", "joined")),
        "train.precision": (train.precision, ("autocast", "bfloat16", "float32")),
        "train.parallel": (train.parallel, ("ddp", "fsdp2")),
        "train.device": (train.device, ("auto", "cpu", "cuda")),
        **{f"attention.name[{i}]": (name, ATTENTIONS) for i, name in enumerate(config.names)},
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{name} is one of {', '.join(allowed)}, got {value!r}")
    if len(config.names) != model.layers:
        raise ConfigError(f"attention.name has {len(config.names)} names, model.layers is {model.layers}")
    if model.hidden % model.heads or model.heads % model.kv_heads:
        raise ConfigError(
            f"model.hidden ({model.hidden}) is a multiple of model.heads ({model.heads}), "
            f"which is one of model.kv_heads ({model.kv_heads})"
        )
    head_dim = model.hidden // model.heads
    by_kernels = attention.implementation == "auto" and any(name in BANDED for name in config.names)
    if head_dim % 2 or (by_kernels and (head_dim % 8 or not 32 <= head_dim <= 256)):
        raise ConfigError(
            f"model.hidden / model.heads ({head_dim}) is a multiple of 8 from 32 to 256"
            + ("" if by_kernels else ", or even where no layer is banded")
        )
    if model.experts_per_token > model.experts:
        raise ConfigError(f"{model.experts_per_token} experts a token of {model.experts}")
    if train.context_parallel > 1:
        _check_context_parallel(config)
    if train.batch % train.micro_batch:
        raise ConfigError(
            f"train.batch ({train.batch}) is a multiple of train.micro_batch ({train.micro_batch})"
        )
    if train.warmup >= train.steps:
        raise ConfigError(f"train.warmup ({train.warmup}) is below train.steps ({train.steps})")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(f"train.betas are two numbers from 0 to below 1, got {train.betas}")
    if attention.window is not None and not ("sliding_window" in config.names and attention.window >= 1):
        raise ConfigError(f"attention.window ({attention.window}) is sliding_window's, and at least 1")


def _parse_set(text: str) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot):
        raise ConfigError(f"--set takes section.key=value, got {text!r}")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:  # a word without quotes
        return section, key, value.strip()


def load(path: Path, settings: typing.Sequence[str] = ()) -> Config:
    """The configuration in a file, with single values set.

    Parameters
    ----------
    path : Path
        TOML.
    settings : sequence of str
        ``section.key=value``; the value in TOML, or a word.

    Raises
    ------
    ConfigError
        Names the setting and what it may be.
    """
    values = _read(path)
    for text in settings:
        section, key, value = _parse_set(text)
        if not isinstance(values.setdefault(section, {}), dict):
            raise ConfigError(f"[{section}] is a section of settings, got {values[section]!r}")
        values[section][key] = value
    sections = typing.get_type_hints(Config)
    for name in values:
        if name not in sections:
            raise _unknown(name, sections)
    config = Config(**{name: _section(name, sections[name], entries) for name, entries in values.items()})
    _check(config)
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a command takes to name its configuration."""
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--context-parallel",
        type=int,
        metavar="P",
        help="P processes share each sequence: a name for --set train.context_parallel=P",
    )


def load_arguments(arguments: argparse.Namespace) -> Config:
    """The configuration that a command line names; raises as `load`."""
    settings = list(arguments.set)
    if arguments.context_parallel is not None:
        settings.append(f"train.context_parallel={arguments.context_parallel}")
    return load(arguments.config, settings)
