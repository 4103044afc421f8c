"""Exact mode: networks of diffusers on our operations give what they gave, and come back as they
were."""

import threading
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.cache import DeepCache, EncoderPropagation
from fastdiff.dispatch import record
from fastdiff.testing import load_file

networks = load_file(Path(__file__).with_name("networks.py"))

every = pytest.mark.parametrize("make", networks.NETWORKS, ids=lambda f: f.__name__)
some = pytest.mark.parametrize(
    "make", (networks.sd35, networks.flux, networks.sd15), ids=lambda f: f.__name__
)


@torch.no_grad()
def run(model, args, kwargs):
    return model(*args, **kwargs, return_dict=False)[0]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def attributes(model):
    return {name: dict(m.__dict__) for name, m in model.named_modules()}


@every
def test_same_output_and_back(make):
    model, args, kwargs = make()
    want, before = run(model, args, kwargs), attributes(model)
    fastdiff.accelerate(model)
    with record() as rows:
        got = run(model, args, kwargs)
    assert error(got, want) < 5e-6 and got.stride() == want.stride()
    assert {"attention", "linear"} <= {op for op, _ in rows}
    assert len({op for op, _ in rows}) > 2, rows
    fastdiff.restore(model)
    after = attributes(model)
    assert {name: set(d) for name, d in after.items()} == {n: set(d) for n, d in before.items()}
    assert torch.equal(run(model, args, kwargs), want)


@every
def test_bfloat16_no_worse_than_plain(make):
    model, args, kwargs = make()
    want = run(model, args, kwargs)

    def half(x):
        if isinstance(x, dict):
            return {k: half(v) for k, v in x.items()}
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.bfloat16() if floating else x

    model = model.bfloat16()
    args, kwargs = tuple(half(x) for x in args), half(kwargs)
    plain = run(model, args, kwargs)
    fastdiff.accelerate(model)
    got = run(model, args, kwargs)
    assert got.dtype == plain.dtype
    assert error(got, want) < 1.5 * error(plain, want)


@every
def test_samples_of_a_batch_do_not_meet(make):
    model, args, kwargs = make()
    fastdiff.accelerate(model)
    both = run(model, args, kwargs)

    def second(x):
        if isinstance(x, dict):
            return {k: second(v) for k, v in x.items()}
        return x[1:] if isinstance(x, torch.Tensor) and len(x) == 2 else x

    alone = run(model, tuple(second(x) for x in args), second(kwargs))
    assert error(alone, both[1:]) < 5e-6


@some
def test_gradients_and_training_run_the_plain_forward(make):
    model, args, kwargs = make()
    x = args[0].clone().requires_grad_()
    model(x, *args[1:], **kwargs, return_dict=False)[0].sum().backward()
    want, x.grad = x.grad, None
    fastdiff.accelerate(model)
    with record() as rows:
        model(x, *args[1:], **kwargs, return_dict=False)[0].sum().backward()
    assert torch.equal(x.grad, want) and set(rows) == {("exact mode", "own forward")}
    model.train()
    with record() as rows:
        run(model, args, kwargs)
    assert set(rows) == {("exact mode", "own forward")}


@some
def test_autocast_runs_the_plain_forward(make):
    model, args, kwargs = make()
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, args, kwargs)
        fastdiff.accelerate(model)
        assert torch.equal(run(model, args, kwargs), want)


@pytest.mark.parametrize("first", ["lora", "accelerate"])
@some
def test_lora(make, first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "proj", "to_out.0"]
    )

    def adapted(steps):
        model, args, kwargs = make()
        bare = run(model, args, kwargs)
        for step in steps:
            torch.manual_seed(3)
            fastdiff.accelerate(model) if step == "accelerate" else model.add_adapter(config)
        return bare, run(model, args, kwargs), model, (args, kwargs)

    bare, want, _, _ = adapted(["lora"])
    order = ["lora", "accelerate"] if first == "lora" else ["accelerate", "lora"]
    _, got, model, inputs = adapted(order)
    assert error(want, bare) > 1e-3  # the adapter does something
    assert error(got, want) < 5e-6
    model.disable_adapters()
    assert error(run(model, *inputs), bare) < 5e-6


def test_own_processor_is_called_and_named():
    model, args, kwargs = networks.sd15()
    want, calls = run(model, args, kwargs), []

    class Mine:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            calls.append(1)
            return torch.zeros_like(hidden_states)

    mine = Mine()
    name = next(iter(model.attn_processors))
    module = model.get_submodule(name.removesuffix(".processor"))
    stock = module.processor
    fastdiff.accelerate(model)
    assert not any("left" in part for part in model._fastdiff.parts)
    module.set_processor(mine)  # after
    changed = run(model, args, kwargs)
    assert calls and error(changed, want) > 1e-3
    fastdiff.restore(model)
    plain = run(model, args, kwargs)
    assert error(changed, plain) < 5e-6
    fastdiff.accelerate(model)  # before
    assert any("left: 1 Attention, which has Mine" in part for part in model._fastdiff.parts)
    assert error(run(model, args, kwargs), plain) < 5e-6
    module.set_processor(stock)
    assert error(run(model, args, kwargs), want) < 5e-6


def test_forwards_of_others_stay_and_are_named():
    model, args, kwargs = networks.dit()
    block, calls = model.transformer_blocks[0], []
    plain = block.forward

    def forward(*a, **k):
        calls.append(1)
        return plain(*a, **k)

    block.forward = forward
    fastdiff.accelerate(model)
    run(model, args, kwargs)
    assert calls
    assert any(
        "left: 1 BasicTransformerBlock, which has a forward" in p for p in model._fastdiff.parts
    )
    fastdiff.restore(model)
    assert block.__dict__["forward"] is forward


def test_hooks_on_a_layer_see_and_change_its_output():
    model, args, kwargs = networks.flux()
    linear = model.transformer_blocks[0].ff.net[0].proj
    norm = model.transformer_blocks[1].norm2
    linear.register_forward_hook(lambda m, a, out: 0.5 * out)
    norm.register_forward_hook(lambda m, a, out: out + 1)
    want = run(model, args, kwargs)
    fastdiff.accelerate(model)
    assert error(run(model, args, kwargs), want) < 5e-6


def test_controlnet_residuals_and_masks():
    model, args, kwargs = networks.sd15()
    draw = networks.draw
    skips = [(32, 16, 24), (32, 16, 24), (32, 8, 12), (64, 8, 12)]
    kwargs["down_block_additional_residuals"] = tuple(
        draw(2, *shape, seed=i) for i, shape in enumerate(skips)
    )
    kwargs["mid_block_additional_residual"] = draw(2, 64, 8, 12)
    want = run(model, args, kwargs)
    fastdiff.accelerate(model)
    assert error(run(model, args, kwargs), want) < 5e-6
    kwargs["encoder_attention_mask"] = None
    assert error(run(model, args, kwargs), want) > 1e-4  # the mask was in force


def test_another_attention_backend_stays_in_force():
    model, args, kwargs = networks.flux()
    fastdiff.accelerate(model)
    model.set_attention_backend("_native_math")
    with record() as rows:
        run(model, args, kwargs)
    assert "attention" not in {op for op, _ in rows}
    model.set_attention_backend("native")


def test_other_releases_of_diffusers_are_left(monkeypatch):
    import diffusers

    model, args, kwargs = networks.dit()
    want = run(model, args, kwargs)
    monkeypatch.setattr(diffusers, "__version__", "9.1.0")
    fastdiff.accelerate(model)
    assert any("diffusers 9.1.0" in part for part in model._fastdiff.parts)
    with record() as rows:
        assert error(run(model, args, kwargs), want) < 5e-6
    assert {op for op, _ in rows} == {"linear"}


def test_two_threads():
    model, args, kwargs = networks.sdxl()
    fastdiff.accelerate(model)
    want, seen = run(model, args, kwargs), []

    def work():
        seen.extend(torch.equal(run(model, args, kwargs), want) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [True] * 6


@pytest.mark.parametrize(
    "cache",
    [DeepCache(1), DeepCache(2), DeepCache(2, 2), EncoderPropagation(1), EncoderPropagation(2)],
    ids=str,
)
@pytest.mark.parametrize("make", [networks.sd15, networks.sdxl], ids=lambda f: f.__name__)
def test_with_a_cache(make, cache):
    """Also where the second call reuses: it is given the first one's input."""
    model, args, kwargs = make()
    with fastdiff.accelerated(model):
        want = run(model, args, kwargs)
    with fastdiff.accelerated(model, cache=cache), fastdiff.request(20, 1):
        assert torch.equal(run(model, args, kwargs), want)
        assert torch.equal(run(model, args, kwargs), want)
