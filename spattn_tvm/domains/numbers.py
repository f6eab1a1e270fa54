"""Numbers that kernels of every family compute with."""

from __future__ import annotations

import math

LOG2E, LN2, INF = math.log2(math.e), math.log(2.0), math.inf
ALL_LANES = 0xFFFFFFFF  # of a warp
# Of float32. As the maximum of no scores it is not above any finite one, yet finite, so that a masked score
# less it gives a weight of exp(-inf) = 0 rather than NaN.
LOWEST = -3.4028234663852886e38
