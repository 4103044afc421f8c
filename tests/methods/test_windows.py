"""Windows at once and in turn: one window is plain, overlaps agree, shifts go through."""

import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.methods.windows import (
    FRAME_START,
    FRAMES,
    Stored,
    crop,
    long_video,
    multi_diffusion,
    windows,
)
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, Euler, Run
from fastdiff.testing import draw_weights, unchanged
from fastdiff.testing_gaussian import GaussianModel


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Local:
    """Not linear; an element depends on its neighbours along all of the last dimensions, around the
    ends of what the model sees. Shifted inputs give shifted outputs only within a window."""

    def __init__(self, dims=2):
        self.dims, self.prediction, self.shapes = dims, "eps", []

    def __call__(self, x, t, y=None):
        self.shapes.append(tuple(x.shape))
        near = sum(x.roll(1, -d - 1) + x.roll(-1, -d - 1) for d in range(self.dims))
        shift = 0.0 if y is None else 0.1 * y.view(-1, *[1] * (x.dim() - 1))
        return 0.8 * x + 0.1 * torch.tanh(near) + shift


class Pointwise(Local):
    """An element knows itself alone: any windows give the plain result."""

    def __call__(self, x, t, y=None):
        self.shapes.append(tuple(x.shape))
        return 0.8 * x + 0.2 * torch.tanh(x)


class Classed(Local):
    num_classes = 3


SHAPE = (2, 3, 10, 14)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("wrap", [False, True])
def test_one_window_is_plain(sampler, wrap):
    settings = dict(
        sampler=sampler, steps=5, seed=3, classes=torch.tensor([0, 2]), guidance=2.5,
        guidance_rescale=0.3,
    )  # fmt: skip
    found = multi_diffusion(Classed(), SHAPE, size=(10, 14), stride=(10, 14), wrap=wrap, **settings)
    assert torch.equal(found, samplers.sample(Classed(), SHAPE, **settings))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("size, stride", [((5, 7), (5, 7)), ((6, 8), (2, 7)), ((10, 9), (10, 2))])
def test_windows_of_an_elementwise_model_are_plain(size, stride, wrap):
    """Averages of equal predictions: what is left is the rounding of the mean."""
    model = Pointwise()
    weight = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(2))
    settings = dict(steps=6, sampler="ddpm", seed=3)
    found = multi_diffusion(
        model, SHAPE, size=size, stride=stride, wrap=wrap, weight=weight, **settings
    )
    assert set(model.shapes) == {(2, 3, *size)}
    assert torch.allclose(found, samplers.sample(Pointwise(), SHAPE, **settings), atol=1e-5)


def test_is_the_weighted_mean_of_the_paper():
    """One step of two windows, by hand; the mean of the steps is the step of the mean."""
    x, weight = draw(1, 1, 4, 6), 0.5 + torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    found = multi_diffusion(Local(), x, size=(4, 4), stride=(4, 2), weight=weight, steps=1)
    run = Run(Local(), x, steps=1)
    summed, total = torch.zeros(1, 1, 4, 6), torch.zeros(4, 6)
    for start in (0, 2):
        part = x[..., start : start + 4]
        stepped = Run(Local(), part, steps=1).step(0, Local()(part, run.times[:1]))
        summed[..., start : start + 4] += weight * stepped
        total[..., start : start + 4] += weight
    want = summed / total
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-4)  # alpha is 0.006: states of size 100
    unweighted = multi_diffusion(Local(), x, size=(4, 4), stride=(4, 2), steps=1)
    assert not torch.allclose(unweighted, want, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shift", [(0, 3), (4, 0), (4, 9)])
def test_wrapped_windows_have_no_first_place(shift):
    """Shifted by strides, noise gives the shifted sample. An element is in at most four windows,
    whose sum may take another order: to rounding."""
    x = draw(2, 3, 8, 12)
    run = dict(size=(6, 5), stride=(2, 3), wrap=True, steps=6)
    want = multi_diffusion(Local(), x, **run).roll(shift, (2, 3))
    with unchanged(x):
        found = multi_diffusion(Local(), x.roll(shift, (2, 3)), **run)
    assert torch.allclose(found, want, atol=1e-5)
    # Without wrapping, or by less than a stride, there is one.
    other = multi_diffusion(Local(), x.roll(shift, (2, 3)), **run | dict(wrap=False))
    assert not torch.allclose(other, want, atol=1e-3)
    part = multi_diffusion(Local(), x.roll(1, 3), **run)
    assert not torch.allclose(part, multi_diffusion(Local(), x, **run).roll(1, 3), atol=1e-3)


def test_frames_are_a_dimension_like_others():
    x = draw(1, 2, 12, 4, 6)
    run = dict(size=(6, 4, 6), stride=(3, 4, 6), wrap=(True, False, False), steps=5)
    want = multi_diffusion(Local(3), x, **run).roll(3, 2)
    assert torch.allclose(multi_diffusion(Local(3), x.roll(3, 2), **run), want, atol=1e-5)


def test_windows_cover_everything():
    for n, size, stride, wrap in (
        (10, 4, 3, False),
        (11, 4, 4, False),
        (12, 5, 4, True),
        (5, 5, 2, True),
    ):
        cover = torch.zeros(1, 1, n)
        index = torch.arange(n).view(1, 1, n)
        for place in windows((n,), (size,), (stride,), (wrap,)):
            cover[0, 0, crop(index, place, (size,))[0, 0]] += 1
        assert (cover > 0).all()


def test_batch_of_samples_is_each_alone():
    seeds = torch.tensor([5, 6])
    run = dict(size=(6, 8), stride=(4, 6), steps=4, sampler="ddpm")
    whole = multi_diffusion(Local(), SHAPE, seed=seeds, **run)
    for b in range(2):
        alone = multi_diffusion(Local(), (1, *SHAPE[1:]), seed=seeds[b : b + 1], **run)
        assert torch.equal(whole[b : b + 1], alone)


@torch.no_grad()
def test_a_cache_keeps_windows_apart():
    """A cache that reuses nothing is inert. With one that does, windows that do not overlap are
    what each gives alone: features of another window in the place of its own would be seen."""
    net = draw_weights(
        DiT(input_size=8, hidden_size=32, depth=4, num_heads=2, in_channels=2, num_classes=3)
    ).eval()
    x = draw(1, 2, 8, 16)
    run = dict(size=(8, 8), stride=(8, 4), steps=12)
    plain = multi_diffusion(net, x, **run)
    inert = multi_diffusion(net, x, cache=fastdiff.cache.DeepCache(1), **run)
    assert torch.allclose(plain, inert, atol=1e-5)
    cache = fastdiff.cache.DeepCache(3)
    found = multi_diffusion(net, x, size=(8, 8), stride=(8, 8), steps=12, cache=cache)
    alone = [fastdiff.sample(net, part, steps=12, cache=cache) for part in x.split(8, 3)]
    assert torch.allclose(found, torch.cat(alone, 3), atol=1e-5)
    whole = [fastdiff.sample(net, part, steps=12) for part in x.split(8, 3)]
    assert not torch.allclose(found, torch.cat(whole, 3), atol=1e-4)  # the cache is at work


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(size=(6,)), "need 2 numbers each"),
        (dict(size=(6, 15)), "need 1 <= stride <= size <= 14"),
        (dict(stride=(6, 9)), "size, stride are 8, 9"),
        (dict(stride=(3, 7), wrap=True), "stride is 3, need a divisor of 10"),
        (dict(weight=torch.ones(2, 2)), r"weight is \[2, 2\], need \[6, 8\]"),
    ],
)
def test_bad_windows(settings, words):
    with pytest.raises(ValueError, match=words):
        multi_diffusion(Local(), SHAPE, **dict(size=(6, 8), stride=(4, 6), steps=2) | settings)


VIDEO = dict(window=6, overlap=2, steps=5, seed=3)


def frames(n, batch=2):
    return (batch, 2, n, 3, 4)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun"])
def test_continued_is_made_in_one_go(sampler):
    run = VIDEO | dict(sampler=sampler)
    whole = long_video(Local(3), frames(14), **run)
    first = long_video(Local(3), frames(6), **run)
    second = long_video(Local(3), frames(4), after=first.stored, **run)
    third = long_video(Local(3), frames(4), after=second.stored, **run)
    assert torch.equal(torch.cat((first.x, second.x, third.x), 2), whole.x)
    assert torch.equal(third.stored.states, whole.stored.states) and third.stored.frame == 14
    # The states that were stored last are the frames themselves.
    assert torch.equal(first.stored.states[-1], first.x[:, :, -2:])


def test_overlap_is_the_stored_one_bit_for_bit():
    """All that the model sees of the frames in common, level by level."""
    seen = []

    class Watching(Local):
        def __call__(self, x, t, y=None):
            seen.append(x.clone())
            return super().__call__(x, t, y)

    first = long_video(Local(3), frames(6), **VIDEO)
    long_video(Watching(3), frames(4), after=first.stored, **VIDEO)
    assert len(seen) == 5
    for x, stored in zip(seen, first.stored.states[:-1], strict=True):
        assert torch.equal(x[:, :, :2], stored)


def test_one_window_is_plain_from_its_noise():
    whole = long_video(Local(3), frames(6), **VIDEO)
    rows = torch.arange(2)[:, None] * FRAMES + torch.arange(6)
    noise = fastdiff.ops.philox_normal(
        (12, 2, 3, 4), torch.full((12,), 3), rows.flatten(), 0, FRAME_START
    )
    noise = noise.view(2, 6, 2, 3, 4).movedim(1, 2)
    assert torch.equal(whole.x, samplers.sample(Local(3), noise, steps=5, seed=3))


def test_noise_of_a_frame_is_that_of_its_absolute_number():
    """Frames far apart are independent. Were noise numbered within windows, those that do not
    overlap would be copies of each other."""
    run = VIDEO | dict(overlap=0, sampler="ddpm")
    x = long_video(Local(3), frames(18), **run).x
    for a in range(0, 18, 6):
        for b in range(0, a, 6):
            assert not torch.isclose(x[:, :, a : a + 6], x[:, :, b : b + 6]).any(-1).all()
    # An elementwise model does not see windows at all: another layout, the same video.
    one = long_video(Pointwise(3), frames(14), **VIDEO | dict(sampler="ddpm")).x
    other = long_video(Pointwise(3), frames(14), window=5, overlap=2, **_rest()).x
    assert torch.allclose(one, other, atol=1e-6)


def _rest():
    return {k: v for k, v in VIDEO.items() if k not in ("window", "overlap")} | dict(sampler="ddpm")


def test_law_of_the_frames_is_the_sampler_s():
    """Noise of a step that is added apart has the variance of the table."""
    from fastdiff.testing_gaussian import recursion

    model = GaussianModel(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    settings = dict(sampler=DDIM(eta=1.0), steps=10)
    mean, variance = (float(v) for v in recursion(Run(model, (1, 1), **settings), model))

    class Each:
        def __call__(self, x, t, y=None):
            n = x[0].numel()
            return model(x.reshape(-1, 1), t.repeat_interleave(n)).view(x.shape)

    x = long_video(Each(), (40, 1, 20, 8, 4), window=8, overlap=2, **settings).x.double()
    n = x.numel()
    assert abs(x.mean() - mean) < 4 * (variance / n) ** 0.5
    assert abs(x.var() / variance - 1) < 4 * (2 / n) ** 0.5


def test_batch_of_videos_is_each_alone():
    seeds = torch.tensor([5, 6])
    run = VIDEO | dict(sampler="ddpm")
    whole = long_video(Local(3), frames(10), **run | dict(seed=seeds))
    for b in range(2):
        alone = long_video(Local(3), frames(10, 1), **run | dict(seed=seeds[b : b + 1]))
        assert torch.equal(whole.x[b : b + 1], alone.x)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(overlap=6), "window, overlap are 6, 6"),
        (dict(shape=frames(13)), "need 6 \\+ k x 4 frames"),
        (dict(shape=frames(3)), "frames"),
        (
            dict(after=Stored(torch.zeros(6, 2, 2, 3, 3, 4), 6), shape=frames(4)),
            "after has 3 frames",
        ),
        (
            dict(after=Stored(torch.zeros(9, 2, 2, 2, 3, 4), 6), shape=frames(4)),
            "after has 9 levels",
        ),
        (dict(sampler=Euler(s_churn=5.0)), "churn at the first level"),
    ],
)
def test_bad_videos(settings, words):
    with pytest.raises(ValueError, match=words):
        long_video(Local(3), **dict(shape=frames(10)) | VIDEO | settings)
