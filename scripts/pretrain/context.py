"""Context parallelism of a run: the ranks of a group share the sequences of a batch.

Each rank is given the whole batch, runs the model on its own rows of it, and attends to the others' keys by
``spattn_tvm.distributed``. Its loss is its part of the batch's, times the number of ranks: so the mean over
all processes, which DDP and FSDP2 take of gradients, is that of whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spattn_tvm import BandLayout
from spattn_tvm.distributed import Shards, context_parallel_attention, gather


@dataclass(frozen=True)
class SharedBatch:
    """How the ranks of a group share a batch of sequences.

    Attributes
    ----------
    group : ProcessGroup
    size : tuple of int
        Sequences and tokens of each, ``(B, C)``.
    shards : Shards
        Of each sequence; of all sequences in a row if documents are separate, because an operator's call has
        one set of boundaries.
    boundaries : tuple of int or None
        Of separate documents, in the sequences one after the other.
    """

    group: dist.ProcessGroup
    size: tuple[int, int]
    shards: Shards
    boundaries: tuple[int, ...] | None

    @classmethod
    def of(cls, positions: Tensor, is_joined: bool, group: dist.ProcessGroup) -> SharedBatch:
        """Each sequence is cut head to tail: nearly as many tokens, and as much causal work, for each rank.

        Parameters
        ----------
        positions : Tensor
            int64 ``(B, C)``: within documents, from 0 in each sequence.
        is_joined : bool
            Whether attention crosses from a document to the next.
        group : ProcessGroup
        """
        batch, context = positions.shape
        ranks = dist.get_world_size(group)
        if is_joined:
            return cls(group, (batch, context), Shards.head_tail(context, ranks), None)
        starts = (positions == 0).flatten().nonzero().flatten().tolist()
        shards = Shards.per_document(range(0, batch * context + 1, context), ranks)
        return cls(group, (batch, context), shards, (*starts, batch * context))

    @property
    def ranks(self) -> int:
        return self.shards.ranks

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's part of ``(B, C)``: ``(B, rows)``, or ``(1, rows)`` if documents are separate."""
        whole = tensor if self.boundaries is None else tensor.reshape(1, -1)
        return self.shards.take(whole, dist.get_rank(self.group))

    def whole(self, own: Tensor) -> Tensor:
        """A tensor ``(B, C)`` from the ranks' parts."""
        return gather(own, self.shards, self.group).view(self.size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BandLayout, scale: float | None) -> Tensor:
        """Attention of this rank's rows, ``(B, H, rows, D)``."""
        return context_parallel_attention(
            q, k, v, layout, self.group, shards=self.shards, cu_seqlens=self.boundaries, scale=scale
        )

    def balancing_loss(self, router_logits: Sequence[Tensor], experts: int, chosen: int) -> Tensor:
        """This rank's part of transformers' ``load_balancing_loss_func`` of the whole batch.

        That is a product: how often an expert is chosen, which has no gradient and is summed over the ranks,
        times how probable it is.

        Parameters
        ----------
        router_logits : sequence of Tensor
            Of each layer, ``(rows, experts)``.
        experts, chosen : int
            How many there are, and how many a token chooses.
        """
        device = router_logits[0].device
        counts, probabilities = torch.zeros(2, experts, device=device).unbind()
        for logits in router_logits:
            weights = logits.softmax(-1)
            selected = weights.topk(chosen).indices.float()
            counts = counts + torch.histc(selected, experts, 0, experts)
            probabilities = probabilities + weights.float().sum(0)
        dist.all_reduce(counts, group=self.group)
        tokens = len(router_logits) * self.size[0] * self.size[1]
        return experts * (counts / tokens * probabilities / tokens).sum()
