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
from peso.model.transitions import Transitions
from peso.model.tree_attention import TreePlaces, along_trees, serves
from peso.model.visibility import Tree, additive
from peso.model.vocabulary import SemanticVocabulary


@dataclass(frozen=True)
class LogitTransform:
    """logits ← cap · tanh(scale · logits / cap): Cohere's ``logit_scale``, Granite's ``logits_scaling``
    (a divisor) and Gemma's ``final_logit_softcapping``. When a backbone is loaded, a check compares the
    result with the model's own logits."""

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
    """A backbone with semantic tokens, in one space of token ids.

    Ids below ``vocabulary.first_id`` are the tokenizer's words; the others are rows of the vocabulary. The
    backbone gets embeddings and returns hidden states. Logits are computed only where they are needed.

    Args:
        backbone: a Transformers causal LM, plain or wrapped by PEFT.
        tokenizer: its tokenizer, without the semantic tokens.
        loss_vocabulary: the normalization of all probabilities: ``full``, ``semantic`` or ``level``.
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
            raise ValueError(f"loss_vocabulary {loss_vocabulary!r} must be full, semantic or level")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.layout = layout
        self.semantic_ids = semantic_ids
        self.loss_vocabulary = loss_vocabulary
        self.backbone_sha256: str | None = None  # of the weights before rounding, if they were rounded
        self.transitions: Transitions | None = None  # counted after each stage, if the head uses them
        self.sharded = False  # whether processes share the weights of its layers, see peso.model.sharding
        self.logit_transform = LogitTransform.of(self.causal_lm.config)

    @property
    def causal_lm(self) -> Any:
        """The Transformers model, with adapters injected in place."""
        backbone: Any = self.backbone
        return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone

    def merged(self) -> GenerativeModel:
        """The model with its active adapters merged into the backbone's weights, in float32. All weights then
        require gradients."""
        backbone: Any = self.backbone
        return self.on(trained_whole(backbone.float().merge_and_unload(), self.vocabulary))

    def on(self, backbone: nn.Module, vocabulary: SemanticVocabulary | None = None) -> GenerativeModel:
        """The model with another backbone, and another vocabulary if given; everything else is shared."""
        model = GenerativeModel(
            backbone,
            self.tokenizer,
            self.vocabulary if vocabulary is None else vocabulary,
            self.layout,
            self.semantic_ids,
            self.loss_vocabulary,
        )
        model.transitions = self.transitions
        return model

    @property
    def device(self) -> torch.device:
        return self.vocabulary.input_rows.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the backbone. Vocabulary rows and adapters may have a higher one."""
        return self.causal_lm.get_input_embeddings().weight.dtype

    def item_token_ids(self, items: Any) -> Any:
        """The token ids of item rows: int (n,) → int64 (n, levels), as NumPy arrays."""
        return self.semantic_ids.token_numbers[items] + self.vocabulary.first_id

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings of token ids in the backbone's precision: (…, length) → (…, length, width).

        If the item head reads, an item's vector is part of the embedding of its last code. A call must then
        have all codes of an item.
        """
        first = self.vocabulary.first_id
        semantic = ids >= first
        words = self._embed_words(ids.masked_fill(semantic, 0))
        rows = F.embedding((ids - first).clamp_min(0), self.vocabulary.input_rows).to(words.dtype)
        embedded = torch.where(semantic.unsqueeze(-1), rows, words)
        head = self.vocabulary.item_head
        if head is None or not head.reads:
            return embedded
        return embedded + head.inputs(ids - first).to(words.dtype)

    def _embed_words(self, ids: Tensor) -> Tensor:
        own = self.vocabulary.input_words
        words: Tensor = (
            self.causal_lm.get_input_embeddings()(ids)
            if own is None
            else F.embedding(ids, own).to(self.dtype)
        )
        return words

    def hidden(
        self, ids: Tensor, visible: Tensor | Tree | None, positions: Tensor, cache: Any = None
    ) -> Tensor:
        """The last hidden states.

        Args:
            ids: (rows, length), token ids.
            visible: bool (rows, 1, length, past + length), which positions each position may attend to (at
                least one). Or a tree, without a cache: if the backbone and the machine support it, the cost
                of attention then depends only on what is visible. Or None for causal attention without a
                cache.
            positions: (rows, length), position ids.
            cache: a Transformers cache, which is extended by ``length`` entries.

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
        # a layer that used this as a mask would return NaN
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
        """The logits of the words: hidden states (…, width) → float32 (…, first_id)."""
        own = self.vocabulary.output_words
        if own is None:
            words = self.causal_lm.get_output_embeddings().weight[: self.vocabulary.first_id]
        else:
            words = own.to(hidden.dtype)
        bias = getattr(self.causal_lm.get_output_embeddings(), "bias", None)
        logits = F.linear(hidden, words, None if bias is None else bias[: self.vocabulary.first_id])
        return self.logit_transform(logits.float())

    def semantic_logits(self, hidden: Tensor, level: int | None = None) -> Tensor:
        """The logits of one level's codes, or of all semantic tokens: hidden states (…, width) → float32
        (…, tokens)."""
        rows = self.vocabulary.output_rows if level is None else self.vocabulary.level_rows(level)
        return self.logit_transform(F.linear(hidden, rows.to(hidden.dtype)).float())

    @property
    def has_item_head(self) -> bool:
        return self.vocabulary.item_head is not None

    def item_share(self, lengths: Tensor) -> Tensor:
        """The share of the item head in the mixture with the codes, by the number of items in the prompt:
        int64 (n,) → float32 (n,)."""
        assert self.vocabulary.item_head is not None
        return self.vocabulary.item_head.share_of(lengths)

    def item_log_probabilities(self, hidden: Tensor) -> Tensor:
        """The log-probability of every item under the item head: hidden states (n, width) that predict an
        item's first code → float32 (n, items)."""
        assert self.vocabulary.item_head is not None
        scores: Tensor = self.vocabulary.item_head(hidden)
        return scores.log_softmax(-1)


def trained_whole(causal_lm: Any, vocabulary: SemanticVocabulary) -> Any:
    """A causal LM all of whose weights require gradients, except embedding and head if the vocabulary trains
    the words' rows instead."""
    causal_lm.requires_grad_(True)
    if vocabulary.input_words is not None:
        for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
            module.weight.requires_grad_(False)
    return causal_lm


def _without_plans(device: torch.device) -> AbstractContextManager[None]:
    """A context in which attention does not use cuDNN.

    Prompts, beams and cases have many shapes, and planning for a new shape takes cuDNN longer than the pass
    itself. Training has only a few shapes.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
