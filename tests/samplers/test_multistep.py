"""Multistep samplers where parts of the state were last predicted several calls ago."""

from dataclasses import replace

import torch

import fastdiff
from fastdiff import models
from fastdiff.engine.token_state import PART, gaps_of
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.schedule import VP, Flow
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive


def test_history_of_a_prediction_that_is_linear_in_log_snr():
    """The last x0 before a gap of any length is continued to the call before."""
    for schedule, prediction in ((VP(), "eps"), (VP(), "v"), (Flow(), "flow")):
        table = SAMPLERS["dpmpp_2m"].table(schedule, 12, prediction, None)
        alpha, sigma, _ = schedule.levels(12, "linspace", extra=1)
        lam = (alpha / sigma).log()[:-1]
        if not lam[0].isfinite():
            lam[0] = -100.0  # its x0 is not asked for below
        x0 = 0.3 + 0.2 * lam  # of every call
        for i in range(3, 12):
            for gap in range(1, i):  # not back to an infinite log-SNR
                x = torch.randn(1, 1, 2, 2)
                a_x, a_m = table.multistep.x0[i]
                m = (x0[i].float() - a_x * x) / a_m  # what the network says here
                before = torch.full_like(x, float(x0[i - gap]))
                gaps = torch.full((1, 1, 2, 2), gap)
                got = table.multistep.history(i, x, m, before, gaps)
                want = torch.full_like(got, float(x0[i - 1]))
                assert torch.allclose(got, want, atol=2e-4), (prediction, i, gap)
        first = table.multistep.history(5, x, m, before, torch.ones_like(gaps))
        assert torch.equal(first, before)  # predicted at every call: nothing changes


def test_other_samplers_have_none():
    for name in ("ddim", "euler", "heun", "ddpm"):
        assert SAMPLERS[name].table(VP(), 9, "eps", None).multistep is None


@torch.no_grad()
def test_gaps_are_those_of_the_choices():
    config = dict(input_size=16, patch_size=2, in_channels=3, hidden_size=32, depth=2,
                  num_heads=2, num_classes=5, learn_sigma=False, prediction="flow")  # fmt: skip
    model = draw_weights(models.DiT(**config)).eval()
    policy = RegionAdaptive(0.3, start=2, resets=(6,))
    fastdiff.accelerate(model, cache=policy)
    last, seen = torch.zeros(2, 8, 12, dtype=torch.int64), []
    with fastdiff.request(10) as run:
        run.samples = 2
        for i in range(10):
            x = torch.randn(2, 3, 16, 24)
            model(x, torch.full((2,), 500.0), torch.tensor([1, 2]))
            found = gaps_of(run, model, x)
            want = (i - last)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
            if found is None:
                assert (want <= 1).all()
            else:
                assert torch.equal(found, want)
                seen.append(int(found.max()))
            index = run.state[id(model), PART].index if (id(model), PART) in run.state else None
            if policy.full(i, 10):
                last[:] = i
            else:
                last.view(2, -1).scatter_(1, index, i)
    assert max(seen) > 2
    fastdiff.restore(model)
    how = dict(sampler="dpmpp_2m", steps=10, classes=torch.tensor([1, 2]))
    one, own = (
        fastdiff.sample(model, (2, 3, 16, 24), **how, cache=replace(policy, own_times=on))
        for on in (False, True)
    )
    assert own.isfinite().all() and not torch.equal(one, own)
    for cache in (
        RegionAdaptive(1.0, own_times=True),
        RegionAdaptive(0.3, 9, (9,), own_times=True),
    ):
        plain = fastdiff.sample(model, (2, 3, 16, 24), **how)
        assert torch.equal(fastdiff.sample(model, (2, 3, 16, 24), **how, cache=cache), plain)
