import pytest
import torch

import fastdiff
from fastdiff.guidance import ClassifierFree
from fastdiff.ops import philox_normal
from fastdiff.samplers import DDIM, VP

SHAPE = (3, 2, 6, 5)
CLASSES = torch.tensor([1, 7, 3])


class Pointwise:
    num_classes = 10

    def __call__(self, x, t, y):
        shift = (y.to(x.dtype) - 4 + t / 1000).view(-1, 1, 1, 1) / 10
        return torch.tanh((0.5 + shift) * x + shift)


@pytest.mark.parametrize("phi", [0.0, 0.7])
@pytest.mark.parametrize("interval", [None, (300.0, 700.0)])
def test_equals_the_pipeline_of_diffusers(phi, interval):
    """Guidance and its rescale as a Stable Diffusion pipeline writes them, around DDIM."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    model, scale = Pointwise(), 5.0
    x = philox_normal(SHAPE, 4, stream=2)
    for t in theirs.timesteps:
        times = t.expand(3).float()
        m = model(x, times, CLASSES)
        if interval is None or interval[0] <= t <= interval[1]:
            empty = model(x, times, torch.full((3,), 10))
            cond, m = m, empty + scale * (m - empty)
            if phi:
                m = rescale_noise_cfg(m, cond, guidance_rescale=phi)
        x = theirs.step(m, t, x).prev_sample
    got = fastdiff.sample(
        model, SHAPE, sampler=DDIM(), steps=20, classes=CLASSES, seed=4, guidance=scale,
        guidance_rescale=phi, guidance_interval=interval, schedule=VP(theirs.alphas_cumprod),
    )  # fmt: skip
    assert (got - x).abs().max() < 1e-5 * x.abs().max()


def test_a_scale_for_each_sample():
    scales = torch.tensor([1.0, 3.0, -0.5])
    args = dict(steps=4, guidance_rescale=0.3)
    together = fastdiff.sample(
        Pointwise(), SHAPE, classes=CLASSES, guidance=scales, seed=torch.arange(3), **args
    )
    for b in range(3):
        alone = fastdiff.sample(
            Pointwise(), (1, *SHAPE[1:]), classes=CLASSES[b : b + 1], guidance=float(scales[b]),
            seed=torch.tensor([b]), **args,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-6)


def test_which_steps_are_guided():
    assert not ClassifierFree(1.0).active(500)
    assert not ClassifierFree(1).active(500)
    assert ClassifierFree(0.0).active(500)
    assert ClassifierFree(torch.ones(2)).active(500)
    limited = ClassifierFree(2.0, (100, 200))
    assert [limited.active(t) for t in (99.9, 100, 200, 200.1)] == [False, True, True, False]
    weights = ClassifierFree(2.5).weights(2, torch.device("cpu"))
    assert weights.tolist() == [[-1.5, 2.5]] * 2 and weights.dtype == torch.float32
