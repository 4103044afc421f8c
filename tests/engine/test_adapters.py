"""Adapters beside caches, the exact mode and programs: seen, reversible, with no new capture."""

import copy

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import adapters, engine, models
from fastdiff.cache import Broadcast, DeepCache, Forecast
from fastdiff.engine._buffers import Buffers
from fastdiff.engine._tape import Made
from fastdiff.engine._watch import Log
from fastdiff.engine.capture_check import _run
from fastdiff.engine.programs import Programs
from fastdiff.testing import draw_weights
from fastdiff.tokens import RegionAdaptive

STEPS = 6


def dit():
    model = models.DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    return draw_weights(model).eval()


def unet():
    model = models.UNet(
        4, 4, (16, 32), 1, (0, 1), 1, heads=2, groups=8, cross_attention_dim=24, num_classes=10
    )
    return draw_weights(model).eval()


def theirs():
    return draw_weights(
        diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
            layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    ).eval()  # fmt: skip


class Tape:
    """A runner that replays operations on memory, as a graph does, without the step's Python."""

    made = 0

    def __init__(self, step, inputs, pool=None, share=True):
        self._buffers = Buffers("Tape", inputs, share=True)
        before, log = self._buffers.values(), Log(step, _run.__code__)
        self._tape, _ = _run(step, self._buffers, log, Made(), None)
        assert not log.found, [v.sentence for v in log.found.values()]
        self._buffers.set(before)
        Tape.made += 1

    def replay(self):
        (out,) = self._tape.replay(self._buffers.tensors)
        return out


class Copies(TorchDispatchMode):
    """Bytes that copies between tensors write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            self.bytes += out.numel() * out.element_size()
        if func is torch.ops.aten._to_copy.default:
            self.bytes += out.numel() * out.element_size()
        return out


def fill(adapter, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return adapter


def draw(model, seed=0, change=None, at=3):
    """A guided run; ``change()`` in its middle."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    y, t = torch.tensor([1, 5]), torch.linspace(900, 10, STEPS)
    with fastdiff.request(steps=STEPS) as run, torch.no_grad():
        for i in range(STEPS):
            if change is not None and i == at:
                change()
            x = x - 0.1 * model(x, t[i].expand(2), y)
    return x, run


def call(net, i=0):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 24, generator=g)
    t = torch.tensor([500, 20])
    return net(x + 0.1 * i, t, encoder_hidden_states=context, return_dict=False)[0]


def loop(net, change=None, at=3):
    with fastdiff.request(steps=STEPS) as run, torch.no_grad():
        outs = []
        for i in range(STEPS):
            if change is not None and i == at:
                change()
            outs.append(call(net, i))
    return torch.stack(outs), run


@pytest.fixture
def files(tmp_path):
    """Three adapters' files for a network of :func:`dit` or :func:`unet`, rank 4."""

    def make(network):
        found = []
        for seed in (11, 12, 13):
            lora = fill(adapters.LoRA(network, 4), seed)
            lora.scale.fill_(0.5 + 0.1 * seed)
            found.append(lora.save(tmp_path / f"{seed}.safetensors"))
            lora.detach()
        return found

    return make


# ---- caches ----


CHANGES = {
    "scale": lambda net, lora, path: lora.scale.mul_(1.5),
    "item": lambda net, lora, path: lora.scale.__setitem__(0, 0.25),
    "put": lambda net, lora, path: lora.put(1, path),
    "ids": lambda net, lora, path: lora.choose([0, 2]),
    "more ids": lambda net, lora, path: lora.choose([1]),
    "no ids": lambda net, lora, path: lora.choose(None),
    "merge": lambda net, lora, path: lora.merge(),
    "detach": lambda net, lora, path: lora.detach(),
    "attach": lambda net, lora, path: fill(adapters.LoRA(net, 2), 5),
    "train": lambda net, lora, path: fill(lora, 7),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("make", [dit, unet])
def test_a_change_in_a_run_begins_caches_anew(make, name, files):
    """Whatever it is: nothing of before is reused."""
    network = make()
    path, _, _ = files(network)
    lora = fill(adapters.LoRA(network, 4, slots=2))
    lora.choose([1, 2])
    fastdiff.accelerate(network, cache=Forecast(schedule=(0, 3), order=0))
    kept, run = draw(network)
    assert not run.notes
    got, run = draw(network, change=lambda: CHANGES[name](network, lora, path), at=2)
    assert run.notes == ["weights changed before step 2: caches began anew"]
    assert [e.how for e in run.trace][2] == "full" and not torch.equal(got, kept)
    assert not draw(network)[1].notes  # a new run begins with what there is


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_a_run_of_another_peoples_network(name, tmp_path):
    network = theirs()
    lora = fill(adapters.LoRA(network, 4, targets=["to_q", "to_v"]))
    path = lora.save(tmp_path / "a.safetensors")
    lora.detach()
    lora = fill(adapters.LoRA(network, 4, targets=["to_q", "to_v"], slots=2), 2)
    lora.choose([1, 2])
    fastdiff.accelerate(network, cache=DeepCache(6))
    _, run = loop(network)
    assert not run.notes
    _, run = loop(network, lambda: CHANGES[name](network, lora, path), 2)
    assert run.notes == ["weights changed before step 2: caches began anew"]


def test_the_version_of_an_adapter_that_took_the_place_of_another_is_new():
    network, seen = dit(), set()
    for _ in range(20):
        lora = adapters.LoRA(network, 2)
        assert adapters.version(network) not in seen
        seen.add(adapters.version(network))
        lora.detach()
        del lora
    with torch.inference_mode():
        lora = adapters.LoRA(network, 2)
        before = adapters.version(network)
        lora.choose([0])
        assert adapters.version(network) != before


# ---- the exact mode ----


def look(network):
    """All that patching could have left behind."""
    return [
        (name, sorted(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in network.named_modules()
    ]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("order", ["accelerate first", "adapter first"])
@pytest.mark.parametrize("back", ["restore first", "detach first"])
@pytest.mark.parametrize("make, run", [(theirs, call), (dit, None), (unet, None)])
def test_accelerate_and_adapters_come_and_go_in_any_order(make, run, order, back, merged):
    network = make()
    run = run or (lambda net: net(torch.ones(2, 4, 8, 8), torch.ones(2), torch.tensor([1, 5])))
    with torch.no_grad():
        state, before, plain = look(network), run(network), copy.deepcopy(network.state_dict())
        lora = fill(adapters.LoRA(network, 4, convolutions=True))
        want = run(network)
        lora.detach()
        if order == "accelerate first":
            fastdiff.accelerate(network)
            exact = run(network)
            lora.attach()
        else:
            lora.attach()
            fastdiff.accelerate(network)
        if merged:
            lora.merge()
        got = run(network)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert (got - before).abs().max() > 0.01
        sentence = "adapter lora: merged into the weights" if merged else "adapter lora: at run ti"
        assert sum(sentence in s for s in fastdiff.summary(network).split("\n")) == 1
        if back == "restore first":
            fastdiff.restore(network)
            torch.testing.assert_close(run(network), want, rtol=1e-4, atol=1e-4)
            lora.detach()
        else:
            lora.detach()
            assert "adapter" not in fastdiff.summary(network)
            if order == "accelerate first":
                assert torch.equal(run(network), exact)
            fastdiff.restore(network)
        assert torch.equal(run(network), before) and look(network) == state
        assert all(map(torch.equal, network.state_dict().values(), plain.values()))
        assert all(p.requires_grad or n == "pos_embed" for n, p in network.named_parameters())


@torch.no_grad()
def test_a_prompts_kept_keys_are_those_of_the_adapter():
    """Of a prompt, projected once in a run: an adapter on to_k is called, one merged is seen."""
    network = fastdiff.accelerate(theirs())
    lora = fill(adapters.LoRA(network, 4, targets=["to_k", "to_v"]))
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 24, generator=g)

    def step():
        return network(x, 10, encoder_hidden_states=context, return_dict=False)[0]

    with fastdiff.request(steps=9):
        outs = [step() for _ in range(3)]
        lora.merge()
        outs += [step() for _ in range(3)]
        lora.scale.fill_(0)
        lora.unmerge()
        outs += [step() for _ in range(3)]
    for i in (1, 2):
        for first in (0, 3, 6):
            assert torch.equal(outs[first + i], outs[first])
    torch.testing.assert_close(outs[3], outs[0], rtol=1e-4, atol=1e-4)
    assert (outs[6] - outs[0]).abs().max() > 1e-3


# ---- captured programs ----


CASES = [
    (dit, []),
    (dit, [Forecast(3, order=1)]),
    (dit, [RegionAdaptive(0.5, 2, (4,))]),
    (unet, [DeepCache(3)]),
    (unet, [Broadcast(2, 3, 2, start=0.2, order=1)]),
]
every = pytest.mark.parametrize(
    "make, policies", CASES, ids=lambda v: getattr(v, "__name__", str(v))
)


@every
def test_replays_go_on_with_other_values(make, policies, files):
    """Files, scales and ids reach the programs that there are: no capture, the bits of a run with
    no programs, and every byte of an adapter is moved once."""
    network = make()
    first, second, third = files(network)
    lora = fill(adapters.LoRA(network, 4, slots=2))
    lora.choose([1, 2])
    one = fill(adapters.LoRA(network, 4, targets="qkv|to_q"), 3)
    own = one.save(first.with_name("one.safetensors"))
    fill(one, 4)
    fastdiff.accelerate(network, cache=policies)
    programs = Programs(network, policies, Tape)
    size = sum(p[0].numel() * 4 for p in lora.parameters())
    of_one = sum(p.numel() * 4 for p in one.parameters())
    changes = [
        (lambda: lora.put(0, first), size),
        (lambda: lora.put(1, second), size),
        (lambda: one.load(own), of_one),
        (lambda: lora.scale.__setitem__(1, 0.3), 0),
        (lambda: lora.scale.copy_(torch.tensor([1.5, 0.1])), 0),
        (lambda: lora.choose([2, 0]), 0),
        (lambda: lora.put(1, third), size),
    ]
    last = draw(programs)[0]
    assert torch.equal(last, draw(network)[0])
    made, kinds = Tape.made, programs.kinds
    for change, bytes_ in changes:
        with torch.no_grad(), Copies() as copies:
            change()
        assert copies.bytes <= bytes_ + 64  # scales and ids
        got, run = draw(programs)
        assert torch.equal(got, draw(network)[0]) and not torch.equal(got, last)
        assert (Tape.made, programs.kinds) == (made, kinds) and not run.notes
        last = got


@every
def test_merged_adapters_are_swapped_under_programs(make, policies, files):
    """A merged adapter is in the weights, which programs read; being merged or not makes other
    programs, each captured once."""
    network = make()
    first, second, _ = files(network)
    lora = fill(adapters.LoRA(network, 4))
    fastdiff.accelerate(network, cache=policies)
    programs = Programs(network, policies, Tape)
    plain = draw(programs)[0]
    kinds = programs.kinds
    lora.merge()
    got, run = draw(programs)
    note = "adapters changed before step 0: other programs run from there"
    assert run.notes == [note] and torch.equal(got, draw(network)[0])
    assert programs.kinds == 2 * kinds
    made = Tape.made
    for path in (first, second):
        lora.unmerge()
        lora.put(0, path)
        lora.merge()
        got = draw(programs)[0]
        assert torch.equal(got, draw(network)[0]) and not torch.equal(got, plain)
    lora.unmerge()
    got = draw(programs)[0]
    assert torch.equal(got, draw(network)[0]) and Tape.made == made
    assert programs.kinds == 2 * kinds


@every
def test_an_adapter_that_comes_later_is_not_ignored(make, policies):
    network = make()
    lora = fill(adapters.LoRA(network, 2))
    fastdiff.accelerate(network, cache=policies)
    programs = Programs(network, policies, Tape)
    before = draw(programs)[0]
    other = fill(adapters.LoRA(network, 3, targets="proj|to_v"), 9)
    got, run = draw(programs)
    assert run.notes == ["adapters changed before step 0: other programs run from there"]
    assert torch.equal(got, draw(network)[0]) and not torch.equal(got, before)
    other.detach()
    made = Tape.made
    got, run = draw(programs)
    assert torch.equal(got, before) and Tape.made == made and len(run.notes) == 1
    lora.choose([1, 0])
    got, run = draw(programs)
    assert torch.equal(got, draw(network)[0]) and len(run.notes) == 1
    lora.detach()
    got, run = draw(programs)
    assert torch.equal(got, draw(network)[0]) and len(run.notes) == 1
    assert not torch.equal(got, before)


def test_programs_of_adapters_that_have_gone_are_let_go():
    network = fastdiff.accelerate(dit())
    programs = Programs(network, [], Tape)
    for _ in range(7):
        extra = fill(adapters.LoRA(network, 1, targets="qkv"))
        draw(programs)
        extra.detach()
    assert programs.kinds == 4


@every
def test_a_change_within_a_run_of_programs(make, policies, files):
    """Caches begin anew, as those of a run without programs do."""
    network = make()
    path, _, _ = files(network)
    lora = fill(adapters.LoRA(network, 4))
    fastdiff.accelerate(network, cache=policies)
    programs = Programs(network, policies, Tape)

    def change():
        lora.put(0, path)

    def again():
        fill(lora)
        lora.scale.fill_(1)

    again()
    want, eager = draw(network, change=change, at=4)
    again()
    draw(programs)
    got, run = draw(programs, change=change, at=4)
    assert torch.equal(got, want) and run.notes == eager.notes
    assert len(run.notes) == (1 if policies else 0)
    assert [e.how for e in run.trace] == [e.how for e in eager.trace]


@pytest.mark.parametrize("make", [dit, unet])
@pytest.mark.parametrize("slots, ids", [(1, None), (3, None), (3, [2, 0])])
def test_a_step_with_an_adapter_can_be_captured(make, slots, ids):
    network = make()
    lora = fill(adapters.LoRA(network, 4, slots=slots, convolutions=True))
    lora.choose(ids)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 20.0]), torch.tensor([1, 5])
    report = engine.check(lambda x, t, y: network(x, t, y), inputs)
    assert report.ok, str(report)
