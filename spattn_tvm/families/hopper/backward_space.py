"""Decision space of the Hopper backward: its structure, tile shapes, pipeline depths and tile order.

The dQ pass and the dK/dV pass have a prefix each; warpgroups and their registers, which belong to the launch,
are the same in both. ``one_pass`` has decisions of the dK/dV pass only, and of those the ones that it does
not fix.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from spattn_tvm.families.space import MULTIPROCESSORS, Decisions, Space, cases_by_width
from spattn_tvm.target import registers_at_launch

from .backward_sizes import (
    ONE_PASS_QUERIES,
    SHARED_LIMIT,
    dkv_arena,
    dq_arena,
    holds_keys,
    one_pass_arena,
)
from .support import WARPGROUP_ROWS, unsupported

if TYPE_CHECKING:
    from spattn_tvm.problem import AttentionProblem
    from spattn_tvm.target import MachineTarget

HEAD_DIMS = (64, 128)

# What a consumer thread keeps besides accumulators and operands: addresses, loop state, masks. ptxas spilled
# nothing where these left room, and serialized every wgmma (C7512) where they did not.
DQ_OTHER_REGISTERS = 32
DKV_OTHER_REGISTERS = 16


def _structures(head_dim: int, dtype: str) -> dict[str, dict[str, tuple[int, ...]]]:
    of_both: dict[str, tuple[int, ...]] = {
        # One warpgroup starts with more registers than setmaxnreg would raise it to; three would get 160 each
        # and need 176.
        "dkv_warpgroups": (2,),
        "dkv_stages": (2, 3, 4, 5, 6, 8),
        "dkv_heads": (1, 2, 4, 8, 16, 32),
        "dkv_registers": (232, 240),
        "dkv_producer_registers": (24, 40),
    }
    return {
        "two passes": {
            "one_pass": (0,),
            "dq_warpgroups": (2,),
            "dq_keys": (32, 48, 64, 96),
            "dq_stages": (2, 3, 4, 5, 6, 8),
            "dq_heads": (1, 2, 4, 8, 16, 32),
            "dq_registers": (232, 240),
            "dq_producer_registers": (24, 40),
            "dkv_queries": (32, 48, 64, 96),
            "dkv_buffers": (1, 2),
            **of_both,
        },
        "one pass": {"one_pass": (1,), **of_both},
    }


def _dq_registers(decisions: Decisions, head_dim: int) -> int:
    """Registers of a dQ consumer: dQ, the fragments of Q and dO, scores, dP and dS."""
    keys = decisions["dq_keys"]
    return head_dim // 2 + 2 * (head_dim // 4) + keys + keys // 4 + DQ_OTHER_REGISTERS


def _dkv_registers(decisions: Decisions, head_dim: int) -> int:
    """Registers of a dK/dV consumer: dK and dV, scores, dP, P and dS or the statistics of a chunk, and where
    they are held the fragments of K and V.
    """
    queries, held = ONE_PASS_QUERIES, 0
    if not decisions["one_pass"]:
        queries = decisions["dkv_queries"]
        held = 2 * (head_dim // 4) if holds_keys(head_dim) else 0
    return head_dim + queries + queries // 2 + held + DKV_OTHER_REGISTERS


def _register_conflict(consumers: int, producer: int, warpgroups: int) -> str | None:
    """Registers move between warpgroups only within what the launch allotted to all of them alike."""
    launch = registers_at_launch(128 * (warpgroups + 1))
    if warpgroups * consumers + producer > (warpgroups + 1) * launch:
        return (
            f"{warpgroups} warpgroups of {consumers} and one of {producer} registers a thread, "
            f"where the launch allots {warpgroups + 1} times {launch}"
        )
    return None


def _passes(decisions: Decisions, head_dim: int) -> dict[str, tuple[int, int]]:
    """Of each pass, by its prefix, the bytes of shared memory and the registers of a consumer."""
    dkv_registers = _dkv_registers(decisions, head_dim)
    if decisions["one_pass"]:
        return {"dkv": (one_pass_arena(decisions, head_dim)[1], dkv_registers)}
    return {
        "dq": (dq_arena(decisions, head_dim)[1], _dq_registers(decisions, head_dim)),
        "dkv": (dkv_arena(decisions, head_dim)[1], dkv_registers),
    }


def _illegal(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> str | None:
    if not decisions["one_pass"]:
        for what in ("warpgroups", "registers", "producer_registers"):
            if decisions[f"dq_{what}"] != decisions[f"dkv_{what}"]:
                return (
                    f"both passes are one launch: dq_{what}={decisions[f'dq_{what}']}, "
                    f"dkv_{what}={decisions[f'dkv_{what}']}"
                )
    for name, (shared, registers) in _passes(decisions, head_dim).items():
        if shared > SHARED_LIMIT:
            return f"the {name} pass needs {shared} bytes of shared memory, a CTA has {SHARED_LIMIT}"
        allotted = decisions[f"{name}_registers"]
        if registers > allotted:
            return f"the {name} pass needs about {registers} registers a thread, {name}_registers={allotted}"
        conflict = _register_conflict(
            allotted, decisions[f"{name}_producer_registers"], decisions[f"{name}_warpgroups"]
        )
        if conflict is not None:
            return f"the {name} pass: {conflict}"
    return None


def _features(decisions: Decisions, problem: AttentionProblem) -> list[float]:
    """Of each pass, zeros where there is none: work executed against useful work, chunks a tile, the tiles
    that each multiprocessor of a full chip gets, shared memory and registers.
    """
    useful = max(1, problem.layout.pairs(problem.length))
    passes = _passes(decisions, problem.head_dim)
    features = [float(decisions["one_pass"])]
    for name, chunk in (("dq", "dq_keys"), ("dkv", "dkv_queries")):
        if name not in passes:
            features += [0.0] * 5
            continue
        shared, registers = passes[name]
        chunk_rows = decisions.get(chunk, ONE_PASS_QUERIES)
        # By symmetry the queries of a key tile are counted like the keys of a query tile.
        executed = problem.layout.executed_pairs(problem.length, WARPGROUP_ROWS, chunk_rows)
        rows = WARPGROUP_ROWS * decisions[f"{name}_warpgroups"]
        heads = problem.query_heads if name == "dq" else problem.kv_heads
        tiles = problem.batch * heads * math.ceil(problem.length / rows)
        # Products a block: three and four in two passes, five in one.
        products = 5 if decisions["one_pass"] else {"dq": 3, "dkv": 4}[name]
        features.append(products * executed / useful)
        features.append(executed / max(1, tiles) / (rows * chunk_rows))
        features.append(math.log2(tiles / MULTIPROCESSORS))
        features.append(shared / SHARED_LIMIT)
        features.append(registers / decisions[f"{name}_registers"])
    return features


# Mean keys a query from which one pass is the default: clearing and converting dQ costs the same whatever the
# bands, and of products it has five where two passes have seven. ms on an H100 (bfloat16, spattention):
#   (B, H, N, D)                  mean keys  one pass  two passes
#   (4, 16, 4096, 128)                  361     0.615       0.404
#   (1, 16, 8192, 128)                  722     0.362       0.339
#   (1, 16, 8192, 128), window of 1024  960     0.396       0.381
#   (1, 16, 16384, 128)                1443     1.052       1.060
#   (1, 16, 65536, 128)                5769    14.2        16.0
#   (1, 16, 16384, 128), causal        8192     5.15        5.99 (in two launches)
#   (4, 16, 4096, 64)                   361     0.346       0.251
#   (1, 16, 16384, 64)                 1443     0.673       0.661
#   (1, 16, 65536, 64)                 5769     9.06       10.2
# One pass gains less at head dim 64.
_ONE_PASS_FROM = {64: 2048, 128: 1400}


def _untuned(
    head_dim: int, dtype: str, target: MachineTarget, deterministic: bool = False, case: int = 0
) -> dict[str, int]:
    """One pass over wide bands, unless results must be reproducible; else two passes, chunks of 64 and the
    deepest rings that fit, with one buffer of K and V.

    Measured on an H200 in bfloat16, spattention, ms at (B, H, N, D). Two buffers and three stages took
    0.442 instead of 0.403 at (4, 16, 4096, 128), packs of 4 heads or of all 0.409 and 0.404 instead of
    0.396, chunks of 96 0.310 instead of 0.265 at head dim 64. On an H100, packs of 8 heads in both passes and
    then of 2 in the dQ pass and 16 in the other, whose last tiles are the shortest of twice as many heads:
    0.402 and 0.395 at (4, 16, 4096, 128), 0.377 and 0.375 at (1, 16, 8192, 128) with a window of 1024, 0.306
    and 0.306 at (16, 16, 1024, 128), 0.327 and 0.332 at (1, 16, 8192, 128); at head dim 64 0.251 and 0.249 at
    the first, 0.246 and 0.242 with the window.
    """
    wide = head_dim == 128
    if case >= _ONE_PASS_FROM[head_dim] and not deterministic:
        return {
            "one_pass": 1,
            "dkv_warpgroups": 2,
            "dkv_stages": 3 if wide else 5,
            "dkv_heads": 4,
            "dkv_registers": 240,
            "dkv_producer_registers": 24,
        }
    return {
        "one_pass": 0,
        "dq_warpgroups": 2,
        "dq_keys": 64,
        "dq_stages": 4 if wide else 6,
        "dq_heads": 2,
        "dq_registers": 240,
        "dq_producer_registers": 24,
        "dkv_warpgroups": 2,
        "dkv_queries": 64,
        "dkv_buffers": 1,
        "dkv_stages": 5 if wide else 8,
        "dkv_heads": 16,
        "dkv_registers": 240,
        "dkv_producer_registers": 24,
    }


def _is_deterministic(decisions: Decisions) -> bool:
    return not decisions["one_pass"]


def _build(decisions: Decisions, head_dim: int, dtype: str, target: MachineTarget) -> Any:
    from .backward import build_hopper_backward

    return build_hopper_backward(decisions, head_dim, dtype)


BACKWARD = Space(
    family="hopper",
    direction="backward",
    structures=_structures,
    illegal=_illegal,
    features=_features,
    untuned=_untuned,
    build=_build,
    unsupported=partial(unsupported, HEAD_DIMS),
    is_deterministic=_is_deterministic,
    cases=cases_by_width(*_ONE_PASS_FROM.values()),
)
