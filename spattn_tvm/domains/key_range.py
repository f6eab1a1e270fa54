"""From a head's bands to loop bounds: the symbolic side of ``bands.py``.

Every kernel family walks the same tiles. The functions take and return TensorIR expressions (or Python
integers, which is how the tests compare them with ``bands.py``). ``d = i - j`` is the distance of query ``i``
and key ``j``; a band is the closed interval ``[low, high]`` of distances.
"""

from tvm.script import tirx as T


def minimum(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else T.min(a, b)


def maximum(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else T.max(a, b)


def key_range(query_begin, query_last, low, high, document_begin):
    """Keys ``[begin, end)`` that a band gives to the queries ``query_begin ... query_last``."""
    return maximum(document_begin, query_begin - high), query_last - low + 1


def document_keys(document, batch, boundaries, key_boundaries, ranges, num_ranges):
    """Which keys a document's queries may attend to: (begin, end, shift); TensorIR only.

    ``shift`` makes a query's row its position among the keys: ``d = i + shift - j``. The queries of a
    document are its last rows, unless there are ``ranges``, int32 ``(num_ranges, 3)`` of begin, end and shift
    for each batch row, or one for all, of a call that is not packed.
    """
    row = T.min(batch, num_ranges - 1)
    end = key_boundaries[document + 1]
    return (
        T.if_then_else(num_ranges > 0, ranges[row, 0], key_boundaries[document]),
        T.if_then_else(num_ranges > 0, ranges[row, 1], end),
        T.if_then_else(num_ranges > 0, ranges[row, 2], end - boundaries[document + 1]),
    )


def query_range(key_begin, key_last, low, high, document_end):
    """Queries ``[begin, end)`` that attend through a band to the keys ``key_begin ... key_last``."""
    return key_begin + low, minimum(document_end, key_last + high + 1)


def has_key(position, low, high, key_begin, key_end):
    """Whether a band gives a query at a position one of the keys ``[key_begin, key_end)``.

    The lower bound of an interval that is missing lies behind every position.
    """
    return (position - low >= key_begin) & (position - high < key_end) & (key_begin < key_end)


def crosses_edge(query_begin, query_last, key_begin, key_last, low, high):
    """Whether some pair of a tile lies outside the band, so that its scores need the mask."""
    return (query_last - key_begin > high) | (query_begin - key_last < low)


def in_band(query, key, low, high):
    return (query - key >= low) & (query - key <= high)
