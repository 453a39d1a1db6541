"""``output_kl``: the distance between the outputs of the adapter and of its anchor on the same inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peso.adapters.proximal.term import Term
from peso.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from peso.adapters.groups import Group, Source
    from peso.adapters.proximal.metrics import Calibration

    Pair = tuple[Tensor, Tensor]  # A (rank, in), B (out, rank)
    Observer = Callable[[str, Pair, Pair, Tensor, float], None]  # module, weights, anchors, inputs, scaling


class OutputKL(Term):
    """λ · Σ_modules mean_tokens KL( softmax(s·B·A·x) ‖ softmax(s·B_a·A_a·x) ), where s is the adapter's
    scaling.

    This is the ablation of PESO (arXiv 2510.25093) that anchors the outputs of the adapter instead of its
    values. x is the input of the module in the current forward pass, without dropout, and counts as constant.
    The term must watch the forward pass::

        term = peso.OutputKL(weight=1.0)
        term.anchor(model)
        with term.watch(model):
            loss = model(**batch).loss
        (loss + term(model)).backward()

    Passes without gradients are ignored. Value and gradient are computed when a module runs. At that time,
    the term needs about five float32 matrices (tokens, out); until the backward pass, it needs only a
    gradient of the size of A and B. It does not work with gradient checkpointing, which runs modules twice.
    There is no decoupled form.

    Args:
        weight: λ. By default 1.0, unless a strength is given.
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
        """The state without hooks, which belong to a model, and without watched passes, which have graphs."""
        return {**self.__dict__, "_hooks": (), "_seen": defaultdict(list)}

    def select(self, source: Source) -> list[Group]:
        groups = [group for group in super().select(source) if group.factor]
        if not groups:
            raise TrainingError("OutputKL needs a model with LoRA modules: plain tensors have no outputs")
        return groups

    def anchor(self, source: Source, losses: Iterable[Tensor] | None = None) -> None:
        """Set the anchor, see :meth:`Term.anchor`.

        Raises:
            TrainingError: see :meth:`Term.anchor`; or a layer with an adapter is not linear.
        """
        from torch import nn

        self.select(source)
        for name, module, layer in self._layers(source):
            if name not in layer.lora_A or not isinstance(layer.lora_A[name], nn.Linear):
                raise TrainingError(f"OutputKL needs linear layers, but {module} is not linear")
        super().anchor(source)

    def keep(self, groups: Sequence[Group]) -> None:
        from peso.adapters.groups import placement

        copies = [group.tensor.detach().to(placement(group.tensor)[1]).clone() for group in groups]
        modules = [group.module for group in groups[::2]]
        self._anchors = dict(zip(modules, zip(copies[::2], copies[1::2], strict=True), strict=True))
        self._seen = defaultdict(list)
        self._trace = None

    @contextmanager
    def watch(self, source: Source, mask: Tensor | None = None) -> Iterator[None]:
        """A context in which forward passes are watched. Passes that were watched before are dropped.

        Args:
            source: the model.
            mask: bool, with the shape of the token ids: the tokens that count, if a batch is padded.
        """
        self.attach(source, mask)
        try:
            yield
        finally:
            self.detach()

    def attach(self, source: Source, mask: Tensor | None = None) -> None:
        """Watch forward passes until :meth:`detach`, for loops in which :meth:`watch` cannot be used.

        Args:
            source: the model.
            mask: see :meth:`watch`.

        Raises:
            TrainingError: there is no anchor, the adapter is a different one, or the model uses gradient
                checkpointing.
        """
        from peso.adapters.proximal.gradients import output_kl

        def observe(module: str, weights: Pair, anchors: Pair, x: Tensor, scaling: float) -> None:
            rows = x[mask] if mask is not None else x.flatten(0, -2)
            self._seen[module].append((output_kl(weights, anchors, rows, scaling), len(rows)))

        self._attach(source, observe)
        self._seen.clear()

    def detach(self) -> None:
        """Stop watching. The term of the watched passes can still be computed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def penalty(self, groups: Sequence[Group], scale: float) -> Tensor:
        """The penalty of the passes watched since the last call."""
        if not self._seen:
            raise TrainingError(
                "no forward pass with gradients was watched: run it inside `with term.watch(model):`, "
                "or call term.attach(model) first"
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
        """tr(H), as the mean over the tokens that :meth:`calibrate` watched."""
        if self._trace is None:
            raise TrainingError("the curvature of OutputKL depends on the data: call calibrate first")
        return self._trace

    def calibrate(self, source: Source, losses: Iterable[Tensor], tokens: float = 1.0) -> Calibration:
        from peso.adapters.proximal.gradients import output_trace

        sums: Mapping[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # Σ over tokens of tr(H), tokens

        def observe(module: str, weights: Pair, anchors: Pair, x: Tensor, scaling: float) -> None:
            rows = x.flatten(0, -2)
            sums[module][0] += float(output_trace(*anchors, rows, scaling))
            sums[module][1] += len(rows)

        def observed() -> Iterator[Tensor]:
            yield from losses
            if not sums:
                raise TrainingError(
                    "OutputKL measures its curvature in the passes that compute the losses: pass an iterator "
                    "to calibrate that computes each loss when it is requested"
                )
            self._trace = sum(total / count for total, count in sums.values())

        self._attach(source, observe)
        try:
            return super().calibrate(source, observed(), tokens)
        finally:
            self.detach()

    def _layers(self, source: Source) -> Iterator[tuple[str, str, Any]]:
        """For every model in the source, the name of its adapter, and each layer with its module's name."""
        from peso.adapters.groups import find_layers

        for model in _models(source):
            name, layers = find_layers(model, self.adapter)
            yield from ((name, module, layer) for module, layer in layers.items())

    def _attach(self, source: Source, observe: Observer) -> None:
        self.groups_of(source)
        self.detach()
        if any(getattr(model, "is_activation_checkpointing", False) for model in _models(source)):
            raise TrainingError(
                "OutputKL watches every pass of a module, but gradient checkpointing runs each pass twice: "
                "turn it off, or choose another term"
            )
        self._hooks = [
            layer.register_forward_hook(self._hook(module, name, observe))
            for name, module, layer in self._layers(source)
        ]

    def _hook(self, module: str, adapter: str, observe: Observer) -> Callable[..., None]:
        import torch

        from peso.adapters.groups import placement

        def hook(layer: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                place = placement(weights[0])
                a, b = self._anchors[module]
                anchors = self._anchors[module] = (a.to(*place), b.to(*place))  # where the parameters are
                observe(module, weights, anchors, arguments[0].detach(), float(layer.scaling[adapter]))

        return hook


def _models(source: Source) -> list[nn.Module]:
    from torch import nn

    from peso.adapters.groups import Group

    parts = [source] if isinstance(source, nn.Module) else list(source)
    if any(isinstance(part, Group) for part in parts):
        raise TypeError("OutputKL watches forward passes: pass the model instead of its groups")
    return [part for part in parts if isinstance(part, nn.Module)]
