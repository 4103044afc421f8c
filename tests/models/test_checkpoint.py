"""Checkpoints: what is saved comes back; damage gives one error that names file and tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import models
from fastdiff.models import DiT, PlainDiT, UNet

TINY_DIT = dict(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=3
)
TINY_UNET = dict(
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    transformer_depth=(0, 1),
    heads=2,
    groups=4,
    cross_attention_dim=8,
    num_classes=3,
)


@pytest.fixture
def path(tmp_path):
    models.save(DiT(**TINY_DIT), tmp_path / "tiny.safetensors", note="test")
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize("model", [DiT(**TINY_DIT), UNet(**TINY_UNET)], ids=["dit", "unet"])
def test_round_trip(model, tmp_path):
    path = tmp_path / "m.safetensors"
    saved = models.save(model, path, note=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.safetensors"]
    loaded, card = models.load(path)
    assert card == saved == json.loads((tmp_path / "m.json").read_text())
    assert card["parameters"] == sum(p.numel() for p in model.parameters()) and card["note"] == 1
    assert type(loaded) is type(model) and not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.half().float(), b)
        assert a.requires_grad == b.requires_grad, name
    half, _ = models.load(path, dtype=torch.bfloat16, plain=True)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_plain_shares_the_parameters(path):
    model, _ = models.load(path)
    twin = models.plain(model)
    assert isinstance(twin, PlainDiT) and not twin.training
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def change(path, edit):
    state = load_file(path)
    edit(state)
    save_file(state, str(path))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.pop("blocks.0.attn.qkv.bias"), "tensor blocks.0.attn.qkv.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "tensor extra is not part of this network"),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 4, 32)}),
            r"tensor pos_embed has shape \[1, 4, 32\], need \[1, 16, 32\]",
        ),
        (
            lambda s: s["final_layer.linear.bias"].fill_(float("nan")),
            "tensor final_layer.linear.bias has values that are not finite",
        ),
    ],
)
def test_wrong_tensors(path, edit, message):
    change(path, edit)
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert str(path) in str(error.value)


def test_damaged_file(path):
    whole = path.read_bytes()
    for broken in (
        b"",
        whole[:7],
        whole[: len(whole) // 2],
        b"\xff" * 64,
        b"\x80\x02}q\x00." + whole,
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="tiny.safetensors: not a readable safetensors file"):
            models.load(path)


def test_damaged_card(path):
    card = path.with_suffix(".json")
    good = json.loads(card.read_text())
    for text in (
        "{",
        "[]",
        "{}",
        json.dumps({**good, "model": "gan"}),
        json.dumps({**good, "config": {"unknown": 1}}),
        json.dumps({**good, "config": {**good["config"], "num_heads": 3}}),
    ):
        card.write_text(text)
        with pytest.raises(ValueError, match="tiny.json: not a readable card"):
            models.load(path)
    card.unlink()
    with pytest.raises(ValueError, match="tiny.json: not a readable card"):
        models.load(path)


def test_no_such_checkpoint():
    with pytest.raises(
        ValueError, match="load: nothing is no file, need a .safetensors path or one of"
    ):
        models.load("nothing")


def test_scenes_ship_within_their_size():
    path = models.checkpoint.FOLDER / "dit-scenes.safetensors"
    assert path.stat().st_size <= 12 * 2**20
    model, card = models.load("dit-scenes")
    assert model.box_size == 24 and card["image_size"] == 64 and card["training"]["minutes"] > 0
    assert "dit-scenes" in models.checkpoint.names()
