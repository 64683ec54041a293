"""A table as a dataset, batches of it, and its target cut into classes of equal size.

===================== ==============================================================================================
name                  what it does
===================== ==============================================================================================
TabularDataset        a table from a file, a DataFrame or an array: features (N, F) and a target (N)
Standardiser          mean 0 and deviation 1, with the training rows' statistics; blanks become 0, the mean
DataLoader            batches, in order or shuffled, again each epoch
train_test_loaders    the three together: split, standardise, batch
folds                 the rows in k parts, each of which is the test once
quantile              the value below which a given share of the numbers lies; torch.quantile from scratch
quantile_labels       the target as n classes of equal size: deciles for n = 10, percentiles for n = 100
QuantileEncoding      each feature as its position among its own quantiles
DropNormMLP           a multi-layer perceptron with DropNorm
OrdinalHead           one score and ordered thresholds: classes that know that 4 lies between 3 and 5
===================== ==============================================================================================

Symbols: N rows, F features, C classes, Q quantiles. What is learned from data (means, deviations, edges of classes) is
learned from training rows only: what the test rows say about themselves is not known beforehand.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels.ops.drop_norm import DropNorm

__all__ = [
    "DataLoader",
    "DropNormMLP",
    "OrdinalHead",
    "QuantileEncoding",
    "QuantileLabels",
    "Standardiser",
    "TabularDataset",
    "class_values",
    "folds",
    "quantile",
    "quantile_labels",
    "train_test_loaders",
]

BLANKS = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})  # what a missing value may look like, in any case
MISSING = ("mean", "drop", "error")


# ---------------------------------------------------------------------------------------------------------- the table


class TabularDataset:
    """A table of numbers: features x (N, F) and a target y (N). A dataset in torch's sense: len() and [].

    Missing values (an empty cell; NA, N/A, NaN, null, None or ? in upper or lower case; None and NaN in Python):

    - a row without a target is left out: there is nothing to learn from it;
    - a missing feature is kept as NaN with ``missing="mean"``, and :class:`Standardiser` turns it into the mean of the
      training rows; with "drop" its row is left out; with "error" it is an error.

    A categorical column with the values a, b, c becomes three columns of 0 and 1, named column=a, column=b, column=c
    (one-hot). Values are compared as text and sorted; a missing one is NaN in all three, so that it becomes the shares
    of the three in the training rows.

    Args:
        source: path of a .csv, .tsv or .txt file (or with .gz) with a header, separated by what the header has most of:
            tab, semicolon or comma; or a pandas DataFrame, a mapping from names to columns, or an (N, columns) array or
            tensor, whose columns are called 0, 1, 2, ...
        target: name of the column to predict.
        features: names of the columns to predict from, in this order; all but the target by default.
        categorical: names of those among them that are categories and not quantities.
        missing: "mean", "drop" or "error".
        dtype: floating-point type of x and y.

    Attributes:
        x: (N, F) features.
        y: (N,) target.
        feature_names: F names.
        target_name: the target's.
        rows: (N,) int64, each row's number in the source, from 1: some may have been left out.

    Raises:
        ValueError: a column that does not exist, a cell that is not a finite number, a row of the wrong length, nothing
            left; with the column's name and the number of the row (1 is the first below the header; empty lines do not
            count).
        TypeError: the source is none of these, or `features` or `categorical` is one text and not a list.
        OSError: the file cannot be read.

    Example:
        >>> data = TabularDataset({"rooms": [2, 3, "?"], "town": ["a", "b", "a"], "price": [10, 20, 30]},
        ...                       target="price", categorical=["town"])
        >>> data.feature_names
        ['rooms', 'town=a', 'town=b']
        >>> data[0]
        (tensor([2., 1., 0.]), tensor(10.))
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        features: Sequence[Any] | None = None,
        *,
        categorical: Sequence[Any] = (),
        missing: str = "mean",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if missing not in MISSING:
            raise ValueError(f"missing must be one of {', '.join(MISSING)}, got {missing!r}")
        for argument, names in (("features", features), ("categorical", categorical)):
            if isinstance(names, str):  # a sequence, too, but of letters
                raise TypeError(f"{argument} must be a list of names, got the text {names!r}")
        columns = _columns(source)
        features = [name for name in columns if name != target] if features is None else list(features)
        for name in (target, *features, *categorical):
            if name not in columns:
                raise ValueError(f"there is no column {name!r}; there are {', '.join(map(str, columns))}")
        for name in categorical:
            if name not in features:
                raise ValueError(f"the categorical column {name!r} is not among the features")
        if not features:
            raise ValueError("expected at least one feature")
        self.target_name = str(target)
        self.feature_names: list[str] = []
        blocks = []
        for name in features:
            column = columns[name]
            block, names = _one_hot(name, column) if name in categorical else _numbers(name, column, dtype)
            blocks.append(block)
            self.feature_names += names
        x, y = np.concatenate(blocks, axis=1), _numbers(target, columns[target], dtype)[0][:, 0]
        kept = self._kept(x, y, missing)
        self.rows = torch.from_numpy(np.flatnonzero(kept) + 1)
        self.x = torch.tensor(x[kept], dtype=dtype)
        self.y = torch.tensor(y[kept], dtype=dtype)

    def _kept(self, x: np.ndarray, y: np.ndarray, missing: str) -> np.ndarray:
        """Which rows stay, by the rule for missing values."""
        blank = np.isnan(x)
        if missing == "error" and (blank.any() or np.isnan(y).any()):
            names = np.array([*self.feature_names, self.target_name])
            row, column = np.argwhere(np.concatenate([blank, np.isnan(y)[:, None]], axis=1))[0]
            raise ValueError(f"column {str(names[column])!r}, row {row + 1}: missing")
        kept = ~np.isnan(y) if missing == "mean" else ~(np.isnan(y) | blank.any(axis=1))
        if not kept.any():
            raise ValueError("no row is left: in each of them something is missing")
        return kept

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Features and target of one row, or of many: a number, a slice, a mask, or a tensor of row indices."""
        return self.x[index], self.y[index]

    def subset(self, indices: Tensor) -> TabularDataset:
        """The dataset with only these rows, (M,) int64 or (N,) bool."""
        part = TabularDataset.__new__(TabularDataset)
        part.target_name, part.feature_names = self.target_name, self.feature_names
        part.rows, part.x, part.y = self.rows[indices], self.x[indices], self.y[indices]
        return part

    def split(
        self, test_share: float = 0.2, generator: torch.Generator | None = None
    ) -> tuple[TabularDataset, TabularDataset]:
        """Two datasets that have every row once, at random: the training and the test set.

        Args:
            test_share: the part of the rows that the test gets, rounded; at least one row must go to either.
            generator: source of the choice; torch's global one by default.
        """
        test_rows = round(test_share * len(self))
        if not 0 < test_rows < len(self):
            raise ValueError(f"a test share of {test_share} leaves one of the parts of {len(self)} rows empty")
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order[test_rows:]), self.subset(order[:test_rows])


def _columns(source: Any) -> Mapping[Any, Sequence[Any]]:
    """The source as columns by name, all of one length."""
    if isinstance(source, (str, PathLike)):
        return _read(Path(source))
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        if source.ndim != 2:
            raise ValueError(f"expected an array of two dimensions, rows and columns, got shape {source.shape}")
        return dict(enumerate(source.T))
    if hasattr(source, "columns") and hasattr(source, "iloc"):  # a DataFrame, without importing pandas
        names = list(source.columns)
        columns = {name: source.iloc[:, place].tolist() for place, name in enumerate(names)}
        if len(columns) < len(names):
            raise ValueError(f"two columns have the same name; the names are {', '.join(map(str, names))}")
        return columns
    if isinstance(source, Mapping):
        lengths = {name: len(column) for name, column in source.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns must be of one length, they have {lengths}")
        return source
    raise TypeError(f"source must be a path, a DataFrame, a mapping or an array, got {type(source).__name__}")


def _read(path: Path) -> dict[str, list[str]]:
    """The columns of a separated text file, as text."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        separator = max("\t;,", key=header.count)
        file.seek(0)
        rows = [row for row in csv.reader(file, delimiter=separator) if row]
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header and at least one row, found {len(rows)} rows")
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns have the same name; the names are {', '.join(names)}")
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(names):
            raise ValueError(f"{path}: row {number} has {len(row)} cells, the header has {len(names)}")
    return {name: list(column) for name, column in zip(names, zip(*rows[1:], strict=True), strict=True)}


def _is_blank(value: Any) -> bool:
    """Whether a cell counts as missing."""
    return str(value).strip().lower() in BLANKS or str(value) in ("<NA>", "NaT")


def _numbers(name: Any, column: Sequence[Any], dtype: torch.dtype) -> tuple[np.ndarray, list[str]]:
    """A column as (N, 1) float64, NaN where it is blank; and its name."""
    values = np.empty((len(column), 1))
    for row, cell in enumerate(column):
        values[row, 0] = math.nan if _is_blank(cell) else _number(name, row, cell)
    too_large = np.flatnonzero(np.abs(values) > torch.finfo(dtype).max)
    if len(too_large):
        row = too_large[0]
        raise ValueError(f"column {str(name)!r}, row {row + 1}: {str(column[row])!r} is too large for {dtype}")
    return values, [str(name)]


def _number(name: Any, row: int, cell: Any) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.nan
    except OverflowError:  # an int of more than 308 digits
        value = math.inf
    if math.isfinite(value) and "_" not in str(cell):  # Python would read 1_000
        return value
    hint = "" if isinstance(value, float) and math.isinf(value) else "; name it in categorical, or leave the column out"
    raise ValueError(f"column {str(name)!r}, row {row + 1}: {str(cell)!r} is not a finite number{hint}")


def _one_hot(name: Any, column: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """A column of categories as (N, categories) of 0 and 1, NaN where it is blank; and the new columns' names."""
    texts = [None if _is_blank(cell) else str(cell).strip() for cell in column]
    categories = sorted({text for text in texts if text is not None})
    if not categories:
        raise ValueError(f"the categorical column {str(name)!r} has no values")
    place = {text: number for number, text in enumerate(categories)}
    values = np.zeros((len(texts), len(categories)))
    for row, text in enumerate(texts):
        if text is None:
            values[row] = math.nan
        else:
            values[row, place[text]] = 1
    return values, [f"{name}={category}" for category in categories]


# ----------------------------------------------------------------------------------------------------------- batches


class Standardiser:
    """Shifts and scales each feature to mean 0 and deviation 1 over the rows it was made with: the training rows.

    (x - mean) / deviation, and 0 where x is missing (NaN), which is the mean. A feature that is the same in all rows is
    shifted only, and one that is missing in all rows becomes 0.

    Args:
        x: (N, F) features of the training rows.

    Attributes:
        mean, deviation: (F,) over the rows where the feature is there; the deviation is the biased one.

    Example:
        >>> standardise = Standardiser(torch.tensor([[1.0], [3.0]]))
        >>> standardise(torch.tensor([[5.0], [float("nan")]])).tolist()
        [[3.0], [0.0]]
    """

    def __init__(self, x: Tensor) -> None:
        there = ~x.isnan()
        count = there.sum(dim=0).clamp_min(1)
        exact = x.double().nan_to_num(nan=0.0)
        mean = exact.sum(dim=0) / count
        variance = (there * (exact - mean) ** 2).sum(dim=0) / count
        deviation = torch.where(variance.sqrt() > 1e-7 * mean.abs(), variance.sqrt(), 1.0)  # rounding is no spread
        self.mean, self.deviation = mean.to(x.dtype), deviation.to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The features x (N, F), standardised."""
        return torch.where(x.isnan(), 0.0, (x - self.mean) / self.deviation)


class DataLoader:
    """Batches of a dataset. Each ``for`` over it is one epoch, and with `shuffle` each epoch has its own order.

    Args:
        dataset: has a length, and answers dataset[indices] with (x, y) for a tensor of indices, as
            :class:`TabularDataset` and torch.utils.data.TensorDataset do.
        batch_size: rows in a batch.
        shuffle: a new random order each epoch.
        drop_last: leave an incomplete last batch out.
        generator: source of the order; torch's global one by default.
        standardise: applied to x of every batch; a :class:`Standardiser` of the training rows, for test batches too.

    Raises:
        ValueError: batch_size is not a whole number of at least 1.

    Example:
        >>> dataset = torch.utils.data.TensorDataset(torch.arange(5.0)[:, None], torch.arange(5))
        >>> loader = DataLoader(dataset, batch_size=2)
        >>> [y.tolist() for x, y in loader], len(loader)
        ([[0, 1], [2, 3], [4]], 3)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 32,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        standardise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not _is_int(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size should be a positive integer value, but got batch_size={batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = generator
        self.standardise = standardise

    def __len__(self) -> int:
        """How many batches an epoch has."""
        rows = len(self.dataset)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = len(self.dataset)
        order = torch.randperm(rows, generator=self.generator) if self.shuffle else torch.arange(rows)
        for batch in range(len(self)):
            x, y = self.dataset[order[batch * self.batch_size : (batch + 1) * self.batch_size]]
            yield (self.standardise(x) if self.standardise else x), y


def train_test_loaders(
    dataset: TabularDataset, test_share: float = 0.2, batch_size: int = 32, generator: torch.Generator | None = None
) -> tuple[DataLoader, DataLoader]:
    """Split, standardise with the training rows' statistics, and batch: a shuffled and an ordered loader.

    Args:
        dataset: the whole table.
        test_share: the part of the rows that the test gets.
        batch_size: rows in a batch.
        generator: source of the split and of the order; torch's global one by default.

    Returns:
        The training set's loader, shuffled, and the test set's.

    Example:
        >>> train, test = train_test_loaders(TabularDataset(torch.rand(100, 4), target=3))
        >>> len(train.dataset), len(test.dataset)
        (80, 20)
    """
    train, test = dataset.split(test_share, generator)
    standardise = Standardiser(train.x)
    return (
        DataLoader(train, batch_size, shuffle=True, generator=generator, standardise=standardise),
        DataLoader(test, batch_size, standardise=standardise),
    )


def folds(rows: int, k: int = 5, generator: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
    """k-fold cross-validation: the rows in k random parts of nearly equal size, each of which is the test once.

    Args:
        rows: N.
        k: number of parts, 2 to N.
        generator: source of the choice; torch's global one by default.

    Returns:
        k pairs of int64 indices, of training and of test rows.

    Example:
        >>> [(len(train), len(test)) for train, test in folds(10, 3)]
        [(6, 4), (7, 3), (7, 3)]
    """
    if not 2 <= k <= rows:
        raise ValueError(f"k must lie in 2..{rows}, the number of rows, got {k}")
    parts = torch.randperm(rows, generator=generator).tensor_split(k)
    return [(torch.cat([*parts[:number], *parts[number + 1 :]]), part) for number, part in enumerate(parts)]


# --------------------------------------------------------------------------------------------------------- quantiles

INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")


def quantile(
    input: Tensor, q: float | Tensor, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    """The q-quantile: the value at rank q * (n - 1) of the n sorted numbers, the smallest having rank 0.

    A rank r between two whole numbers, l below and h above it, with the values v_l and v_h:
    linear v_l + (r - l) (v_h - v_l); lower v_l; higher v_h; midpoint (v_l + v_h) / 2; nearest v at r, rounded (half to
    even). A NaN among the numbers makes the answer NaN: nobody knows its rank.

    Args:
        input: float32 or float64 tensor of any shape.
        q: a number or a (Q) tensor, of input's dtype, in [0, 1].
        dim: along which; None takes all numbers.
        keepdim: keep the dimension, with size 1.
        interpolation: "linear", "lower", "higher", "midpoint" or "nearest".

    Returns:
        input's shape without dim, with Q in front where q is a tensor of one dimension. Equal to torch.quantile's bit
        for bit, also for more than 2^24 numbers, which torch refuses.

    Raises:
        RuntimeError, IndexError: where torch.quantile raises it, with its text.
        TypeError: input is not a tensor, q neither a number nor a tensor, or dim neither an int nor None.

    Source:
        Hyndman and Fan, Sample quantiles in statistical packages, 1996 (definition 7).

    Example:
        >>> quantile(torch.tensor([1.0, 2.0, 4.0]), 0.75)
        tensor(3.)
    """
    ranks_of = _checked_q(input, q, dim, interpolation)
    values = input.reshape(-1) if dim is None or input.dim() == 0 else input.movedim(dim, -1)
    n = values.shape[-1]
    rank = (ranks_of if n <= 2**24 else ranks_of.double()) * (n - 1)  # float32 counts to 2^24
    result = _at_rank(values.sort(dim=-1).values, rank, interpolation)  # (..., Q)
    result = torch.where(values.isnan().any(dim=-1, keepdim=True), torch.nan, result).movedim(-1, 0)
    if keepdim and dim is None:
        result = result.reshape(-1, *[1] * input.dim())
    elif keepdim and dim is not None and input.dim():
        result = result.unsqueeze(1 + dim % input.dim())
    return result if isinstance(q, Tensor) and q.dim() == 1 else result.squeeze(0)


def _at_rank(sorted_values: Tensor, rank: Tensor, interpolation: str) -> Tensor:
    """The values (..., Q) at the ranks (Q) of the numbers (..., n), which are sorted."""
    round_ = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}.get(interpolation)
    if round_:
        return sorted_values[..., round_(rank).long()]
    below, above = rank.floor(), rank.ceil()
    weight = torch.full_like(rank, 0.5) if interpolation == "midpoint" else rank - below
    return torch.lerp(
        sorted_values[..., below.long()], sorted_values[..., above.long()], weight.to(sorted_values.dtype)
    )


def _checked_q(input: Tensor, q: float | Tensor, dim: int | None, interpolation: str) -> Tensor:
    """q as a tensor (Q) of input's dtype, after torch.quantile's checks, in torch's order."""
    for name, value, right, expected in (
        ("input", input, isinstance(input, Tensor), "a tensor"),
        ("q", q, isinstance(q, Tensor) or _is_real(q), "a number or a tensor"),
        ("dim", dim, dim is None or _is_int(dim), "an int or None"),
    ):
        if not right:
            raise TypeError(f"quantile(): {name} must be {expected}, got {type(value).__name__}")
    if not isinstance(q, Tensor) and not 0 <= q <= 1:
        raise RuntimeError(f"quantile() q must be in the range [0, 1] but got {q:g}")
    if interpolation not in INTERPOLATIONS:
        raise RuntimeError(
            "quantile() interpolation must be one of linear, lower, higher, midpoint or nearest, but got "
            f"{interpolation}"
        )
    if input.numel() == 0:
        raise RuntimeError("quantile() input tensor must be non-empty")
    if isinstance(q, Tensor) and q.dim() > 1:
        raise RuntimeError("quantile() q must be a scalar or 1D tensor")
    if input.dtype not in (torch.float32, torch.float64):
        raise RuntimeError("quantile() input tensor must be either float or double dtype")
    if isinstance(q, Tensor) and q.dtype != input.dtype:
        raise RuntimeError("quantile() q tensor must be same dtype as the input tensor")
    if isinstance(q, Tensor) and q.device != input.device:
        raise RuntimeError("quantile() q tensor must be on the same device as the input tensor")
    last = max(1, input.dim()) - 1
    if dim is not None and not -last - 1 <= dim <= last:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-last - 1}, {last}], but got {dim})")
    if not isinstance(q, Tensor):
        return torch.tensor([q], dtype=input.dtype, device=input.device)
    if q.device.type == "cpu" and not ((q >= 0) & (q <= 1)).all():  # as torch: elsewhere the check would wait
        raise RuntimeError("quantile() q values must be in the range [0, 1]")
    return q.reshape(-1)


def _is_real(value: Any) -> bool:
    return _is_int(value) or isinstance(value, (float, np.floating))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------- quantiles as labels


class QuantileLabels(NamedTuple):
    """A target as classes.

    Attributes:
        labels: (N,) int64, 0 to classes - 1.
        edges: (classes - 1,) increasing; class c holds edges[c-1] < y <= edges[c].
        classes: how many remain after tied edges were merged.
    """

    labels: Tensor
    edges: Tensor
    classes: int


def quantile_labels(y: Tensor, n: int, train: Tensor | None = None) -> QuantileLabels:
    """Cut a target into n classes that hold equally many training rows: deciles for n = 10, percentiles for n = 100.

    The edges are the quantiles 1/n, 2/n, ..., (n-1)/n of the training rows' targets, and class c holds
    edges[c-1] < y <= edges[c]; the first and the last class are open, so that every y has a class.

    Where many rows have one target, or there are fewer rows than classes, some of these classes would hold no training
    row. Each of them is merged with its neighbour: its edge goes. What remains is reported as `classes`, and every
    class has at least one training row.

    Args:
        y: (N,) float32 or float64 targets.
        n: how many classes are wanted, at least 1.
        train: which rows the edges come from, (M,) int64 or (N,) bool; None: all. The others are labelled only.

    Returns:
        :class:`QuantileLabels`: labels (N,), edges (classes - 1,), and the number of classes.

    Raises:
        ValueError: n is not a whole number of at least 1, y is not (N,) of float32 or float64, a target is not finite,
            or there is no training row.

    Example:
        >>> quantile_labels(torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 4.0]), n=4)
        QuantileLabels(labels=tensor([0, 0, 0, 0, 0, 0, 1, 1]), edges=tensor([2.]), classes=2)
    """
    if not _is_int(n) or n < 1:
        raise ValueError(f"n must be a whole number of at least 1, got {n}")
    if y.dim() != 1 or y.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"y must be float32 or float64 of one dimension, got {y.dtype} of shape {tuple(y.shape)}")
    if not y.isfinite().all():
        row = int((~y.isfinite()).nonzero()[0])
        raise ValueError(f"y[{row}] is {y[row].item()}; expected finite targets")
    known = y if train is None else y[train]
    if len(known) == 0:
        raise ValueError("expected at least one training row, got none")
    wanted = torch.arange(1, n, dtype=y.dtype, device=y.device) / n
    edges = quantile(known, wanted).unique() if n > 1 else y.new_empty(0)
    occupied = torch.bucketize(known, edges).unique()  # bucketize counts the edges below y
    edges = edges[occupied[:-1]]
    return QuantileLabels(torch.bucketize(y, edges), edges, len(edges) + 1)


def class_values(y: Tensor, labels: Tensor, classes: int) -> Tensor:
    """One target for each class, the median of its rows: the guess that makes the mean absolute error smallest.

    Args:
        y: (N,) targets of the training rows.
        labels: (N,) their classes.
        classes: C; each has at least one row.

    Returns:
        (C,) medians, in the target's unit.
    """
    return torch.stack([quantile(y[labels == c], 0.5) for c in range(classes)])


# --------------------------------------------------------------------------------------------------------------- nets


class QuantileEncoding(nn.Module):
    """Each feature as its position among its own quantiles (piecewise linear encoding).

    A feature with the edges e_0 < e_1 < ... < e_B, quantiles of the training rows, becomes B numbers
    clamp((x - e_{b-1}) / (e_b - e_{b-1}), 0, 1): a thermometer. A linear layer above it can be any function that is
    linear between the edges; where data are dense, edges are dense. Tied edges are merged; a feature with two
    values becomes one number.

    Args:
        x: (N, F) training rows, without NaN.
        bins: largest number of numbers for each feature.

    Attributes:
        width: how many numbers come out.

    Source:
        Gorishniy, Rubachev, Babenko, On embeddings for numerical features in tabular deep learning, 2022,
        arXiv:2203.05556.

    Example:
        >>> encode = QuantileEncoding(torch.tensor([[0.0], [1.0], [3.0]]), bins=2)
        >>> encode(torch.tensor([[2.0]])).tolist()
        [[1.0, 0.5]]
    """

    feature: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, x: Tensor, bins: int = 16) -> None:
        super().__init__()
        shares = torch.linspace(0, 1, bins + 1, dtype=x.dtype, device=x.device)
        edges = [quantile(column, shares).unique() for column in x.T]
        counts = torch.tensor([len(e) - 1 for e in edges], device=x.device)
        self.register_buffer("feature", torch.arange(len(edges), device=x.device).repeat_interleave(counts))
        self.register_buffer("low", torch.cat([e[:-1] for e in edges]))
        self.register_buffer("high", torch.cat([e[1:] for e in edges]))
        self.width = len(self.low)

    def forward(self, x: Tensor) -> Tensor:
        """The features (N, F) as (N, width) numbers of 0..1."""
        return ((x[:, self.feature] - self.low) / (self.high - self.low)).clamp(0, 1)


class DropNormMLP(nn.Module):
    """A multi-layer perceptron with DropNorm before each ReLU: normalised, and while training thinned out.

    Args:
        features: F.
        classes: C.
        hidden: width of both hidden layers.
        p: the part of the hidden features that each batch does without.

    Example:
        >>> DropNormMLP(features=8, classes=10)(torch.rand(5, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, features: int, classes: int, hidden: int = 128, p: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            DropNorm(hidden, p),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            DropNorm(hidden, p),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, C) of the rows x (N, F)."""
        return self.layers(x)


class OrdinalHead(nn.Module):
    """Classes in a row: one score that passes ordered thresholds one by one (the cumulative link model).

    P(class > c) = sigmoid(k (score - t_c)) with t_0 < t_1 < ... < t_{C-2}, so the probability of class c is
    p_c = sigmoid(a_c) - sigmoid(a_{c-1}) with a_c = k (t_c - score). The score is linear in the features, k > 0 is
    learned, and the thresholds are ordered because each is the one before plus a softplus. Computed without
    cancellation: for a > b, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)).

    Args:
        features: F: of the data, or of the last hidden layer of a network.
        classes: C, at least 2.

    Raises:
        ValueError: fewer than 2 classes.

    Source:
        McCullagh, Regression models for ordinal data, 1980.

    Example:
        >>> log_p = OrdinalHead(features=8, classes=10)(torch.rand(5, 8))     # goes into cross_entropy as scores do
        >>> log_p.exp().sum(dim=1).allclose(torch.ones(5))
        True
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        start = torch.logit(torch.arange(1, classes) / classes)  # at score 0, every class is equally likely
        self.score = nn.Linear(features, 1, bias=False)  # a bias would only shift all thresholds
        self.first = nn.Parameter(start[:1].clone())
        self.steps = nn.Parameter(start.diff().expm1().log())  # the inverse of softplus
        self.log_sharpness = nn.Parameter(torch.zeros(()))

    @property
    def thresholds(self) -> Tensor:
        """(C - 1,) increasing."""
        return torch.cat([self.first, self.first + F.softplus(self.steps).cumsum(dim=0)])

    def forward(self, x: Tensor) -> Tensor:
        """The logarithms (N, C) of the classes' probabilities for the features x (N, F)."""
        sharpness = self.log_sharpness.exp()
        a = sharpness * (self.thresholds - self.score(x))  # (N, C-1)
        gap = sharpness * F.softplus(self.steps)  # (C-2), a_c - a_{c-1}
        below = F.pad(F.logsigmoid(a), (0, 1))  # log P(class <= c); the last is sure to be
        above = F.pad(F.logsigmoid(-a), (1, 0))  # log P(class > c - 1); nothing is below the first
        return below + above + F.pad(torch.log(-torch.expm1(-gap)), (1, 1))
