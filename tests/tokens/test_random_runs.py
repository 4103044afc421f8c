"""Whole runs with settings drawn at random: none fails, none meets NaN, none sees another."""

import os

import pytest
import torch

import fastdiff
from fastdiff import models
from fastdiff.accelerate import acceleration_of
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.run import model_times
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
# CI draws some; FASTDIFF_EXAMPLES=1000 draws as many.
EXAMPLES = int(os.environ.get("FASTDIFF_EXAMPLES", "150"))

RUNS = st.fixed_dictionaries(
    {
        "patch": st.sampled_from([2, 4]),
        "grid": st.tuples(st.integers(1, 7), st.integers(1, 7)),
        "batch": st.integers(1, 3),
        "steps": st.integers(1, 12),
        "sampler": st.sampled_from([*sorted(set(SAMPLERS) - {"lcm"}), "lcm"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "guidance": st.sampled_from([1.0, 3.0]),
        "interval": st.booleans(),
        "masked": st.booleans(),
        "cached": st.sampled_from(["", "schedule", "guidance"]),
        "programs": st.booleans(),
    }
)
POLICIES = st.builds(
    RegionAdaptive,
    ratio=st.floats(0, 1),
    start=st.integers(1, 5),
    resets=st.lists(st.integers(0, 14), max_size=3),
    end=st.one_of(st.none(), st.integers(1, 14)),
    end_ratio=st.one_of(st.none(), st.floats(0, 1)),
    metric=st.sampled_from(["std", "norm", "change"]),
    high=st.floats(0, 1),
    starvation=st.sampled_from([0.0, 0.1, 2.0, 100.0]),
    own_times=st.booleans(),
    most=st.one_of(st.none(), st.integers(1, 6)),
)


def network(patch, prediction):
    config = dict(input_size=4 * patch, patch_size=patch, in_channels=2, hidden_size=16, depth=3,
                  num_heads=2, num_classes=4, learn_sigma=False, prediction=prediction)  # fmt: skip
    return draw_weights(models.DiT(**config)).eval()


NETWORKS = {(p, k): network(p, k) for p in (2, 4) for k in ("flow", "eps")}


def go(model, run, policy, seed):
    shape = (run["batch"], 2, *(run["patch"] * n for n in run["grid"]))
    more = {}
    if run["masked"]:
        g = torch.Generator().manual_seed(seed)
        more["mask"] = (torch.rand(run["batch"], 1, *shape[2:], generator=g) > 0.7).float()
        more["reference"] = torch.randn(shape, generator=g)
    policies = [policy]
    if run["cached"] == "schedule":
        policies.append(fastdiff.cache.Forecast(2, order=1))
    if run["cached"] == "guidance":
        policies.append(fastdiff.cache.GuidanceReuse(2))
    how = dict(
        sampler=run["sampler"], steps=run["steps"], seed=seed,
        classes=torch.arange(run["batch"]), guidance=run["guidance"],
        guidance_interval=(200.0, 800.0) if run["interval"] else None, **more,
    )  # fmt: skip
    out = fastdiff.sample(model, shape, cache=policies, **how)
    if run["programs"]:
        with fastdiff.accelerated(model, cache=policies, exact=False):
            programs = fastdiff.programs(model)
            for _ in range(2):
                assert torch.equal(fastdiff.sample(programs, shape, **how), out)
    return out


@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@hypothesis.given(run=RUNS, policy=POLICIES)
def test_any_run(run, policy):
    prediction = "flow" if run["sampler"] in ("flow_euler", "dpmpp_2m", "heun") else "eps"
    model = NETWORKS[run["patch"], prediction].to(run["dtype"])
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    first = go(model, run, policy, 1)
    assert first.isfinite().all()
    other = {**run, "grid": (2, 3), "batch": 2}
    go(model, other, policy, 2)
    assert torch.equal(go(model, run, policy, 1), first)
    assert acceleration_of(model) is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    calls = len(model_times(model, sampler=run["sampler"], steps=run["steps"]))  # 2 a Heun step
    apart = run["cached"] == "guidance" and not policy.neutral  # branches run one by one: rounding
    if not apart and (policy.neutral or calls <= policy.start):
        plain = go(model, run, RegionAdaptive(1.0), 1)
        assert torch.equal(plain, first)
