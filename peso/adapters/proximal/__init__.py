"""Proximal terms for any training loop: an anchor, and the penalty on moving away from it."""

from importlib import import_module
from pkgutil import iter_modules

from peso.adapters.proximal.calibration import Calibration
from peso.adapters.proximal.fisher import Fisher, diagonal_fisher
from peso.adapters.proximal.l2 import L2
from peso.adapters.proximal.orthogonal import Orthogonal
from peso.adapters.proximal.output_kl import OutputKL
from peso.adapters.proximal.softmax import PerRankKL, SoftmaxKL
from peso.adapters.proximal.term import DistanceTerm, Term
from peso.errors import ConfigError

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


def find_term(name: str) -> type[Term]:
    """The term that a configuration names.

    Args:
        name: of a term in this folder, or of one that is imported already; or a class that Python can import,
            such as ``my_package.my_term.MyTerm``.

    Raises:
        ConfigError: there is no such term.
    """
    for file in iter_modules(__path__):
        import_module(f"{__name__}.{file.name}")
    if name in Term.named:
        return Term.named[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"{name!r} is not a proximal term; known are {', '.join(sorted(Term.named))}, and any class that "
            "Python can import, such as my_package.my_term.MyTerm"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{name} cannot be imported ({error}); name a class that Python can import from here (PYTHONPATH)"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise ConfigError(f"{name} is not a subclass of peso.adapters.proximal.Term")
    return found
