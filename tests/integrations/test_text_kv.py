"""Keys and values of a prompt: projected anew whenever prompt or weights change, else kept."""

from pathlib import Path

import torch

import fastdiff
from fastdiff.testing import load_file

networks = load_file(Path(__file__).with_name("networks.py"))


@torch.no_grad()
def run(model, args, kwargs):
    return model(*args, **kwargs, return_dict=False)[0]


def layer(model):
    return model.down_blocks[0].attentions[0].transformer_blocks[0].attn2


def kept(run_, model):
    return run_.state.get(("text_kv", id(layer(model))), [])


def test_same_bits_and_kept_at_second_sight():
    model, args, kwargs = networks.sd15()
    fastdiff.accelerate(model)
    want = run(model, args, kwargs)
    with fastdiff.request() as r:
        for _ in range(3):
            assert torch.equal(run(model, args, kwargs), want)
        (entry,) = kept(r, model)
        pair = entry.pair
        assert pair is not None
        run(model, args, kwargs)
        assert kept(r, model)[0].pair is pair
    assert not r.state


def test_another_prompt_and_a_prompt_or_weight_written_to():
    model, args, kwargs = networks.sd15()
    fastdiff.accelerate(model)
    prompt = kwargs["encoder_hidden_states"]
    with fastdiff.request():
        for _ in range(3):
            old = run(model, args, kwargs)
        with torch.no_grad():
            prompt.mul_(-1)
        changed = run(model, args, kwargs)
        with torch.no_grad():
            layer(model).to_v.weight.mul_(3)
        heavier = run(model, args, kwargs)
        kwargs["encoder_hidden_states"] = prompt + 1
        other = [run(model, args, kwargs) for _ in range(3)][-1]
    assert torch.equal(other, run(model, args, kwargs))
    kwargs["encoder_hidden_states"] = prompt
    assert torch.equal(heavier, run(model, args, kwargs))
    with torch.no_grad():
        layer(model).to_v.weight.div_(3)
    assert ((changed - run(model, args, kwargs)).norm() / changed.norm()).item() < 5e-6
    assert not torch.equal(changed, old) and not torch.equal(changed, heavier)


def test_many_prompts_are_bounded():
    model, args, kwargs = networks.sd15()
    fastdiff.accelerate(model)
    prompt = kwargs["encoder_hidden_states"]
    with fastdiff.request() as r:
        for i in range(9):
            kwargs["encoder_hidden_states"] = prompt + i
            run(model, args, kwargs)
        assert len(kept(r, model)) == 4
        assert all(entry.pair is None for entry in kept(r, model))


def test_inference_tensors_have_no_version_and_are_not_kept():
    model, args, kwargs = networks.sd15()
    fastdiff.accelerate(model)
    want = run(model, args, kwargs)
    with fastdiff.request() as r, torch.inference_mode():
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].clone()
        for _ in range(3):
            assert torch.equal(model(*args, **kwargs, return_dict=False)[0], want)
        assert not kept(r, model)
