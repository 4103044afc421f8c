"""Orthogonal adaptation: bases, training of one factor, merging of concepts."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastdiff import adapters
from fastdiff.adapters import OrthogonalLoRA, crosstalk, merge_concepts
from fastdiff.adapters.orthogonal import columns
from fastdiff.models import DiT
from fastdiff.testing import draw_weights


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 24, bias=False))
    return model.to(dtype)


def state_of(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def fill(lora, seed):
    """An adapter that does something."""
    with torch.no_grad():
        for i, pair in enumerate(lora.pairs.values()):
            pair.up.copy_(0.3 * draw(*pair.up.shape, seed=100 * seed + i))
    return lora


def concepts(model, count, rank=5, basis="orthogonal", **settings):
    out = []
    for i in range(count):
        lora = fill(OrthogonalLoRA(model, rank, i, seed=3, basis=basis, **settings), i + 1)
        lora.detach()
        out.append(lora)
    return out


def test_columns_are_orthogonal_and_do_not_depend_on_later_ones():
    basis = columns(48, 64, 64, seed=7)
    assert (basis.T @ basis - torch.eye(64)).abs().max() < 1e-13
    assert torch.equal(basis, columns(48, 64, 64, seed=7))
    for stop in (1, 20, 63):
        assert (columns(48, 64, stop, seed=7) - basis[:, :stop]).abs().max() < 1e-13
    for other in (columns(48, 64, 64, seed=8), columns(32, 64, 64, seed=7)):
        assert (other - basis).abs().max() > 0.1
    assert columns(48, 64, 0, seed=7).shape == (64, 0)


def test_columns_are_those_of_qr_with_a_positive_diagonal():
    basis, drawn = columns(8, 32, 32, 0), columns(8, 32, 32, 0, "gaussian")
    r = basis.T @ drawn
    assert r.tril(-1).abs().max() < 1e-13 and r.diagonal().min() > 0


def test_same_seed_in_another_process():
    code = (
        "import torch\nfrom fastdiff.adapters.orthogonal import columns\n"
        "print(*columns(48, 64, 20, 5).flatten().view(torch.int64).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = columns(48, 64, 20, 5).flatten().view(torch.int64).tolist()
    assert [int(n) for n in done.stdout.split()] == mine


def test_each_of_four_merged_concepts_says_what_it_said_alone():
    model = nn.Sequential(nn.Linear(64, 48)).double()
    loras = concepts(model, 4)
    alone = []
    for lora in loras:
        x = draw(2, 9, 5, dtype=torch.float64) @ lora.pairs["0"].down[0].double()
        lora.attach()
        with torch.no_grad():
            alone.append((x, model(x)))
        lora.detach()
    base = state_of(model)
    made = merge_concepts(model, loras)
    for x, want in alone:
        assert (model(x) - want).abs().max() < 1e-5
    off = draw(3, 64, dtype=torch.float64)
    assert (
        model(off) - nn.functional.linear(off, base["0.weight"], base["0.bias"])
    ).abs().max() > 0.1
    made.detach()
    assert same(model, base)


def test_single_concept_merges_as_it_runs():
    model, x = network(), draw(2, 7, 64)
    lora = fill(OrthogonalLoRA(model, 4, 1, alpha=6.0), 1)
    with torch.no_grad():
        want = model(x)
        lora.merge()
        assert (model(x) - want).abs().max() < 1e-5
        lora.detach()
        made = merge_concepts(model, [lora], [1.0])
        assert (model(x) - want).abs().max() < 1e-5
        made.unmerge()
        assert (model(x) - want).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_changes_no_bit_and_the_base_comes_back(dtype):
    model = network(dtype)
    loras, base = concepts(model, 3), state_of(model)
    weights = [0.5, 1.0, 2.0]
    merged = []
    for order in ([0, 1, 2], [2, 0, 1]):
        made = merge_concepts(model, [loras[i] for i in order], [weights[i] for i in order])
        merged.append(state_of(model))
        made.detach()
        assert same(model, base) and "_fastdiff_adapters" not in model.__dict__
    assert all(torch.equal(merged[0][n], merged[1][n]) for n in base)
    assert not torch.equal(merged[0]["0.weight"], base["0.weight"])
    want = base["0.weight"].double() + sum(
        w * a.pairs["0"].delta(0).double() for w, a in zip(weights, loras, strict=True)
    )
    error = (merged[0]["0.weight"].double() - want).abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 2**-8 * want.abs().max())


def test_files_merge_as_adapters_do(tmp_path):
    model = network()
    loras, base = concepts(model, 3), state_of(model)
    files = [lora.save(tmp_path / f"{i}.safetensors") for i, lora in enumerate(loras)]
    made = merge_concepts(model, [files[1], loras[0], str(files[2])])
    first = state_of(model)
    made.save(tmp_path / "all")
    made.detach()
    made = merge_concepts(model, loras)
    assert same(model, first)
    made.detach()
    again = adapters.load(model, tmp_path / "all")
    again.merge()
    assert same(model, first)
    again.detach()
    assert same(model, base)
    one = adapters.load(model, files[1])
    assert isinstance(one, OrthogonalLoRA) and one.settings == loras[1].settings
    for a, b in zip(one.state_dict().values(), loras[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_crosstalk_is_0_for_orthogonal_and_measured_for_gaussian_columns():
    model = network()
    for matrix in crosstalk(concepts(model, 3)).values():
        assert (matrix - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-6
    loras = concepts(model, 3, rank=8, basis="gaussian")
    found = crosstalk(loras)["0"]
    assert torch.equal(found.diagonal(), torch.ones(3, dtype=torch.float64))
    rest = found[~torch.eye(3, dtype=torch.bool)]
    assert (0.2 < rest).all() and (rest < 0.5).all()  # sqrt(8 / 64) is 0.35
    # It is what another concept sees of inputs B_0 c, over what the first sees.
    b0, b1 = (lora.pairs["0"].down[0].double() for lora in loras[:2])
    c = draw(8, 20000, dtype=torch.float64)
    seen = [(b @ (b0.T @ c)).square().mean().sqrt() for b in (b0, b1)]
    assert abs(seen[1] / seen[0] - found[0, 1]) < 0.01


def test_training_moves_only_the_up_factors():
    model, x = network(), draw(16, 64)
    lora = OrthogonalLoRA(model, 4, 2)
    with torch.no_grad():
        assert torch.equal(model(x), network()(x))  # up is 0
    base, downs = state_of(model), [p.down.clone() for p in lora.pairs.values()]
    assert all(any(t is p.up for p in lora.pairs.values()) for t in lora.trainable())
    rate = torch.optim.AdamW(lora.trainable(), 1e-2, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = (model(x) - draw(16, 24, seed=5)).square().mean()
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for pair, down in zip(lora.pairs.values(), downs, strict=True):
        assert torch.equal(pair.down, down) and pair.down.grad is None
        assert pair.up.abs().max() > 0
    assert same(model, base)


def test_gradient_is_that_of_the_formula_and_no_input_is_kept():
    model = nn.Sequential(nn.Linear(64, 24))
    lora = fill(OrthogonalLoRA(model, 4, 2, alpha=6.0), 1)
    x, pair, kept = draw(3, 33, 64), lora.pairs["0"], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = model(x)
    weight = draw(3, 33, 24, seed=2)
    out.backward(weight)
    low = x.flatten(0, 1) @ pair.down[0].T
    want = 1.5 * weight.flatten(0, 1).T @ low
    assert (pair.up.grad[0] - want).abs().max() < 1e-4
    assert kept and max(t.numel() for t in kept) == 3 * 33 * 4


def test_inputs_get_their_gradient_too():
    model = network().double()
    lora = fill(OrthogonalLoRA(model, 4, 2), 1)
    x = draw(3, 64, dtype=torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(model(x).square().sum(), x)
    lora.merge()
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (ours - want).abs().max() < 1e-5


def test_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 4, 1))
    x, base = draw(2, 6, 8, 12), state_of(model)
    loras = [
        fill(OrthogonalLoRA(model, 2, i, targets="^0$|^1$", convolutions=True), i)
        for i in (0, 1)
    ]  # fmt: skip
    with torch.no_grad():
        want = model(x)
    model(x).sum().backward()
    assert all(a.pairs["0"].up.grad.abs().max() > 0 for a in loras)
    for lora in loras:
        lora.detach()
    with torch.no_grad():
        made = merge_concepts(model, loras)
        assert (model(x) - want).abs().max() < 1e-5
        made.unmerge()
        assert (model(x) - want).abs().max() < 1e-5
    made.detach()
    assert same(model, base)


def test_concepts_of_a_network():
    """All layers of one, a picture that is not square, two samples: run, merged, taken back."""
    model = draw_weights(
        DiT(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=10)
    )
    args = draw(2, 4, 8, 12), torch.tensor([10.0, 900.0]), torch.tensor([3, 5])
    base = state_of(model)
    with torch.no_grad():
        plain = model(*args)
        loras = [fill(OrthogonalLoRA(model, 2, i, targets=r"attn|mlp"), i + 1) for i in (0, 1)]
        want = model(*args)
        for lora in loras:
            lora.detach()
        made = merge_concepts(model, loras)
        assert (model(*args) - want).abs().max() < 1e-5 and (plain - want).abs().max() > 1e-2
        made.detach()
        assert same(model, base) and torch.equal(model(*args), plain)


def test_bf16_base_trains():
    model = network(torch.bfloat16)
    lora = OrthogonalLoRA(model, 4)
    model(draw(2, 5, 64).bfloat16()).float().square().sum().backward()
    grads = [p.up.grad for p in lora.pairs.values()]
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads[1:])


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(rank=10, concept=5), r"layer 2 has 48 inputs, need rank \* \(concept \+ 1\) = 60"),
        (dict(rank=65), "layer 0 has 64 inputs"),
        (dict(concept=-1), "concept is -1"),
        (dict(seed=0.5), "seed is 0.5"),
        (dict(basis="haar"), "basis is 'haar', need orthogonal or gaussian"),
        (dict(rank=-1), "rank is -1"),
        (dict(targets="none"), "targets is 'none'"),
    ],
)
def test_errors_leave_the_network_alone(settings, words):
    model = network()
    with pytest.raises(ValueError, match=words):
        OrthogonalLoRA(model, **settings)
    assert "_fastdiff_adapters" not in model.__dict__
    OrthogonalLoRA(model, 10, 5, basis="gaussian")  # has no limit


def test_errors_of_merging_leave_the_network_alone(tmp_path):
    model = network()
    loras, base = concepts(model, 2), state_of(model)
    twin = OrthogonalLoRA(model, 10, 0, seed=3)
    twin.detach()
    other = OrthogonalLoRA(model, 5, 1, seed=4)
    other.detach()
    plain = adapters.LoRA(model, 4)
    plain.save(tmp_path / "plain")
    plain.detach()
    bad = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24))
    attached = OrthogonalLoRA(bad, 2, 7, seed=3)
    for words, do in {
        "empty": lambda: merge_concepts(model, []),
        "weights has 1": lambda: merge_concepts(model, loras, [1.0]),
        "column 0 of the bases": lambda: merge_concepts(model, [twin, loras[0]]),
        "column 5 of the bases": lambda: merge_concepts(model, [twin, loras[1]]),
        r"seeds \[3, 4\]": lambda: merge_concepts(model, [loras[0], other]),
        "its method is lora": lambda: merge_concepts(model, [tmp_path / "plain"]),
        "concept 0 is attached": lambda: merge_concepts(model, [attached]),
        "is a Linear": lambda: merge_concepts(model, [model[0]]),
        "crosstalk: concepts are 1": lambda: crosstalk(loras[:1]),
    }.items():
        with pytest.raises(ValueError, match=words):
            do()
        assert same(model, base) and "_fastdiff_adapters" not in model.__dict__
    attached.detach()
    with pytest.raises(ValueError, match="need 48 rows and 64"):
        merge_concepts(model, [attached])
    assert same(model, base) and "_fastdiff_adapters" not in model.__dict__
