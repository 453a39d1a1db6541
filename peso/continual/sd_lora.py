"""``sd_lora``: directions of earlier adapters stay, their magnitudes go on learning (arXiv 2501.13198).

SD-LoRA (Wu et al., ICLR 2025) with the choices of Table 1 of arXiv 2510.25093.
"""

from __future__ import annotations

from peso.continual.sum_lora import SumLora


class SdLora(SumLora):
    """``sum_lora`` whose past adapters are each multiplied by a number that learns with the new one:
    W + Σ_{i<t} m_i B̄_i Ā_i + s B_t A_t. A magnitude begins at s = alpha / rank and goes on where the last
    stage left it."""

    train_magnitudes = True
