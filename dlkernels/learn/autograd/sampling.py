"""Random categories by given weights: the contract of torch.multinomial, two tables behind it, and a test of both."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from .._words import class_name


def multinomial(
    input: torch.Tensor, num_samples: int, replacement: bool = False, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw categories by their weights; the contract and the error texts of torch.multinomial.

    With replacement, every draw is category i with probability w_i / sum_j w_j, by inverse CDF. Without, the second
    draw is made from what the first has left, and so on; :func:`_race` does all of them at once.

    Args:
        input: (K) or (rows, K) float16, bfloat16, float32 or float64 weights, not negative; they need not sum to 1.
        num_samples: draws from each row; without replacement, at most the number of weights that are not 0.
        replacement: whether a category can be drawn more than once.
        generator: source of the random numbers; torch's global one by default.

    Returns:
        (num_samples) or (rows, num_samples) int64 categories, in the order in which they were drawn.

    Raises:
        TypeError: an argument has the wrong type.
        RuntimeError: wrong number of dimensions, dtype or number of samples; a weight is negative, infinite or nan;
            all weights of a row are 0; fewer weights that are not 0 than draws without replacement. (In the last case
            torch's kernels now return categories of probability 0; this is the error that its documentation asks for
            and that it used to raise.)

    Example:
        >>> multinomial(torch.tensor([0.0, 2.0, 1.0]), 2).sort().values
        tensor([1, 2])
    """
    _check_types(input, num_samples, replacement, generator)
    num_samples = int(num_samples)
    if input.dim() not in (1, 2):
        raise RuntimeError("prob_dist must be 1 or 2 dim")
    if not input.dtype.is_floating_point:
        got = _SCALAR_TYPES.get(input.dtype, input.dtype)
        raise RuntimeError(f"multinomial only supports floating-point dtypes for input, got: {got}")
    if num_samples <= 0:
        raise RuntimeError("cannot sample n_sample <= 0 samples")
    if not replacement and num_samples > input.shape[-1]:
        raise RuntimeError("cannot sample n_sample > prob_dist.size(-1) samples without replacement")
    if input.shape[-1] > 2**24:
        raise RuntimeError("number of categories cannot exceed 2^24")
    weights = _checked_weights(input, with_replacement=replacement and num_samples > 1)
    if replacement:
        return InverseCDF(weights).draw(num_samples, generator)
    if ((weights > 0).sum(dim=-1) < num_samples).any():
        raise RuntimeError(
            "invalid multinomial distribution (with replacement=False, not enough non-negative category to sample)"
        )
    return _race(weights, num_samples, generator)


_SCALAR_TYPES = {
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.uint16: "UInt16",
    torch.uint32: "UInt32",
    torch.uint64: "UInt64",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def _check_types(input: Any, num_samples: Any, replacement: Any, generator: Any) -> None:
    """TypeErrors in torch's words."""
    whole = isinstance(num_samples, numbers.Integral) and not isinstance(num_samples, bool)
    if isinstance(num_samples, torch.Tensor):  # torch takes a tensor of one whole number
        whole = num_samples.numel() == 1 and not (num_samples.dtype.is_floating_point or num_samples.dtype.is_complex)
    for position, name, value, right, wanted in (
        (1, "input", input, isinstance(input, torch.Tensor), "Tensor"),
        (2, "num_samples", num_samples, whole, "int"),
        (3, "replacement", replacement, isinstance(replacement, bool), "bool"),
        (0, "generator", generator, generator is None or isinstance(generator, torch.Generator), "torch.Generator"),
    ):
        if not right:
            place = f" (position {position})" if position else ""
            raise TypeError(f"multinomial(): argument '{name}'{place} must be {wanted}, not {class_name(value)}")


def _checked_weights(input: torch.Tensor, with_replacement: bool = True) -> torch.Tensor:
    """The weights as float64 outside of autograd, or torch's error; torch has two texts for two of its paths."""
    weights = input.detach().to(torch.float64)
    negative, infinite = (weights < 0).any(), (~weights.isfinite()).any()
    if not with_replacement and (negative or infinite):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    if negative or weights.isnan().any():  # nan is not >= 0 either
        raise RuntimeError("invalid multinomial distribution (encountering probability entry < 0)")
    if infinite:
        raise RuntimeError("invalid multinomial distribution (encountering probability entry = infinity or NaN)")
    if (weights.sum(dim=-1) <= 0).any():
        raise RuntimeError("invalid multinomial distribution (sum of probabilities <= 0)")
    return weights


def _race(weights: torch.Tensor, num_samples: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw without replacement: let all categories race, and take the first to arrive.

    Category i arrives at time T_i = E_i / w_i, with E_i exponential, so P(T_i > t) = exp(-w_i t). The first one is i
    with probability

        integral of w_i exp(-w_i t) * prod_{j != i} exp(-w_j t) dt = w_i / sum_j w_j

    An exponential time has no memory: for those still on their way, the rest of the race is a new race. So the second
    to arrive is a draw from what is left, and so on. In logarithms, since E_i / w_i can overflow.

    Args:
        weights: (..., K) float64.
        num_samples: at most the number of positive weights in each row.
        generator: of the random numbers.

    Returns:
        (..., num_samples) int64, in the order of arrival.

    Source:
        Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006).
    """
    exponential = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device).exponential_(
        generator=generator
    )
    arrival = exponential.log() - weights.log()
    return arrival.topk(num_samples, dim=-1, largest=False, sorted=True).indices


class InverseCDF:
    """Draw with replacement by inverting the cumulative distribution: a binary search for each draw, O(log K).

    Lay the weights end to end on a line of length 1; F_i is where category i ends. Throw u uniformly on [0, 1) and
    take the category it falls on, the first with F_i > u. A category of weight 0 has no length: F_i = F_{i-1}, and
    it is never the first.

    Args:
        weights: (K) or (rows, K) floating-point weights, not negative; a row sums to more than 0.

    Raises:
        RuntimeError: a weight is negative, infinite or nan, or all weights of a row are 0.

    Example:
        >>> InverseCDF(torch.tensor([0.0, 1.0])).draw(3)
        tensor([1, 1, 1])
    """

    def __init__(self, weights: torch.Tensor) -> None:
        weights = _checked_weights(weights)
        ends = weights.cumsum(dim=-1)
        # Where sums are made in parallel, rounding could give a weight of 0 some length. So its end becomes F_{i-1}.
        ends = ends.masked_fill(weights == 0, 0).cummax(dim=-1).values
        self.ends = ends / ends[..., -1:]  # the last end is 1, exactly: no u is beyond it

    def draw(self, num_samples: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Returns (num_samples) or (rows, num_samples) int64 categories."""
        shape = (*self.ends.shape[:-1], num_samples)
        u = torch.rand(shape, dtype=torch.float64, device=self.ends.device, generator=generator)
        return torch.searchsorted(self.ends, u, right=True)


class AliasTable:
    """Draw with replacement by one look-up, O(1), however many categories there are.

    Scale the K weights to mean 1 and pour each into its own bucket of size 1. Some overflow, some stay partly empty.
    Fill the empty parts with what flows over, so that every bucket holds at most two categories: its owner, up to
    `keep`, and an `alias` above. To draw: choose a bucket, all alike, and a height u in it; the owner where
    u < keep, otherwise the alias.

    Who fills whom? Go through the poor (p < 1) and the rich (p >= 1) in order; the current rich one fills the current
    poor one, and a rich one that falls below 1 becomes poor and is filled by the next. No loop is needed, because all
    can be read off two running sums, the needs N_i = sum (1 - p) of the poor and the gifts G_j = sum (p - 1) of the
    rich:

    - poor i is filled by the first rich j with G_j >= N_{i-1}, who was still rich after all before;
    - rich j gives until the first poor i with N_i > G_j, and is then short of N_i - G_j: it keeps 1 - (N_i - G_j),
      and its alias is rich j + 1. If there is no such i, its bucket is its own.

    Args:
        weights: (K) floating-point weights, not negative, with a sum above 0.

    Attributes:
        keep: (K) float64, the owner's part of each bucket.
        alias: (K) int64, who has the rest.

    Raises:
        RuntimeError: `weights` is not 1-D; a weight is negative, infinite or nan; all weights are 0.

    Source:
        Walker (1977); Vose (1991). By running sums: Huebschle-Schneider and Sanders (2022).

    Example:
        >>> table = AliasTable(torch.tensor([3.0, 1.0]))
        >>> table.keep, table.alias                       # bucket 1: half its own, half of 0
        (tensor([1.0000, 0.5000], dtype=torch.float64), tensor([0, 0]))
    """

    def __init__(self, weights: torch.Tensor) -> None:
        if weights.dim() != 1:
            raise RuntimeError("prob_dist must be 1 dim")
        weights = _checked_weights(weights)
        p = weights / weights.sum() * len(weights)
        is_rich = p >= 1
        is_rich[p.argmax()] = True  # rounding may leave all just below 1
        poor, rich = is_rich.logical_not().nonzero().squeeze(1), is_rich.nonzero().squeeze(1)
        needs, gifts = (1 - p[poor]).cumsum(0), (p[rich] - 1).cumsum(0)

        self.keep, self.alias = p.clamp_max(1), torch.arange(len(p), device=p.device)
        before = torch.cat([needs.new_zeros(1), needs])[:-1]
        giver = torch.searchsorted(gifts, before).clamp_max(len(rich) - 1)  # rounding may ask for one too many
        self.alias[poor] = rich[giver]

        until = torch.searchsorted(needs, gifts[:-1], right=True)  # the last one gives all it has
        short = (until < len(poor)).nonzero().squeeze(1)
        self.keep[rich[short]] = (1 + gifts[short] - needs[until[short]]).clamp(0, 1)
        self.alias[rich[short]] = rich[short + 1]

    def draw(self, num_samples: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Returns (num_samples) int64 categories."""
        device = self.keep.device
        bucket = torch.randint(len(self.keep), (num_samples,), device=device, generator=generator)
        height = torch.rand(num_samples, dtype=torch.float64, device=device, generator=generator)
        return torch.where(height < self.keep[bucket], bucket, self.alias[bucket])

    def probabilities(self) -> torch.Tensor:
        """(K) float64: the probabilities that the table draws with, added up from its buckets."""
        return self.keep.index_add(0, self.alias, 1 - self.keep) / len(self.keep)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """Pearson's test: do the counts fit the probabilities?

    X^2 = sum_i (n_i - n p_i)^2 / (n p_i). If the counts are draws with these probabilities, X^2 is about chi-square
    distributed with (number of p_i > 0) - 1 degrees of freedom, as long as all n p_i are at least 5 or so.

    Args:
        counts: (K) how often each category was drawn.
        probabilities: (K) weights, not negative; they need not sum to 1.

    Returns:
        X^2, and the probability of one at least as large by chance. A category of probability 0 that was drawn all
        the same gives (inf, 0).

    Example:
        >>> statistic, p_value = chi_square(torch.tensor([60, 40]), torch.tensor([0.5, 0.5]))
        >>> statistic, round(p_value, 4)
        (4.0, 0.0455)
    """
    possible = probabilities > 0
    if counts[~possible].any():
        return float("inf"), 0.0
    p = probabilities[possible].double()
    n = counts[possible].double()
    expected = n.sum() * p / p.sum()
    statistic = ((n - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(p) - 1, dtype=torch.float64)
    return statistic.item(), torch.special.gammaincc(freedom / 2, statistic / 2).item()
