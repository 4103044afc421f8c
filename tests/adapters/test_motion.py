"""MotionDirector: two paths of a video U-Net, the loss without looks, roles in a training step."""

import diffusers
import pytest
import torch
from torch import nn

from fastdiff import adapters
from fastdiff.adapters import MotionLoRA, motion_director
from fastdiff.adapters.motion import debias, debiased_loss, noise_prior, training_losses
from fastdiff.testing import draw_weights

T = torch.tensor([10, 900])
FRAMES = 3


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet3d():
    model = diffusers.UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=24,
        attention_head_dim=8,
    )  # fmt: skip
    text = draw(2, 7, 24, seed=2)
    return draw_weights(model), lambda x: model(x, T, encoder_hidden_states=text.to(x.dtype)).sample


def animatediff():
    model = diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=24,
        num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=4,
    )  # fmt: skip
    text = draw(2, 7, 24, seed=2)

    def call(x):
        each = text.to(x.dtype).repeat_interleave(x.shape[2], 0)
        return model(x, T, encoder_hidden_states=each).sample

    return draw_weights(model), call


NETWORKS = {"unet3d": unet3d, "animatediff": animatediff}


def fill(lora, seed=1):
    with torch.no_grad():
        for i, pair in enumerate(lora.pairs.values()):
            pair.up.copy_(0.1 * draw(*pair.up.shape, seed=100 * seed + i))
    return lora.eval()


def video(seed=3):
    return draw(2, 4, FRAMES, 8, 16, seed=seed)


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", NETWORKS)
def test_paths_are_the_transformers_over_frames_and_over_time(kind):
    model, _ = NETWORKS[kind]()
    spatial, temporal = motion_director(model, rank=2)
    inside = ("temp_attentions", "transformer_in", "motion_modules")
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    time = {n for n in linear if any(p in n for p in inside)}
    frames = {n for n in linear if ".attentions." in n}
    assert set(temporal.places) == time and set(spatial.places) == frames and time and frames
    pair = next(iter(spatial.pairs.values()))
    assert abs(pair.down.std() - 1 / 2) < 0.15 and not pair.up.any()
    only = MotionLoRA(model, "temporal", 2, targets=["to_q"])
    assert set(only.places) == {n for n in time if n.endswith("to_q")}


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_scales_0_and_detaching_are_the_base(kind):
    model, call = NETWORKS[kind]()
    x, base = video(), state_of(model)
    want = call(x)
    spatial, temporal = motion_director(model, rank=3)
    assert torch.equal(call(x), want)
    fill(spatial), fill(temporal, 2)
    assert not torch.equal(call(x), want)
    spatial.scale.zero_(), temporal.scale.zero_()
    assert torch.equal(call(x), want)
    spatial.detach(), temporal.detach()
    assert torch.equal(call(x), want) and same(model, base)


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_scales_switch_as_merged_models_do(kind):
    model, call = NETWORKS[kind]()
    model.double()  # float32 rounds by as much, through a whole network
    x, base = video().double(), state_of(model)
    both = fill(motion_director(model, rank=3)[0]), fill(adapters.attached(model)[1], 2)
    found = {}
    for on in ((1, 0), (0, 1), (1, 1)):
        for lora, scale in zip(both, on, strict=True):
            lora.scale.fill_(scale)
        found[on] = call(x)
    assert not torch.equal(found[1, 0], found[0, 1])
    for lora in both:
        lora.scale.fill_(1)
        lora.detach()
    for on, out in found.items():
        merged = [lora for lora, scale in zip(both, on, strict=True) if scale]
        for lora in merged:
            lora.attach().merge()
        assert (call(x) - out).abs().max() < 1e-6
        for lora in merged:
            lora.detach()
    assert same(model, base)


@torch.no_grad()
def test_roles():
    model, call = unet3d()
    x = video()
    want = call(x)
    spatial, temporal = (fill(a) for a in motion_director(model, rank=3))
    full = call(x)
    with spatial.acting("off"), temporal.acting("off"):
        assert torch.equal(call(x), want)
    with spatial.acting("frozen"), temporal.acting("frozen"):
        # torch picks another product where no weight asks for gradients.
        assert (call(x) - full).abs().max() < 1e-5
    assert spatial.role == temporal.role == "train" and torch.equal(call(x), full)
    with pytest.raises(ValueError, match="role is 'on'"), spatial.acting("on"):
        pass
    spatial.merge()
    with pytest.raises(ValueError, match="need unmerge"), spatial.acting("off"):
        pass


def test_roles_and_gradient_checkpointing():
    """Whose second pass would come after the role."""
    model, call = animatediff()
    model.enable_gradient_checkpointing()
    spatial, temporal = motion_director(model, rank=2)
    with pytest.raises(ValueError, match="checkpointing is on"):
        training_losses(spatial, temporal, call, video(), video(), leave_out=0.0)
    assert spatial.role == temporal.role == "train"
    with torch.no_grad(), spatial.acting("off"):
        call(video())
    model.disable_gradient_checkpointing()
    training_losses(spatial, temporal, call, video(), video(), leave_out=0.0).total.backward()


@torch.no_grad()
def test_each_video_has_its_spatial_adapter():
    model, call = unet3d()
    x = video()
    spatial, temporal = motion_director(model, rank=3, videos=2)
    fill(spatial), fill(temporal, 2)
    found = {}
    for ids in ([1, 2], [2, 1], [0, 2]):
        spatial.choose(ids)
        found[tuple(ids)] = call(x)
    for slot in (0, 1):
        spatial.choose(None)
        spatial.merge(slot)
        alone = call(x)
        spatial.unmerge()
        for ids, out in found.items():
            row = ids.index(slot + 1) if slot + 1 in ids else None
            if row is not None:
                assert (out[row] - alone[row]).abs().max() < 1e-5
    with spatial.acting("off"):
        assert (call(x)[0] - found[0, 2][0]).abs().max() < 1e-5
    spatial.choose([1, 2, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="rows, need a multiple of the 7"):
        call(x)


def test_variance_of_debiased_noise():
    e = draw(4, 4, 8, 32, 32, dtype=torch.float64)
    phi = debias(e, beta=1.0, anchor=2)
    rest = [f for f in range(8) if f != 2]
    assert abs(phi[:, :, rest].var() - 3) < 0.02
    assert abs(phi[:, :, 2].var() - (2**0.5 - 1) ** 2) < 0.005
    assert torch.equal(debias(e, 0.0), e)
    for beta in (0.5, 1.0, 3.0):  # what all frames share
        const = torch.ones(1, 1, 3, 1, 1, dtype=torch.float64)
        shift = debias(e[:, :, :3] + const, beta) - debias(e[:, :, :3], beta)
        assert (shift - ((beta**2 + 1) ** 0.5 - beta)).abs().max() < 1e-12


def test_anchor_of_each_sample():
    e, anchor = draw(3, 2, 4, 5, 6), torch.tensor([3, 0, 1])
    want = torch.cat([debias(e[b : b + 1], 2.0, int(a)) for b, a in enumerate(anchor)])
    assert torch.equal(debias(e, 2.0, anchor), want)
    target = draw(3, 2, 4, 5, 6, seed=2)
    want = (debias(e, 2.0, anchor) - debias(target, 2.0, anchor)).square().mean()
    assert abs(debiased_loss(e, target, 2.0, anchor) - want) < 1e-5
    assert debiased_loss(e, e.clone()) == 0


def test_noise_prior():
    noise, inverted = draw(2, 4, 3, 32, 32), draw(2, 4, 3, 32, 32, seed=2)
    assert torch.equal(noise_prior(noise, inverted, 0), noise)
    assert torch.equal(noise_prior(noise, inverted, 1), inverted)
    mixed = noise_prior(noise, inverted, 0.3)
    assert abs(mixed.var() - 1) < 0.03
    assert abs((mixed * inverted).mean() - 0.3**0.5) < 0.03


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_training_step(kind):
    model, call = NETWORKS[kind]()
    spatial, temporal = motion_director(model, rank=3)
    fill(spatial), fill(temporal, 2)
    x, noise, seen = video(), video(seed=4), []

    def predict(noisy):
        seen.append((noisy.shape[2], spatial.role, temporal.role))
        return call(noisy)

    generator = torch.Generator().manual_seed(3)
    losses = training_losses(
        spatial, temporal, predict, x, noise, leave_out=0.0, generator=generator
    )
    assert seen == [(1, "train", "off"), (FRAMES, "frozen", "train")]
    losses.temporal.backward()
    assert all(p.grad is None for p in spatial.parameters())
    assert all(p.grad.abs().max() > 0 for p in temporal.parameters())
    temporal.zero_grad()
    losses.spatial.backward()
    assert all(p.grad.abs().max() > 0 for p in spatial.parameters())
    assert all(p.grad is None for p in temporal.parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        out = call(x)
        want = (out - noise).square().mean() + debiased_loss(out, noise, 1.0, losses.anchor)
        assert abs(losses.temporal - want) < 1e-5 * want
        with temporal.acting("off"):
            f = losses.frame
            still = call(x[:, :, f : f + 1]) - noise[:, :, f : f + 1]
        assert abs(losses.spatial - still.square().mean()) < 1e-5
    assert torch.equal(losses.total, losses.spatial + losses.temporal)


def test_a_step_without_the_spatial_adapter():
    model, call = unet3d()
    spatial, temporal = motion_director(model, rank=3)
    fill(spatial), fill(temporal, 2)
    losses = training_losses(spatial, temporal, call, video(), video(4), leave_out=1.0)
    with torch.no_grad(), spatial.acting("off"):
        out = call(video())
        want = (out - video(4)).square().mean() + debiased_loss(out, video(4), 1.0, losses.anchor)
    assert losses.spatial is None and losses.total is losses.temporal
    assert abs(losses.temporal - want) < 1e-5 * want
    assert spatial.role == "train"


def test_training_brings_both_losses_down():
    model, call = unet3d()
    spatial, temporal = motion_director(model, rank=4)
    before = state_of(model)
    rate = torch.optim.Adam([*spatial.trainable(), *temporal.trainable()], 1e-2)
    losses = []
    for i in range(16):
        generator = torch.Generator().manual_seed(i % 2)
        step = training_losses(
            spatial, temporal, call, video(), video(4), leave_out=0.0, generator=generator
        )
        rate.zero_grad()
        step.total.backward()
        rate.step()
        losses.append((step.spatial.item(), step.temporal.item()))
    assert all(losses[-1][i] < 0.99 * losses[1][i] for i in (0, 1))
    assert same(model, before)


def test_one_frame_over_time_is_its_value():
    """Softmax over one key: temporal adapters of queries and keys change nothing there."""
    model, call = unet3d()
    x = draw(2, 4, 1, 8, 8)
    with torch.no_grad():
        want = call(x)
        lora = fill(MotionLoRA(model, "temporal", 2, targets=r"attn[12]\.to_[qk]$"))
        assert (call(x) - want).abs().max() < 1e-5
        assert (call(video()) - (lora.detach(), call(video()))[1]).abs().max() > 1e-5


def test_files_and_bf16(tmp_path):
    model, call = unet3d()
    model.bfloat16()
    spatial, temporal = motion_director(model, rank=2, videos=2)
    fill(spatial), fill(temporal, 2)
    spatial.save(tmp_path / "s"), temporal.save(tmp_path / "t")
    spatial.detach(), temporal.detach()
    base = state_of(model)
    for name, lora in (("s", spatial), ("t", temporal)):
        twin = adapters.load(model, tmp_path / name)
        assert isinstance(twin, MotionLoRA) and twin.path == lora.path
        assert twin.settings == lora.settings and set(twin.places) == set(lora.places)
        for a, b in zip(twin.state_dict().values(), lora.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    x = video().bfloat16()
    training_losses(*adapters.attached(model), call, x, x, leave_out=0.0).total.backward()
    assert all(p.grad.isfinite().all() for p in adapters.attached(model)[1].parameters())
    for lora in adapters.attached(model):
        lora.detach()
    assert same(model, base)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(path="both"), "path is 'both', need spatial or temporal"),
        (dict(rank=257), "rank is 257"),
        (dict(videos=0), "slots is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(targets=["transformer_in.proj_in"]), "fits no layer of the spatial"),
        (dict(targets="nothing"), "targets is 'nothing'"),
    ],
)
def test_errors_leave_the_network_alone(settings, words):
    model, _ = unet3d()
    with pytest.raises(ValueError, match=words):
        MotionLoRA(model, **{**dict(path="spatial"), **settings})
    assert "_fastdiff_adapters" not in model.__dict__
    with pytest.raises(ValueError, match="has no temporal transformers"):
        MotionLoRA(nn.Sequential(nn.Linear(2, 2)), "temporal")


def test_errors_of_functions():
    e = draw(2, 2, 3, 4, 4)
    model = nn.Sequential(nn.Linear(2, 2))
    for words, do in {
        "beta is -1": lambda: debias(e, -1),
        "anchor is 3": lambda: debias(e, 1.0, 3),
        r"anchor has shape \[3\]": lambda: debias(e, 1.0, torch.zeros(3, dtype=torch.int64)),
        "need that of predicted": lambda: debiased_loss(e, e[:1]),
        "weight is 2": lambda: noise_prior(e, e, 2),
        "inverted has shape": lambda: noise_prior(e, e[:1], 0.5),
        r"need \[B, C, F, H, W\] of both": lambda: training_losses(model, model, None, e, e[:1]),
        "leave_out is 2": lambda: training_losses(model, model, None, e, e, leave_out=2),
    }.items():
        with pytest.raises(ValueError, match=words):
            do()
