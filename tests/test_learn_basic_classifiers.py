"""Softmax regression, nearest neighbours, networks and measures, against torch, scikit-learn and definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlkernels.learn.basic_classifiers import (
    MLP,
    KNearestNeighbours,
    SmallCNN,
    SoftmaxRegression,
    accuracy,
    confusion_matrix,
    random_shift,
    softmax,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(images=40, features=6, classes=3, seed=0):
    random = generator(seed)
    x = torch.randn(images, features, dtype=torch.float64, generator=random)
    return x, torch.randint(classes, (images,), generator=random)


def regression(features=6, classes=3, seed=1):
    model = SoftmaxRegression(features, classes, dtype=torch.float64)
    model.weight = torch.randn(classes, features, dtype=torch.float64, generator=generator(seed))
    model.bias = torch.randn(classes, dtype=torch.float64, generator=generator(seed + 1))
    return model


class TestSoftmaxRegression:
    def test_softmax_is_torchs(self):
        logits = torch.randn(7, 5, dtype=torch.float64, generator=generator()) * 30
        torch.testing.assert_close(softmax(logits), logits.softmax(dim=1))

    def test_softmax_of_huge_scores_is_finite(self):
        p = softmax(torch.tensor([[1e30, -1e30], [88.0, 90.0]]))
        assert p.isfinite().all()
        torch.testing.assert_close(p.sum(dim=1), torch.ones(2))

    def test_gradient_is_autograds(self):
        x, y = problem()
        model = regression()
        weight, bias = (tensor.clone().requires_grad_() for tensor in (model.weight, model.bias))
        expected = nn.functional.cross_entropy(x @ weight.T + bias, y)
        expected.backward()
        loss, grad_weight, grad_bias = model.loss_and_gradient(x, y)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad_weight, weight.grad)
        torch.testing.assert_close(grad_bias, bias.grad)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_gradient_is_that_of_finite_differences(self, name):
        x, y = problem()
        model = regression()
        gradient = dict(zip(("weight", "bias"), model.loss_and_gradient(x, y)[1:], strict=True))[name]
        parameter = getattr(model, name).view(-1)
        step = 1e-6
        for i in range(len(parameter)):
            at = parameter[i].item()
            parameter[i] = at + step
            above = model.loss_and_gradient(x, y)[0]
            parameter[i] = at - step
            below = model.loss_and_gradient(x, y)[0]
            parameter[i] = at
            assert gradient.view(-1)[i].item() == pytest.approx(((above - below) / (2 * step)).item(), abs=1e-8)

    def test_loss_of_a_hopeless_answer_is_finite(self):
        model = SoftmaxRegression(1, 2)
        model.weight = torch.tensor([[1e4], [-1e4]])
        assert model.loss_and_gradient(torch.ones(1, 1), torch.tensor([1]))[0].isfinite()

    def test_learns_what_is_separable(self):
        x, _ = problem(images=300)
        y = (x[:, 0] > 0).long() + (x[:, 0] > 0).long() * (x[:, 1] > 0).long()
        model = SoftmaxRegression(6, 3, dtype=torch.float64)
        for _ in range(60):
            losses = model.train_epoch(x, y, learning_rate=1.0, batch_size=50, generator=generator())
        assert len(losses) == 6
        assert sum(losses) / 6 < 0.2
        assert accuracy(y, model.predict(x)) > 0.95

    def test_the_last_batch_may_be_smaller(self):
        x, y = problem(images=11)
        assert len(SoftmaxRegression(6, 3, dtype=torch.float64).train_epoch(x, y, 0.1, batch_size=5)) == 3


class TestKNearestNeighbours:
    @given(
        st.integers(1, 4),
        st.integers(4, 30),
        st.integers(0, 9),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(0, 10**6),
    )
    @settings(max_examples=60, deadline=None)
    def test_is_the_definition_ties_included(self, k, images, queries, features, largest, seed):
        """Small whole numbers make ties of distance and of votes common."""
        random = generator(seed)
        x = torch.randint(largest + 1, (images, features), generator=random).double()
        y = torch.randint(3, (images,), generator=random)
        asked = torch.randint(largest + 1, (queries, features), generator=random).double()
        model = KNearestNeighbours(k, block_bytes=100).fit(x, y)
        nearest, predicted = model.neighbours(asked).tolist(), model.predict(asked).tolist()
        for query, indices, answer in zip(asked, nearest, predicted, strict=True):
            squares = ((x - query) ** 2).sum(dim=1).tolist()
            assert indices == sorted(range(images), key=lambda i: (squares[i], i))[:k]
            classes = [y[i].item() for i in indices]
            assert answer == max(classes, key=lambda c: (classes.count(c), -classes.index(c)))

    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_neighbours_are_scikit_learns(self, k):
        neighbors = pytest.importorskip("sklearn.neighbors")
        x, y = problem(images=200)
        asked, _ = problem(images=50, seed=9)
        theirs = neighbors.KNeighborsClassifier(k, algorithm="brute").fit(x.numpy(), y.numpy())
        model = KNearestNeighbours(k).fit(x, y)
        assert model.neighbours(asked).tolist() == theirs.kneighbors(asked.numpy(), return_distance=False).tolist()

    def test_an_equal_vote_goes_to_the_class_of_the_nearest(self):
        model = KNearestNeighbours(k=2).fit(torch.tensor([[1.0], [3.0]]), torch.tensor([7, 2]))
        assert model.predict(torch.tensor([[1.5], [2.5], [2.0]])).tolist() == [7, 2, 7]

    def test_blocks_do_not_change_the_answer(self):
        x, y = problem(images=100)
        asked, _ = problem(images=33, seed=3)
        answers = [KNearestNeighbours(3, size).fit(x, y).predict(asked) for size in (1, 5000, 10**8)]
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])

    def test_no_questions_no_answers(self):
        x, y = problem()
        assert KNearestNeighbours(3).fit(x, y).predict(x[:0]).shape == (0,)

    def test_refuses_what_cannot_be(self):
        with pytest.raises(ValueError, match="at least 1"):
            KNearestNeighbours(0)
        with pytest.raises(ValueError, match="only 2 training images"):
            KNearestNeighbours(3).fit(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))


class TestNetworks:
    def test_shapes(self):
        assert MLP(64, 10)(torch.rand(5, 1, 8, 8)).shape == (5, 10)
        assert SmallCNN(1, 8, 10)(torch.rand(5, 1, 8, 8)).shape == (5, 10)
        assert SmallCNN(3, 33, 7, width=4)(torch.rand(2, 3, 33, 33)).shape == (2, 7)

    def test_the_cnn_on_torchs_layers_is_the_same_network(self):
        ours = SmallCNN(1, 8, 10)
        theirs = SmallCNN(1, 8, 10, conv=nn.Conv2d)
        assert {type(module) for module in theirs.modules()}.isdisjoint({type(ours.filters[0])})
        theirs.load_state_dict(ours.state_dict())
        x = torch.rand(4, 1, 8, 8, generator=generator())
        torch.testing.assert_close(ours(x), theirs(x))

    def test_same_seed_same_first_weights(self):
        built = []
        for conv in ({}, {"conv": nn.Conv2d}):
            torch.manual_seed(3)
            built.append(SmallCNN(1, 8, 10, **conv).state_dict())
        assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])

    def test_too_small_an_image(self):
        with pytest.raises(ValueError, match="at least 4"):
            SmallCNN(1, 3, 10)

    def test_losses_on_both_layers_agree_over_twenty_steps(self):
        """The same weights and batches; float32 sums in another order, amplified by twenty steps of training."""
        datasets = pytest.importorskip("sklearn.datasets")
        bunch = datasets.load_digits()
        x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 4 - 2
        y = torch.tensor(bunch.target)
        torch.manual_seed(0)
        ours = SmallCNN(1, 8, 10)
        theirs = SmallCNN(1, 8, 10, conv=nn.Conv2d)
        theirs.load_state_dict(ours.state_dict())
        losses = []
        for model in (ours, theirs):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            losses.append([])
            for step in range(20):
                optimizer.zero_grad()
                batch = slice(64 * step, 64 * step + 64)
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        assert losses[0][-1] < losses[0][0] - 0.2  # something was learned
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class TestRandomShift:
    def test_every_image_moves_by_at_most_one_pixel_and_the_rest_is_fill(self):
        x = torch.rand(200, 2, 5, 4, generator=generator()) + 1
        torch.manual_seed(0)
        shifted = random_shift(x, pixels=1, fill=-3.0)
        padded = nn.functional.pad(x, (1, 1, 1, 1), value=-3.0)
        seen = set()
        for image, moved in zip(padded, shifted, strict=True):
            windows = {(i, j): image[:, i : i + 5, j : j + 4] for i in range(3) for j in range(3)}
            places = [place for place, window in windows.items() if torch.equal(window, moved)]
            assert len(places) == 1
            seen.update(places)
        assert len(seen) == 9  # all distances happen

    def test_the_image_itself_is_left_alone(self):
        x = torch.rand(3, 1, 4, 4)
        before = x.clone()
        random_shift(x).zero_()
        assert torch.equal(x, before)


class TestMeasures:
    def test_confusion_matrix_is_scikit_learns(self):
        metrics = pytest.importorskip("sklearn.metrics")
        target = torch.randint(5, (300,), generator=generator(1))
        predicted = torch.randint(5, (300,), generator=generator(2))
        expected = metrics.confusion_matrix(target.numpy(), predicted.numpy(), labels=range(6))
        assert confusion_matrix(target, predicted, 6).tolist() == expected.tolist()

    def test_accuracy_is_the_share_on_the_diagonal(self):
        target = torch.tensor([0, 1, 2, 2])
        predicted = torch.tensor([0, 1, 1, 2])
        assert accuracy(target, predicted) == 0.75
        assert confusion_matrix(target, predicted, 3).trace() == 3

    def test_nothing_to_count(self):
        nothing = torch.empty(0, dtype=torch.int64)
        assert confusion_matrix(nothing, nothing, 2).tolist() == [[0, 0], [0, 0]]
        with pytest.raises(ValueError, match="non-empty"):
            accuracy(nothing, nothing)

    @pytest.mark.parametrize(("target", "predicted"), [([0, 3], [0, 1]), ([0, 1], [-1, 1]), ([0], [0, 1])])
    def test_refuses_what_cannot_be_counted(self, target, predicted):
        with pytest.raises(ValueError):
            confusion_matrix(torch.tensor(target), torch.tensor(predicted), 3)
