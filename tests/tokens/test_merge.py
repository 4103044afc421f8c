"""Token merging: against loops, exact accounting, batches, networks."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff import models
from fastdiff.testing import draw_weights, load_file
from fastdiff.tokens import Merge
from fastdiff.tokens.merge import plan

networks = load_file(Path(__file__).parents[1] / "integrations" / "networks.py")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own(size=16, **more):
    config = dict(input_size=size, patch_size=2, in_channels=3, hidden_size=32, depth=2,
                  num_heads=2, num_classes=5, learn_sigma=False, prediction="flow")  # fmt: skip
    return draw_weights(models.DiT(**config | more)).eval()


def by_loops(x, height, width, ratio, stride):
    """Lists of the tokens that each kept token stands for, one sample."""
    tokens = range(height * width)
    to = [n for n in tokens if n // width % stride == 0 and n % width % stride == 0]
    sources = [n for n in tokens if n not in to]
    best = []
    for s in sources:
        alike = [float(F.cosine_similarity(x[s], x[d], dim=0)) for d in to]
        best.append((max(alike), to[alike.index(max(alike))]))
    order = sorted(range(len(sources)), key=lambda i: (-best[i][0], i))
    groups = {n: [n] for n in tokens}
    for i in order[: min(int(ratio * len(tokens)), len(sources))]:
        del groups[sources[i]]
        groups[best[i][1]].append(sources[i])
    return groups


@pytest.mark.parametrize(("grid", "stride"), [((4, 4), 2), ((3, 7), 2), ((6, 5), 3), ((1, 8), 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_against_loops(grid, stride, ratio):
    tokens = grid[0] * grid[1]
    x = draw(2, tokens, 6)
    found = plan(x, grid, Merge(ratio, stride))
    for b in range(2):
        groups = by_loops(x[b], *grid, ratio, stride)
        if found is None:
            assert len(groups) == tokens
            continue
        assert found.kept[b].tolist() == sorted(groups)
        assert found.sizes[b].tolist() == [len(groups[n]) for n in sorted(groups)]
        y = found.merge(x)
        want = torch.stack([x[b, groups[n]].mean(0) for n in sorted(groups)])
        assert torch.allclose(y[b], want, atol=1e-6)
        back = found.unmerge(y)[b]
        for i, n in enumerate(sorted(groups)):
            assert all(torch.equal(back[m], y[b, i]) for m in groups[n])


def test_merging_equal_tokens_is_exact():
    """Proportional attention over them is attention over all."""
    x = draw(1, 4, 8)
    pairs = x.repeat_interleave(4, 1)[:, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
    found = plan(pairs, (4, 4), Merge(0.75))
    assert found.sizes.tolist() == [[4.0] * 4]
    assert torch.allclose(found.unmerge(found.merge(pairs)), pairs, atol=1e-6)
    model = own(size=8)
    patches = draw(2, 3, 2, 2, seed=1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    model.pos_embed.data.zero_()  # equal tokens stay equal through all blocks
    t, y = torch.rand(2) * 1000, torch.tensor([1, 2])
    with torch.no_grad():
        plain = model(patches, t, y)
        for ratio, good in ((0.75, True), (0.5, True)):
            with fastdiff.accelerated(model, cache=Merge(ratio)):
                close = torch.allclose(model(patches, t, y), plain, atol=1e-5 * plain.abs().max())
            assert close == good
        with fastdiff.accelerated(model, cache=Merge(0.5, proportional=False)):
            assert not torch.allclose(model(patches, t, y), plain, atol=1e-3 * plain.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("make", [networks.dit, networks.pixart, networks.sd15])
@pytest.mark.parametrize("exact", [True, False])
def test_networks(make, exact):
    model, args, kwargs = make()
    plain = model(*args, **kwargs, return_dict=False)[0]
    before = [dict(m.__dict__) for m in model.modules()]
    outs = []
    for ratio in (0.0, 0.25, 0.6):
        fastdiff.accelerate(model, cache=Merge(ratio), exact=exact)
        outs.append(model(*args, **kwargs, return_dict=False)[0])
        fastdiff.restore(model)
    assert torch.allclose(outs[0], plain, atol=1e-5 * plain.abs().max())
    assert exact or torch.equal(outs[0], plain)
    errors = [float((o - plain).norm() / plain.norm()) for o in outs]
    assert errors[0] < errors[1] < errors[2] < 1
    assert [dict(m.__dict__) for m in model.modules()] == before


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_gives_what_its_samples_give(dtype):
    model = own().to(dtype)
    fastdiff.accelerate(model, cache=Merge(0.5))
    x, t, y = draw(3, 3, 16, 24).to(dtype), torch.rand(3) * 1000, torch.arange(3)
    whole = model(x, t, y)
    assert whole.isfinite().all()
    for b in range(3):
        one = model(x[b : b + 1], t[b : b + 1], y[b : b + 1])
        scale = (2e-2 if dtype == torch.bfloat16 else 1e-5) * whole.abs().max()
        assert torch.allclose(one, whole[b : b + 1], atol=scale)


@torch.no_grad()
def test_one_token_and_training():
    model = own(size=2)
    x, t, y = draw(1, 3, 2, 2), torch.ones(1), torch.tensor([1])
    plain = model(x, t, y)
    fastdiff.accelerate(model, cache=Merge(1.0))
    assert torch.equal(model(x, t, y), plain)
    model = own()
    plain = model(draw(1, 3, 16, 16), t, y)
    fastdiff.accelerate(model, cache=Merge(0.5))
    assert not torch.equal(model(draw(1, 3, 16, 16), t, y), plain)
    assert torch.equal(model.train()(draw(1, 3, 16, 16), t, y), plain)  # off in training


def test_networks_that_cannot_and_bad_settings():
    for make in (networks.sd3, networks.flux, networks.wan):
        with pytest.raises(ValueError, match="attention of several streams"):
            fastdiff.accelerate(make()[0], cache=Merge())
    with pytest.raises(ValueError, match="need one of them"):
        fastdiff.accelerate(own(), cache=[Merge(), fastdiff.tokens.RegionAdaptive()])
    for settings, message in (
        (dict(ratio=1.2), "ratio is 1.2, need a number from 0 to 1"),
        (dict(stride=1), "stride is 1, need an integer of at least 2"),
        (dict(levels=0), "levels is 0, need"),
    ):
        with pytest.raises(ValueError, match=f"Merge: {message}"):
            Merge(**settings)
