"""The rebuilt network gives the recorded noise of step 0, so that a drift of seeds is seen."""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.engine.token_state import PART
from fastdiff.tokens import RegionAdaptive

_spec = importlib.util.spec_from_file_location(
    "ras_oracle", Path(__file__).with_name("ras_oracle.py")
)


@pytest.mark.parametrize("run", ["std", "l2norm"])
def test_dense_step_0(run):
    pytest.importorskip("diffusers")
    oracle = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(oracle)
    x, text, pooled = oracle.inputs()
    with torch.no_grad():
        t = torch.full((2,), 1000.0)
        u, c = oracle.network()(torch.cat([x, x]), text, pooled, t, return_dict=False)[0].chunk(2)
    noise = u + oracle.GUIDANCE * (c - u)
    torch.testing.assert_close(noise, oracle.expected(run)["noise0"].float(), rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("run", ["std", "l2norm"])
def test_whole_runs(run):
    """The same tokens at every step, and the same latents."""
    diffusers = pytest.importorskip("diffusers")
    oracle = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(oracle)
    (ratio, high), want = oracle.RUNS[run], oracle.expected(run)
    policy = RegionAdaptive(
        ratio, start=oracle.START, resets=oracle.RESETS, metric="std" if run == "std" else "norm",
        high=high, starvation=oracle.STARVATION, compatible=True,
    )  # fmt: skip
    net = fastdiff.accelerate(oracle.network(), cache=policy)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=oracle.SHIFT)
    scheduler.set_timesteps(oracle.STEPS)
    x, text, pooled = oracle.inputs()
    with fastdiff.request(oracle.STEPS) as now:
        now.samples = 1
        for i, t in enumerate(scheduler.timesteps):
            out = net(x.repeat(2, 1, 1, 1), text, pooled, t.expand(2), return_dict=False)[0]
            u, c = out.chunk(2)
            now.prediction = u + oracle.GUIDANCE * (c - u)
            active = want["active"][i]
            index = now.state[id(net), PART].index
            if active[0] >= 0:
                assert index[0].tolist() == sorted(active.tolist()), f"step {i}"
            else:
                assert now.trace[-1].how == "full", f"step {i}"
            x = scheduler.step(now.prediction, t, x, return_dict=False)[0]
    error = (x - want["final"]).norm() / want["final"].norm()
    assert error < 1e-3
