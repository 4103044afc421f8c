"""The policy: schedule, metric, region, bad input."""

import pytest
import torch

from fastdiff.cache.parse import parse
from fastdiff.tokens import RegionAdaptive
from fastdiff.tokens.region import forced_tokens, score


def test_schedule():
    policy = RegionAdaptive(0.25, start=3, resets=(9, 5), end=12, high=0.3)
    full = [policy.full(i, 14) for i in range(14)]
    assert [i for i, dense in enumerate(full) if dense] == [0, 1, 2, 5, 9, 12, 13]
    assert policy.left_out(4, 14, 100) == (52, 23) and policy.left_out(5, 14, 100) == (0, 0)
    assert RegionAdaptive(0.5, high=0.4).left_out(4, 28, 7) == (1, 2)  # 4 of 7 are computed
    assert sum(RegionAdaptive(0.0).left_out(4, 28, 7)) == 6
    assert RegionAdaptive(0.5, high=0.3, compatible=True).left_out(4, 28, 256) == (89, 38)
    assert not RegionAdaptive(0.5, resets=(40,)).full(27, 28)  # a reset past the end is no error
    assert RegionAdaptive(1.0).neutral and all(RegionAdaptive(1.0).full(i, 9) for i in range(9))


def test_ratio_changes_in_a_straight_line():
    policy = RegionAdaptive(0.6, start=2, resets=(), end_ratio=0.2)
    shares = [policy.share(i, 7) for i in range(7)]
    assert shares == pytest.approx([1, 1, 0.6, 0.5, 0.4, 0.3, 0.2])
    assert policy.share(4, None) == 0.6  # nobody knows where the run ends


def test_metric():
    noise = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    got = score(noise, "std")
    want = [[sum(noise[b, n, p].std() for p in range(4)) / 4 for n in range(5)] for b in range(2)]
    assert torch.allclose(got, torch.tensor(want))
    want = [[sum(noise[b, n, p].norm() for p in range(4)) / 4 for n in range(5)] for b in range(2)]
    assert torch.allclose(score(noise, "norm"), torch.tensor(want))
    one = noise[..., :1]
    assert torch.allclose(score(one, "std"), one[..., 0].std(dim=2))  # over pixels: one channel
    assert torch.equal(score(one[:, :, :1], "std"), one[:, :, 0, 0].abs())
    assert score(noise.half(), "norm").dtype == torch.float32


def test_region_and_halo():
    mask = torch.zeros(1, 8, 12, dtype=torch.bool)
    mask[0, 3, 5] = True  # token (1, 2) of a grid of 4 x 6
    grid = forced_tokens(mask, (4, 6), 0).view(4, 6)
    assert grid.nonzero().tolist() == [[1, 2]]
    grid = forced_tokens(mask, (4, 6), 1).view(4, 6)
    assert grid.sum() == 9 and grid[0:3, 1:4].all()
    video = torch.zeros(2, 3, 8, 12, dtype=torch.bool)
    video[1, 2, 0, 0] = True
    grid = forced_tokens(video, (3, 4, 6), 1).view(2, 3, 4, 6)
    assert not grid[0].any() and grid[1, 1:, :2, :2].all() and grid.sum() == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ratio=1.5), "ratio is 1.5, need a number from 0 to 1"),
        (dict(ratio="half"), "ratio is 'half', need"),
        (dict(start=0), "start is 0, need an integer of at least 1"),
        (dict(resets=(3, -1)), "resets is -1, need an integer of at least 0"),
        (dict(metric="l1"), "metric is 'l1', need one of std, norm, change"),
        (dict(high=-0.1), "high is -0.1, need"),
        (dict(starvation=float("nan")), "starvation is nan, need"),
        (dict(most=0), "most is 0, need"),
        (dict(end_ratio=2), "end_ratio is 2, need"),
        (dict(compatible=True, most=3), "most is 3 and compatible is set, need one of them"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"RegionAdaptive: {message}"):
        RegionAdaptive(**settings)


def test_as_text():
    assert parse("tokens:0.25,start=3,resets=8+16") == RegionAdaptive(0.25, 3, (8, 16))
