"""Experts by noise level: every row goes to the one expert of its range."""

import pytest
import torch
from torch import nn

from fastdiff.experts import NoiseAdapters, NoiseExperts, noise_bins, uniform_edges


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.rows = nn.Linear(6, 6), []

    def forward(self, x, t, y=None):
        self.rows.append(t.tolist())
        out = self.layer(x) + t[:, None, None] / 1000
        return out if y is None else out + y[:, None, None]


def test_ranges_are_half_open_and_the_last_is_closed():
    edges = torch.tensor(uniform_edges(5))
    t = torch.tensor([0.0, 199.99, 200.0, 400.0, 799.0, 800.0, 999.0, 1000.0])
    assert noise_bins(t, edges).tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    assert noise_bins(torch.tensor([-1.0, 2000.0]), edges).tolist() == [0, 4]
    assert torch.equal(noise_bins(t[:7].long(), edges), noise_bins(t[:7].long().float(), edges))


def test_a_mixed_batch_is_its_rows_alone():
    model = NoiseExperts([Net(i) for i in range(4)], uniform_edges(4))
    t = torch.tensor([500.0, 0.0, 249.9, 250.0, 1000.0, 750.0])
    x, y = torch.randn(6, 3, 6), torch.arange(6.0)
    got = model(x, t, y)
    for b in range(6):
        want = model(x[b : b + 1], t[b : b + 1], y[b : b + 1])
        torch.testing.assert_close(got[b : b + 1], want)
    seen = [sorted(level for call in net.rows for level in call) for net in model.experts]
    assert seen == [
        [0.0] * 2 + [t[2].item()] * 2,
        [250.0] * 2,
        [500.0] * 2,
        [750.0] * 2 + [1000.0] * 2,
    ]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(model(x[order], t[order], y[order]), got[order])


def test_one_expert_is_the_module_itself_and_unused_ones_do_not_run():
    net = Net(0)
    x, t = torch.randn(3, 2, 6), torch.tensor([1.0, 400.0, 999.0])
    assert torch.equal(NoiseExperts([net], [0, 1000])(x, t), net(x, t))
    two = NoiseExperts([Net(1), Net(2)], [0, 500, 1000])
    two(x, torch.tensor(700.0).expand(3))
    assert two.experts[0].rows == [] and len(two.experts[1].rows) == 1
    assert two(x[:0], t[:0]).shape == (0, 2, 6)


def test_gradients_reach_the_experts_that_ran():
    model = NoiseExperts([Net(0), Net(1), Net(2)], [0, 300, 600, 1000])
    x = torch.randn(4, 2, 6, requires_grad=True)
    model(x, torch.tensor([700.0, 0.0, 800.0, 10.0])).sum().backward()
    assert x.grad is not None and model.experts[1].layer.weight.grad is None
    assert model.experts[0].layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_equal_a_loop_over_rows_and_the_merged_weight(dtype):
    torch.manual_seed(0)
    layer = NoiseAdapters(nn.Linear(24, 16).to(dtype), 4, 3, scale=0.5)
    x, t = torch.randn(7, 5, 24).to(dtype), torch.tensor([0, 250, 999, 500, 20, 1000, 260])
    assert torch.equal(layer(x, t), layer.linear(x))  # what adapters add starts at 0
    nn.init.normal_(layer.up, std=0.1)
    got = layer(x, t)
    which = noise_bins(t, layer.edges)
    for b in range(7):
        merged = nn.functional.linear(x[b], layer.merged(int(which[b])), layer.linear.bias)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got[b], merged, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer(x[b : b + 1], t[b : b + 1])[0], got[b])


def test_adapters_train():
    layer = NoiseAdapters(nn.Linear(8, 8), 3, 2)
    nn.init.normal_(layer.up)
    x = torch.randn(4, 8)
    layer(x, torch.tensor([0.0, 10.0, 900.0, 950.0])).square().sum().backward()
    assert layer.up.grad[1].abs().sum() == 0 and layer.down.grad[1].abs().sum() == 0
    assert layer.up.grad[0].abs().sum() > 0 and layer.down.grad[2].abs().sum() > 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: uniform_edges(0), "count is 0"),
        (lambda: NoiseExperts([Net(0)], [0, 1, 2]), r"edges is \[0, 1, 2\], need 2 ascending"),
        (lambda: NoiseExperts([Net(0), Net(1)], [0, 5, 5]), "need 3 ascending numbers"),
        (lambda: NoiseAdapters(nn.Linear(2, 2), 2, 0), "rank is 0"),
        (lambda: NoiseAdapters(nn.Linear(2, 2), 2, 1, [0, 1]), "need 3 ascending"),
        (lambda: NoiseExperts([Net(0)], [0, 9])(torch.ones(2, 1, 6), torch.ones(1)), r"need \[2\]"),
        (
            lambda: NoiseExperts([Net(0)], [0, 9])(torch.ones(1, 1, 6), torch.tensor([9.5])),
            "level 9.5, need 0.0 to 9.0",
        ),
        (
            lambda: NoiseExperts([Net(0)], [0, 9])(torch.ones(1, 1, 6), torch.tensor([torch.nan])),
            "level nan",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
