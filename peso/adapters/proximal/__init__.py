"""Proximal terms for any training loop: an anchor, and a penalty on moving away from it.

The names below are loaded when they are first used, so that reading a configuration does not import PyTorch.
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
    from peso.adapters.proximal.released_l2 import ReleasedL2
    from peso.adapters.proximal.released_orthogonal import ReleasedOrthogonal
    from peso.adapters.proximal.softmax_kl import SoftmaxKL

__all__ = [
    "L2",
    "Calibration",
    "DistanceTerm",
    "Fisher",
    "Orthogonal",
    "OutputKL",
    "PerRankKL",
    "ReleasedL2",
    "ReleasedOrthogonal",
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
    "ReleasedL2": "released_l2",
    "ReleasedOrthogonal": "released_orthogonal",
    "SoftmaxKL": "softmax_kl",
    "diagonal_fisher": "fisher",
}


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_term(name: str) -> type[Term]:
    """Find a proximal term by its name in a configuration.

    Args:
        name: the name of a term in this folder, of a term that is already imported, or of a term that an
            installed distribution offers (entry points ``peso.proximal_terms``); or a class that Python can
            import, such as ``my_package.my_term.MyTerm``.

    Raises:
        ConfigError: there is no such term, or the class is not a proximal term.
    """
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            found = getattr(import_module(module), attribute)
        except Exception as error:  # importing a module can raise anything
            raise ConfigError(
                f"{name} cannot be imported ({type(error).__name__}: {error}); use a class that Python can "
                "import, such as my_package.my_term.MyTerm, and add its folder to PYTHONPATH if necessary"
            ) from error
    else:
        try:
            found = TERMS.find(name)
        except KeyError:
            raise ConfigError(
                f"{name!r} is not a proximal term; use one of {', '.join(TERMS.names())}, or any class that "
                "Python can import, such as my_package.my_term.MyTerm"
            ) from None
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise ConfigError(f"{name} is not a subclass of peso.adapters.proximal.Term")
    require_whole(f"strategy.proximal {name!r}", found)
    return found
