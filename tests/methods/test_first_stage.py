"""The first stage in tiles, the scale of latents, and a prompt's keys and values."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.methods.first_stage import FirstStage, ramp, spans, tiled
from fastdiff.testing import load_file, unchanged

networks = load_file(Path(__file__).parent.parent / "integrations" / "networks.py")


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def filled(module):
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return module.double()


def decoder():
    """Two doublings; an output depends on latents up to 4 away: 1 + 1 + 1/2 + 1/2 + 1/4, rounded
    up to whole latents at either side."""
    return filled(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 5, 3, padding=1),
            nn.Upsample(scale_factor=2), nn.Conv2d(5, 5, 3, padding=1), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(5, 2, 3, padding=1),
        )
    )  # fmt: skip


def encoder():
    """Two halvings, with the padding at one side that Stable Diffusion's has."""
    return filled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(4, 4, 3, stride=2), nn.SiLU(), nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(4, 3, 3, stride=2),
        )
    )  # fmt: skip


class Looks(nn.Module):
    """A decoder that looks at the whole map, as GroupNorm and attention do."""

    def __init__(self):
        super().__init__()
        self.net = decoder()

    def forward(self, z):
        y = self.net(z)
        return y + 0.1 * y.mean((2, 3), keepdim=True)


SIZES = [((7, 19), (8, 8)), ((16, 12), (8, 6)), ((9, 24), (4, 7)), ((5, 5), (8, 8))]


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("size, tile", SIZES)
@torch.no_grad()
def test_a_halo_makes_the_decoder_exact(size, tile, overlap):
    net, z = decoder(), draw(2, 3, *size)
    with unchanged(z):
        found = tiled(net, z, tile=tile, ratio=4, halo=4, overlap=overlap)
    # float64: other sizes may take other orders of summation
    assert torch.allclose(found, net(z), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_halo_makes_the_encoder_exact():
    net, image = encoder(), draw(2, 2, 40, 28)
    found = tiled(net, image, tile=(16, 12), ratio=Fraction(1, 4), halo=8)
    assert torch.allclose(found, net(image), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_halo_too_small_would_be_seen():
    net, z = decoder(), draw(1, 3, 16, 16)
    for halo in (0, 1, 2):
        found = tiled(net, z, tile=(8, 8), ratio=4, halo=halo)
        wrong = (found - net(z)).abs().amax((0, 1)) > 1e-9
        assert wrong.any()
        # Only around the seams, up to the receptive field.
        away = torch.ones(64)
        away[32 - 16 : 32 + 16] = 0
        assert not wrong[away.bool()][:, away.bool()].any()


@pytest.mark.parametrize("overlap", [0, 2, 3])
@pytest.mark.parametrize("size, tile", SIZES)
@torch.no_grad()
def test_blends_are_no_further_off_than_the_worst_tile(size, tile, overlap):
    overlap = min(overlap, min(tile) // 2)
    net, z = Looks(), draw(2, 3, *size)
    full, worst = net(z), 0.0
    for row in spans(size[0], tile[0], 4, overlap):
        for column in spans(size[1], tile[1], 4, overlap):
            y = net(z[..., row.low : row.high, column.low : column.high])
            at = full[..., 4 * row.low : 4 * row.high, 4 * column.low : 4 * column.high]
            inner = (
                slice(4 * (row.start - row.low), 4 * (row.stop - row.low)),
                slice(4 * (column.start - column.low), 4 * (column.stop - column.low)),
            )
            worst = max(worst, float((y - at)[..., inner[0], inner[1]].abs().max()))
    found = tiled(net, z, tile=tile, ratio=4, halo=4, overlap=overlap)
    assert (found - full).abs().max() <= worst + 1e-12


@torch.no_grad()
def test_blending_takes_the_step_out_of_a_seam():
    """A network whose every tile has a level of its own: without overlap the seam is the whole
    difference, with an overlap of 4 latents at 4 outputs each it is a sixteenth."""

    def level(z):
        y = z.mean((1, 2, 3), keepdim=True)
        return y.expand(len(z), 1, 4 * z.shape[2], 4 * z.shape[3])

    z = torch.zeros(1, 1, 8, 14).double()
    z[..., 8:] = 1
    jumps = {
        overlap: float(
            tiled(level, z, tile=(8, 8), ratio=4, overlap=overlap).diff(dim=3).abs().max()
        )
        for overlap in (0, 2, 4)
    }
    assert jumps[2] < jumps[0] / 7 and jumps[4] < jumps[2]


@pytest.mark.parametrize(
    "n, tile, overlap", [(13, 6, 2), (7, 6, 3), (100, 9, 4), (6, 6, 0), (9, 4, 2)]
)
@pytest.mark.parametrize("ratio", [1, 8])
def test_weights_have_the_sum_one(n, tile, overlap, ratio):
    total = torch.zeros(n * ratio).double()
    for span in spans(n, tile, 1, overlap):
        total[span.start * ratio : span.stop * ratio] += ramp(span, n, overlap, Fraction(ratio))
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-14)


@torch.no_grad()
def test_one_tile_is_plain():
    net, z = decoder().float(), draw(2, 3, 7, 9).float()
    assert torch.equal(tiled(net, z, tile=(8, 9), ratio=4, halo=3, overlap=2), net(z))


@pytest.mark.parametrize("overlap", [0, 2])
def test_gradients_go_through(overlap):
    net, z = decoder(), draw(1, 3, 9, 13).requires_grad_()
    weight = draw(1, 2, 36, 52)
    (full,) = torch.autograd.grad((net(z) * weight).sum(), z)
    found = tiled(net, z, tile=(6, 5), ratio=4, halo=4, overlap=overlap)
    (ours,) = torch.autograd.grad((found * weight).sum(), z)
    assert torch.allclose(ours, full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale, shift", [(0.18215, 0.0), (1.5305, 0.0609)])
@pytest.mark.parametrize("tile", [None, (3, 4)])
@torch.no_grad()
def test_scale_goes_there_and_back(scale, shift, tile):
    """With an autoencoder that loses nothing: latents of 4 times the channels at half the size."""
    stage = FirstStage(
        nn.PixelUnshuffle(2), nn.PixelShuffle(2), scale=scale, shift=shift, factor=2, tile=tile
    )
    image = draw(2, 3, 10, 14)
    z = stage.to_latent(image)
    assert torch.allclose(z, scale * (nn.PixelUnshuffle(2)(image) - shift), rtol=1e-14, atol=1e-14)
    assert torch.allclose(stage.to_image(z), image, rtol=1e-14, atol=1e-14)


@torch.no_grad()
def test_first_stage_in_tiles_is_the_whole():
    image, z = draw(1, 2, 32, 44), draw(1, 3, 8, 11)
    whole = FirstStage(encoder(), decoder(), factor=4)
    tiles = FirstStage(encoder(), decoder(), factor=4, tile=(4, 5), halo=4, overlap=1)
    assert torch.allclose(tiles.to_latent(image), whole.to_latent(image), rtol=0, atol=1e-12)
    assert torch.allclose(tiles.to_image(z), whole.to_image(z), rtol=0, atol=1e-12)


@torch.no_grad()
def test_keys_and_values_of_a_prompt_are_projected_twice_in_a_run(monkeypatch):
    """At first sight and once to be kept, however many steps follow; and the same bits."""
    model, args, kwargs = networks.sd15()
    want = [model(args[0] + i, *args[1:], **kwargs, return_dict=False)[0] for i in range(6)]
    fastdiff.accelerate(model)
    plain = [model(args[0] + i, *args[1:], **kwargs, return_dict=False)[0] for i in range(6)]
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    prompt, counts, linear = kwargs["encoder_hidden_states"], [], nn.functional.linear

    def counting(x, weight, bias=None):
        if weight is layer.weight and x is prompt:
            counts[-1] += 1
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counting)
    with fastdiff.request():
        for i in range(6):
            counts.append(0)
            y = model(args[0] + i, *args[1:], **kwargs, return_dict=False)[0]
            assert torch.equal(y, plain[i])
            assert (y - want[i]).norm() < 1e-5 * want[i].norm()
    assert counts == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(halo=-1), "need halo >= 0"),
        (dict(overlap=5), "overlap from 0 to half a tile"),
        (dict(ratio=Fraction(1, 4)), r"x is \(9, 12\), need multiples of 4"),
        (dict(ratio=2), "need .* by ratio"),
    ],
)
def test_bad_input(settings, words):
    settings = dict(tile=(8, 8), ratio=4) | settings
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        tiled(decoder(), draw(1, 3, 9, 12), **settings)


def test_bad_shapes_and_scales():
    with pytest.raises(ValueError, match=r"x is \[3, 4, 4\]"):
        tiled(decoder(), draw(3, 4, 4), tile=(8, 8))
    with pytest.raises(ValueError, match="scale is 0.0"):
        FirstStage(encoder(), decoder(), scale=0.0)
