"""Do all ranks call with the same? Asked once for each configuration, before anything else travels."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

_MOST_KNOWN = 1024

# Of each group, the configurations that its ranks are known to share. Ranks that call with the same forget
# the same.
_known: WeakKeyDictionary[dist.ProcessGroup, OrderedDict[tuple[object, ...], None]] = WeakKeyDictionary()


class RankMismatchError(ValueError):
    """Ranks of a group called with what doesn't fit together."""


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:100]}…{text[-16:]}"


def _differences(settings: list[Mapping[str, object]]) -> str:
    refused = [(rank, each["refused"]) for rank, each in enumerate(settings) if "refused" in each]
    if refused:
        return "; ".join(f"rank {rank} refused its arguments: {text}" for rank, text in refused)
    lines = []
    for name in settings[0]:
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(settings):
            values.setdefault(_shown(each[name]), []).append(rank)
        if len({str(each[name]) for each in settings}) > 1:
            shown = " against ".join(
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in values.items()
            )
            lines.append(f"{name} {shown}")
    return "; ".join(lines)


def agree(group: dist.ProcessGroup, device: torch.device, settings: Mapping[str, object]) -> None:
    """Compare `settings` with the other ranks', if this rank hasn't yet.

    32 bytes of each rank, gathered by all; more only if they differ.

    Raises
    ------
    RankMismatchError
        On each rank: what differs, and on which ranks.
    RuntimeError
        No answer from a rank within the group's timeout.
    """
    configuration = (device, *settings.values())
    known = _known.setdefault(group, OrderedDict())
    if configuration in known:
        known.move_to_end(configuration)
        return
    digest = hashlib.sha256(repr(settings).encode()).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(gathered, mine, group=group)
        if any(other.tolist() != list(digest) for other in gathered):
            everyone: list[Mapping[str, object]] = [{}] * len(gathered)
            dist.all_gather_object(everyone, dict(settings), group=group)
            raise RankMismatchError(
                f"the ranks' calls of context_parallel_attention differ: {_differences(everyone)}"
            )
    except RankMismatchError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} waited in vain for the other ranks' calls of "
            f"context_parallel_attention: one ended, hangs, or called with arguments of its own ({error})"
        ) from error
    known[configuration] = None
    if len(known) > _MOST_KNOWN:
        known.popitem(last=False)


def agree_on_refusal(group: dist.ProcessGroup, device: torch.device, error: Exception) -> None:
    """Let the others know that this rank's arguments are bad, if they are about to ask: on the first call."""
    if not _known.get(group):
        settings = {"refused": f"{type(error).__name__}: {error}"}
        try:
            agree(group, device, settings)
        except (RuntimeError, RankMismatchError):  # the caller raises what is wrong here
            return
