"""The registry of the optimizers that are compared, each with what its result is checked by.

PROVIDERS   of bench diag: each beside its update made one operation at a time
PEERS       of bench matrix, step, train and gpu: those of matrices, and diagonal ones beside them
METHODS     of bench train: settings that were searched, and the best of them, by problem
"""

from .diagonal import PROVIDERS
from .peers import PEERS
from .tuned import METHODS

__all__ = ["METHODS", "PEERS", "PROVIDERS"]
