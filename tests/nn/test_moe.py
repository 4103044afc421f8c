"""The layer of experts: against a loop over tokens, identities, gradients, what it tells."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff.nn import MoE, SwiGLU, balance_loss, routes
from fastdiff.testing import assert_close

GATED = {"swiglu": (0, 1), "swishglu": (1, 0), "geglu": (1, 0)}  # which half gates, which does not


def layer(width=12, hidden=10, experts=5, k=2, seed=0, **more):
    torch.manual_seed(seed)
    made = MoE(width, hidden, experts, k, **more)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made.eval()


def expert(moe, e, x):
    """Expert ``e`` on ``x [..., C]`` in its dtype, by its parts."""
    bias = None if moe.up_bias is None else moe.up_bias[e].to(x.dtype)
    u = F.linear(x, moe.up[e].to(x.dtype), bias)
    if moe.activation in GATED:
        halves = u.chunk(2, -1)
        gate, value = (halves[i] for i in GATED[moe.activation])
        h = value * (F.gelu(gate) if moe.activation == "geglu" else F.silu(gate))
    else:
        h = F.gelu(u)
    bias = None if moe.down_bias is None else moe.down_bias[e].to(x.dtype)
    return F.linear(h, moe.down[e].to(x.dtype), bias)


def loop(moe, x, logits=None):
    """Token after token, in float64."""
    flat = x.double().reshape(-1, x.shape[-1])
    if logits is None:
        logits = flat @ moe.router.double().T
    logits = logits.reshape(len(flat), -1).double()
    out = []
    for token, row in zip(flat, logits, strict=True):
        gates = row.sigmoid() if moe.gate == "sigmoid" else row.softmax(0)
        chosen = sorted(range(len(row)), key=lambda e, row=row: (-row[e].item(), e))[: moe.k]
        scale = sum(gates[e] for e in chosen) if moe.renormalise else 1.0
        y = sum(gates[e] / scale * expert(moe, e, token) for e in chosen)
        out.append(y if moe.shared is None else y + moe.shared.double()(token))
    if moe.shared is not None:
        moe.shared.float()
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("shape", [(1, 12), (7, 12), (3, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(activation="swishglu", bias="up", renormalise=True),
        dict(activation="gelu", bias=True, gate="sigmoid"),
        dict(activation="geglu", k=1),
        dict(shared=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_a_loop_over_tokens(shape, more):
    more = dict(more, shared=SwiGLU(12, 8)) if more.get("shared") else more
    moe = layer(**more)
    x = torch.randn(shape)
    want = loop(moe, x)
    got = moe(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert torch.allclose(got.double(), want, atol=1e-5 * want.abs().max().item())


@torch.no_grad()
def test_bfloat16_is_as_close_as_a_loop_in_it():
    moe = layer()
    x = torch.randn(33, 12)
    for p in moe.parameters():
        p.copy_(p.bfloat16())
    x = x.bfloat16().float()
    routing = moe.route(x)
    want = loop(moe, x)
    half = layer().bfloat16()
    half.load_state_dict(moe.state_dict())
    rows = [
        sum(w * expert(half, e, token) for w, e in zip(ws, es.tolist(), strict=True))
        for token, ws, es in zip(
            x.bfloat16(), routing.weights.bfloat16(), routing.experts, strict=True
        )
    ]
    assert_close(half(x.bfloat16()), want, torch.stack(rows), what="MoE bf16")


@torch.no_grad()
def test_all_experts_are_the_dense_mixture():
    moe = layer(experts=4, k=4)
    x = torch.randn(3, 9, 12)
    gates = (x @ moe.router.T).softmax(-1)
    want = sum(gates[..., e, None] * expert(moe, e, x) for e in range(4))
    assert torch.allclose(moe(x), want, atol=1e-5 * want.abs().max().item())


@torch.no_grad()
def test_one_expert_is_the_plain_mlp():
    moe = layer(experts=1, k=1)
    mlp = SwiGLU(12, 10)
    mlp.load_state_dict({"up": moe.up[0], "down": moe.down[0]})
    x = torch.randn(3, 9, 12)
    assert torch.allclose(moe(x), mlp(x), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [False, True])
def test_equal_experts(renormalise):
    """Their output times the sum of the gates: less than 1 where these are not renormalised."""
    moe = layer(renormalise=renormalise)
    moe.up.copy_(moe.up[:1].expand_as(moe.up))
    moe.down.copy_(moe.down[:1].expand_as(moe.down))
    x = torch.randn(21, 12)
    total = moe.route(x).weights.sum(1, keepdim=True)
    assert torch.allclose(total, torch.ones(())) == renormalise
    assert torch.allclose(moe(x), total * expert(moe, 0, x), atol=1e-5)


@torch.no_grad()
def test_permutations_of_tokens_and_of_experts():
    moe = layer()
    x = torch.randn(29, 12)
    want, perm = moe(x), torch.randperm(29)
    assert torch.allclose(moe(x[perm]), want[perm], atol=1e-6)
    other, perm = layer(), torch.randperm(5)
    for name, p in moe.named_parameters():
        getattr(other, name).copy_(p[perm])
    assert torch.allclose(other(x), want, atol=1e-6)


@torch.no_grad()
def test_logits_of_samples():
    moe = layer(router=False, renormalise=True)
    x, sample = torch.randn(3, 7, 12), torch.randn(3, 5)
    got = moe(x, torch.zeros(3, 7, 5), sample)
    assert torch.allclose(got.double(), loop(moe, x, sample.repeat_interleave(7, 0)), atol=1e-5)
    with pytest.raises(ValueError, match="logits is None and the layer has no router"):
        moe(x)


def test_gradients_and_unused_experts():
    moe = layer(width=6, hidden=5, experts=6, k=2).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    routing = moe.route(x)
    idle = routing.counts == 0
    assert idle.any()
    moe(x).square().sum().backward()
    assert not moe.up.grad[idle].any() and not moe.down.grad[idle].any()
    assert moe.up.grad[~idle].flatten(1).any(1).all() and moe.router.grad.any()

    def call(x, up, down, router):
        return torch.func.functional_call(moe, dict(up=up, down=down, router=router), (x,))

    args = [p.detach().clone().requires_grad_() for p in (x, moe.up, moe.down, moe.router)]
    assert torch.autograd.gradcheck(call, args)


def test_what_layers_chose():
    moe = layer()
    x = torch.randn(2, 9, 12)
    with routes() as outer:
        moe(x)
        with routes() as found:
            moe(x)
            moe(x[:, :3])
    moe(x)
    assert len(outer) == 1 and [len(r.experts) for r in found] == [18, 6]
    for r in found:
        assert torch.equal(r.counts, r.experts.flatten().bincount(minlength=5))
    share, mean = found[0].counts / 36, found[0].logits.softmax(1).mean(0)
    assert torch.allclose(found[0].balance(), 5 * (share * mean).sum())
    loss = balance_loss(found)
    assert torch.allclose(loss, found[0].balance() + found[1].balance())
    loss.backward()
    assert moe.router.grad.any() and moe.up.grad is None
    with pytest.raises(ValueError, match="found is empty"):
        balance_loss([])


def test_balance_of_an_even_router_is_one_and_its_experts_the_first():
    moe = layer()
    torch.nn.init.zeros_(moe.router)
    with routes() as found:
        moe(torch.randn(17, 12))
    assert found[0].balance().item() == pytest.approx(1.0)
    assert found[0].experts.tolist() == [[0, 1]] * 17


def test_the_router_does_not_round_under_autocast():
    moe, x = layer(), torch.randn(40, 12)
    with torch.no_grad():
        want = moe.route(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = moe.route(x)
    assert torch.equal(got.weights, want.weights) and torch.equal(got.experts, want.experts)


def test_bad_arguments():
    for change, message in (
        (dict(width=0), "width is 0, need an integer of at least 1"),
        (dict(k=6), "k is 6, need at most 5, the experts"),
        (dict(activation="relu"), "activation is 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**change)


def test_autocast_computes_experts_in_its_dtype():
    """As linear layers do; the router stays in float32."""
    torch.manual_seed(0)
    moe, x = MoE(16, 8, 4, 2, bias=True, shared=SwiGLU(16, 8)), torch.randn(3, 5, 16)
    want = moe(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = moe(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2)
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


def test_the_backward_keeps_less_than_a_loop_does():
    """Bytes of what autograd saves beside the parameters, each memory once."""
    torch.manual_seed(0)
    moe, x = MoE(96, 384, 8, 2, activation="gelu_tanh"), torch.randn(512, 96, requires_grad=True)

    def loop(tokens):
        routing, out = moe.route(tokens), torch.zeros_like(tokens)
        for e in range(8):
            token, j = (routing.experts == e).nonzero(as_tuple=True)
            h = F.gelu(F.linear(tokens[token], moe.up[e]), approximate="tanh")
            y = F.linear(h, moe.down[e]) * routing.weights[token, j, None]
            out = out.index_add(0, token, y)
        return out

    def kept(run):
        own = {p.untyped_storage().data_ptr() for p in moe.parameters()}
        held = {}

        def pack(t):
            memory = t.untyped_storage()
            if memory.data_ptr() not in own:
                held[memory.data_ptr()] = memory.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = run(x)
        return sum(held.values()), out

    ours, a = kept(moe)
    theirs, b = kept(loop)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours < 0.9 * theirs, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype):
    """Experts with few rows, with many and with none; forward and every gradient."""
    torch.manual_seed(0)
    moe = MoE(48, 96, 6, 2, renormalise=True).to(dtype)
    with torch.no_grad():
        moe.router[0] += 0.3  # takes most
        moe.router[5] -= 9 * moe.router[5].sign()
    x = torch.randn(200, 48, dtype=dtype).abs()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            with torch.no_grad():
                plain = moe(x)
            out = moe(leaf)
            grads = torch.autograd.grad(out.float().square().sum(), [leaf, *moe.parameters()])
            found.append([plain, out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
