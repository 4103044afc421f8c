"""The rebuilt network gives the recorded noise of step 0, so that a drift of seeds is seen."""

import importlib.util
from pathlib import Path

import pytest
import torch

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
