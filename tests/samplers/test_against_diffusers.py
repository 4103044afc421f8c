"""Full trajectories equal those of diffusers' schedulers, on the same model and the same noise.

What is compared is the solver: schedulers' own float32 tables of alpha_bar are given to ours, and
the noise that they ask for is the noise that ours draws.
"""

import importlib

import pytest
import torch

import fastdiff
from fastdiff.ops import philox_normal
from fastdiff.samplers import (
    DDIM,
    DDPM,
    EDM,
    LCM,
    VP,
    DPMpp2M,
    Euler,
    Flow,
    Given,
    Heun,
    alphas_cumprod,
    timesteps,
    zero_terminal_snr,
)  # fmt: skip

diffusers = pytest.importorskip("diffusers")
SHAPE = (3, 4, 9, 14)
SEED = 17
SPREAD = 1e-5  # relative to the largest value


class Network:
    """Pointwise, nonlinear in x, another function each call."""

    def __init__(self, calls=120):
        gen = torch.Generator().manual_seed(1)
        self.bias = torch.randn(calls, *SHAPE[1:], generator=gen)
        self.calls = 0
        self.times = []

    def __call__(self, x, t, y):
        self.times.append(float(t[0]))
        out = 0.8 * torch.tanh(x) + 0.5 * self.bias[self.calls]
        self.calls += 1
        return out


class SameNoise:
    """Stands in for diffusers' randn_tensor: the noise of our next step that draws any."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def __call__(self, shape, **_):
        return philox_normal(shape, SEED, step=next(self.steps))


def run_diffusers(scheduler, x, monkeypatch=None, noise_steps=(), **step_args):
    if monkeypatch is not None:
        module = importlib.import_module(type(scheduler).__module__)
        monkeypatch.setattr(module, "randn_tensor", SameNoise(noise_steps))
    model = Network()
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t[None], None), t, x, **step_args).prev_sample
    return x, model


def start(scheduler=None):
    """The first state: noise; for variance-exploding schedulers what the model first sees."""
    z = philox_normal(SHAPE, SEED, stream=2)
    sigmas = getattr(scheduler, "sigmas", None)
    if scheduler is None or sigmas is None or getattr(scheduler, "init_noise_sigma", 1.0) == 1.0:
        return z, z
    return z, z * scheduler.init_noise_sigma / (sigmas[0] ** 2 + 1) ** 0.5


def compare(scheduler, sampler, steps, schedule, prediction="eps", clip=None, **run):
    z, first = start(scheduler)
    want, theirs = run_diffusers(scheduler, z, **run)
    ours = Network()
    got = fastdiff.sample(
        ours, first, sampler=sampler, steps=steps, seed=SEED, prediction=prediction, clip=clip,
        schedule=schedule,
    )  # fmt: skip
    assert ours.calls == theirs.calls
    error = float((got - want).abs().max() / want.abs().max())
    print(f"ERROR {type(scheduler).__name__} {steps} {prediction} clip={clip}: {error:.1e}")
    assert error < SPREAD
    return ours.times, theirs.times


def vp(scheduler, **args):
    return VP(scheduler.alphas_cumprod.double(), **args)


PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "eta, clip, rederive", [(0, None, True), (0, 1.0, True), (0.7, 1.0, False), (1, None, True)]
)
def test_ddim(monkeypatch, prediction, steps, eta, clip, rederive):
    for spacing in ("leading", "trailing"):
        theirs = diffusers.DDIMScheduler(
            prediction_type=PREDICTIONS[prediction], clip_sample=clip is not None,
            clip_sample_range=clip or 1.0, timestep_spacing=spacing, **BETAS,
        )  # fmt: skip
        theirs.set_timesteps(steps)
        ours, want = compare(
            theirs, DDIM(eta, spacing, rederive), steps, vp(theirs), prediction, clip,
            monkeypatch=monkeypatch, noise_steps=range(steps), eta=eta,
            use_clipped_model_output=clip is not None and rederive,
        )  # fmt: skip
        assert ours == want


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(monkeypatch, variance, steps, prediction):
    # Theirs draws beta_t noise in the last step too, unless that is t = 0: hence "leading" for it.
    spacing = "leading" if variance == "large" else "trailing"
    for clip in (None, 1.0):
        theirs = diffusers.DDPMScheduler(
            prediction_type=PREDICTIONS[prediction], variance_type=f"fixed_{variance}",
            clip_sample=clip is not None, timestep_spacing=spacing, beta_schedule="linear",
        )  # fmt: skip
        theirs.set_timesteps(steps)
        ours, want = compare(
            theirs, DDPM(variance, spacing), steps, vp(theirs), prediction, clip,
            monkeypatch=monkeypatch, noise_steps=range(steps),
        )  # fmt: skip
        assert ours == want


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m(monkeypatch, steps, sde, karras):
    for prediction in PREDICTIONS:
        for spacing in ("linspace", "leading", "trailing"):
            theirs = diffusers.DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
                use_karras_sigmas=karras,
                prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing, **BETAS,
            )  # fmt: skip
            theirs.set_timesteps(steps)
            schedule = vp(theirs)
            if karras:  # their ends are those of the whole schedule, whatever the spacing
                if steps == 1:
                    continue
                schedule = Given(theirs.sigmas[:-1].double(), schedule)
            ours, want = compare(
                theirs, DPMpp2M(sde, spacing), steps, schedule, prediction,
                monkeypatch=monkeypatch, noise_steps=range(steps),
            )  # fmt: skip
            assert karras or ours == want


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_euler_and_heun(steps, karras, name):
    for prediction in ("eps", "v"):
        for spacing in ("leading", "trailing", "linspace"):
            theirs = getattr(diffusers, f"{name}DiscreteScheduler")(
                use_karras_sigmas=karras, prediction_type=PREDICTIONS[prediction],
                timestep_spacing=spacing, **BETAS,
            )  # fmt: skip
            theirs.set_timesteps(steps)
            sampler = dict(Euler=Euler, Heun=Heun)[name](spacing=spacing)
            schedule = vp(theirs, karras=karras)
            if spacing == "linspace":  # theirs are fractional timesteps
                sigmas = theirs.sigmas[:-1].double()
                if name == "Heun":
                    sigmas = torch.cat((sigmas[:1], sigmas[1::2]))
                schedule = Given(sigmas, schedule)
            ours, want = compare(theirs, sampler, steps, schedule, prediction)
            if spacing != "linspace":
                torch.testing.assert_close(
                    torch.tensor(ours), torch.tensor(want), rtol=0, atol=1e-2
                )


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(steps, shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    ours, want = compare(theirs, Euler(), steps, Flow(shift), "flow")
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(want))
    theirs.set_timesteps(steps)  # their own grid
    sigmas = theirs.sigmas[1:-1].double()  # the first is 1, an infinite ratio
    ratios = torch.cat((torch.tensor([torch.inf], dtype=torch.float64), sigmas / (1 - sigmas)))
    compare(theirs, DDIM(), steps, Given(ratios, Flow()), "flow")
    if shift == 1:
        theirs.set_timesteps(steps)
        ours, want = compare(theirs, Euler(spacing="linspace"), steps, Flow(), "flow")
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(want))


@pytest.mark.parametrize("steps", [4, 20])
def test_flow_heun(steps):
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(steps)
    compare(theirs, Heun(spacing="linspace"), steps, Flow(), "flow")


@pytest.mark.parametrize("steps", [20, 50])
def test_edm(steps):
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(steps)
    z = philox_normal(SHAPE, SEED, stream=2)
    want, there = run_diffusers(theirs, z)
    c_in = (theirs.sigmas[0] ** 2 + 0.25) ** -0.5
    model = Network()
    got = fastdiff.sample(
        model, z * theirs.init_noise_sigma * c_in, sampler="euler", steps=steps, prediction="edm"
    )
    print(f"ERROR EDMEuler {steps}: {float((got - want).abs().max() / want.abs().max()):.1e}")
    assert (got - want).abs().max() < SPREAD * want.abs().max()
    torch.testing.assert_close(torch.tensor(model.times), torch.tensor(there.times))
    assert isinstance(EDM(), EDM)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm(monkeypatch, steps):
    for prediction in PREDICTIONS:
        for clip in (None, 1.0):
            theirs = diffusers.LCMScheduler(
                prediction_type=PREDICTIONS[prediction], clip_sample=clip is not None
            )
            theirs.set_timesteps(steps)
            ours, want = compare(
                theirs, LCM(), steps, vp(theirs), prediction, clip,
                monkeypatch=monkeypatch, noise_steps=range(steps),
            )  # fmt: skip
            assert ours == want


def test_schedules():
    kinds = dict(linear="linear", scaled_linear="scaled_linear", cosine="squaredcos_cap_v2")
    for ours, name in kinds.items():
        theirs = diffusers.DDPMScheduler(beta_schedule=name).alphas_cumprod.double()
        torch.testing.assert_close(alphas_cumprod(ours), theirs, rtol=1e-4, atol=1e-7)
    shifted = diffusers.DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double()
    ours = zero_terminal_snr(alphas_cumprod())
    torch.testing.assert_close(ours, shifted, rtol=1e-4, atol=1e-6)
    assert ours[-1] == 0
    for steps in (1, 7, 20, 50, 333, 1000):
        for spacing in ("leading", "trailing", "linspace"):
            theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
            theirs.set_timesteps(steps)
            if spacing != "linspace" or steps > 1:
                assert timesteps(steps, spacing).tolist() == theirs.timesteps.tolist()
    offset = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    offset.set_timesteps(20)
    assert VP(offset=1).levels(20, "leading").t.tolist() == offset.timesteps.tolist()


def test_zero_terminal_snr_runs():
    schedule = VP(zero_terminal_snr(alphas_cumprod()))
    for sampler in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "euler"):
        out = fastdiff.sample(
            Network(), SHAPE, sampler=sampler, steps=20, prediction="v", schedule=schedule, clip=1.0
        )
        assert torch.isfinite(out).all()
    for sampler in ("ddim", "dpmpp_2m", "euler"):
        with pytest.raises(
            ValueError, match="prediction is 'eps' and the schedule starts at alpha"
        ):
            fastdiff.sample(
                Network(), SHAPE, sampler=sampler, steps=20, prediction="eps", schedule=schedule
            )
    with pytest.raises(ValueError, match="Heun: the schedule starts at alpha = 0"):
        fastdiff.sample(
            Network(), SHAPE, sampler="heun", steps=20, prediction="v", schedule=schedule
        )


class LearnedNetwork(Network):
    """Its second half of channels says where the variance lies, -1 to 1 and beyond."""

    def __call__(self, x, t, y):
        out = super().__call__(x, t, y)
        return torch.cat((out, 1.2 * torch.sin(3 * x + out)), 1)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_with_a_learned_variance(prediction, clip, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        **BETAS, prediction_type=PREDICTIONS[prediction], clip_sample=clip is not None,
        clip_sample_range=clip or 1.0, variance_type="learned_range", timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(20)
    monkeypatch.setitem(globals(), "Network", LearnedNetwork)
    compare(
        scheduler, DDPM("learned", "leading"), 20, vp(scheduler), prediction, clip,
        monkeypatch=monkeypatch, noise_steps=range(20),
    )  # fmt: skip
