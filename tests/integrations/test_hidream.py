"""HiDream's feed-forwards of experts in the exact mode: same output, one stack, and back."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.dispatch import record
from fastdiff.engine import capture_check
from fastdiff.integrations import experts
from fastdiff.testing import load_file

networks = load_file(Path(__file__).with_name("networks.py"))
OPS = {"moe_route", "grouped_linear", "moe_combine"}


@torch.no_grad()
def run(model, args, kwargs):
    return model(*args, **kwargs, return_dict=False)[0]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def layers(model):
    return [m for m in model.modules() if type(m).__name__ == "MOEFeedForwardSwiGLU"]


def weights(layer):
    return [p for e in layer.experts for p in e.parameters()]


@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
def test_same_output_and_back(size):
    model, _, kwargs = networks.hidream()
    args = (networks.draw(2, 4, *size),)
    want, count = run(model, args, kwargs), len(layers(model))
    params = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in params.items()}
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert count == 3
    fastdiff.accelerate(model)
    parts = fastdiff.summary(model)
    assert f"{count} MOEFeedForwardSwiGLU on moe_route, grouped_linear and moe_combine" in parts
    with record() as rows:
        got = run(model, args, kwargs)
    assert error(got, want) < 5e-6
    assert OPS <= {op for op, _ in rows} and ("exact mode", "own forward") not in rows
    assert sum(n for (op, _), n in rows.items() if op == "moe_route") == count
    fastdiff.restore(model)
    after = dict(model.named_parameters())
    assert after.keys() == params.keys()
    for name, p in after.items():
        assert p is params[name] and torch.equal(p, values[name]) and p.requires_grad
        assert p.untyped_storage().nbytes() == p.nbytes, name
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == {
        n: set(d) for n, d in before.items()
    }
    assert torch.equal(run(model, args, kwargs), want)


def test_bfloat16_no_worse_than_plain():
    model, args, kwargs = networks.hidream()
    want = run(model, args, kwargs)
    model = model.bfloat16()
    args = tuple(x.bfloat16() for x in args)
    kwargs = {k: x.bfloat16() if x.is_floating_point() else x for k, x in kwargs.items()}
    plain = run(model, args, kwargs)
    fastdiff.accelerate(model)
    got = run(model, args, kwargs)
    assert got.dtype == plain.dtype and error(got, want) < 1.5 * error(plain, want)


def test_parameters_share_one_stack():
    model, args, kwargs = networks.hidream()
    layer, want = layers(model)[0], run(model, args, kwargs)
    bytes_before = sum(p.nbytes for p in weights(layer))
    with fastdiff.accelerated(model):
        held = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in weights(layer)}
        assert len(held) == 2 and sum(s.nbytes() for s in held.values()) == bytes_before
        with torch.no_grad():  # in place, and by another state
            layer.experts[1].w1.weight.mul_(2.0)
        changed = run(model, args, kwargs)
        other = copy.deepcopy(dict(model.state_dict()))
        for name in other:
            if "experts.2.w2" in name and "shared" not in name:
                other[name] = other[name] * 3
        model.load_state_dict(other)
        again = run(model, args, kwargs)
    assert error(changed, want) > 1e-5 and error(again, changed) > 1e-5
    assert error(run(model, args, kwargs), again) < 5e-6  # the changes stay


def test_moved_weights_are_stacked_anew():
    model, args, kwargs = networks.hidream()
    want = run(model, args, kwargs)
    fastdiff.accelerate(model)
    model.double().float()  # every parameter's data is replaced
    layer = layers(model)[0]
    assert experts._stacks(experts._experts(layer)) is None
    with record() as rows:
        assert error(run(model, args, kwargs), want) < 5e-6
    assert OPS <= {op for op, _ in rows}
    assert experts._stacks(experts._experts(layer)) is not None
    with torch.inference_mode():
        model.double().float()
        assert error(model(*args, **kwargs, return_dict=False)[0], want) < 5e-6


def test_nothing_waits_for_the_device():
    """Its own forward reads counts on the host, ours nothing."""
    model, _, _ = networks.hidream()
    layer = layers(model)[0]
    x = networks.draw(2, 9, 32)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names = set()
    with torch.no_grad(), Seen():
        want = layer(x)
    assert "bincount" in names
    fastdiff.accelerate(model)
    with torch.no_grad():
        found = capture_check.check(lambda x: layer(x), (x,))
        assert found.ok, str(found)
        assert error(layer(x), want) < 5e-6


def test_hooks_adapters_and_training_run_the_plain_forward():
    model, args, kwargs = networks.hidream()
    layer = layers(model)[0]
    fastdiff.accelerate(model)
    calls = []
    for module in (layer.experts[3].w2, layer.experts[1], layer.gate):
        before, _ = run(model, args, kwargs), calls.clear()
        hook = module.register_forward_hook(lambda m, a, out: calls.append(1))
        assert error(run(model, args, kwargs), before) < 5e-6 and calls
        hook.remove()
    model.train()
    with record() as rows:
        run(model, args, kwargs)
    assert "moe_route" not in {op for op, _ in rows}
    model.eval()
    x = args[0].clone().requires_grad_()
    try:
        model(x, **kwargs, return_dict=False)
    finally:
        fastdiff.restore(model)


def test_lora_on_an_expert():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["w1", "w3"])
    model, args, kwargs = networks.hidream()
    torch.manual_seed(3)
    model.add_adapter(config)
    want = run(model, args, kwargs)
    model, args, kwargs = networks.hidream()
    fastdiff.accelerate(model)
    torch.manual_seed(3)
    model.add_adapter(config)
    assert error(run(model, args, kwargs), want) < 5e-6
    fastdiff.restore(model)
    assert error(run(model, args, kwargs), want) < 5e-6
    fastdiff.accelerate(model)
    assert "3 MOEFeedForwardSwiGLU, which has peft." in fastdiff.summary(model)


def test_a_failing_accelerate_leaves_no_stack():
    model, _, _ = networks.hidream()
    with pytest.raises(ValueError, match="cache"):
        fastdiff.accelerate(model, cache=object())
    for p in weights(layers(model)[0]):
        assert p.untyped_storage().nbytes() == p.nbytes
