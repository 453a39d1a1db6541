"""``output_kl``: the distance between the outputs of the adapter and of its anchor on the same inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peso.adapters.groups import Group, Source, find_layers, placement
from peso.adapters.proximal.metrics import Calibration, Prior, softmax_kl
from peso.adapters.proximal.term import Term, check_first_derivative
from peso.errors import TrainingError

Pair = tuple[Tensor, Tensor]  # A (rank, in), B (out, rank)
Observer = Callable[[str, Pair, Pair, Tensor, float], None]  # module, weights, anchors, inputs, scaling


class OutputKL(Term):
    """λ · Σ_modules mean_tokens KL( softmax(s·B·A·x) ‖ softmax(s·B_a·A_a·x) ), s the adapter's scaling.

    The ablation of PESO (arXiv 2510.25093) that anchors the outputs of the adapter instead of its values. x
    is the input of the module in this forward pass, without dropout, and counts as constant. The forward pass
    has to be watched::

        term = peso.OutputKL(weight=1.0)
        term.anchor(model)
        with term.watch(model):
            loss = model(**batch).loss
        (loss + term(model)).backward()

    Passes without gradients are ignored. Value and gradient are computed as a module runs: for that moment it
    holds about five matrices (tokens, out) of the module in float32; until backward, only a gradient of the
    size of A and B. Not with gradient checkpointing, which runs modules twice. There is no decoupled form.

    Args:
        weight: λ; 1.0 if neither it nor a strength is given.
        strength: λ = strength · ρ̄. tr(H) depends on the tokens, so :meth:`calibrate` watches the passes that
            compute its losses, which must come from an iterator.
        reduction, adapter, coupling: see :class:`~peso.adapters.proximal.term.Term`.
    """

    name = "output_kl"
    default_weight = 1.0
    watches_outputs = True

    _anchors: dict[str, Pair]
    _seen: dict[str, list[tuple[Tensor, int]]]  # module → Σ KL, tokens of a pass
    _trace: float | None = None
    _hooks: Sequence[Any] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, which belong to a model, and without what was seen, which has a graph."""
        return {**self.__dict__, "_hooks": (), "_seen": defaultdict(list)}

    def select(self, source: Source) -> list[Group]:
        groups = [group for group in super().select(source) if group.factor]
        if not groups:
            raise TrainingError("OutputKL needs a model with LoRA modules: plain tensors have no outputs")
        return groups

    def anchor(self, source: Source, losses: Iterable[Tensor] | None = None) -> None:
        """As :meth:`Term.anchor`. Raises TrainingError for an adapter on other than linear layers too."""
        self.select(source)
        for name, module, layer in self._layers(source):
            if name not in layer.lora_A or not isinstance(layer.lora_A[name], nn.Linear):
                raise TrainingError(f"OutputKL is for linear layers, which {module} is not")
        super().anchor(source)

    def keep(self, groups: Sequence[Group]) -> None:
        copies = [group.tensor.detach().to(placement(group.tensor)[1]).clone() for group in groups]
        modules = [group.module for group in groups[::2]]
        self._anchors = dict(zip(modules, zip(copies[::2], copies[1::2], strict=True), strict=True))
        self._seen = defaultdict(list)
        self._trace = None

    @contextmanager
    def watch(self, source: Source, mask: Tensor | None = None) -> Iterator[None]:
        """Forward passes inside are watched; what was seen before is dropped.

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

        def observe(module: str, weights: Pair, anchors: Pair, x: Tensor, scaling: float) -> None:
            rows = x[mask] if mask is not None else x.flatten(0, -2)
            kl = _OutputKL.apply(*weights, *anchors, rows, scaling)  # type: ignore[no-untyped-call]
            self._seen[module].append((kl, len(rows)))

        self._attach(source, observe)
        self._seen.clear()

    def detach(self) -> None:
        """Stop watching; the term of what was seen can still be computed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        """Of the passes seen since the last call."""
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
        return total * scale

    def trace(self) -> float:
        """Of the tokens that :meth:`calibrate` saw, whose mean it is."""
        if self._trace is None:
            raise TrainingError("the curvature of OutputKL depends on the data: call calibrate first")
        return self._trace

    def calibrate(self, source: Source, losses: Iterable[Tensor], tokens: float = 1.0) -> Calibration:
        sums: Mapping[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # Σ over tokens of tr(H), tokens

        def observe(module: str, weights: Pair, anchors: Pair, x: Tensor, scaling: float) -> None:
            rows = x.flatten(0, -2)
            sums[module][0] += float(output_trace(*anchors, rows, scaling))
            sums[module][1] += len(rows)

        def observed() -> Iterator[Tensor]:
            yield from losses
            if not sums:
                raise TrainingError(
                    "OutputKL measures its curvature in the passes that compute the losses: give calibrate "
                    "an iterator that computes each loss when it is asked for it"
                )
            self._trace = sum(total / count for total, count in sums.values())

        self._attach(source, observe)
        try:
            return super().calibrate(source, observed(), tokens)
        finally:
            self.detach()

    def _layers(self, source: Source) -> Iterator[tuple[str, str, Any]]:
        """Of every model in the source: name of its adapter, and each layer with its module's name."""
        for model in _models(source):
            name, layers = find_layers(model, self.adapter)
            yield from ((name, module, layer) for module, layer in layers.items())

    def _attach(self, source: Source, observe: Observer) -> None:
        self.groups_of(source)
        self.detach()
        if any(getattr(model, "is_activation_checkpointing", False) for model in _models(source)):
            raise TrainingError(
                "OutputKL observes every pass of a module, and gradient checkpointing runs each twice: "
                "turn it off, or choose another term"
            )
        self._hooks = [
            layer.register_forward_hook(self._hook(module, name, observe))
            for name, module, layer in self._layers(source)
        ]

    def _hook(self, module: str, adapter: str, observe: Observer) -> Callable[..., None]:
        def hook(layer: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                place = placement(weights[0])
                a, b = self._anchors[module]
                anchors = self._anchors[module] = (a.to(*place), b.to(*place))  # it follows the parameters
                observe(module, weights, anchors, arguments[0].detach(), float(layer.scaling[adapter]))

        return hook


def _models(source: Source) -> list[nn.Module]:
    parts = [source] if isinstance(source, nn.Module) else list(source)
    if any(isinstance(part, Group) for part in parts):
        raise TypeError("OutputKL observes forward passes: give it the model, not the groups found in it")
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
    """Σ over tokens of one module's KL. Forward computes value and gradients; backward only scales them."""

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
        check_first_derivative()
        of_a, of_b = ctx.saved_tensors
        return (of_a * outer).to(ctx.dtypes[0]), (of_b * outer).to(ctx.dtypes[1]), None, None, None, None
