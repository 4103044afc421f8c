"""What the tests of the engine share: one thread, and a sampler step of our own."""

import pytest
import torch

from fastdiff.models import DiT
from fastdiff.ops import Noise, fused_step
from fastdiff.samplers import SAMPLERS, VP


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small operations: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network():
    """A tiny DiT with values everywhere: with adaLN-Zero's own, every output is 0."""
    torch.manual_seed(1)
    model = DiT(
        input_size=8, patch_size=2, in_channels=3, hidden_size=48, depth=2, num_heads=3,
        num_classes=5,
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def sampling():
    """``sampling(sampler, steps, size, device)`` -> (model, one guided step of it, inputs)."""

    def make(sampler, steps=8, size=8, device="cpu"):
        model = network().to(device)

        def step(x, h1, i, rows, times, y, w, seeds, slots):
            t = times.index_select(0, i).expand(len(y))
            m = model(torch.cat((x, x)), t, y).view(2, len(x), -1, *x.shape[2:])
            new, kept = fused_step(
                x, m[:, :, : x.shape[1]], rows, step=i, w=w, h1=h1,
                noise=Noise(seeds, slots, i), rescale=0.5, keep=True,
            )  # fmt: skip
            x.copy_(new)
            h1.copy_(kept)
            i.add_(1)
            return x

        table = SAMPLERS[sampler].table(VP(), steps, "eps", 1.0)
        x = torch.randn(2, 3, size, size)
        inputs = {
            "x": x,
            "h1": torch.zeros_like(x),
            "i": torch.zeros(1, dtype=torch.int64),
            "rows": table.rows,
            "times": table.t,
            "y": torch.tensor([5, 5, 1, 2]),
            "w": torch.tensor([[-1.0, 2.0]]).repeat(2, 1),
            "seeds": torch.tensor([7, 7]),
            "slots": torch.arange(2),
        }
        return model, step, {k: v.to(device) for k, v in inputs.items()}

    return make
