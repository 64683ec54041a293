"""The engine: values that remember what they were computed from, and the walk back.

An operation is a line of :data:`ELEMENTWISE` or a method of :class:`Tensor`: how to compute y, and for each operand x
the pullback, which turns g = dL/dy into dL/dx. Pullbacks are made of the operations themselves. Therefore the result
of differentiating is a graph like any other, and can be differentiated again.
"""

from __future__ import annotations

import contextlib
import itertools
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Self

Axis = int | tuple[int, ...] | None
Pullback = Callable[..., Any]  # (g, y, *operands) -> the operand's share of the gradient
AnyNode = TypeVar("AnyNode", bound="Node")

# ---------------------------------------------------------------------------------------------- recording, or not

_recording: ContextVar[bool] = ContextVar("recording", default=True)


@contextlib.contextmanager
def _record(wanted: bool) -> Iterator[None]:
    """Remember operations in this block, or do not."""
    token = _recording.set(wanted)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """A block whose results do not remember what they were made of; for this thread, like torch.no_grad.

    Example:
        >>> x = Scalar(3.0)
        >>> with no_grad():
        ...     y = x * x
        >>> y.requires_grad
        False
    """
    return _record(False)


# ------------------------------------------------------------------------------------------ elementwise operations


def _vanishing_power(a: Node, b: Node) -> Any:
    """1 where b * a ** (b - 1) would be 0 * 0 ** -1; the derivative of a ** 0 is 0 there too."""
    return (a.value == 0) & (b.value == 0)


def _silenced_logarithm(a: Node, b: Node) -> Any:
    """1 where a ** b * log(a) would be 0 * log(0); its limit is 0."""
    return (a.value == 0) & (b.value >= 0)


# Name: how to compute y, and the pullback of each operand: g = dL/dy times the local derivative dy/dx.
ELEMENTWISE: dict[str, tuple[Callable[..., Any], Pullback] | tuple[Callable[..., Any], Pullback, Pullback]] = {
    "+": (np.add, lambda g, y, a, b: g, lambda g, y, a, b: g),
    "-": (np.subtract, lambda g, y, a, b: g, lambda g, y, a, b: -g),
    "*": (np.multiply, lambda g, y, a, b: g * b, lambda g, y, a, b: g * a),
    "/": (np.divide, lambda g, y, a, b: g / b, lambda g, y, a, b: -(g * y / b)),
    "**": (
        np.power,
        lambda g, y, a, b: g * (b * a ** (b - 1 + _vanishing_power(a, b))),
        lambda g, y, a, b: g * (y * (a + _silenced_logarithm(a, b)).log()),
    ),
    "neg": (np.negative, lambda g, y, x: -g),
    "exp": (np.exp, lambda g, y, x: g * y),
    "log": (np.log, lambda g, y, x: g / x),
    "sin": (np.sin, lambda g, y, x: g * x.cos()),
    "cos": (np.cos, lambda g, y, x: -(g * x.sin())),
    "tanh": (np.tanh, lambda g, y, x: g * (1 - y * y)),
    "relu": (lambda x: np.maximum(x, 0), lambda g, y, x: g * (x.value > 0)),
}


# ------------------------------------------------------------------------------------------------- a node of the graph


class Node:
    """A value, and what it was computed from: what Scalar and Tensor have in common.

    Attributes:
        value: the number or array. A leaf's may be assigned; a result's never changes.
        parents: the nodes it was computed from; empty for a leaf.
        pullbacks: for each parent, (g, self, *parents) -> g * d self / d parent.
        operation: name of the operation; "" for a leaf.
        requires_grad: whether derivatives by it, or through it, are wanted.
        grad: of a leaf, what backward() has added up so far; None before.
        label: name for the drawing.
    """

    __slots__ = (
        "_value",
        "_version",
        "_versions",
        "grad",
        "label",
        "operation",
        "parents",
        "pullbacks",
        "requires_grad",
    )
    __array_ufunc__ = None  # array + node is node.__radd__(array), not an array of nodes

    _value: Any
    _version: int  # how often the value was assigned
    _versions: tuple[int, ...]  # the parents' versions, when they were used
    grad: Self | None
    label: str
    operation: str
    parents: tuple[Self, ...]
    pullbacks: tuple[Pullback, ...]
    requires_grad: bool

    def __init__(self, value: Any, requires_grad: bool = True, label: str = "") -> None:
        self._begin(self._converted(value), requires_grad, label)

    def _begin(self, value: Any, requires_grad: bool, label: str = "") -> None:
        """Begin as a leaf; `value` already has the right type."""
        self._value, self._version, self._versions = value, 0, ()
        self.parents, self.pullbacks, self.operation = (), (), ""
        self.requires_grad, self.grad, self.label = requires_grad, None, label

    @classmethod
    def _fixed(cls, value: Any) -> Self:
        """A constant; `value` already has the right type."""
        node = cls.__new__(cls)
        node._begin(value, requires_grad=False)
        return node

    @classmethod
    def _apply(
        cls, operation: str, function: Callable[..., Any], parents: tuple[Self, ...], *pullbacks: Pullback
    ) -> Self:
        """The node of function(*values of the parents). This is where the graph is made."""
        with np.errstate(all="ignore"):  # inf and nan are answers
            node = cls._fixed(cls._owned(function(*(parent._value for parent in parents))))
        if _recording.get() and any(parent.requires_grad for parent in parents):
            node.parents, node.pullbacks, node.operation, node.requires_grad = parents, pullbacks, operation, True
            node._versions = tuple(parent._version for parent in parents)
        return node

    @property
    def value(self) -> Any:
        """The number or array."""
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        if self.parents:
            raise AttributeError(f"only a leaf's value can be assigned, this is the result of '{self.operation}'")
        new = self._converted(value)
        if np.shape(new) != np.shape(self._value):
            raise ValueError(f"the new value must have the shape {np.shape(self._value)}, got {np.shape(new)}")
        self._value = new
        self._version += 1

    def backward(self, gradient: Any = None, create_graph: bool = False) -> None:
        """Add d self / d leaf to the `grad` of every leaf that requires one.

        With L = sum(gradient * self), every leaf x gets x.grad + dL/dx: gradients accumulate, as torch's do. The graph
        stays; it may be used again.

        Args:
            gradient: of the shape of self; 1 by default, if self is one number.
            create_graph: make `grad` part of a graph, so that it can be differentiated again.

        Raises:
            RuntimeError: self does not depend on anything that requires a gradient; self has several elements and no
                gradient was given; a leaf's value was assigned after it was used.

        Example:
            >>> x = Scalar(3.0)
            >>> (x * x).backward()
            >>> x.grad
            Scalar(6.0)
        """
        if not self.requires_grad:
            raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
        leaves = [node for node in topological_order(self) if node.requires_grad and not node.parents]
        gradients = grad(self, leaves, None if gradient is None else [gradient], create_graph)
        with _record(create_graph):
            for leaf, new in zip(leaves, gradients, strict=True):
                leaf.grad = new if leaf.grad is None else leaf.grad + new

    # What Scalar and Tensor answer differently.

    @classmethod
    def _owned(cls, value: Any) -> Any:
        """A computed value in the type in which nodes keep it."""
        raise NotImplementedError

    def _converted(self, value: Any) -> Any:
        """A value that is given, checked and copied."""
        raise NotImplementedError

    def _constant(self, other: Any) -> Self | None:
        """`other` as an operand beside self; None if it cannot be one."""
        raise NotImplementedError

    def _ones(self) -> Self:
        """The gradient of self by itself."""
        raise NotImplementedError

    def _fit(self, gradient: Self) -> Self:
        """The gradient for self, from that of a result to which self was broadcast."""
        raise NotImplementedError

    # The operators. All of them are lines of ELEMENTWISE.

    def _elementwise(self, operation: str, *others: Any, swapped: bool = False) -> Self:
        operands = [self, *map(self._constant, others)]
        if None in operands:
            return NotImplemented
        function, *pullbacks = ELEMENTWISE[operation]
        return self._apply(operation, function, tuple(operands[::-1] if swapped else operands), *pullbacks)  # type: ignore[arg-type]

    def __add__(self, other: Any) -> Self:
        return self._elementwise("+", other)

    def __radd__(self, other: Any) -> Self:
        return self._elementwise("+", other, swapped=True)

    def __sub__(self, other: Any) -> Self:
        return self._elementwise("-", other)

    def __rsub__(self, other: Any) -> Self:
        return self._elementwise("-", other, swapped=True)

    def __mul__(self, other: Any) -> Self:
        return self._elementwise("*", other)

    def __rmul__(self, other: Any) -> Self:
        return self._elementwise("*", other, swapped=True)

    def __truediv__(self, other: Any) -> Self:
        return self._elementwise("/", other)

    def __rtruediv__(self, other: Any) -> Self:
        return self._elementwise("/", other, swapped=True)

    def __pow__(self, other: Any) -> Self:
        return self._elementwise("**", other)

    def __rpow__(self, other: Any) -> Self:
        return self._elementwise("**", other, swapped=True)

    def __neg__(self) -> Self:
        return self._elementwise("neg")

    def exp(self) -> Self:
        """e to the power of self."""
        return self._elementwise("exp")

    def log(self) -> Self:
        """The natural logarithm."""
        return self._elementwise("log")

    def sin(self) -> Self:
        """The sine."""
        return self._elementwise("sin")

    def cos(self) -> Self:
        """The cosine."""
        return self._elementwise("cos")

    def tanh(self) -> Self:
        """The hyperbolic tangent."""
        return self._elementwise("tanh")

    def relu(self) -> Self:
        """max(0, self); its derivative at 0 is taken to be 0."""
        return self._elementwise("relu")


# --------------------------------------------------------------------------------------------------- differentiation


def topological_order(*outputs: AnyNode) -> list[AnyNode]:
    """All nodes that the outputs were made of, every node after its parents.

    Depth first, with a stack of our own in the place of recursion: the length of a chain is limited by memory only.
    A node is met twice: when it is met first, it is put back below its parents; when it comes up again, all its
    parents are in the list.

    Args:
        *outputs: any nodes.

    Returns:
        Every node once.

    Example:
        >>> x = Scalar(3.0)
        >>> [node.operation for node in topological_order((x * x).exp())]
        ['', '*', 'exp']
    """
    order: list[AnyNode] = []
    met: set[AnyNode] = set()
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, parents_are_listed = stack.pop()
        if parents_are_listed:
            order.append(node)
        elif node not in met:
            met.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in reversed(node.parents))
    return order


def grad(
    outputs: Node | Sequence[Node],
    inputs: Node | Sequence[Node],
    grad_outputs: Sequence[Any] | None = None,
    create_graph: bool = False,
) -> tuple[Any, ...]:
    """The derivatives of the outputs, added up, by each input; no `grad` is touched.

    With L = sum_i sum(grad_outputs_i * outputs_i), returns dL/dx for every input x. The chain rule, for a node y with
    children c (those computed from y)::

        dL/dy = sum_c dL/dc * dc/dy

    so a node's derivative is complete when all its children are done: the graph is walked in topological order,
    backwards, and every node hands to each parent its share (its pullback).

    Args:
        outputs: a node, or several.
        inputs: a node, or several; also results in the middle of the graph.
        grad_outputs: one for each output, of its shape; None for 1, for outputs of one number.
        create_graph: make the answer part of a graph, so that it can be differentiated again.

    Returns:
        One node for each input, of its shape; zeros for an input that the outputs do not depend on.

    Raises:
        RuntimeError: an input does not require a gradient; an output has several elements and no grad_output; a
            leaf's value was assigned after it was used.
        ValueError: not one grad_output for each output, or of another shape.

    Source:
        torch.autograd.grad; Griewank and Walther, Evaluating Derivatives (2008), chapter 3.

    Example:
        >>> x = Scalar(2.0)
        >>> (slope,) = grad(x**3, x, create_graph=True)   # 3 x^2
        >>> grad(slope, x)                                # 6 x
        (Scalar(12.0),)
    """
    outputs = (outputs,) if isinstance(outputs, Node) else tuple(outputs)
    inputs = (inputs,) if isinstance(inputs, Node) else tuple(inputs)
    if not all(node.requires_grad for node in inputs):
        raise RuntimeError("One of the differentiated Tensors does not require grad")
    with _record(create_graph):
        gradients = _pull_back(outputs, _seeds(outputs, grad_outputs), set(inputs))
        return tuple(gradients[node] if node in gradients else node._ones() * 0 for node in inputs)


def _seeds(outputs: Sequence[Node], grad_outputs: Sequence[Any] | None) -> list[Node]:
    """dL/d output for every output, checked."""
    given = [None] * len(outputs) if grad_outputs is None else list(grad_outputs)
    if len(given) != len(outputs):
        raise ValueError(f"grad_outputs must have one entry for each of the {len(outputs)} outputs, got {len(given)}")
    seeds = []
    for position, (output, gradient) in enumerate(zip(outputs, given, strict=True)):
        if gradient is None and np.size(output.value) != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        seed = output._ones() if gradient is None else output._constant(gradient)
        if seed is None:
            raise TypeError(f"grad_outputs[{position}] must be a number, array or node, got {type(gradient).__name__}")
        if np.shape(seed.value) != np.shape(output.value):
            raise ValueError(
                f"grad_outputs[{position}] must have the shape {np.shape(output.value)} of its output, "
                f"got {np.shape(seed.value)}"
            )
        seeds.append(seed)
    return seeds


def _pull_back(outputs: Sequence[Node], seeds: Sequence[Node], inputs: set[Node]) -> dict[Node, Node]:
    """dL/dx for every input x that the outputs depend on."""
    order = topological_order(*outputs)
    needed: set[Node] = set()  # inputs, and what depends on them: nothing else is computed
    for node in order:
        if node in inputs or any(parent in needed for parent in node.parents):
            needed.add(node)

    gradients: dict[Node, Any] = {}
    for output, seed in zip(outputs, seeds, strict=True):
        gradients[output] = gradients[output] + seed if output in gradients else seed
    for node in reversed(order):
        if node not in needed or node not in gradients:
            continue
        gradient = gradients[node] if node in inputs else gradients.pop(node)  # complete: all children are done
        if node._versions != tuple(parent._version for parent in node.parents):
            raise RuntimeError(f"an operand of '{node.operation}' was assigned a new value after it was used")
        for parent, pullback in zip(node.parents, node.pullbacks, strict=True):
            if parent in needed:
                share = parent._fit(pullback(gradient, node, *node.parents))
                gradients[parent] = gradients[parent] + share if parent in gradients else share
    return {node: gradient for node, gradient in gradients.items() if node in inputs}


# ---------------------------------------------------------------------------------------------------------- scalars


class Scalar(Node):
    """A number in a graph: + - * / ** exp log sin cos tanh relu.

    Numbers that stand beside a Scalar in an expression are constants. Arithmetic is that of IEEE 754: 1 / 0 is inf.

    Args:
        value: a number.
        requires_grad: False for a constant.
        label: name for the drawing.

    Example:
        >>> x, y = Scalar(2.0), Scalar(3.0)
        >>> (x * y + x).backward()
        >>> x.grad, y.grad
        (Scalar(4.0), Scalar(2.0))
    """

    __slots__ = ()

    @property
    def local_derivatives(self) -> tuple[Scalar, ...]:
        """d self / d parent for every parent: what the chain rule multiplies with on this edge of the graph."""
        return tuple(pullback(self._ones(), self, *self.parents) for pullback in self.pullbacks)

    def __float__(self) -> float:
        return self._value

    def __repr__(self) -> str:
        return f"Scalar({self._value})"

    @classmethod
    def _owned(cls, value: Any) -> float:
        return float(value)

    def _converted(self, value: Any) -> float:
        if not isinstance(value, numbers.Real):
            raise TypeError(f"the value of a Scalar must be a real number, got {type(value).__name__}")
        return float(value)

    def _constant(self, other: Any) -> Scalar | None:
        if isinstance(other, Scalar):
            return other
        return Scalar._fixed(float(other)) if isinstance(other, numbers.Real) else None

    def _ones(self) -> Scalar:
        return Scalar._fixed(1.0)

    def _fit(self, gradient: Scalar) -> Scalar:
        return gradient


# ---------------------------------------------------------------------------------------------------------- tensors


class Tensor(Node):
    """An array in a graph: NumPy's arithmetic and broadcasting, with derivatives.

    What changes from numbers to arrays: the derivative of an array by an array would be a huge matrix, the Jacobian J.
    It is never built. A pullback computes the product g J straight from g, which has the shape of the result, and
    returns the shape of the operand.

    Numbers and arrays that stand beside a Tensor in an expression are constants.

    Args:
        value: array or nested lists. It is copied; whole numbers become float64, floating-point types stay.
        requires_grad: False for a constant.
        label: name for the drawing.

    Example:
        >>> x = Tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> (x * x).sum().backward()
        >>> x.grad
        Tensor([[2., 4.],
                [6., 8.]])
    """

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self._value.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._value.ndim

    @property
    def dtype(self) -> np.dtype:
        """NumPy's type of the elements."""
        return self._value.dtype

    def item(self) -> float:
        """The number in a tensor of one element."""
        return self._value.item()

    def __float__(self) -> float:
        return float(self.item())

    def __len__(self) -> int:
        return len(self._value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._value, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return repr(self._value).replace("array", "Tensor", 1).replace("\n", "\n ")

    # ------------------------------------------------------------------------------------------ shapes

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in another shape, as ints or one tuple; -1 for the size that follows from the others."""
        return self._apply("reshape", lambda x: x.reshape(_ints(shape)), (self,), lambda g, y, x: g.reshape(x.shape))

    def transpose(self, *axes: Any) -> Tensor:
        """The dimensions in the order `axes`, ints or one tuple; reversed if none are given."""
        order = _ints(axes) or tuple(range(self.ndim))[::-1]
        back = tuple(np.argsort([axis % self.ndim for axis in order]).tolist())
        return self._apply("transpose", lambda x: x.transpose(order), (self,), lambda g, y, x: g.transpose(back))

    @property
    def T(self) -> Tensor:
        """The dimensions in reverse order."""
        return self.transpose()

    def broadcast_to(self, *shape: Any) -> Tensor:
        """Stretched to a shape, ints or one tuple. The way back is a sum, done for all operations by :meth:`_fit`."""
        return self._apply("broadcast", lambda x: np.broadcast_to(x, _ints(shape)), (self,), lambda g, y, x: g)

    def astype(self, dtype: Any) -> Tensor:
        """The elements as another floating-point type. The way back is done by :meth:`_fit`."""
        return self._apply(f"{np.dtype(dtype)}", lambda x: x.astype(dtype), (self,), lambda g, y, x: g)

    def __getitem__(self, key: Any) -> Tensor:
        """Elements, as NumPy's indexing gives them: numbers, slices, arrays of indices, masks.

        The way back puts every gradient where its element was taken from; what was taken twice gets both.
        """
        return self._apply("index", lambda x: x[key], (self,), lambda g, y, x: g._scattered(key, x.shape))

    def _scattered(self, key: Any, shape: tuple[int, ...]) -> Tensor:
        """Zeros of a shape, self added at the places `key`: the transpose of indexing."""

        def scatter(x: np.ndarray) -> np.ndarray:
            result = np.zeros(shape, dtype=x.dtype)
            np.add.at(result, key, x)
            return result

        return self._apply("scatter", scatter, (self,), lambda g, y, x: g[key])

    # -------------------------------------------------------------------------------------- reductions

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The sum over one dimension, several, or all. The way back: every summand has the influence of the sum."""
        return self._apply(
            "sum",
            lambda x: x.sum(axis=axis, keepdims=keepdims),
            (self,),
            lambda g, y, x: g.reshape(_kept(x.shape, axis)).broadcast_to(x.shape),
        )

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The mean over one dimension, several, or all."""
        total = self.sum(axis, keepdims)
        return total / (self._value.size / max(1, total._value.size))

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The largest over one dimension, several, or all. Equal largest elements share the gradient equally."""

        def pullback(g: Tensor, y: Tensor, x: Tensor) -> Tensor:
            kept = _kept(x.shape, axis)
            chosen = x.value == y.value.reshape(kept)
            with np.errstate(all="ignore"):
                shares = (chosen / chosen.sum(axis=axis, keepdims=True)).astype(x.dtype)
            return g.reshape(kept).broadcast_to(x.shape) * shares

        return self._apply("max", lambda x: x.max(axis=axis, keepdims=keepdims), (self,), pullback)

    # ------------------------------------------------------------------------------------------ products

    def __matmul__(self, other: Any) -> Tensor:
        """The matrix product, as NumPy's: vectors count as a row or a column, leading dimensions broadcast.

        For Y = A B, with dL = sum_ij G_ij dY_ij and dY = dA B + A dB::

            dL/dA = G B^T          dL/dB = A^T G
        """
        operand = self._constant(other)
        return NotImplemented if operand is None else _matmul(self, operand)

    def __rmatmul__(self, other: Any) -> Tensor:
        operand = self._constant(other)
        return NotImplemented if operand is None else _matmul(operand, self)

    def log_softmax(self, axis: int = -1) -> Tensor:
        """z - log sum exp(z), along one dimension.

        The largest score is subtracted first, as a constant: the result is the same and exp() cannot overflow.
        """
        shifted = self - self._value.max(axis=axis, keepdims=True)
        return shifted - shifted.exp().sum(axis, keepdims=True).log()

    def softmax(self, axis: int = -1) -> Tensor:
        """exp(z) / sum exp(z), along one dimension."""
        return self.log_softmax(axis).exp()

    # ------------------------------------------------------------------------------- answers to Node's questions

    @classmethod
    def _owned(cls, value: Any) -> np.ndarray:
        array = np.asarray(value)
        array.flags.writeable = False  # a pullback may need it later
        return array

    def _converted(self, value: Any) -> np.ndarray:
        array = np.array(value)
        if array.dtype.kind in "biu":
            array = array.astype(np.float64)
        if array.dtype.kind != "f":
            raise TypeError(f"the value of a Tensor must be an array of real numbers, got {array.dtype}")
        return self._owned(array)

    def _constant(self, other: Any) -> Tensor | None:
        """Numbers, and arrays of whole numbers or truth values, take the type of self; arrays of floats keep theirs."""
        if isinstance(other, Tensor):
            return other
        if not isinstance(other, (numbers.Real, np.ndarray, np.bool_)):
            return None
        plain = not isinstance(other, np.ndarray) or other.dtype.kind in "biu"
        return Tensor._fixed(self._converted(np.asarray(other, dtype=self.dtype) if plain else other))

    def _ones(self) -> Tensor:
        return Tensor._fixed(self._owned(np.ones_like(self._value)))

    def _fit(self, gradient: Tensor) -> Tensor:
        """Sum a gradient over the dimensions in which self was broadcast: what was read n times has n influences."""
        extra = gradient.ndim - self.ndim
        stretched = [d + extra for d, size in enumerate(self.shape) if size == 1 and gradient.shape[d + extra] != 1]
        if extra or stretched:
            gradient = gradient.sum((*range(extra), *stretched)).reshape(self.shape)
        return gradient if gradient.dtype == self.dtype else gradient.astype(self.dtype)


def _ints(given: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes or dimensions that were given one by one, or as one tuple or list."""
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _kept(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """The shape after a reduction with keepdims=True."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = {a % len(shape) for a in axes}
    return tuple(1 if d in reduced else size for d, size in enumerate(shape))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product; vectors become matrices first, and the dimension that was added goes at the end."""
    if a.ndim == 1 and b.ndim >= 1:
        product = _matmul(a.reshape(1, -1), b)
        return product.reshape(product.shape[:-2] + product.shape[-1:]) if b.ndim > 1 else product.reshape()
    if b.ndim == 1 and a.ndim >= 1:
        product = _matmul(a, b.reshape(-1, 1))
        return product.reshape(product.shape[:-1])
    return a._apply(
        "@",
        np.matmul,
        (a, b),
        lambda g, y, a, b: _matmul(g, _last_two_swapped(b)),
        lambda g, y, a, b: _matmul(_last_two_swapped(a), g),
    )


def _last_two_swapped(x: Tensor) -> Tensor:
    return x.transpose(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)


# ---------------------------------------------------------------------------------------------------------- learning


def cross_entropy(logits: Tensor, target: np.ndarray) -> Tensor:
    """The mean softmax cross-entropy: of all rows n, the mean of -log softmax(z_n)[y_n].

    Made of the operations above. Nobody tells the engine that the gradient is (softmax(z) - onehot(y)) / N: it
    comes out.

    Args:
        logits: (N, C) scores.
        target: (N,) whole numbers in 0..C-1.

    Returns:
        () the mean loss.

    Raises:
        ValueError: shapes do not fit, or a class is out of range.
        TypeError: classes are not whole numbers.

    Example:
        >>> cross_entropy(Tensor([[0.0, 0.0]]), np.array([1])).item()
        0.6931471805599453
    """
    target = np.asarray(target)
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (N, C) and target (N,), got {logits.shape} and {target.shape}")
    if target.dtype.kind not in "iu":
        raise TypeError(f"target must hold whole numbers, got {target.dtype}")
    if target.size and not (target.min() >= 0 and target.max() < logits.shape[1]):
        raise ValueError(f"target must lie in 0..{logits.shape[1] - 1}")
    return -logits.log_softmax(axis=1)[np.arange(len(target)), target].mean()


class MLP:
    """A multi-layer perceptron of Tensors: linear maps with ReLU between them.

    Args:
        sizes: width of every layer, input and output included.
        seed: of the first weights: normal, of variance 2 / inputs (He), biases 0.

    Attributes:
        parameters: weight (inputs, outputs) and bias (outputs) of every layer, in order.

    Example::

        model = MLP([64, 32, 10])
        loss = cross_entropy(model(x), y)
        loss.backward()
        for parameter in model.parameters:
            parameter.value = parameter.value - 0.1 * parameter.grad.value
            parameter.grad = None
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.parameters: list[Tensor] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
            weight = random.normal(0, np.sqrt(2 / inputs), (inputs, outputs))
            self.parameters += [Tensor(weight, label=f"W{number}"), Tensor(np.zeros(outputs), label=f"b{number}")]

    def __call__(self, x: Any) -> Tensor:
        """Scores (N, C) of the rows x (N, F)."""
        layers = list(zip(self.parameters[::2], self.parameters[1::2], strict=True))
        for weight, bias in layers[:-1]:
            x = (x @ weight + bias).relu()
        weight, bias = layers[-1]
        return x @ weight + bias
