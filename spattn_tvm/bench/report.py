"""A benchmark's timings as JSON, tables and text."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spattn_tvm.provenance import device_facts, versions
from spattn_tvm.target import MachineTarget

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    Step = Callable[[], Any]


FORMAT = 2


@dataclass
class Timing:
    """Result of one peer on one step; times in milliseconds, memory in MiB, None where not measured."""

    peer: str
    title: str
    same_mask: bool
    step_name: str
    status: str = "ok"
    reason: str = ""
    samples_ms: list[float] = field(default_factory=list)
    useful_flops: int = 0
    matmul_tflops: float | None = None
    peak_memory_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ratio_to_dense: float | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def useful_tflops(self) -> float | None:
        return self.useful_flops / self.median_ms * 1e-9 if self.median_ms else None

    def to_json(self) -> dict[str, Any]:
        quartiles = statistics.quantiles(self.samples_ms, n=4) if len(self.samples_ms) > 1 else None
        tflops = self.useful_tflops
        share = tflops / self.matmul_tflops if tflops and self.matmul_tflops else None
        return {
            "peer": self.peer,
            "title": self.title,
            "direction": self.step_name,
            "status": self.status,
            "reason": self.reason,
            "median_ms": self.median_ms,
            "min_ms": min(self.samples_ms) if self.samples_ms else None,
            "p25_ms": quartiles[0] if quartiles else None,
            "p75_ms": quartiles[2] if quartiles else None,
            "rounds": len(self.samples_ms),
            "useful_tflops": tflops,
            "matmul_share": share,
            "peak_memory_mib": self.peak_memory_mib,
            "same_mask": self.same_mask,
            "errors": self.errors,
            "ratio_to_dense": self.ratio_to_dense,
        }


def fill_ratios(timings: Sequence[Timing], matmul_tflops: float) -> None:
    dense: dict[str, float] = {}
    for timing in timings:
        if not timing.same_mask and timing.median_ms is not None:
            dense[timing.step_name] = min(timing.median_ms, dense.get(timing.step_name, float("inf")))
    for timing in timings:
        timing.matmul_tflops = matmul_tflops
        if timing.median_ms is not None and timing.step_name in dense:
            timing.ratio_to_dense = timing.median_ms / dense[timing.step_name]


def report_head(
    number: int, target: MachineTarget, device: torch.device, packages: Sequence[str]
) -> dict[str, Any]:
    """How a report begins: its format's number, when, and on what it was measured."""
    return {
        "format": number,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "target": target.folder,
        "device": device_facts(device),
        "versions": versions(packages),
    }


def write_report(report: Mapping[str, Any], folder: Path, kind: str = "benchmarks") -> Path:
    """Write a report to ``folder/<target>/<kind>/<date>.json``; `folder` is ``autotune_logs``, say."""
    stamp = datetime.datetime.fromisoformat(report["date"]).strftime("%Y-%m-%dT%H%M%SZ")
    path = folder / report["target"] / kind / f"{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def plan_text(plan: dict[str, Any] | None) -> str:
    """What a peer made for one length, such as ``mask plan, 8.2 s, 210 MiB``; "" for nothing."""
    if plan is None or not plan["what"]:
        return ""
    memory = "" if plan["memory_mib"] is None else f", {plan['memory_mib']:.0f} MiB"
    return f"{plan['what']}, {plan['seconds']:.2g} s{memory}"


def tables(report: dict[str, Any]) -> list[Table]:
    """One rich table per problem of a report."""
    from rich.table import Table

    cuda = report["target"].startswith("cuda")
    unit, factor = ("TFLOP/s", 1.0) if cuda else ("GFLOP/s", 1e3)
    result_tables = []
    for result in report["results"]:
        table = Table(
            title=f"{result['shape']}, {report['threads']} threads" if not cuda else result["shape"]
        )
        table.add_column("direction")
        table.add_column("peer")
        for title in ("median ms", "p25-p75", f"useful {unit}", "of matmul", "vs dense", "max error"):
            table.add_column(title, justify="right")
        if cuda:
            table.add_column("peak MiB", justify="right")
        table.add_column("made for one length")
        previous = ""
        notes: dict[str, None] = {}
        for entry in result["entries"]:
            shown = entry["direction"].replace("_", " + ") if entry["direction"] != previous else ""
            if shown and previous:
                table.add_section()
            previous = entry["direction"]
            if entry["median_ms"] is None:
                table.add_row(shown, entry["title"], entry["status"])
                notes.setdefault(f"{entry['title']}: {entry['reason']}")
                continue
            spread = "" if entry["p25_ms"] is None else f"{entry['p25_ms']:.3g}-{entry['p75_ms']:.3g}"
            cells = [
                shown,
                entry["title"],
                f"{entry['median_ms']:.4g}",
                spread,
                f"{entry['useful_tflops'] * factor:.4g}",
                f"{entry['matmul_share']:.0%}",
                "" if entry["ratio_to_dense"] is None else f"{entry['ratio_to_dense']:.3f}",
                f"{max(entry['errors'].values()):.1e}",
            ]
            if cuda:
                cells.append(f"{entry['peak_memory_mib']:.0f}")
            table.add_row(*cells, plan_text(result["plans"].get(entry["peer"])))
        table.caption = "\n".join(notes)
        table.caption_justify = "left"
        result_tables.append(table)
    return result_tables
