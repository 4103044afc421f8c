"""ConPreDiff: matchings against brute force, neighbourhoods by hand, a network that is the same."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from fastdiff import adapters
from fastdiff.adapters import ConPreDiff, conprediff, context_loss
from fastdiff.adapters.conprediff import assign, neighbours, offsets, set_distance, sinkhorn
from fastdiff.models.baseline import PlainDiT, PlainUNet
from fastdiff.testing import draw_weights


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet():
    model = PlainUNet(
        in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        transformer_depth=(0, 1), heads=2, groups=8, cross_attention_dim=16, num_classes=10,
    )  # fmt: skip
    t, y = torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    return draw_weights(model), (draw(2, 3, 8, 12), t, y)


def price(cost, index):
    return cost.gather(-1, index[..., None]).sum((-1, -2))


def least(cost):
    """By trying all."""
    q = cost.shape[-1]
    rows = torch.arange(q)
    every = [cost[..., rows, list(p)].sum(-1) for p in itertools.permutations(range(q))]
    return torch.stack(every).amin(0)


@pytest.mark.parametrize("q", range(1, 8))
def test_matching_is_the_cheapest(q):
    cost = draw(3, 5, q, q, seed=q, dtype=torch.float64).square()
    index = assign(cost)
    assert torch.equal(index.sort(-1).values, torch.arange(q).expand(3, 5, q))
    assert (price(cost, index) - least(cost)).abs().max() < 1e-12


@pytest.mark.parametrize("q", [8, 9, 12])
def test_matching_of_larger_sets_is_that_of_scipy(q):
    cost = draw(11, q, q, seed=q, dtype=torch.float64)
    for c, index in zip(cost, assign(cost), strict=True):
        rows, columns = linear_sum_assignment(c.numpy())
        assert abs(c[range(q), index].sum() - c.numpy()[rows, columns].sum()) < 1e-12


def test_matching_in_parts_is_the_same(monkeypatch):
    cost = draw(23, 6, 6)
    want = assign(cost)
    monkeypatch.setattr(conprediff, "_POINTS", 5 << 6)
    assert torch.equal(assign(cost), want)
    assert assign(cost[:0]).shape == (0, 6)


@pytest.mark.parametrize("q", [1, 2, 5, 9])
def test_distance_of_permuted_copies_is_0(q):
    a = draw(4, 7, q, 3)
    order = torch.stack([torch.randperm(q, generator=torch.Generator().manual_seed(i)) for i in
                         range(28)]).view(4, 7, q, 1)  # fmt: skip
    b = a.gather(2, order.expand(a.shape))
    assert torch.equal(set_distance(a, b), torch.zeros(4, 7))


@pytest.mark.parametrize("q", [3, 8])
def test_one_dimension_is_sorted_matching(q):
    a, b = draw(6, q, 1, dtype=torch.float64), draw(6, q, 1, seed=2, dtype=torch.float64)
    want = (a.sort(1).values - b.sort(1).values).square().mean((1, 2))
    assert (set_distance(a, b) - want).abs().max() < 1e-12


def test_one_value_is_the_mean_square_error():
    a, b = draw(2, 15, 1, 4), draw(2, 15, 1, 4, seed=2)
    assert abs(context_loss(a, b) - F.mse_loss(a, b)) < 1e-6


@pytest.mark.parametrize("q", [4, 8, 16])
def test_gradient_is_that_of_matched_pairs(q):
    a = draw(3, q, 2, dtype=torch.float64).requires_grad_()
    b = draw(3, q, 2, seed=2, dtype=torch.float64)
    set_distance(a, b).sum().backward()
    cost = torch.cdist(a.detach(), b).square()
    if q <= conprediff.EXACT:
        want = 2 * (a - b.gather(1, assign(cost)[..., None].expand(b.shape))) / q
    else:
        plan, _ = sinkhorn(cost)
        want = 2 * (a * plan.sum(2, keepdim=True) - plan @ b)
    assert (a.grad - want).abs().max() < 1e-12
    if q <= conprediff.EXACT:  # the matching is constant nearby
        assert torch.autograd.gradcheck(lambda x: set_distance(x, b), a)


@pytest.mark.parametrize("q", [2, 6, 16, 40])
def test_plan_is_one_and_its_bound_holds(q):
    cost = torch.cdist(draw(5, q, 3, dtype=torch.float64), draw(5, q, 3, seed=2).double()).square()
    plan, gap = sinkhorn(cost, gap=0.02)
    assert plan.min() >= 0
    assert (plan.sum(1) - 1 / q).abs().max() < 1e-12 and (plan.sum(2) - 1 / q).abs().max() < 1e-12
    for c, p, g in zip(cost, plan, gap, strict=True):
        rows, columns = linear_sum_assignment(c.numpy())
        missed = (p * c).sum() - c.numpy()[rows, columns].sum() / q
        assert -1e-12 < missed <= g + 1e-12 and g <= 0.02 * c.mean()


def test_a_plan_that_had_no_time_says_how_far_it_may_be():
    cost = torch.cdist(draw(5, 16, 3), draw(5, 16, 3, seed=2)).square()
    _, gap = sinkhorn(cost, gap=0.001, rounds=1)
    assert (gap > 0.001 * cost.mean((1, 2))).all()


@pytest.mark.parametrize("border", conprediff.BORDERS)
def test_neighbours_by_hand(border):
    x, places = draw(2, 3, 4, 6), offsets([1, 2])
    found = neighbours(x, places, border).view(2, 4, 6, 16, 3)
    assert len(places) == 16 and (0, 0) not in places

    def at(i, n):
        if border == "nearest":
            return min(max(i, 0), n - 1)
        if border == "mirror":
            return -i if i < 0 else 2 * (n - 1) - i if i >= n else i
        return i % n

    for i, j, (k, (di, dj)) in itertools.product(range(4), range(6), enumerate(places)):
        inside = 0 <= i + di < 4 and 0 <= j + dj < 6
        want = x[:, :, at(i + di, 4), at(j + dj, 6)] * (inside or border != "zero")
        assert torch.equal(found[:, i, j, k], want)


def test_removed_head_is_the_plain_network_and_gradients_reach_it():
    model, args = unet()
    names = list(model.state_dict())
    with torch.no_grad():
        want = model(*args)
    context = ConPreDiff(model, "conv_norm_out", features=16, channels=3, strides=[1], hidden=8)
    clean = draw(2, 3, 8, 12, seed=7)
    out = model(*args)
    assert torch.equal(out, want)
    loss = F.mse_loss(out, clean) + context.loss(clean, torch.tensor([1.0, 0.5]))
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in context.parameters())
    assert model.conv_in.weight.grad.abs().max() > 0
    context.detach()
    assert list(model.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(model(*args), want)


def test_weight_of_a_sample_and_sets_of_strides():
    a, b = draw(2, 5, 8, 3), draw(2, 5, 8, 3, seed=2)
    each = [context_loss(a[i : i + 1], b[i : i + 1], groups=2) for i in (0, 1)]
    both = context_loss(a, b, torch.tensor([2.0, 0.0]), groups=2)
    assert abs(both - each[0]) < 1e-6
    parts = [set_distance(a[:, :, i : i + 4], b[:, :, i : i + 4]).mean() / 3 for i in (0, 4)]
    assert abs(context_loss(a, b, groups=2) - sum(parts) / 2) < 1e-6


def test_tokens_bf16_and_file(tmp_path):
    model = draw_weights(
        PlainDiT(input_size=8, patch_size=1, in_channels=4, hidden_size=32, depth=2, num_heads=2)
    ).bfloat16()
    context = ConPreDiff(model, 1, features=32, channels=4)
    clean = draw(2, 4, 8, 6)
    model(clean, torch.tensor([10.0, 900.0]), torch.tensor([3, 5]))
    context.loss(clean.bfloat16()).backward()
    context.save(tmp_path / "a")
    context.detach()
    twin = adapters.load(model, tmp_path / "a")
    assert isinstance(twin, ConPreDiff) and twin.places == context.places
    for a, b in zip(context.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_the_context():
    """Of an image whose right neighbour is known everywhere: stripes."""
    model, args = unet()
    x = torch.linspace(-1, 1, 8 * 12).view(1, 1, 8, 12).expand(2, 3, 8, 12).contiguous()
    context = ConPreDiff(model, "conv_norm_out", features=16, channels=3, strides=[1], hidden=32)
    rate = torch.optim.Adam([*model.parameters(), *context.trainable()], 1e-2)
    losses = []
    for _ in range(60):
        model(x, *args[1:])
        loss = context.loss(x)
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(block=1), "no list of blocks"),
        (dict(strides=[]), r"strides is \[\]"),
        (dict(strides=[0]), "strides is 0"),
        (dict(border="none"), "border 'none'"),
        (dict(channels=0), "channels is 0"),
    ],
)
def test_errors_leave_the_network_alone(settings, words):
    model, _ = unet()
    with pytest.raises(ValueError, match=words):
        ConPreDiff(model, **{**dict(block="conv_in", features=16, channels=3), **settings})
    assert "_fastdiff_adapters" not in model.__dict__


def test_errors_of_functions():
    for words, do in {
        "q to 12": lambda: assign(draw(13, 13)),
        "need that of a": lambda: set_distance(draw(2, 3), draw(3, 3)),
        "divisor of 4": lambda: context_loss(draw(1, 1, 4, 2), draw(1, 1, 4, 2), groups=3),
        r"need \[1\]": lambda: context_loss(draw(1, 1, 4, 2), draw(1, 1, 4, 2), draw(3)),
        "need one of nearest": lambda: neighbours(draw(1, 1, 4, 4), [(0, 1)], "no"),
        r"reach \(4, 0\)": lambda: neighbours(draw(1, 1, 4, 4), [(4, 0)], "mirror"),
        "gap is 0": lambda: sinkhorn(draw(3, 3), 0),
    }.items():
        with pytest.raises(ValueError, match=words):
            do()
    model, args = unet()
    context = ConPreDiff(model, "conv_norm_out", features=9, channels=3)
    model(*args)
    with pytest.raises(ValueError, match="with F 9"):
        context.loss(draw(2, 3, 8, 12))
