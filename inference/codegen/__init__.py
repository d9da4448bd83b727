"""A pure graph of tensor operations as one C program: loops of equal shape are merged, nothing is allocated while it runs.

Every operation becomes a *statement*. Views cost nothing: they are strides on the memory of something else. Element-wise
operations and reductions over the same loops share one loop nest (a *group*) where their order allows it, and pass values
on in registers; only what another group needs is written to memory. All memory lies in one arena whose layout is
decided here. `operations.py` says which translation each operation has.
"""

from .graph import translate
from .memory import ALIGNMENT, NotTranslated

__all__ = ["ALIGNMENT", "NotTranslated", "translate"]
