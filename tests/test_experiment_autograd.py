"""The experiment autograd: what it writes, what it promises, and what it refuses."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("typer")
pytest.importorskip("tqdm")

import torch

from dlkernels.experiments import Options, autograd, cli, data

FIGURES = ("graph", "orders", "training", "chains", "histograms", "p_values", "pairs", "cost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One smoke run for all that only look."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["run", "autograd", "--smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(folder):
    record = json.loads((folder / "metrics.json").read_text())
    assert record["figures"] == [f"{name}.png" for name in FIGURES]
    return record["results"]


def test_an_mlp_trained_by_our_engine_reads_the_digits_with_torchs_gradients(tmp_path):
    """The full form's plan."""
    options = Options("autograd", tmp_path)
    found = autograd.train(autograd.load(options), options)
    assert found.accuracy[-1] >= 0.95
    assert len(found.difference) > 1500
    assert max(found.difference) < 1e-10
    assert np.mean(found.loss[-100:]) < 0.1 * found.loss[0]


def test_the_difference_from_torch_is_measured(tmp_path, monkeypatch):
    """A gradient that is wrong in one entry shows."""
    true_grad = autograd.grad

    def wrong_grad(output, inputs):
        gradients = true_grad(output, inputs)
        return (
            gradients[0] + 1e-6 * (np.arange(gradients[0].value.size) == 5).reshape(gradients[0].shape),
            *gradients[1:],
        )

    monkeypatch.setattr(autograd, "grad", wrong_grad)
    options = Options("autograd", tmp_path, form="smoke")
    assert max(autograd.train(autograd.load(options), options).difference) == pytest.approx(1e-6)


def test_the_three_ways_to_a_derivative_agree(results):
    found = results["expression"]
    assert found["ours"] == pytest.approx(found["torch"], rel=1e-14)
    assert found["ours"] == pytest.approx(found["finite_differences"], rel=1e-8)


def test_higher_derivatives_are_those_of_the_formula(results):
    assert max(results["orders"]["largest_difference_from_the_formula"]) < 1e-12
    nodes = results["orders"]["nodes"]
    assert nodes == sorted(set(nodes))


def test_training_in_the_smoke_form(results):
    training = results["training"]
    assert training["accuracy"] > 0.85
    assert training["interval"][0] < training["accuracy"] < training["interval"][1]
    assert training["largest_difference_from_torch"] < 1e-10
    assert len(training["loss"]) == training["steps"]


def test_a_recursive_walk_ends_where_ours_goes_on(results):
    assert 0 < results["chains"]["longest_by_recursion"] < results["chains"]["length"][-1]


def test_samplers_are_right(results):
    for found in [*results["histograms"].values(), *results["pairs"].values()]:
        assert found["p_value"] > 1e-4
    assert [found["draws_of_weight_0"] for found in results["histograms"].values()] == [0, 0, 0]
    assert [found["twice"] for found in results["pairs"].values()] == [0, 0]
    assert all(sum(found["counts"]) == 10**5 for found in results["histograms"].values())


def test_the_p_values_tell_the_flawed_sampler_from_the_right_ones(results):
    found = results["p_values"]
    assert list(found["distance"]) == [*autograd.SAMPLERS, "a flawed sampler"]
    assert {name for name, distance in found["distance"].items() if distance > found["allowed"]} == {"a flawed sampler"}


def test_pair_probabilities_add_up():
    exact = autograd.pair_probabilities(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    assert exact.sum().item() == pytest.approx(1)
    assert exact.tolist() == pytest.approx(np.array([[0, 0, 1 / 3], [0, 0, 0], [2 / 3, 0, 0]]))


def test_costs_are_those_of_every_size(results):
    cost = results["cost"]
    assert cost["categories"] == [4**power for power in range(1, 6)]
    for found in cost["seconds"].values():
        assert len(found["draw"]) == len(found["setup"]) == 5


def test_runs_are_repeatable(results, tmp_path):
    assert cli.main(["run", "autograd", "--smoke", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert again["training"]["loss"] == results["training"]["loss"]
    assert again["histograms"] == results["histograms"]
    assert again["p_values"] == results["p_values"]


def test_own_images(tmp_path):
    """Another size, another number of classes."""
    random = np.random.default_rng(0)
    y = np.arange(160) % 3
    x = random.integers(0, 60, (160, 1, 9, 9))
    for image, label in zip(x, y, strict=True):
        image[:, :, 3 * label : 3 * label + 3] += 150
    own = data.Images("own", x[:120].astype(np.uint8), y[:120], x[120:].astype(np.uint8), y[120:], ("a", "b", "c"))
    options = Options("autograd", tmp_path, form="smoke")
    assert autograd.train(own, options).accuracy[-1] > 0.9


@pytest.mark.parametrize(
    ("source", "message"), [("sst2", "'sst2' is a set of sentences"), ("nowhere", "'nowhere' is neither")]
)
def test_what_is_no_set_of_images_is_one_clear_error(source, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "autograd", "--data", source]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
