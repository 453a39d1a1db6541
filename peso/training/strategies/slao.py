"""``slao``: continual merging of one adapter, with orthogonal initialization (arXiv 2512.23017).

"Merge before Forget: A Single LoRA Continual Learning via Continual Merging" (Qiao & Mahdavi, ICLR 2026).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peso.training.strategies.strategy import StageContext, Strategy

if TYPE_CHECKING:
    from torch import Tensor

PREFIX, COUNT = "slao.up.", "slao.count"


class Slao(Strategy):
    """One adapter, in which each stage replaces A and is merged into B with weight 1/√i (SLAO).

    The i-th training of an adapter starts from A = Qᵀ, where Q R = (A_{i-1})ᵀ with a positive diagonal of R,
    and from B = B_{i-1}, where A_{i-1}, B_{i-1} are the trained factors, not the merged ones. It gives A_i
    and B_i; the model of the stage has A_i and B̄_i = B̄_{i-1} + (B_i - B̄_{i-1}) / √i. B_i is stored with
    the stage.

    This is implemented from the abstract and from descriptions of the method by others, and not compared with
    the authors' code. The paper has no new token rows; here, the semantic vocabulary is trained, too, and not
    merged. The first training (i = 1) is that of stage 0 if it trains an adapter, otherwise that of stage 1.
    """

    name = "slao"
    reads = frozenset({"slao"})
    needs = frozenset({"slao"})

    _merged: dict[str, Tensor]

    def begin(self, context: StageContext) -> None:
        from torch import tensor

        from peso.adapters.lora import Past, put_adapter, read_adapter

        last = read_adapter(context.backbone)
        self._merged = last.up
        if not last.acts:  # the first adapter
            context.memory[COUNT] = tensor(1)
            return
        learned = {name: context.memory.get(PREFIX + name, up) for name, up in last.up.items()}
        start = {name: orthonormal_rows(down) for name, down in last.down.items()}
        put_adapter(context.backbone, Past(start, learned, last.ranks, last.magnitudes))
        context.memory[COUNT] = context.memory.get(COUNT, tensor(1)) + 1

    def end(self, context: StageContext) -> None:
        from peso.adapters.lora import Past, put_adapter, read_adapter

        learned = read_adapter(context.backbone)
        share = 1 / math.sqrt(int(context.memory[COUNT]))
        merged = {name: self._merged[name].lerp(up, share) for name, up in learned.up.items()}
        put_adapter(context.backbone, Past(learned.down, merged, learned.ranks, learned.magnitudes))
        context.memory.update({PREFIX + name: up for name, up in learned.up.items()})


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Orthonormal rows with the span of the matrix's rows (rank, width), by QR with a positive diagonal of
    R."""
    from torch.linalg import qr

    q, r = qr(matrix.double().T)
    signs = r.diagonal().sign()
    signs[signs == 0] = 1
    rows: Tensor = (q * signs).T
    return rows.float().contiguous()
