"""``output_kl``: the distance between what the adapter and its anchor make of the same inputs.

Knows linear LoRA layers and the tokens that pass through them; knows nothing of the model around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peso.continual.calibration import Calibration
from peso.continual.groups import Found, Group, Source, check_same_groups, find_groups, find_layers, shapes
from peso.continual.proximal.term import Coupling, Reduction, Term
from peso.continual.softmax_kl import Prior, softmax_kl
from peso.continual.stacks import placement
from peso.errors import TrainingError

Pair = tuple[Tensor, Tensor]  # A (rank, in), B (out, rank)
Look = Callable[[str, Pair, Pair, Tensor, float], None]  # module, its weights, its anchors, inputs, scaling


class OutputKL(Term):
    """λ · Σ_modules mean_tokens KL( softmax(s·B·A·x) ‖ softmax(s·B_a·A_a·x) ), s the adapter's scaling.

    The ablation of PESO (arXiv 2510.25093) that anchors what the adapter says rather than what it is. x is
    what the module is given in this forward pass, without dropout, and counts as constant. The forward pass
    has to be watched:

        term = peso.OutputKL(weight=1.0)
        term.anchor(model)
        with term.watch(model):
            loss = model(**batch).loss
        (loss + term(model)).backward()

    Passes without gradients are not looked at. Value and gradient are found when a module is passed: for that
    moment it holds some five matrices (tokens, out) of the module in float32; until backward, only a gradient
    of the size of A and B. Not with gradient checkpointing, which passes modules twice. There is no decoupled
    form.

    Args:
        weight: λ; 1.0 where neither it nor a strength is given.
        strength: λ = strength · ρ̄. tr(H) depends on the tokens, so :meth:`calibrate` watches the passes that
            make its losses, which must come from an iterator.
        reduction: ``sum`` over the modules, or ``mean``.
        adapter: name of the PEFT adapter; None: the one that is active when the term is called.
        coupling: ``loss``.

    Raises:
        ConfigError: an impossible argument.
    """

    has_decoupled_form = False

    def __init__(
        self,
        weight: float | None = None,
        reduction: Reduction = "sum",
        adapter: str | None = None,
        *,
        strength: float | None = None,
        coupling: Coupling = "loss",
    ) -> None:
        super().__init__(
            weight, reduction, adapter, strength=strength, coupling=coupling, weight_by_default=1.0
        )
        self._anchored: dict[str, tuple[int, ...]] = {}
        self._anchors: dict[str, Pair] = {}
        self._seen: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)  # module → Σ KL, tokens of a pass
        self._trace: float | None = None
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, which belong to a model, and without what was seen, which has a graph."""
        return {**self.__dict__, "_hooks": [], "_seen": defaultdict(list)}

    def anchor(self, source: Source) -> None:
        """Takes the parameters as they are now for the anchor.

        Raises:
            TrainingError: no LoRA adapter, or one on something other than linear layers.
        """
        groups = self._factors(source)
        for name, layers in self._layers(source):
            for module, layer in layers.items():
                if name not in layer.lora_A or not isinstance(layer.lora_A[name], nn.Linear):
                    raise TrainingError(f"OutputKL is for linear layers, which {module} is not")
        copies = [group.tensor.detach().to(placement(group.tensor)[1]).clone() for group in groups]
        self._anchors = {
            groups[first].module: (copies[first], copies[first + 1]) for first in range(0, len(groups), 2)
        }
        self._anchored = shapes(groups)
        self._seen.clear()
        self._trace = self._calibration = None

    @contextmanager
    def watch(self, source: Source, mask: Tensor | None = None) -> Iterator[None]:
        """Forward passes inside are looked at; what was seen before is forgotten.

        Args:
            mask: bool, of the shape of the token ids: which tokens count, where a batch is padded.
        """
        self.attach(source, mask)
        try:
            yield
        finally:
            self.detach()

    def attach(self, source: Source, mask: Tensor | None = None) -> None:
        """As :meth:`watch`, until :meth:`detach`: for loops whose forward pass is out of reach."""

        def look(module: str, weights: Pair, anchors: Pair, x: Tensor, scaling: float) -> None:
            rows = x[mask] if mask is not None else x.flatten(0, -2)
            kl = _OutputKL.apply(*weights, *anchors, rows, scaling)
            self._seen[module].append((kl, len(rows)))

        self._seen.clear()
        self._attach(source, look)

    def detach(self) -> None:
        """Nothing is looked at any more; what was seen can still be collected."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def collected(self) -> Tensor:
        """The weighted term of the passes seen since the last call: 0-d, with its graph."""
        return self._collect(self.weight_in_loss())

    def value_at(self, source: Source, weight: float) -> Tensor:
        self.groups_of(source)
        return self._collect(weight)

    def _collect(self, weight: float) -> Tensor:
        if not self._seen:
            raise TrainingError(
                "no forward pass with gradients was watched: run it inside `with term.watch(model):`, "
                "or call term.attach(model) before it"
            )
        total: Tensor | None = None
        for passes in self._seen.values():
            tokens = max(1, sum(count for _, count in passes))
            for kl, _ in passes:
                total = kl / tokens if total is None else total + (kl / tokens).to(total.device)
        self._seen.clear()
        assert total is not None
        return total * (weight / self._divisor)

    def metric_trace(self) -> float:
        """Of the tokens that :meth:`calibrate` saw, whose mean it is."""
        if self._trace is None:
            raise TrainingError("the curvature of OutputKL depends on the data: call calibrate first")
        return self._trace / self._divisor

    def calibrate(self, source: Source, losses: Iterable[Tensor], tokens: float = 1.0) -> Calibration:
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # Σ over tokens of tr(H), tokens

        def look(module: str, weights: Pair, anchors: Pair, x: Tensor, scaling: float) -> None:
            rows = x.flatten(0, -2)
            sums[module][0] += float(output_trace(*anchors, rows, scaling))
            sums[module][1] += len(rows)

        def told() -> Iterator[Tensor]:
            yield from losses
            if not sums:
                raise TrainingError(
                    "OutputKL reads its curvature off the passes that make the losses: give calibrate an "
                    "iterator that computes each loss when it is asked for it"
                )
            self._trace = sum(total / count for total, count in sums.values())

        self._attach(source, look)
        try:
            return super().calibrate(source, told(), tokens)
        finally:
            self.detach()

    def groups_of(self, source: Source) -> list[Group]:
        if not self._anchored:
            raise TrainingError("the proximal term has no anchor yet: call anchor(model) before training")
        groups = self._factors(source)
        check_same_groups(self._anchored, groups)
        return groups

    def _factors(self, source: Source) -> list[Group]:
        groups = [group for group in find_groups(source, self.adapter) if group.factor]
        if not groups:
            raise TrainingError("OutputKL needs a model with LoRA modules: plain tensors have no outputs")
        return groups

    def _layers(self, source: Source) -> list[tuple[str, dict[str, Any]]]:
        """Of every model in the source: name of its adapter, layers by module."""
        return [find_layers(model, self.adapter) for model in _models(source)]

    def _attach(self, source: Source, look: Look) -> None:
        self.groups_of(source)
        self.detach()
        for model in _models(source):
            if getattr(model, "is_activation_checkpointing", False):
                raise TrainingError(
                    "OutputKL looks at every pass of a module, and gradient checkpointing passes each twice: "
                    "turn it off, or choose another term"
                )
        for name, layers in self._layers(source):
            for module, layer in layers.items():
                self._hooks.append(layer.register_forward_hook(self._hook(module, name, look)))

    def _hook(self, module: str, adapter: str, look: Look) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def hook(layer: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                place = placement(weights[0])
                a, b = self._anchors[module]
                anchors = self._anchors[module] = (a.to(*place), b.to(*place))  # it follows the parameters
                look(module, weights, anchors, arguments[0].detach(), float(layer.scaling[adapter]))

        return hook

    @property
    def _divisor(self) -> int:
        return len(self._anchors) if self.reduction == "mean" else 1


def _models(source: Source) -> list[nn.Module]:
    if isinstance(source, Found):
        raise TypeError("OutputKL looks at forward passes: give it the model, not the groups found in it")
    parts = [source] if isinstance(source, nn.Module) else list(source)
    return [part for part in parts if isinstance(part, nn.Module)]


@torch.no_grad()
def output_trace(a: Tensor, b: Tensor, x: Tensor, scaling: float) -> Tensor:
    """Σ_tokens of the trace of the Hessian of KL(softmax(s·B·A·x) ‖ ·) at A, B: 0-d.

    With p = softmax(s·B·A·x), F = diag(p) − p·pᵀ is the Hessian in the output, JᵀFJ that in the parameters:
    s²·‖A·x‖²·tr(F) for B, s²·‖x‖²·Σ_k B_kᵀ·F·B_k over the columns of B for A.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(a.dtype)
        inner = x @ a.T  # (tokens, rank)
        p = torch.softmax(scaling * (inner @ b.T), -1)  # (tokens, out)
        of_b = inner.square().sum(-1) * (p * (1 - p)).sum(-1)
        of_a = x.square().sum(-1) * (p @ b.square() - (p @ b).square()).sum(-1)
        return scaling**2 * (of_a + of_b).sum()


class _OutputKL(torch.autograd.Function):
    """Σ over tokens of one module's KL. Forward finds value and gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, a_anchor: Tensor, b_anchor: Tensor, x: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = a_anchor.dtype
            wide_a, wide_b, x = a.to(dtype), b.to(dtype), x.to(dtype)
            inner = x @ wide_a.T  # (tokens, rank)
            # s·(B·A − B_a·A_a)·x without the difference of two nearly equal outputs
            moved = inner @ (wide_b - b_anchor).T + (x @ (wide_a - a_anchor).T) @ b_anchor.T
            prior = torch.softmax(scaling * ((x @ a_anchor.T) @ b_anchor.T), -1)  # (tokens, out)
            kl, outer = softmax_kl(moved.mul_(scaling), Prior(prior, prior.sum(-1, keepdim=True)))
            outer.mul_(scaling)
            ctx.save_for_backward((outer @ wide_b).T @ x, outer.T @ inner)
        ctx.dtypes = a.dtype, b.dtype
        return kl.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TrainingError(
                "OutputKL has a first derivative only: take its gradient without create_graph=True"
            )
        of_a, of_b = ctx.saved_tensors
        return (of_a * outer).to(ctx.dtypes[0]), (of_b * outer).to(ctx.dtypes[1]), None, None, None, None
