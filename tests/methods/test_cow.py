"""Cyclic One-Way diffusion: its pastes, its law, its levels."""

import pytest
import torch

from fastdiff.cache import Forecast
from fastdiff.engine.request import Request
from fastdiff.methods.cow import cow
from fastdiff.methods.inversion import ddim_inversion
from fastdiff.methods.trajectory import Trajectory, running
from fastdiff.models import DiT
from fastdiff.samplers import DDIM, Run
from fastdiff.testing_gaussian import GaussianModel, affine

SHAPE = (2, 3, 5, 7)
# Of 20 steps: back at level 6, replace at 10, preserve at 12.
RUN = dict(steps=20)
FINAL = DDIM(eta=0.1)


def gaussian(classes=False):
    k = 3 if classes else 1
    mean = torch.randn(k, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    return GaussianModel(mean, torch.full((1, *SHAPE[1:]), 0.4), classes=classes)


def transformer():
    torch.manual_seed(0)
    net = DiT(8, 2, 3, 32, 3, 2, num_classes=3, prediction="flow").eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def clean(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def half(shape=SHAPE):
    mask = torch.zeros(1, 1, *shape[2:])
    mask[..., 4:] = 1.0
    return mask


def inverted(model, x, until=6, **settings):
    return ddim_inversion(model, x, until=until, sampler=FINAL, **RUN, **settings)


def test_every_call_in_the_cycles_sees_the_stored_region():
    model, x, seen = gaussian(), clean(), []
    store = inverted(model, x)
    steps = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    cow(model, x, half(), cycles=3, callback=lambda i, run: steps.append(i), **RUN)
    hook.remove()
    assert steps == [6, 7, 8, 9] * 3 + list(range(10, 20))
    known = (half() == 0).expand(SHAPE)
    for i, state in zip(steps, seen[-len(steps) :], strict=True):
        if i <= 10 or i == 12:  # level 10 follows the last paste of the cycles, 12 is preserve's
            assert torch.equal(state[known], store.state(i)[known])
        else:
            assert not torch.equal(state[known], store.state(i)[known])
        assert not torch.equal(state[~known], store.state(i)[~known])


def test_all_seed_is_a_replay():
    """With mask 0 and pastes to the end nothing but the stored path is left."""
    model, x = gaussian(), clean()
    found = cow(model, x, torch.zeros(1, 1, 5, 7), cycles=2, preserve=0.0, **RUN)
    assert torch.equal(found, x)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_cycles_it_is_plain_sampling_from_the_inversion(guidance):
    model, x = gaussian(True), clean()
    before = x.clone()
    settings = dict(classes=torch.tensor([0, 2]), guidance=guidance, seed=3)
    mask = torch.ones(1, 1, 5, 7)
    found = cow(model, x, mask, cycles=0, **RUN, **settings)
    store = inverted(model, x, **settings)
    with running(model, store.state(10), sampler=FINAL, **RUN, **settings) as run:
        for i in range(10, 20):
            run.step(i, run.predict(i))
    assert torch.equal(found, run.x) and torch.equal(x, before)


def test_cycle_of_no_length_is_none():
    model, x = gaussian(), clean()
    mask = torch.ones(1, 1, 5, 7)
    one = cow(model, x, mask, cycles=4, back=0.5, **RUN)
    assert torch.equal(one, cow(model, x, mask, cycles=0, **RUN))


def test_jumps_compose():
    run = Run(gaussian(), SHAPE, steps=20)
    for i, j, k in [(10, 8, 6), (20, 15, 0), (19, 18, 1), (7, 7, 3)]:
        (c1, s1), (c2, s2), (c, s) = run.jump(i, j), run.jump(j, k), run.jump(i, k)
        assert abs(c1 * c2 - c) < 1e-12 and abs(((c2 * s1) ** 2 + s2**2) ** 0.5 - s) < 1e-12
    c, s = run.jump(20, 6)
    assert abs(c - run.alpha[6]) < 1e-12 and abs(s - run.sigma[6]) < 1e-12


def law(model, x, mask, cycles, cycle_eta):
    """Mean and variance of what comes out, from the maps of steps and jumps; elementwise."""
    store = inverted(model, x)
    run, walk = (Run(model, x, sampler=DDIM(eta=eta), **RUN) for eta in (0.1, cycle_eta))
    final, inside = affine(run.table, run, model), affine(walk.table, walk, model)
    m, v = store.state(10).double(), torch.zeros_like(x).double()

    def paste(i):
        return torch.where(mask == 1, m, store.state(i)), v * mask

    for _ in range(cycles):
        c, s = run.jump(10, 6)
        m, v = c * m, c**2 * v + s**2
        for i in range(6, 10):
            m, v = paste(i)
            a, b, s = inside[i]
            m, v = a * m + b, a**2 * v + s**2
        m, v = paste(10)
    for i in range(10, 20):
        if i == 12:
            m, v = paste(12)
        a, b, s = final[i]
        m, v = a * m + b, a**2 * v + s**2
    return m, v


@pytest.mark.parametrize("cycle_eta", [0.0, 1.0])
def test_law(cycle_eta):
    """4 sigma of 8192 samples, in the seed's region and outside."""
    model = GaussianModel(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.3]]))
    n, mask = 8192, torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[2.0, 1.0]])
    m, v = law(model, x, mask, 3, cycle_eta)
    found = cow(
        model, x.expand(n, 2).contiguous(), mask, cycles=3, cycle_sampler=DDIM(eta=cycle_eta),
        seed=2, **RUN,
    ).double()  # fmt: skip
    assert ((found.mean(0) - m[0]).abs() < 4 * (v[0] / n).sqrt() + 1e-6).all()
    assert ((found.var(0) / v[0] - 1).abs() < 4 * (2 / n) ** 0.5).all()
    assert v[0, 0] > 5 * v[0, 1] > 0


@pytest.mark.parametrize("faulty", ["no noise", "variance of one step"])
def test_wrong_jump_would_be_seen(monkeypatch, faulty):
    model = GaussianModel(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.3]]))
    n, mask = 8192, torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[2.0, 1.0]])
    _, v = law(model, x, mask, 3, 0.0)
    right = Trajectory.jump

    def jump(run, i, j):
        c, s = right(run, i, j)
        return (c, 0.0) if faulty == "no noise" else (c, right(run, j + 1, j)[1])

    monkeypatch.setattr(Trajectory, "jump", jump)
    found = cow(model, x.expand(n, 2).contiguous(), mask, cycles=3, seed=2, **RUN).double()
    assert (found.var(0)[0] / v[0, 0] - 1).abs() > 8 * (2 / n) ** 0.5


def test_other_background():
    model, x, other = gaussian(), clean(), clean() + 1.0
    kept, moved = (cow(model, x, half(), background=b, **RUN) for b in (None, other))
    known = (half() == 0).expand(SHAPE)
    assert torch.equal(kept[known], moved[known])  # of a model that looks at each number alone
    assert not torch.equal(kept[~known], moved[~known])
    assert torch.equal(cow(model, x, half(), background=x, **RUN), kept)


@pytest.mark.parametrize("faulty", [False, True])
def test_caches_follow_levels_and_forget_at_a_paste(monkeypatch, faulty):
    """A cache that counts calls in the place of levels is found wrong."""
    net, shape = transformer(), (2, 3, 8, 12)
    if faulty:
        monkeypatch.setattr(Request, "at", lambda own, _: own.advance())
    x, mask, seen = clean(shape), half(shape), []

    def callback(i, run):
        event = run.request.trace[-1]
        seen.append((i, event.step, event.how))

    settings = dict(cycles=2, preserve=None, classes=torch.tensor([0, 1]), guidance=2.0, **RUN)
    cow(net, x, mask, cache=Forecast(interval=3), callback=callback, **settings)
    assert [i for i, _, _ in seen] == [6, 7, 8, 9] * 2 + list(range(10, 20))
    assert {how for _, _, how in seen[:8]} == {"full"}
    policy = Forecast(interval=3)  # by its levels, however many calls there were before
    planned = all((how == "full") == policy.full(i, 20) for i, _, how in seen[9:])
    assert planned != faulty and all(i == step for i, step, _ in seen) != faulty


def test_batch_is_each_alone():
    model, x, seeds = gaussian(), clean(), torch.tensor([6, 7])
    settings = dict(cycles=2, cycle_sampler=DDIM(eta=1.0), **RUN)
    whole = cow(model, x, half(), seed=seeds, **settings)
    for b in range(2):
        p = slice(b, b + 1)
        assert torch.equal(cow(model, x[p], half(), seed=seeds[p], **settings), whole[p])


def test_levels_of_fifty_steps():
    steps = []
    model = GaussianModel(torch.zeros(1, 1), torch.ones(1, 1))
    mask = torch.ones(1, 1)
    cow(model, torch.ones(1, 1), mask, cycles=1, steps=50, callback=lambda i, _: steps.append(i))
    assert steps == list(range(15, 50))  # back 35, replace 25 steps before the end


@pytest.mark.parametrize(
    "x, settings, words",
    [
        (SHAPE, {}, "cow: x is .*, need a tensor"),
        (None, dict(cycles=-1), "cycles is -1, need an integer of at least 0"),
        (None, dict(back=0.4), r"\(preserve, replace, back\) is \(0.4, 0.5, 0.4\), need shares"),
        (None, dict(back=1.0), "need shares that ascend from 0 and are below 1"),
        (None, dict(sampler="dpmpp_2m"), "a sampler keeps a history"),
        (None, dict(cycle_sampler=DDIM(spacing="leading")), "cycle_sampler has other levels"),
        (None, dict(mask=torch.ones(3)), r"mask is \[3\], need"),
        (None, dict(background=torch.ones(3)), r"reference is \[3\], need"),
    ],
)
def test_bad_input(x, settings, words):
    settings = dict(mask=half()) | settings
    with pytest.raises(ValueError, match=words):
        cow(gaussian(), clean() if x is None else x, **settings, **RUN)
