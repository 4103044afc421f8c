"""DiffEditor: two predictions in a step, the regional SDE, time travel, energies of features."""

import math

import pytest
import torch
from torch import nn

from fastdiff import samplers
from fastdiff.cache import DeepCache
from fastdiff.methods.diffeditor import (
    SDE_STREAM,
    Term,
    Timeline,
    diffeditor,
    gradient,
    inverted,
    unlike,
)
from fastdiff.methods.taps import features
from fastdiff.methods.trajectory import running
from fastdiff.models import UNet
from fastdiff.ops.fused_step import philox_normal
from fastdiff.samplers import Run
from fastdiff.samplers.ddim import jump_variance
from fastdiff.testing_gaussian import GaussianModel, affine

SHAPE = (2, 3, 5)
STEPS = 10
SETTINGS = dict(sampler="ddim", steps=STEPS)
NEVER = Timeline(frozenset(), frozenset(), frozenset())


class Tapped(GaussianModel):
    """Whose one block gives the state: the gradient of an energy of it is known."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inner = nn.Identity()

    def forward(self, x, t, y=None):
        return super().forward(self.inner(x), t, y)


def gaussian(dtype=torch.float64, **more):
    torch.manual_seed(1)
    mean = torch.randn(1, *SHAPE, dtype=dtype)
    return Tapped(mean, torch.rand(1, *SHAPE, dtype=dtype) + 0.3, **more)


def image(batch=3, dtype=torch.float64):
    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(2))
    return x.to(dtype)


def half():
    mask = torch.zeros(1, 1, *SHAPE[1:])
    mask[..., 2:] = 1
    return mask


def pull(current, reference):  # towards 0.5 more than the reference
    return 0.5 * (current["inner"] - reference["inner"] - 0.5).square().flatten(1).sum(1)


def stay(current, reference):
    return 0.5 * (current["inner"] - reference["inner"]).square().flatten(1).sum(1)


def at(guided=(), stochastic=(), travelled=()):
    return Timeline(*(frozenset(s) for s in (guided, stochastic, travelled)))


def edit(model=None, x=None, terms=(), **settings):
    return diffeditor(
        gaussian() if model is None else model, image() if x is None else x, terms,
        **{"taps": ["inner"], "timeline": NEVER, **SETTINGS, **settings},
    )  # fmt: skip


def from_inverted(model, x, **settings):
    with running(model, x, **{**SETTINGS, **settings}) as run:
        first = inverted(run)[0]
    return samplers.sample(model, first, **{**SETTINGS, **settings})


class Closed:
    """The algorithm in float64 for a Gaussian model, without the library's rows."""

    def __init__(self, model, x):
        run = Run(model, x, **SETTINGS)
        self.alpha, self.sigma, self.n = run.alpha, run.sigma, len(run)
        self.mean, self.variance = model.mean.double().detach(), model.variance.double().detach()
        self.model = model

    def eps(self, x, i):
        """What the model says at ``x`` with the time of level ``i``."""
        a, s = self.alpha[i], self.sigma[i]
        return s * (x - a * self.mean) / (a**2 * self.variance + s**2)

    def back(self, x, i):
        eps = self.eps(x, i)
        x0 = (x - self.sigma[i + 1] * eps) / self.alpha[i + 1]
        return self.alpha[i] * x0 + self.sigma[i] * eps

    def step(self, x, i, g=0.0, v=0.0):
        """x0 of eps + g; direction of eps."""
        eps = self.eps(x, i)
        x0 = (x - self.sigma[i] * (eps + g)) / self.alpha[i]
        return self.alpha[i + 1] * x0 + (self.sigma[i + 1] ** 2 - v**2) ** 0.5 * eps

    def states(self, x):
        found = [x]
        for i in reversed(range(self.n)):
            found.append(self.back(found[-1], i))
        return found[::-1]


@pytest.mark.parametrize("travelled", [(), (3, 5)])
def test_run_by_hand(travelled):
    """Regions of two energies, two predictions in a step, time travel. The noisiest state is
    large, so the bound is relative."""
    model, x, mask = gaussian(), image(), half().double()
    terms = [Term(pull, 0.05, mask), Term(stay, [0.03] * STEPS, 1 - mask)]
    found = edit(model, x, terms, timeline=at(range(0, 8, 2), travelled=travelled), repeat=3)
    closed = Closed(model, x)
    states = closed.states(x)
    x = states[0]
    for i in range(STEPS):
        for visit in range(3 if i in travelled else 1):
            if visit:
                x = closed.back(x, i)
            g = 0.0
            if i in range(0, 8, 2):
                g = 0.05 * mask * (x - states[i] - 0.5) + 0.03 * (1 - mask) * (x - states[i])
            x = closed.step(x, i, g)
    assert torch.allclose(found, x, atol=2e-5)


def test_one_prediction_would_be_seen():
    """A guided direction, as of plain classifier guidance, is another result."""
    model, x = gaussian(), image()
    found = edit(model, x, [Term(pull, 0.05)], timeline=at([4]))
    closed = Closed(model, x)
    states = closed.states(x)
    here = states[0]
    for i in range(STEPS):
        eps = closed.eps(here, i) + (0.05 * (here - states[i] - 0.5) if i == 4 else 0.0)
        x0 = (here - closed.sigma[i] * eps) / closed.alpha[i]
        here = closed.alpha[i + 1] * x0 + closed.sigma[i + 1] * eps
    assert (found - here).abs().max() > 1e-3


def test_inversion_and_travel_use_the_condition_alone():
    """Steps are guided (2 for the class, -1 for none); what goes back is not."""
    model = Tapped(
        torch.randn(2, *SHAPE).double(), torch.rand(2, *SHAPE).double() + 0.3, classes=True
    )
    model.num_classes = 1  # the null class is the second component alone
    x, at_ = image(), (2, 5)
    found = edit(
        model, x, timeline=at(travelled=at_), repeat=2, guidance=2.0,
        classes=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    own, none = Closed(model, x), Closed(model, x)
    own.mean, none.mean = own.mean[:1], none.mean[1:]
    own.variance, none.variance = own.variance[:1], none.variance[1:]
    guided = Closed(model, x)
    guided.eps = lambda x, i: 2 * own.eps(x, i) - none.eps(x, i)
    x = own.states(x)[0]
    for i in range(STEPS):
        x = guided.step(x, i)
        if i in at_:
            x = guided.step(own.back(x, i), i)
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_time_travel_is_a_product_of_affine_maps(repeat):
    """Basis vectors pushed through a run of travelled steps; float32 rows: 1e-5."""
    model, i = gaussian(), 5
    d = math.prod(SHAPE)
    x = torch.cat([torch.zeros(1, d), torch.eye(d)]).view(-1, *SHAPE).double()
    found = edit(model, x, timeline=at(travelled=[i]), repeat=repeat).flatten(1)
    closed, zero, one = Closed(model, x), torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)

    def slope(f, j):
        return f(one.double(), j) - f(zero.double(), j)

    whole = torch.ones(1, *SHAPE).double()
    for j in range(STEPS):
        whole = whole * slope(closed.back, j) * slope(closed.step, j)
    whole = whole * (slope(closed.back, i) * slope(closed.step, i)) ** (repeat - 1)
    matrix = (found[1:] - found[0]).T
    assert torch.allclose(matrix, torch.diag(whole.flatten()), atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("classes", [False, True])
def test_neutral_settings_are_sample(sampler, classes):
    """No terms, no mask, travelled steps done once: the sampler from the inverted noise."""
    x = image(dtype=torch.float32)
    model, own = gaussian(torch.float32), {}
    if classes:
        model = Tapped(torch.randn(2, *SHAPE), torch.full((2, 1, 1, 1), 0.3), classes=True)
        own = dict(classes=torch.tensor([0, 1, 2]), guidance=2.0)
    plain = from_inverted(model, x, sampler=sampler, **own)
    every = at(range(STEPS), range(STEPS), range(STEPS))
    run = dict(sampler=sampler, timeline=every, repeat=1, **own)
    assert torch.equal(edit(model, x, **run), plain)
    assert torch.equal(edit(model, x, mask=torch.zeros(1, 1, *SHAPE[1:]), **run), plain)
    assert torch.equal(edit(model, x, mask=half(), eta=0.0, **run), plain)
    assert torch.equal(edit(model, x, [Term(pull, 0.0)], **run), plain)
    nothing = Term(pull, 1.0, torch.zeros(1, 1, *SHAPE[1:]))
    assert torch.equal(edit(model, x, [nothing], **run), plain)


def test_repeat_is_not_free():
    """What the neutral test cannot see: travelled steps do something."""
    assert not torch.equal(edit(timeline=at(travelled=[5])), edit())


def test_outside_the_mask_nothing_depends_on_the_seed():
    model, x, mask = gaussian(), image(), half()
    run = dict(mask=mask, eta=0.7, timeline=at(stochastic=range(STEPS - 1)))
    a, b = edit(model, x, seed=1, **run), edit(model, x, seed=2, **run)
    outside = (mask == 0).expand_as(a)
    assert torch.equal(a[outside], b[outside])
    assert torch.equal(a[outside], edit(model, x)[outside])
    assert (a[~outside] != b[~outside]).all()


def regional(model, x, mask, i, eta, **settings):
    """States before and after call i, the only stochastic one."""
    seen = {}
    edit(
        model, x, mask=mask, eta=eta, timeline=at(stochastic=[i]),
        callback=lambda j, run: seen.update({j: run.x}), **settings,
    )  # fmt: skip
    return seen[i - 1], seen[i]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_variance_within_the_mask(prediction):
    """v = eta M sigma_{s|t} of DDIM, and the direction has as much less: with a soft mask too."""
    model, n, i, eta = gaussian(prediction=prediction), 3000, 4, 0.8
    x = image(1).expand(n, *SHAPE).clone()
    mask = torch.linspace(0, 1, SHAPE[1] * SHAPE[2]).view(1, 1, *SHAPE[1:]).double()
    here, found = regional(model, x, mask, i, eta)
    closed = Closed(model, x[:1])
    a, s = closed.alpha, closed.sigma
    v = eta * mask * s[i + 1] / s[i] * jump_variance(a[i : i + 2], s[i : i + 2]).sqrt()
    want = closed.step(here[:1], i, v=v)
    error = (found.mean(0, keepdim=True) - want).abs()
    assert (error <= 4.5 * v / math.sqrt(n) + 1e-5).all()
    spread = found.var(0, keepdim=True)
    assert ((spread - v**2).abs() <= 4.5 * v**2 * math.sqrt(2 / n) + 1e-12).all()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_stochastic_step_number_by_number(prediction):
    """With the noise of its counters the step is its formula; float32 rows."""
    model, i, eta, x = gaussian(prediction=prediction), 4, 0.8, image()
    mask = torch.linspace(0, 1, SHAPE[1] * SHAPE[2]).view(1, 1, *SHAPE[1:]).double()
    here, found = regional(model, x, mask, i, eta, seed=3)
    closed = Closed(model, x)
    a, s = closed.alpha, closed.sigma
    v = eta * mask * s[i + 1] / s[i] * jump_variance(a[i : i + 2], s[i : i + 2]).sqrt()
    z = philox_normal(x.shape, 3, step=0, stream=SDE_STREAM).double()
    assert torch.allclose(found, closed.step(here, i, v=v) + v * z, atol=1e-5)


def test_blended_steps_would_be_seen():
    """A soft mask that blends a noisy step with a plain one has the right variance, but takes
    another part from the direction: by more than the bound of the test before."""
    closed, i, m, n = Closed(gaussian(), image()), 4, 0.5, 3000
    s = closed.sigma
    v = 0.8 * s[i + 1] / s[i] * jump_variance(closed.alpha[i : i + 2], s[i : i + 2])[0].sqrt()
    map_ = (s[i + 1] ** 2 - (m * v) ** 2) ** 0.5
    blend = m * (s[i + 1] ** 2 - v**2) ** 0.5 + (1 - m) * s[i + 1]
    eps = closed.eps(closed.states(image(1))[i], i).abs().max()
    assert abs(map_ - blend) * eps > 4.5 * m * v / math.sqrt(n) + 1e-5


def test_whole_mask_is_ddim_with_eta():
    """Mean and variance of the library's own DDIM of that eta, for one step."""
    model, i, eta = gaussian(), 4, 0.6
    x = image(2)
    here, plain = regional(model, x, torch.ones(1, 1, *SHAPE[1:]), i, eta, seed=1)
    _, other = regional(model, x, torch.ones(1, 1, *SHAPE[1:]), i, eta, seed=2)
    run = Run(model, x, sampler=samplers.DDIM(eta=eta), steps=STEPS)
    with torch.no_grad():
        a, b, s = affine(run.table, run, model)[i]
    z = (plain - a * here - b) / s
    assert abs(z.mean()) < 4 / math.sqrt(z.numel()) and 0.5 < z.var() < 1.8
    assert not torch.allclose(plain, other)


def test_batch_is_each_alone():
    torch.manual_seed(3)
    model = Tapped(torch.randn(2, *SHAPE), torch.full((2, 1, 1, 1), 0.3), classes=True)
    x, seeds, classes = image(dtype=torch.float32), torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])
    masks = (torch.rand(3, 1, *SHAPE[1:]) > 0.5).float()

    def run(part):
        return edit(
            model, x[part], [Term(pull, 0.05, masks[part]), Term(stay, 0.03)], mask=masks[part],
            timeline=at(range(8), range(3, 8), [4, 6]), seed=seeds[part], classes=classes[part],
            guidance=2.0,
        )  # fmt: skip

    alone = torch.cat([run(slice(b, b + 1)) for b in range(3)])
    assert torch.equal(run(slice(None)), alone)


def test_timeline_of_the_paper():
    plan = Timeline.of(50)
    assert sorted(plan.guided) == [*range(10), *range(10, 30, 2)]
    assert sorted(plan.stochastic) == list(range(11, 20))
    assert sorted(plan.travelled) == [22, 24, 26, 28]
    for n in (1, 7, 25):
        assert all(0 <= i < n for calls in Timeline.of(n) for i in calls)


def test_levels_that_are_visited():
    """The levels, not the number of calls, are what caches see."""
    seen = []
    edit(timeline=at(travelled=[4]), callback=lambda i, run: seen.append(list(run.visits)))
    back = list(reversed(range(STEPS)))
    assert seen[-1] == back + [0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6, 7, 8, 9]


def test_likeness():
    a = torch.randn(2, 4, 3, 5)
    assert torch.allclose(unlike(a, 3 * a), torch.full((2,), 0.2))
    assert torch.allclose(unlike(a, -a), torch.full((2,), 1.0))
    where = torch.zeros(1, 1, 3, 5)
    where[..., 0] = 1
    b = torch.where(where == 1, a, -a)
    assert torch.allclose(unlike(a, b, where), torch.full((2,), 0.2))
    assert torch.allclose(unlike(a, b, 1 - where), torch.full((2,), 1.0))
    assert torch.isfinite(unlike(a, b, 0 * where)).all()


def unet():
    torch.manual_seed(0)
    return UNet(
        2, 2, (8, 16), layers_per_block=1, transformer_depth=(0, 1), heads=2, groups=4,
        cross_attention_dim=8, num_classes=3, class_tokens=2,
    ).eval()  # fmt: skip


TAPS = ["up_blocks.0", "up_blocks.1"]


def move(current, reference):
    return sum(unlike(current[n], reference[n].roll(2, -1)) for n in TAPS)


def test_features_of_a_network():
    """Energies of decoder blocks of a U-Net, a real step of guidance, and no traces."""
    model, x = unet(), torch.randn(2, 2, 4, 6)
    moved = torch.zeros(1, 1, 4, 6)
    moved[..., :3] = 1
    run = dict(taps=TAPS, classes=torch.tensor([0, 1]), guidance=2.0, steps=8)
    found = diffeditor(model, x, [Term(move, 1e3, moved)], mask=moved, **run)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, diffeditor(model, x, [], mask=moved, **run))
    assert not any(m._forward_hooks for m in model.modules())


def test_cache_that_reuses_nothing():
    model, x = unet(), torch.randn(2, 2, 4, 6)
    run = dict(
        taps=TAPS, classes=torch.tensor([0, 1]), guidance=2.0, steps=7,
        mask=torch.ones(1, 1, 4, 6),
    )  # fmt: skip
    terms = [Term(move, 10.0)]
    plain = diffeditor(model, x, terms, **run)
    assert torch.equal(diffeditor(model, x, terms, cache=DeepCache(1), **run), plain)
    assert not torch.equal(diffeditor(model, x, terms, cache=DeepCache(2), **run), plain)


def test_features_are_live_under_a_cache():
    """Also those of the reference, for which no gradient is taken."""
    model, x, ref = unet(), torch.randn(2, 2, 4, 6), torch.randn(2, 2, 4, 6)
    settings = dict(classes=torch.tensor([0, 1]), guidance=2.0, steps=8)
    found, terms = [], [Term(move, 10.0)]
    with running(model, x, cache=DeepCache(2), **settings) as run:
        for i in range(8):
            m = run.predict(i)
            found.append((run.x, features(run, i, TAPS, ref), gradient(run, i, terms, ref, TAPS)))
            run.step(i, m)
    with running(model, x, **settings) as run:
        for i, (state, theirs, g) in enumerate(found):
            run.x = state
            plain = features(run, i, TAPS, ref)
            assert all(torch.allclose(theirs[n], plain[n], atol=1e-5) for n in TAPS)
            assert torch.allclose(g, gradient(run, i, terms, ref, TAPS), rtol=1e-3, atol=1e-4)


def test_nan_stays_in_its_sample():
    def bad(current, reference):
        value = pull(current, reference)
        return torch.where(torch.arange(len(value)) == 1, math.nan, 1.0) * value

    run = dict(timeline=at([2, 3]))
    found, good = edit(terms=[Term(bad, 0.1)], **run), edit(terms=[Term(pull, 0.1)], **run)
    assert found[1].isnan().any() and torch.equal(found[[0, 2]], good[[0, 2]])


def test_energy_that_raises_leaves_the_model_alone():
    model, x = gaussian(), image()
    before = x.clone()

    def bad(current, reference):
        raise RuntimeError("no energy today")

    with pytest.raises(RuntimeError, match="no energy today"):
        edit(model, x, [Term(bad)], timeline=at([0]))
    assert torch.equal(x, before) and not model.inner._forward_hooks


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(repeat=0), "repeat is 0"),
        (dict(eta=1.5), "eta is 1.5, need a number in"),
        (dict(sampler="ddpm"), "sampler is 'ddpm', need a deterministic one"),
        (dict(sampler="heun"), "sampler is 'heun', need a deterministic one"),
        (dict(clip=1.0), "clip is 1.0 and guidance_rescale"),
        (dict(mask=torch.ones(1, 1, 3, 4)), r"mask is \[1, 1, 3, 4\], need"),
        (dict(terms=[Term(pull, 1.0, torch.ones(5))]), r"mask of term 0 is \[5\]"),
        (dict(terms=[Term(pull)], taps=["outer"]), "taps has 'outer'"),
        (dict(terms=[Term(pull, [1.0])], timeline=at([0])), "scale has 1 entries, need 10"),
        (
            dict(terms=[Term(lambda a, b: a["inner"].sum())], timeline=at([0])),
            r"energy gives \[\], need a tensor \[3\]",
        ),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        edit(**settings)
