"""The generative recommender: a frozen backbone with adapters, a semantic vocabulary, a prompt layout and a
catalog.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from peso.items.semantic_ids import SemanticIds
from peso.model.layout import PromptLayout
from peso.model.tree_attention import TreePlaces, along_trees, serves
from peso.model.visibility import Tree, additive
from peso.model.vocabulary import SemanticVocabulary


@dataclass(frozen=True)
class LogitTransform:
    """logits ← cap · tanh(scale · logits / cap): Cohere's ``logit_scale``, Granite's ``logits_scaling``
    (a divisor), Gemma's ``final_logit_softcapping``. The check at loading compares with the model's own."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(scale / divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class GenerativeModel(nn.Module):
    """One id space over the backbone's words and the semantic tokens.

    Ids below ``vocabulary.first_id`` are the tokenizer's words, the rest rows of the vocabulary. The
    backbone is called with embeddings and returns hidden states; logits are computed only where asked.

    Args:
        backbone: a Transformers causal LM, plain or wrapped by PEFT.
        tokenizer: its tokenizer, without the semantic tokens.
        loss_vocabulary: normalization of every probability: ``full``, ``semantic`` or ``level``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        vocabulary: SemanticVocabulary,
        layout: PromptLayout,
        semantic_ids: SemanticIds,
        loss_vocabulary: str,
    ) -> None:
        super().__init__()
        if loss_vocabulary not in ("full", "semantic", "level"):
            raise ValueError(f"loss_vocabulary {loss_vocabulary!r} is none of full, semantic, level")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.layout = layout
        self.semantic_ids = semantic_ids
        self.loss_vocabulary = loss_vocabulary
        self.backbone_sha256: str | None = None  # of its weights before they were rounded, where they were
        self.logit_transform = LogitTransform.of(self.causal_lm.config)

    @property
    def causal_lm(self) -> Any:
        """The Transformers model itself, adapters injected in place."""
        backbone: Any = self.backbone
        return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone

    def merged(self) -> GenerativeModel:
        """The model with its active adapters added to the backbone's weights for good, in float32; all
        of them require a gradient."""
        backbone: Any = self.backbone
        causal_lm = backbone.float().merge_and_unload().requires_grad_(True)
        return GenerativeModel(
            causal_lm, self.tokenizer, self.vocabulary, self.layout, self.semantic_ids, self.loss_vocabulary
        )

    @property
    def device(self) -> torch.device:
        return self.vocabulary.input_rows.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's own precision; vocabulary rows and adapters may be kept in a higher one."""
        return self.causal_lm.get_input_embeddings().weight.dtype

    def item_token_ids(self, items: Any) -> Any:
        """int64 (n, levels) token ids of item rows (NumPy in, NumPy out)."""
        return self.semantic_ids.token_numbers[items] + self.vocabulary.first_id

    def embed(self, ids: Tensor) -> Tensor:
        """ids (…) → embeddings (…, width) in the backbone's precision."""
        first = self.vocabulary.first_id
        semantic = ids >= first
        words = self.causal_lm.get_input_embeddings()(ids.masked_fill(semantic, 0))
        rows = F.embedding((ids - first).clamp_min(0), self.vocabulary.input_rows).to(words.dtype)
        return torch.where(semantic.unsqueeze(-1), rows, words)

    def hidden(
        self, ids: Tensor, visible: Tensor | Tree | None, positions: Tensor, cache: Any = None
    ) -> Tensor:
        """Last hidden states.

        Args:
            ids: (rows, length) token ids.
            visible: bool (rows, 1, length, past + length), who may attend to whom; every position must see
                something. Or a tree that says so of the rows (no cache then): attention then costs what is
                seen, where the backbone and the machine allow it. None: plain causal attention (no cache).
            positions: (rows, length) position ids.
            cache: a Transformers cache; it is extended by ``length`` entries.

        Returns:
            (rows, length, width) in the backbone's precision.
        """
        if isinstance(visible, Tree):
            if serves(self.causal_lm):
                return self._hidden_along(ids, visible, positions)
            visible = visible.dense()
        mask = None if visible is None else additive(visible, self.dtype)
        with nullcontext() if self.training else _without_plans(ids.device):
            output = self.causal_lm.get_decoder()(
                inputs_embeds=self.embed(ids),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def _hidden_along(self, ids: Tensor, tree: Tree, positions: Tensor) -> Tensor:
        # whoever took this for a mask would get no numbers
        no_mask = torch.full((1, 1, 1, 1), torch.nan, dtype=self.dtype, device=ids.device)
        with along_trees(self.causal_lm):
            output = self.causal_lm.get_decoder()(
                inputs_embeds=self.embed(ids),
                attention_mask=no_mask,
                position_ids=positions,
                use_cache=False,
                peso_tree=TreePlaces(tree),
            )
        return output.last_hidden_state

    def word_logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, width) → float32 logits (…, first_id) of the backbone's own words."""
        words = self.causal_lm.get_output_embeddings().weight[: self.vocabulary.first_id]
        bias = getattr(self.causal_lm.get_output_embeddings(), "bias", None)
        logits = F.linear(hidden, words, None if bias is None else bias[: self.vocabulary.first_id])
        return self.logit_transform(logits.float())

    def semantic_logits(self, hidden: Tensor, level: int | None = None) -> Tensor:
        """hidden (…, width) → float32 logits (…, tokens) of one level's codes, or of all semantic tokens."""
        rows = self.vocabulary.output_rows if level is None else self.vocabulary.level_rows(level)
        return self.logit_transform(F.linear(hidden, rows.to(hidden.dtype)).float())

    @property
    def has_item_head(self) -> bool:
        return self.vocabulary.item_head is not None

    def item_share(self, lengths: Tensor) -> Tensor:
        """Share of the item head in the pool with the codes, by the number of items in the prompt: int64 (n,)
        → float32 (n,)."""
        assert self.vocabulary.item_head is not None
        return self.vocabulary.item_head.share_of(lengths)

    def item_log_probabilities(self, hidden: Tensor) -> Tensor:
        """hidden (n, width), the states that predict an item's first code → float32 (n, items), of every item
        of the catalog under the item head."""
        assert self.vocabulary.item_head is not None
        scores: Tensor = self.vocabulary.item_head(hidden)
        return scores.log_softmax(-1)


def _without_plans(device: torch.device) -> AbstractContextManager[None]:
    """Attention that needs no planning: prompts, beams and cases come in many shapes, and cuDNN plans for
    each new one for longer than the pass takes. (The rows of training come in few.)"""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
