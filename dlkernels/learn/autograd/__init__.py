"""Derivatives by bookkeeping, and random draws by two tables: the engine under a training loop, in plain sight.

================= ==========================================================================================
name              what it is
================= ==========================================================================================
Scalar, Tensor    a value that knows what it was computed from: a float, or a NumPy array
Node.backward     the derivatives of a result by everything it was made of, added to their `grad`
grad              the same, returned; with create_graph=True they can be differentiated again
no_grad           a block in which nothing is remembered
to_dot            the graph as text for Graphviz
draw_graph        the graph as a figure
cross_entropy     softmax cross-entropy, of the operations above
MLP               a multi-layer perceptron of Tensors
multinomial       draw categories by given weights; the contract of torch.multinomial
InverseCDF        the table behind it: a draw is a binary search, O(log K)
AliasTable        another table: a draw is one look-up, O(1)
chi_square        do these counts fit these probabilities?
================= ==========================================================================================

Three rooms, to be read in this order: ``engine`` computes with NumPy, and nothing of torch is in it; ``graph`` shows
what it remembers; ``sampling`` takes and returns torch's tensors.
"""

from .engine import (
    ELEMENTWISE,
    MLP,
    Node,
    Scalar,
    Tensor,
    cross_entropy,
    grad,
    no_grad,
    topological_order,
)
from .graph import draw_graph, to_dot
from .sampling import AliasTable, InverseCDF, chi_square, multinomial

__all__ = [
    "ELEMENTWISE",
    "MLP",
    "AliasTable",
    "InverseCDF",
    "Node",
    "Scalar",
    "Tensor",
    "chi_square",
    "cross_entropy",
    "draw_graph",
    "grad",
    "multinomial",
    "no_grad",
    "to_dot",
    "topological_order",
]
