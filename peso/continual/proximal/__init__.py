"""Proximal terms for anyone's training loop: an anchor, and the penalty on moving away from it.

Knows adapters and anchors; knows nothing of stages, data, loops or files. One file a term.
"""

from peso.continual.calibration import Calibration
from peso.continual.proximal.fisher import Fisher, diagonal_fisher
from peso.continual.proximal.l2 import L2
from peso.continual.proximal.orthogonal import Orthogonal
from peso.continual.proximal.output_kl import OutputKL
from peso.continual.proximal.softmax import PerRankKL, SoftmaxKL
from peso.continual.proximal.term import Term

__all__ = [
    "L2",
    "Calibration",
    "Fisher",
    "Orthogonal",
    "OutputKL",
    "PerRankKL",
    "SoftmaxKL",
    "Term",
    "diagonal_fisher",
]
