"""``sd_lora``: ``sum_lora`` with a magnitude for each past adapter (SD-LoRA, arXiv 2501.13198)."""

from __future__ import annotations

from peso.training.strategies.sum_lora import SumLora


class SdLora(SumLora):
    """``sum_lora`` with a learnable magnitude for every earlier adapter (SD-LoRA).

    The weights of stage t are W + Σ_{i<t} m_i B̄_i Ā_i + s B_t A_t. A magnitude m_i starts at
    s = alpha / rank, and is trained further at every stage.
    """

    name = "sd_lora"
    train_magnitudes = True
