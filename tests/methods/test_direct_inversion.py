"""Direct Inversion: the source comes back bit for bit, the target is left alone."""

import pytest
import torch

from fastdiff import samplers
from fastdiff.accelerate import acceleration_of
from fastdiff.cache import Forecast
from fastdiff.methods.direct_inversion import direct_inversion
from fastdiff.methods.inversion import ddim_inversion
from fastdiff.methods.trajectory import running
from fastdiff.models import DiT
from fastdiff.samplers import DDIM
from fastdiff.testing_gaussian import GaussianModel

SHAPE = (2, 3, 5, 7)
SOURCE, TARGET = torch.tensor([0, 2]), torch.tensor([1, 0])
RUN = dict(classes=SOURCE, steps=10)


def gaussian():
    mean = torch.randn(3, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    return GaussianModel(mean, torch.full((1, *SHAPE[1:]), 0.4), classes=True)


def transformer():
    torch.manual_seed(0)
    net = DiT(8, 2, 3, 32, 4, 2, num_classes=3, prediction="flow").eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def clean(dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


class Sharing(torch.nn.Module):
    """A model whose target rows read the source rows beside them."""

    def __init__(self, model, batch):
        super().__init__()
        self.model, self.batch, self.num_classes = model, batch, model.num_classes
        self.prediction, self.seen, self.share = model.prediction, [], True

    def forward(self, x, t, y=None):
        out = self.model(x, t, y)
        if not self.share or len(x) % (2 * self.batch):
            return out
        self.seen.append(x.unflatten(0, (-1, 2, self.batch))[:, 0].clone())
        rows = out.unflatten(0, (-1, 2, self.batch))
        mixed = torch.stack((rows[:, 0], 0.7 * rows[:, 1] + 0.3 * rows[:, 0]), 1)
        return mixed.flatten(0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_source_comes_back_bit_for_bit(dtype, guidance, eta):
    x = clean(dtype)
    before = x.clone()
    last = []
    found = direct_inversion(
        gaussian(), x, TARGET, guidance=guidance, sampler=DDIM(eta=eta), **RUN,
        callback=lambda i, run: last.append(run.x[:2].clone()),
    )  # fmt: skip
    assert torch.equal(found.source, before) and torch.equal(last[-1], before)
    for i, state in enumerate(last):
        assert torch.equal(state, found.store.state(i + 1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("cache", [None, Forecast(interval=3)])
def test_source_through_caches(cache):
    x, last = clean(shape=(2, 3, 8, 12)), []
    found = direct_inversion(
        transformer(), x, TARGET, guidance=4.0, cache=cache, **RUN,
        callback=lambda i, run: last.append(run.x[:2].clone()),
    )  # fmt: skip
    assert torch.equal(found.source, x) and torch.equal(last[-1], x)


def differences(dtype):
    """Share of the source's numbers that ``x + (x* - x)`` misses."""
    model, x = gaussian(), clean(dtype)
    store = ddim_inversion(model, x, **RUN)
    missed = []
    with running(model, store.state(0), guidance=7.5, **RUN) as run:
        for i in range(len(run)):
            run.step(i, run.predict(i))
            star = store.state(i + 1)
            run.x = run.x + (star - run.x)
            missed.append((run.x != star).double().mean())
    return float(torch.stack(missed).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_added_difference_would_be_seen(dtype):
    assert differences(dtype) > 0.02


def test_without_selection_the_source_is_lost():
    model, x = gaussian(), clean()
    store = ddim_inversion(model, x, **RUN)
    naive = samplers.sample(model, store.state(0), guidance=7.5, **RUN)
    assert (naive - x).abs().mean() > 0.3


@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_target_is_plain_sampling_where_nothing_is_shared(eta):
    model, x, sampler = gaussian(), clean(), DDIM(eta=eta)
    found = direct_inversion(model, x, TARGET, guidance=3.0, sampler=sampler, seed=5, **RUN)
    plain = samplers.sample(
        model, found.store.state(0), classes=TARGET, guidance=3.0, steps=10, sampler=sampler, seed=5
    )
    assert torch.equal(found.target, plain)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_samplers_with_history(sampler):
    model, x = gaussian(), clean()
    found = direct_inversion(model, x, TARGET, guidance=3.0, sampler=sampler, **RUN)
    plain = samplers.sample(
        model, found.store.state(0), classes=TARGET, guidance=3.0, steps=10, sampler=sampler
    )
    assert torch.equal(found.source, x) and torch.equal(found.target, plain)


def test_target_reads_sources_of_the_true_path():
    model, x = Sharing(gaussian(), 2), clean()
    store = ddim_inversion(model.model, x, **RUN)
    found = direct_inversion(model, x, TARGET, guidance=3.0, store=store, **RUN)
    assert len(model.seen) == 10 and len(model.seen[0]) == 2  # both branches of guidance
    for i, rows in enumerate(model.seen):
        for row in rows:
            assert torch.equal(row, store.state(i))
    alone = direct_inversion(model.model, x, TARGET, guidance=3.0, store=store, **RUN)
    assert (found.target - alone.target).abs().max() > 1e-2


@pytest.mark.parametrize("calls", [0, 4, 10])
@pytest.mark.parametrize("make", [gaussian, transformer])
def test_source_rows_may_leave_when_nobody_reads_them(make, calls):
    """Bit for bit where the model's arithmetic does not depend on its batch; of a network to the
    rounding of products of another size, which the guided steps carry on."""
    model = make()
    x = clean(shape=SHAPE if make is gaussian else (2, 3, 8, 12))
    settings = dict(guidance=3.0, sampler=DDIM(eta=0.3), **RUN)
    whole = direct_inversion(model, x, TARGET, **settings)
    rows = []
    hook = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    part = direct_inversion(model, x, TARGET, source_calls=calls, store=whole.store, **settings)
    hook.remove()
    assert rows == [8] * calls + [4] * (10 - calls)
    assert torch.equal(part.source, x)
    if make is gaussian:
        assert torch.equal(part.target, whole.target)
    else:
        assert (part.target - whole.target).abs().max() < 1e-5 * whole.target.abs().max()


def test_source_rows_leave_a_cached_run():
    model, x = transformer(), clean(shape=(2, 3, 8, 12))
    how = []
    direct_inversion(
        model, x, TARGET, source_calls=5, cache=Forecast(interval=3), guidance=3.0, **RUN,
        callback=lambda i, run: how.append((run.request.trace[-1].how, run.request.samples)),
    )  # fmt: skip
    assert how[5] == ("full", 2) and how[4][1] == 4
    assert {h for h, _ in how[6:]} != {"full"}


def test_batch_is_each_alone():
    model, x, seeds = gaussian(), clean(), torch.tensor([3, 4])
    settings = dict(guidance=3.0, sampler=DDIM(eta=1.0), steps=10)
    whole = direct_inversion(model, x, TARGET, classes=SOURCE, seed=seeds, **settings)
    for b in range(2):
        part = slice(b, b + 1)
        one = direct_inversion(
            model, x[part], TARGET[part], classes=SOURCE[part], seed=seeds[part], **settings
        )
        assert torch.equal(one.target, whole.target[part])


def test_scale_of_each_sample():
    model, x = gaussian(), clean()
    settings = dict(classes=SOURCE, steps=10)
    both = direct_inversion(model, x, TARGET, guidance=torch.tensor([2.0, 5.0]), **settings)
    for b, scale in enumerate((2.0, 5.0)):
        one = direct_inversion(model, x, TARGET, guidance=scale, **settings)
        assert torch.equal(one.target[b], both.target[b])


def test_run_that_breaks_off_leaves_the_model_alone():
    net, x = transformer(), clean(shape=(2, 3, 8, 12))
    before = x.clone()

    def callback(i, run):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        direct_inversion(net, x, TARGET, cache=Forecast(interval=3), callback=callback, **RUN)
    assert acceleration_of(net) is None and torch.equal(x, before)


def test_model_without_classes():
    model = GaussianModel(torch.zeros(1, 3, 5, 7), torch.full((1, 3, 5, 7), 0.4))
    x = clean()
    found = direct_inversion(model, x, guidance=1.0, steps=10)
    assert torch.equal(found.source, x) and found.target.shape == x.shape


def test_inversion_at_other_levels():
    model, x = gaussian(), clean()
    store = ddim_inversion(model, x, classes=SOURCE, steps=9)
    with pytest.raises(ValueError, match="plan: levels is .*, need"):
        direct_inversion(model, x, TARGET, store=store, **RUN)


@pytest.mark.parametrize(
    "x, target, settings, words",
    [
        (SHAPE, TARGET, {}, "x is .*, need a tensor"),
        (None, None, {}, "target and classes go together"),
        (None, TARGET, dict(source_calls=11), "source_calls is 11, need an integer from 0 to 10"),
        (None, TARGET, dict(source_calls=True), "source_calls is True"),
    ],
)
def test_bad_input(x, target, settings, words):
    with pytest.raises(ValueError, match=words):
        direct_inversion(gaussian(), clean() if x is None else x, target, **settings, **RUN)
