from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import AttentionProblem

BASE = AttentionProblem("forward", "float32", 1, 16, 16, 4096, 64, BandLayout.spattention(16, 4096))


def test_key_is_readable():
    assert BASE.key == "forward-float32-b1-h16-k16-n4096-d64-spattention-c4096"
    backward = dataclasses.replace(
        BASE, direction="backward", kv_heads=4, layout=BandLayout.sliding_window(16, 256, allow_longer=False)
    )
    assert backward.key == "backward-float32-b1-h16-k4-n4096-d64-sliding_window-w256"


layouts = st.one_of(
    st.builds(BandLayout.spattention, st.just(4), st.none() | st.integers(64, 99)),
    st.builds(lambda c: BandLayout.causal(4, c, allow_longer=True), st.integers(1, 99)),
    st.builds(BandLayout.sliding_window, st.just(4), st.integers(1, 99), st.none() | st.integers(64, 99)),
    st.builds(
        lambda heads: BandLayout.custom([[pair] for pair in heads]),
        st.lists(st.tuples(st.integers(0, 9), st.integers(9, 20)), min_size=4, max_size=4),
    ),
    st.builds(
        lambda context, order: BandLayout.spattention(7, context).heads(order[:4]),
        st.none() | st.integers(64, 99),
        st.permutations(range(7)),
    ),
)
same_rows = st.builds(
    AttentionProblem,
    st.sampled_from(["forward", "backward"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(1, 3),
    st.just(4),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 64),
    st.integers(1, 256),
    layouts,
)


def with_other_keys(problem: AttentionProblem, keys: int) -> AttentionProblem:
    """The same with another number of keys, where its layout takes them."""
    try:
        return dataclasses.replace(problem, kv_length=keys)
    except ValueError:
        return problem


problems = same_rows | st.builds(with_other_keys, same_rows, st.integers(1, 64))


@given(problems)
def test_json_round_trip(problem):
    assert AttentionProblem.from_json(json.loads(json.dumps(problem.to_json()))) == problem
    assert AttentionProblem.from_json(json.dumps(problem.to_json())) == problem
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,120}", problem.key)


@given(problems, problems)
def test_different_problems_have_different_keys(a, b):
    assert (a == b) == (a.key == b.key)


def test_useful_flops_count_pairs():
    problem = AttentionProblem("forward", "float16", 3, 4, 2, 10, 8, BandLayout.spattention(4, 12))
    pairs = sum(
        any(lo <= i - j <= hi for lo, hi in head)
        for head in problem.layout.bands(10)
        for i in range(10)
        for j in range(10)
    )
    assert problem.useful_flops == 3 * pairs * 4 * 8
    assert dataclasses.replace(problem, direction="backward").useful_flops == 3 * pairs * 10 * 8


def test_other_keys_are_part_of_a_problem():
    layout = BandLayout.spattention(4, 64)
    problem = AttentionProblem("forward", "float16", 3, 4, 2, 10, 8, layout, 37)
    assert problem.keys == 37 and problem.key == "forward-float16-b3-h4-k2-n10-m37-d8-spattention-c64"
    pairs = sum(
        any(lo <= i + 27 - j <= hi for lo, hi in head)
        for head in layout.bands(64)
        for i in range(10)
        for j in range(37)
    )
    assert problem.useful_flops == 3 * pairs * 4 * 8
    query, key, row = 3 * 4 * 10 * 8 * 2, 3 * 2 * 37 * 8 * 2, 3 * 4 * 10 * 4
    assert problem.min_bytes == (query + key + key) + (query + row)
    same = dataclasses.replace(problem, kv_length=10)
    assert same.kv_length is None and same.keys == 10 and same != problem
    assert "kv_length" not in same.to_json()
    few = dataclasses.replace(problem, length=40, kv_length=37)  # the first queries stand before all keys
    assert few.useful_flops == dataclasses.replace(problem, length=37, kv_length=None).useful_flops


@given(problems)
def test_the_most_keys_are_those_of_one_query(problem):
    first = max(0, problem.keys - problem.length)
    counts = [
        sum(any(lo <= i - j <= hi for lo, hi in bands) for j in range(i + 1))
        for bands in problem.layout.bands(problem.keys)
        for i in range(first, problem.keys)
    ]
    assert problem.most_keys == max(1, *counts)


def test_min_bytes_count_each_tensor_once():
    problem = AttentionProblem("forward", "float16", 3, 4, 2, 10, 8, BandLayout.spattention(4, 12))
    query, key, row = 3 * 4 * 10 * 8 * 2, 3 * 2 * 10 * 8 * 2, 3 * 4 * 10 * 4
    assert problem.min_bytes == (query + key + key) + (query + row)
    backward = dataclasses.replace(problem, direction="backward")
    assert backward.min_bytes == (query + key + key + query + query + row + row) + (query + key + key)
    assert dataclasses.replace(problem, dtype="float32").min_bytes == 2 * problem.min_bytes - (row)


steps = st.builds(
    lambda kv_heads, queries, earlier, layout: AttentionProblem(
        "decode", "bfloat16", 3, 4, kv_heads, queries, 32, layout, queries + earlier
    ),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 16),
    st.integers(0, 48),
    layouts.filter(lambda layout: layout.is_autoregressive),
)


@given(steps)
def test_a_step_reads_the_union_of_a_groups_bands(step):
    """And attends to the pairs of its queries."""
    assert AttentionProblem.from_json(json.dumps(step.to_json())) == step
    group, first = 4 // step.kv_heads, step.keys - step.length
    seen = [
        {
            (i, j)
            for i in range(first, step.keys)
            for j in range(i + 1)
            if any(lo <= i - j <= hi for lo, hi in bands)
        }
        for bands in step.layout.bands(step.keys)
    ]
    assert step.useful_flops == 3 * 4 * 32 * sum(map(len, seen))
    keys = sum(
        len({j for pairs in seen[head : head + group] for _, j in pairs}) for head in range(0, 4, group)
    )
    rows = 3 * 4 * step.length
    assert step.min_bytes == 2 * 3 * keys * 32 * 2 + 2 * rows * 32 * 2 + rows * 4


def test_a_problem_of_numpys_integers_is_the_same() -> None:
    layout = BandLayout.causal(4)
    plain = AttentionProblem("forward", "float32", 2, 4, 2, 100, 32, layout)
    sizes = (np.int64(size) for size in (2, 4, 2, 100, 32))
    found = AttentionProblem("forward", "float32", *sizes, layout)  # type: ignore[arg-type]
    assert found == plain and found.key == plain.key
    assert AttentionProblem.from_json(json.loads(json.dumps(found.to_json()))) == plain


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"direction": "sideways"}, ValueError, "sideways"),
        ({"dtype": "float64"}, ValueError, "float64"),
        ({"batch": 0}, ValueError, "batch must be between 1 and .*, got 0"),
        ({"length": 2**30}, ValueError, "length must be between 1 and 1073741823, got 1073741824"),
        ({"batch": 10**20}, ValueError, "batch must be between 1 and"),
        ({"length": -3}, ValueError, "length must be between 1 and .*, got -3"),
        ({"head_dim": 64.0}, TypeError, "head_dim must be an integer, got 64.0"),
        ({"batch": True}, TypeError, "batch must be an integer, got True"),
        ({"kv_heads": 3}, ValueError, "multiple of kv_heads, got 16 and 3"),
        ({"length": 4097}, ValueError, "4097 is longer than the layout's context_length 4096"),
        ({"kv_length": 0}, ValueError, "kv_length must be between 1 and .*, got 0"),
        ({"kv_length": 8.0}, TypeError, "kv_length must be an integer, got 8.0"),
        (
            {"length": 9, "kv_length": 4097},
            ValueError,
            "4097 is longer than the layout's context_length 4096",
        ),
        ({"kv_length": 9, "layout": BandLayout.spattention(16)}, ValueError, "context length"),
        ({"layout": BandLayout.causal(8)}, ValueError, "made for 8 query heads and q has 16"),
        ({"layout": "causal:heads=16"}, TypeError, "must be a BandLayout, got str"),
        ({"direction": "decode"}, ValueError, "1 to 16 queries, no more than keys, got 4096 and 4096"),
        ({"direction": "decode", "length": 9, "kv_length": 8}, ValueError, "got 9 and 8"),
        (
            {"direction": "decode", "length": 1, "layout": BandLayout.spattention(16)},
            ValueError,
            "decoding needs bands that don't follow",
        ),
    ],
)
def test_bad_problems_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(BASE, **changes)


def test_bad_json_is_refused():
    data = BASE.to_json()
    with pytest.raises(ValueError, match=r"missing \['dtype'\], unknown \['colour'\]"):
        AttentionProblem.from_json({**{k: v for k, v in data.items() if k != "dtype"}, "colour": 1})
    with pytest.raises(ValueError, match="a problem is a JSON object"):
        AttentionProblem.from_json("[1]")
    with pytest.raises(ValueError, match="'causal'"):
        AttentionProblem.from_json({**data, "layout": "causal"})
