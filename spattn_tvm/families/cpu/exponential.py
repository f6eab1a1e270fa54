"""``e**x`` for kernels whose compiler has no vector exponential (LLVM calls libm once per lane)."""

from tvm.script import tirx as T

from spattn_tvm.domains.numbers import LOG2E

# Minimax polynomial of degree 6 for 2**f on [-1/2, 1/2]: relative error 6e-8 in float32, one ulp.
_COEFFICIENTS = (1.0, 0.693147180, 0.240226507, 0.0555036595, 0.00961817697, 0.00133335581, 0.000154353)
_SMALLEST_EXPONENT = -127.0


def exp(x):
    """``e**x`` of a float32 expression ``x <= 88``; exactly 0 below -87.7 (and for -inf), NaN for NaN.

    Scores are scaled by log2(e) here, after their maximum was subtracted: before, one beyond 2.36e38 would
    become infinite.
    """
    x = x * T.float32(LOG2E)
    # Not T.max: the comparison must be false for NaN, so that NaN passes.
    clamped = T.Select(T.float32(_SMALLEST_EXPONENT) > x, T.float32(_SMALLEST_EXPONENT), x)
    whole = T.nearbyint(clamped)
    fraction = clamped - whole
    power = T.float32(_COEFFICIENTS[-1])
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        power = power * fraction + T.float32(coefficient)
    return power * T.reinterpret("float32", (T.cast(whole, "int32") + 127) << 23)
