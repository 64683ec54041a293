"""The experiment broadcast_tensors: what it writes, and what it refuses."""

import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("typer")
pytest.importorskip("tqdm")

import torch

from dlkernels.experiments import broadcast_tensors, cli


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one smoke run measured."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["run", "broadcast_tensors", "--smoke", "--out", str(out)]) == 0
    record = json.loads((out / "metrics.json").read_text())
    assert record["figures"] == [f"{name}.png" for name in ("rules", "strides", "sweep", "bytes", "times")]
    return record["results"]


def test_the_sweep_agrees_with_torch(results):
    sweep = results["sweep"]
    assert sweep["pairs"] == 21**2
    assert sweep["groups_of_up_to_five"] == 200
    assert sweep["disagreements"] == 0
    assert 0 < sweep["pairs_refused_by_both"] < sweep["pairs"]
    assert 0 < sweep["groups_refused_by_both"] < sweep["groups_of_up_to_five"]


def test_every_rule_has_its_result(results):
    rules = results["rules"]
    for title, shapes in broadcast_tensors.RULES:
        try:
            expected = list(torch.broadcast_shapes(*shapes))
        except RuntimeError as error:
            expected = str(error)
        assert rules[title] == expected
    assert rules["expand: -1 keeps a size"] == [2, 3, 4]
    assert "must match the existing size (4)" in rules["expand: one way only"]


def test_a_view_shares_its_bytes_and_a_copy_does_not(results):
    found = results["bytes"]
    assert found["shared"] == [4 * side for side in found["side"]]
    assert found["copied"] == [4 * side**2 for side in found["side"]]


def test_gradients_count_how_often_an_element_was_read(results):
    assert [(row["summed"], row["gradient"]) for row in results["gradients"]] == [
        ("(-1,)", "4"),
        ("(-2,)", "3"),
        ("(-2, -1)", "12"),
        ("(-2, -1)", "15"),
    ]


def test_the_sweep_notices_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(broadcast_tensors, "broadcast_shapes", lambda *shapes: torch.Size([1]))
    found = broadcast_tensors.sweep_pairs(broadcast_tensors.small_shapes(1), "cpu")
    assert (found == broadcast_tensors.DIFFERS).sum() == 5**2 - 3  # (1,) with itself, () with (1,), (1,) with ()


def test_it_takes_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "broadcast_tensors", "--data", "mnist"]) == 2
    assert "takes no --data" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
