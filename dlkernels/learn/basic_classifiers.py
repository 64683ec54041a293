"""Four ways to tell ten digits apart, from the simplest to a convolutional network, and two ways to judge them.

===================== ================================= ==================================================
name                  what it learns                    how an image becomes a class
===================== ================================= ==================================================
SoftmaxRegression     one template per class            the template that fits best (a linear map)
KNearestNeighbours    nothing: it keeps the images      a vote of the k most similar images
MLP                   two layers of features            a linear map of the features
SmallCNN              small local filters, everywhere   a linear map of what the filters found, and where
===================== ================================= ==================================================

Symbols: N images, F numbers per image (its pixels in a row), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlkernels.ops.conv2d import Conv2d

__all__ = [
    "MLP",
    "KNearestNeighbours",
    "SmallCNN",
    "SoftmaxRegression",
    "accuracy",
    "confusion_matrix",
    "random_shift",
    "softmax",
]


# ---------------------------------------------------------------------------------------------- softmax regression


def softmax(logits: Tensor) -> Tensor:
    """Turn scores into probabilities: p_c = exp(z_c) / sum_j exp(z_j).

    The largest score is subtracted first. That changes nothing in the quotient, and keeps exp() from overflowing.

    Args:
        logits: (N, C) scores.

    Returns:
        (N, C) probabilities; every row sums to 1.
    """
    shifted = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return shifted / shifted.sum(dim=1, keepdim=True)


class SoftmaxRegression:
    """A linear classifier, its gradient written out by hand: z = x W^T + b, p = softmax(z).

    Plain tensors and no autograd, so that every line of the training can be read here. Training starts at zero:
    the loss is convex, every start leads to the same place.

    Args:
        features: F, numbers per image.
        classes: C.
        dtype: of the weights.

    Attributes:
        weight: (C, F), one template per class.
        bias: (C,).

    Example::

        model = SoftmaxRegression(features=64, classes=10)
        for _ in range(20):
            model.train_epoch(x, y, learning_rate=0.5)
        accuracy(y_test, model.predict(x_test))
    """

    def __init__(self, features: int, classes: int, dtype: torch.dtype = torch.float32) -> None:
        self.weight = torch.zeros(classes, features, dtype=dtype)
        self.bias = torch.zeros(classes, dtype=dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Scores (N, C) of the images x (N, F)."""
        return x @ self.weight.T + self.bias

    def predict(self, x: Tensor) -> Tensor:
        """The most probable class (N,) of each of the images x (N, F)."""
        return self.logits(x).argmax(dim=1)

    def loss_and_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean cross-entropy of a batch, and its gradient.

        With z = x W^T + b, p = softmax(z) and the loss of one image L = -log p_y = log sum_j exp(z_j) - z_y::

            dL/dz_c = p_c - [c == y]              the probability it gave, minus the one it should have given
            dL/dW   = sum_n dL/dz_n (outer) x_n   every image pulls its own template up and pushes the others down
            dL/db   = sum_n dL/dz_n

        and everything is divided by N for the mean.

        Args:
            x: (N, F) images.
            y: (N,) int64 classes.

        Returns:
            The loss (a scalar), dL/dW (C, F) and dL/db (C,).
        """
        rows = torch.arange(len(y))
        p = softmax(self.logits(x))
        loss = -p[rows, y].clamp_min(torch.finfo(p.dtype).tiny).log().mean()
        grad_z = p
        grad_z[rows, y] -= 1
        grad_z /= len(y)
        return loss, grad_z.T @ x, grad_z.sum(dim=0)

    def train_epoch(
        self,
        x: Tensor,
        y: Tensor,
        learning_rate: float,
        batch_size: int = 100,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """One pass of stochastic gradient descent over (x, y) in a fresh random order.

        Args:
            x: (N, F) images.
            y: (N,) int64 classes.
            learning_rate: length of a step, in units of the gradient.
            batch_size: images per step; the last batch may be smaller.
            generator: source of the order; torch's global one by default.

        Returns:
            The loss of every batch, before its step.
        """
        losses = []
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            loss, grad_weight, grad_bias = self.loss_and_gradient(x[batch], y[batch])
            self.weight -= learning_rate * grad_weight
            self.bias -= learning_rate * grad_bias
            losses.append(loss.item())
        return losses


# --------------------------------------------------------------------------------------------- k-nearest neighbours


class KNearestNeighbours:
    """Classify by the vote of the k training images that are closest in Euclidean distance. Exact, no index.

    All distances come from one matrix product, ||a - b||^2 = ||a||^2 - 2 a.b + ||b||^2, block by block so that memory
    stays bounded, in float64. For whole-number pixels (0..255) that arithmetic is exact; for other values,
    neighbours whose distances differ by less than rounding may swap.

    Ties, by these two rules:
      1. Of two training images at the same distance, the one with the smaller index is the nearer.
      2. Of two classes with the same number of votes, the one that owns the nearest neighbour wins.

    Args:
        k: number of neighbours that vote, at most the number of training images.
        block_bytes: memory for one block of distances.

    Example::

        model = KNearestNeighbours(k=3).fit(x, y)
        accuracy(y_test, model.predict(x_test))
    """

    def __init__(self, k: int = 3, block_bytes: int = 64 * 2**20) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.block_bytes = block_bytes

    def fit(self, x: Tensor, y: Tensor) -> KNearestNeighbours:
        """Keep the training images x (N, F) and their classes y (N,) int64. Returns self."""
        if len(x) < self.k:
            raise ValueError(f"{self.k} neighbours were asked for, but there are only {len(x)} training images")
        self.x = x.to(torch.float64)
        self.y = y
        self.squares = (self.x * self.x).sum(dim=1)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """The class (M,) of each of the images x (M, F)."""
        if len(x) == 0:
            return self.y.new_empty(0)
        return torch.cat([self._vote(self._nearest(block)) for block in self._blocks(x)])

    def neighbours(self, x: Tensor) -> Tensor:
        """Indices (M, k) of the k nearest training images of each of the images x (M, F), nearest first."""
        if len(x) == 0:
            return torch.empty(0, self.k, dtype=torch.int64)
        return torch.cat([self._nearest(block) for block in self._blocks(x)])

    def _blocks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut the queries so that one block's distances, (rows, N) float64, fit in block_bytes."""
        return x.split(max(1, self.block_bytes // (8 * len(self.x))))

    def _nearest(self, x: Tensor) -> Tensor:
        """Indices (M, k) of the nearest neighbours of one block.

        ||x||^2 is left out: it is the same for all candidates. argmin returns the first of equal minima, which is
        rule 1; k is small, so k passes are cheaper than sorting.
        """
        distance = torch.addmm(self.squares, x.to(torch.float64), self.x.T, alpha=-2)
        nearest = []
        for _ in range(self.k):
            index = distance.argmin(dim=1, keepdim=True)
            distance.scatter_(1, index, torch.inf)
            nearest.append(index)
        return torch.cat(nearest, dim=1)

    def _vote(self, nearest: Tensor) -> Tensor:
        """Classes (M,) by majority of the neighbours (M, k).

        votes[m, i] counts the neighbours with the class of neighbour i. The first maximum belongs to the nearest
        neighbour among the tied classes, which is rule 2.
        """
        classes = self.y[nearest]
        votes = (classes[:, :, None] == classes[:, None, :]).sum(dim=2)
        return classes.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------- networks


class MLP(nn.Module):
    """A multi-layer perceptron: pixels in a row, two hidden layers with ReLU, one linear layer.

    Args:
        features: F, numbers per image (images of any shape are flattened).
        classes: C.
        hidden: width of both hidden layers.

    Example::

        logits = MLP(features=64, classes=10)(torch.rand(5, 1, 8, 8))   # (5, 10)
    """

    def __init__(self, features: int, classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, C) of the images x (N, ...)."""
        return self.layers(x)


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with ReLU, the image halved after the second and the third, one hidden linear layer.

    Args:
        channels: of the image: 1 for greyscale, 3 for colour.
        size: height and width of the image in pixels, at least 4.
        classes: C.
        width: filters in the first layer; the others have twice as many.
        conv: class of the convolutions. ``torch.nn.Conv2d`` builds the same network on torch's own layers: the
            constructor, the initialisation and the keys of the state_dict are the same.

    Example::

        ours = SmallCNN(channels=1, size=8, classes=10)
        theirs = SmallCNN(channels=1, size=8, classes=10, conv=torch.nn.Conv2d)
        theirs.load_state_dict(ours.state_dict())                       # the same network
    """

    def __init__(self, channels: int, size: int, classes: int, width: int = 16, conv: type[nn.Conv2d] = Conv2d) -> None:
        super().__init__()
        if size < 4:
            raise ValueError(f"images are halved twice, so size must be at least 4, got {size}")
        self.filters = nn.Sequential(
            conv(channels, width, kernel_size=3, padding=1),
            nn.ReLU(),
            conv(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            conv(2 * width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, C) of the images x (N, channels, size, size)."""
        return self.head(self.filters(x))


def random_shift(x: Tensor, pixels: int = 1, fill: float = 0.0) -> Tensor:
    """Move every image by its own random distance: new examples for free, since a shifted digit is the same digit.

    Args:
        x: (N, channels, H, W) images.
        pixels: largest distance, up or down and left or right; all distances are equally likely.
        fill: the value of what comes in from outside.

    Returns:
        (N, channels, H, W) shifted copies. The random numbers are torch's global ones.
    """
    count, channels, height, width = x.shape
    padded = nn.functional.pad(x, (pixels,) * 4, value=fill)
    offset = torch.randint(0, 2 * pixels + 1, (2, count, 1)).to(x.device)
    rows = offset[0] + torch.arange(height, device=x.device)
    columns = offset[1] + torch.arange(width, device=x.device)
    image = torch.arange(count, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


# ----------------------------------------------------------------------------------------------------------- judging


def accuracy(target: Tensor, predicted: Tensor) -> float:
    """The share of right answers, from 0 to 1, of two (N,) tensors of classes; N must not be 0."""
    if len(target) != len(predicted) or len(target) == 0:
        raise ValueError(f"expected two non-empty tensors of one length, got {len(target)} and {len(predicted)}")
    return (target == predicted).double().mean().item()


def confusion_matrix(target: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count who was taken for whom: entry (i, j) is the number of images of class i that were called j.

    Args:
        target: (N,) int64, what the images are.
        predicted: (N,) int64, what they were called.
        classes: C; every entry of both must lie in 0..C-1.

    Returns:
        (C, C) int64: the right answers are on the diagonal, row i sums to the number of images of class i.

    Raises:
        ValueError: lengths differ, or a class is out of range.
    """
    if len(target) != len(predicted):
        raise ValueError(f"expected as many answers as images, got {len(predicted)} for {len(target)}")
    for name, values in (("target", target), ("predicted", predicted)):
        if len(values) and not (values.min() >= 0 and values.max() < classes):
            raise ValueError(f"{name} must lie in 0..{classes - 1}")
    pair = target * classes + predicted  # every (i, j) gets its own number, so one count does it
    return torch.bincount(pair, minlength=classes * classes).reshape(classes, classes)
