"""Proximal terms for any training loop: an anchor, and the penalty on moving away from it.

A name below is loaded when it is first used: a configuration that names a term does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peso.adapters.proximal.term import TERMS, DistanceTerm, Term
from peso.config.registry import require_whole
from peso.errors import ConfigError

if TYPE_CHECKING:
    from peso.adapters.proximal.fisher import Fisher, diagonal_fisher
    from peso.adapters.proximal.l2 import L2
    from peso.adapters.proximal.metrics import Calibration
    from peso.adapters.proximal.orthogonal import Orthogonal
    from peso.adapters.proximal.output_kl import OutputKL
    from peso.adapters.proximal.per_rank_kl import PerRankKL
    from peso.adapters.proximal.softmax_kl import SoftmaxKL

__all__ = [
    "L2",
    "Calibration",
    "DistanceTerm",
    "Fisher",
    "Orthogonal",
    "OutputKL",
    "PerRankKL",
    "SoftmaxKL",
    "Term",
    "diagonal_fisher",
    "find_term",
]

_HOMES = {
    "L2": "l2",
    "Calibration": "metrics",
    "Fisher": "fisher",
    "Orthogonal": "orthogonal",
    "OutputKL": "output_kl",
    "PerRankKL": "per_rank_kl",
    "SoftmaxKL": "softmax_kl",
    "diagonal_fisher": "fisher",
}


if not TYPE_CHECKING:  # or a type checker would take any name

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_term(name: str) -> type[Term]:
    """The term that a configuration names.

    Args:
        name: of a term in this folder, of one that is imported already, or of one that an installed
            distribution offers (entry points ``peso.proximal_terms``); or a class that Python can import,
            such as ``my_package.my_term.MyTerm``.

    Raises:
        ConfigError: there is no such term, or what is named is not one.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute) if module else TERMS.find(name)
    except KeyError:
        raise ConfigError(
            f"{name!r} is not a proximal term; known are {', '.join(TERMS.names())}, and any class that "
            "Python can import, such as my_package.my_term.MyTerm"
        ) from None
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{name} cannot be imported ({error}); name a class that Python can import from here (PYTHONPATH)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise ConfigError(f"{name} is not a subclass of peso.adapters.proximal.Term")
    require_whole(f"strategy.proximal {name!r}", found)
    return found
