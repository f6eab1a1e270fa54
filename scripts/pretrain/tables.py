"""Tables and plots of runs, from their logs alone.

    python scripts/pretrain/tables.py results/pretrain/quality/* --plot losses.png --plot-distances copies.png
    python scripts/pretrain/tables.py results/pretrain/throughput/*.jsonl --plot-lengths throughput.png

Runs of train.py (folders with a ``log.jsonl``) give the quality table, where runs that differ by their seed
alone are one row with its spread, whether the paper's claim holds, and the loss by position and by distance
to the needed token; no rates, since runs beside one another on one device slow one another down. Files of
throughput.py give the throughput table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from config import FREE_ON_RESUME

from spattn_tvm.plotting import plot_loss_curves

Line = dict[str, Any]

BASELINES = ("longformer", "bigbird", "reformer")
CLAIM = "on par with dense attention, better than Longformer, BigBird and Reformer"


class TableError(ValueError):
    """Logs that make no table."""


def read_lines(path: Path) -> list[Line]:
    """The lines of a log or of measurements, but for a last one that was not written to its end.

    Raises
    ------
    TableError
        No such file, or one that train.py and throughput.py do not write.
    """
    path = path / "log.jsonl" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except OSError as error:
        raise TableError(f"no log {path}: {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"{path} is no log: {error}") from error
    known = ("run", "step", "forward_backward")
    if not lines or not all(isinstance(line, dict) and any(name in line for name in known) for line in lines):
        raise TableError(f"{path} is no log of train.py, and has no measurements of throughput.py")
    return lines


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    text = f"{statistics.mean(values):{sign},.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def _comparable(run: Line) -> Line:
    """What runs of one table have in common."""
    config = run["config"]
    free = FREE_ON_RESUME | {"train.seed", "train.device"}
    train, data = (
        {name: value for name, value in config[section].items() if f"{section}.{name}" not in free}
        for section in ("train", "data")
    )
    return {"model": config["model"], "data": data | {"sha256": run["data"]["sha256"]}, "train": train}


def _differences(one: Line, other: Line, path: str = "") -> list[str]:
    found = []
    for name in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += _differences(mine, theirs, f"{path}{name}.")
        elif mine != theirs:
            found.append(f"{path}{name}: {mine!r} and {theirs!r}")
    return found


def _libraries(run: Line) -> str:
    return ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers"))


def _surplus(end: Line) -> dict[str, float]:
    """By distance, how much more a copy of text costs than the text did; below 0 where it is known again."""
    copies = end.get("copies_by_distance", {})
    return {distance: losses["copy"] - losses["original"] for distance, losses in copies.items()}


def _names(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def paired_differences(losses: dict[str, dict[int, float]]) -> dict[str, list[float]]:
    """Of each attention, how much more it loses than spattention with the same seed.

    Runs of one seed have the same initial weights and the same batches, which losses depend on more than on
    attention: only these are compared.

    Parameters
    ----------
    losses : dict
        Held-out nats a token by attention and seed.
    """
    ours = losses.get("spattention", {})
    return {
        label: [runs[seed] - ours[seed] for seed in sorted(ours.keys() & runs.keys())]
        for label, runs in losses.items()
    }


def verdict(losses: dict[str, dict[int, float]]) -> str:
    """In one sentence: does the paper's claim hold?

    A difference counts if its mean over seeds is more than twice the largest standard deviation of one.
    """
    found = paired_differences(losses)
    missing = [label for label in ("dense", *BASELINES) if not found.get(label)]
    spreads = [statistics.stdev(values) for values in found.values() if len(values) > 1 and any(values)]
    if missing or not spreads:
        lack = (
            f"are no runs of {_names(['spattention', *missing])} with the same seed"
            if missing
            else "is no second seed of spattention and another"
        )
        return f"Whether the paper's claim holds here ({CLAIM}) is open: there {lack}."
    least = 2 * max(spreads)
    means = {label: statistics.mean(values) for label, values in found.items() if values}
    is_on_par = means["dense"] >= -least
    is_better = "better than" if means["dense"] > least else "on par with"
    parts = [f"{is_better if is_on_par else 'worse than'} dense ({-means['dense']:+.4f} nats/token)"]
    ahead = [label for label in BASELINES if means[label] > least]
    for words, labels in (
        ("better than", ahead),
        ("not better than", [label for label in BASELINES if label not in ahead]),
    ):
        if labels:
            parts.append(f"{words} {_names([f'{label} ({-means[label]:+.4f})' for label in labels])}")
    holds = "holds" if is_on_par and len(ahead) == len(BASELINES) else "does not hold"
    return (
        f"The paper's claim ({CLAIM}) {holds} here: SPAttention is {', '.join(parts)}, where a difference of "
        f"more than {least:.4f} counts, twice the largest spread of one over seeds."
    )


def _part(title: str, found: dict[str, dict[int, dict[str, float]]], *, paired: bool) -> list[str]:
    """A table of numbers by attention, seed and column; nothing where there are none.

    If `paired`, of others than spattention the differences from it over the same seeds.
    """
    columns = list(dict.fromkeys(key for runs in found.values() for one in runs.values() for key in one))
    rows = [[label] for label in found]
    for key in columns:
        values = {
            label: {seed: one[key] for seed, one in runs.items() if key in one}
            for label, runs in found.items()
        }
        behind = paired_differences(values)
        for row in rows:
            is_difference = paired and row[0] != "spattention"
            shown = behind[row[0]] if is_difference else list(values[row[0]].values())
            row.append(_spread(shown, 3, "+" if is_difference else "") if shown else "–")
    header = ("attention", *(f"{int(key):,}" for key in columns))
    return [title, markdown(header, rows)] if columns else []


def quality(logs: dict[str, list[Line]]) -> str:
    """The quality table, its verdict and, below it, what is known by position and by distance.

    Raises
    ------
    TableError
        Runs that differ in more than attention and seed, are the same, or have not come to their end.
    """
    rows: dict[str, list[tuple[Line, Line]]] = {}
    common: tuple[str, Line] | None = None
    for name, lines in logs.items():
        run = next((line["run"] for line in lines if "run" in line), None)
        if run is None:
            raise TableError(f"{name} has no line of its configuration")
        facts = _comparable(run)
        if common is None:
            common = name, facts
        elif differences := _differences(common[1], facts):
            raise TableError(f"{common[0]} and {name} can't be compared: {'; '.join(differences)}")
        end = lines[-1]
        if end.get("step") != run["config"]["train"]["steps"] or "held_out_loss" not in end:
            raise TableError(f"{name} ended at step {end.get('step')} of {run['config']['train']['steps']}")
        seed = run["config"]["train"]["seed"]
        if any(other["config"]["train"]["seed"] == seed for other, _ in rows.get(run["label"], [])):
            raise TableError(f"{name} is a second run of {run['label']} with seed {seed}")
        rows.setdefault(run["label"], []).append((run, end))

    def value(runs: list[tuple[Line, Line]], name: str) -> str:
        return _spread([end[name] for _, end in runs], 4)

    losses = {
        label: {run["config"]["train"]["seed"]: end["held_out_loss"] for run, end in runs}
        for label, runs in rows.items()
    }
    behind = paired_differences(losses)
    ranked = sorted(
        rows.items(),
        key=lambda row: statistics.mean(behind[row[0]] if all(behind.values()) else losses[row[0]].values()),
    )
    table = []
    for label, runs in ranked:
        table.append(
            [
                label,
                str(len(runs)),
                value(runs, "held_out_loss"),
                _spread(behind[label], 4, "+") if behind[label] and label != "spattention" else "–",
                value(runs, "held_out_bits_per_byte"),
            ]
        )
    run, _ = ranked[0][1][0]
    settings, context = run["config"]["train"], run["config"]["data"]["context"]
    made_with = {f"{one['device']['name']}, {_libraries(one)}" for _, runs in ranked for one, _ in runs}
    header = (
        "attention",
        "seeds",
        "held-out nats/token",
        "minus spattention, same seeds",
        "bits/byte",
    )
    caption = (
        f"{run['parameters'] / 1e6:,.1f} M parameters, context {context:,}, "
        f"{settings['steps'] * settings['batch'] * context / 1e6:,.1f} M tokens a run; "
        f"{'; '.join(sorted(made_with))}"
    )
    ends = {label: {run["config"]["train"]["seed"]: end for run, end in runs} for label, runs in ranked}
    parts = [caption, markdown(header, table), verdict(losses)]
    parts += _part(
        "Held-out nats/token from a position within the document on, up to the next: of spattention, and how "
        "much more the others lose with the same seeds",
        {label: {s: end["held_out_by_position"] for s, end in runs.items()} for label, runs in ends.items()},
        paired="spattention" in ends,
    )
    # The text differs from distance to distance, and a run's losses of both share what its seed does.
    parts += _part(
        "Nats/token that a copy costs more than the text so many tokens before",
        {label: {s: _surplus(end) for s, end in runs.items()} for label, runs in ends.items()},
        paired=False,
    )
    return "\n\n".join(parts)


def throughput(lines: Sequence[Line]) -> str:
    """The throughput table; of equal measurements the last one counts.

    Ratios are to dense attention at the same length on as many processes, and so are shares of the bound.

    Raises
    ------
    TableError
        Rows of a length that are of other layers, or of another device.
    """
    latest = {(line["context"], line.get("processes", 1), line["label"]): line for line in lines}
    table = []
    for context, processes, label in sorted(latest):
        line = latest[context, processes, label]
        dense, bound = (latest.get((context, processes, name)) for name in ("dense", "bound"))
        for other in (dense, bound):
            for name in ("layers", "parameters", "device"):
                if other is not None and line[name] != other[name]:
                    raise TableError(
                        f"{label} and {other['label']} at {context:,} tokens can't be compared: {name} "
                        f"{line[name]} and {other[name]}; measure both again"
                    )
        name = label if processes == 1 else f"{label}, {processes} processes"
        cells = [f"{context:,}", str(line["layers"]), name]
        for what in ("forward_backward", "with_optimizer"):
            rate = line[what]["tokens_per_second"]
            ratio = f" ({rate / dense[what]['tokens_per_second']:.2f}x)" if dense else ""
            share = line[what]["mfu"]
            of_bound = f"{rate / bound[what]['tokens_per_second']:.1%}" if bound else "–"
            cells += [f"{rate:,.0f}{ratio}", of_bound, f"{share:.1%}" if share else "–"]
        table.append([*cells, f"{line['peak_memory_bytes'] / 2**30:.1f}"])
    header = (
        "tokens",
        "layers",
        "attention",
        "forward + backward, tokens/s",
        "of the bound",
        "MFU",
        "with optimizer, tokens/s",
        "of the bound",
        "MFU",
        "peak GiB",
    )
    shapes = {
        (line["layers"], line["parameters"], f"{line['device']}, {_libraries(line)}")
        for line in latest.values()
    }
    caption = "; ".join(
        f"{layers} layers, {p / 1e9:.2f} B parameters, {device}" for layers, p, device in sorted(shapes)
    )
    return f"{caption}\n\n{markdown(header, table)}"


def _by_label(logs: dict[str, list[Line]]) -> dict[str, list[list[Line]]]:
    """Runs by attention: those of the seeds that all attentions have, if there are any."""
    found: dict[str, dict[int, list[Line]]] = {}
    for lines in logs.values():
        run = next(line["run"] for line in lines if "run" in line)
        found.setdefault(run["label"], {})[run["config"]["train"]["seed"]] = lines
    shared = set.intersection(*(set(runs) for runs in found.values()))
    return {
        label: [lines for seed, lines in runs.items() if seed in shared or not shared]
        for label, runs in found.items()
    }


def _mean_curve(curves: Sequence[dict[int, float]]) -> list[tuple[int, float]]:
    """The mean of several curves, where all have points."""
    common = set.intersection(*(set(curve) for curve in curves))
    return [(x, statistics.mean(curve[x] for curve in curves)) for x in sorted(common)]


def plot(logs: dict[str, list[Line]], path: Path, window: int) -> None:
    """Loss of held-out text over steps, the mean over the seeds that all attentions have.

    Where all runs are of one attention, of training text too, as the mean of the last `window` steps.
    """
    series, runs_of = [], _by_label(logs)
    for label, runs in runs_of.items():
        if len(runs_of) == 1:
            losses = _mean_curve(
                [{line["step"]: line["loss"] for line in lines if "loss" in line} for lines in runs]
            )
            smooth = [
                (step, statistics.mean(loss for _, loss in losses[max(0, index + 1 - window) : index + 1]))
                for index, (step, _) in enumerate(losses)
            ]
            series.append((f"{label}, training", smooth))
        held_out = [
            {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
            for lines in runs
        ]
        series.append((label if len(runs_of) > 1 else f"{label}, held out", _mean_curve(held_out)))
    title = "Held-out loss" if len(runs_of) > 1 else "Training"
    plot_loss_curves(series, path, y_label="nats a token", title=title)


def plot_distances(logs: dict[str, list[Line]], path: Path) -> None:
    """What a copy costs more than the text so many tokens before, the mean over the seeds of an attention.

    Raises
    ------
    TableError
        Contexts that no copy fits into.
    """
    curves: dict[str, list[dict[int, float]]] = {}
    for lines in logs.values():
        run = next(line["run"] for line in lines if "run" in line)
        surplus = {int(distance): nats for distance, nats in _surplus(lines[-1]).items()}
        curves.setdefault(run["label"], []).append(surplus)
    series = [(label, _mean_curve(runs)) for label, runs in curves.items()]
    if not any(points for _, points in series):
        raise TableError("no run has copies to draw: data.context is above 128 tokens where there are some")
    plot_loss_curves(
        series,
        path,
        x_label="tokens between the text and its copy",
        y_label="nats a token, copy minus text",
        title="Copies by distance",
        log_x=True,
    )


def plot_lengths(lines: Sequence[Line], path: Path) -> None:
    """Forward and backward pass by length, as a multiple of dense attention's rate on as many processes.

    Raises
    ------
    TableError
        No length with a row of dense attention.
    """
    rates = {
        (line.get("processes", 1), line["label"], line["context"]): line["forward_backward"][
            "tokens_per_second"
        ]
        for line in lines
    }
    curves: dict[str, list[tuple[int, float]]] = {}
    for processes, label, context in sorted(rates):
        if (dense := rates.get((processes, "dense", context))) is not None:
            name = label if processes == 1 else f"{label}, {processes} processes"
            curves.setdefault(name, []).append((context, rates[processes, label, context] / dense))
    if not curves:
        raise TableError("rates are shown over dense attention's, and no length has a row of dense")
    plot_loss_curves(
        list(curves.items()),
        path,
        x_label="tokens of a sequence",
        y_label="tokens/s over dense attention's",
        title="Forward and backward pass",
        log_x=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of train.py, files of throughput.py")
    parser.add_argument("--plot", type=Path, help="picture of the losses")
    parser.add_argument("--plot-distances", type=Path, help="picture of the losses of copies")
    parser.add_argument("--plot-lengths", type=Path, help="picture of the throughput by length")
    parser.add_argument("--window", type=int, default=20, help="steps that a point of the picture averages")
    arguments = parser.parse_args()
    try:
        read = {str(path): read_lines(path) for path in arguments.runs}
        logs = {name: lines for name, lines in read.items() if "forward_backward" not in lines[0]}
        measured = [line for name, lines in read.items() if name not in logs for line in lines]
        if logs:
            print(quality(logs))
        if measured:
            print(throughput(measured))
        if arguments.plot and logs:
            plot(logs, arguments.plot, arguments.window)
        if arguments.plot_distances and logs:
            plot_distances(logs, arguments.plot_distances)
        if arguments.plot_lengths and measured:
            plot_lengths(measured, arguments.plot_lengths)
    except TableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
