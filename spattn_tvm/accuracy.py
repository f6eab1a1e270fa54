"""When a result counts as right: the rule that tests, verification, tuning and benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ERROR_RATIO = 2.0


# Below it the order of a sum decides, and nothing is called wrong. Relative to the largest value of a result,
# or to 1 where that is smaller: inputs are standard normal, and a gradient may cancel to next to nothing.
ERROR_FLOOR = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention as a few PyTorch operations in q's dtype: ``(o, lse)``; queries without a key give (0, -inf).

    Parameters
    ----------
    q : Tensor
        ``(B, Hq, N, D)``.
    k, v : Tensor
        ``(B, Hkv, N, D)``.
    mask : Tensor
        Bool ``(Hq, N, N)``.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (scale * (q @ k.mT)).masked_fill(~mask, -torch.inf)
    has_key = mask.any(-1)
    safe = scores.masked_fill(~has_key[..., None], 0.0)
    o = safe.softmax(-1).masked_fill(~has_key[..., None], 0.0) @ v
    lse = safe.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return o, lse.masked_fill(~has_key, -torch.inf)


def judge(
    actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor], dtype: str
) -> tuple[dict[str, float], str]:
    """Errors by name, and which of them are too large ("" when none is).

    An error is the largest absolute difference from `exact` (float64) over the largest absolute value of
    `exact`; `plain` is the same computation in `dtype`, or several ways of it along a first dimension.
    """
    errors, wrong = {}, []
    for name, value in actual.items():
        finite = exact[name].isfinite()
        if not torch.equal(value.double().masked_fill(finite, 0.0), exact[name].masked_fill(finite, 0.0)):
            errors[name] = float("inf")
            wrong.append(f"{name} is finite, or not, at the wrong places")
            continue
        reference = exact[name].masked_fill(~finite, 0.0)
        largest = float(reference.abs().max().clamp_min(1e-30))

        def error_of(
            result: Tensor, finite: Tensor = finite, reference: Tensor = reference, largest: float = largest
        ) -> float:
            return float((result.double().masked_fill(~finite, 0.0) - reference).abs().max()) / largest

        errors[name] = error_of(value)
        allowed = max(ERROR_RATIO * error_of(plain[name]), ERROR_FLOOR[dtype] * max(1.0, 1.0 / largest))
        if not errors[name] <= allowed:
            wrong.append(f"{name} is off by {errors[name]:.2e}, allowed {allowed:.2e}")
    return errors, "; ".join(wrong)
