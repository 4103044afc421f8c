"""Whole sampling programs on the trained digit models against the plainest correct torch loop.

Every arm "loop" is the method written out in torch alone, as its algorithm box has it, on the same
weights in plain torch (``fastdiff.models.plain``), with torch's own generator for noise. Programs
run on the trained DiT (3.5 M weights, 64 tokens) with the settings of their papers where they fit
20 steps. "Forecast(2)" is the same program with a cache that computes every second step: another
result, whose distance this file prints where it is run by itself. "recomputed" is value-based
decoding as its public code does it: every candidate has a model call for its proposal and one for
its value.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _case import Case
from torch import Tensor, nn

import fastdiff
from fastdiff import methods, models
from fastdiff.cache import Forecast
from fastdiff.cli_methods import REWARDS, region_of
from fastdiff.samplers import DDIM, Run
from fastdiff.samplers.table import to_eps, to_x0

MODEL = "dit-digits"
STEPS = 20
BATCH = 4
TARGET = 1.3


class Loop:
    """What a plain loop needs of a run: levels, a guided prediction, a DDIM step."""

    def __init__(self, net: nn.Module, y: Tensor, guidance: float, steps: int = STEPS):
        self.net, self.y, self.guidance = net, y, guidance
        run = Run(net, (1, 1, 32, 32), steps=steps)
        self.n, self.kind, self.t = steps, run.prediction, run.table.t.tolist()
        self.alpha, self.sigma = run.alpha.tolist(), run.sigma.tolist()
        self.to_x0 = [v.tolist() for v in to_x0(self.kind, run.alpha[:-1], run.sigma[:-1])]
        self.to_eps = [v.tolist() for v in to_eps(self.kind, run.alpha[:-1], run.sigma[:-1])]
        self.null = net.num_classes

    def predict(self, i: int, x: Tensor, y: Tensor | None = None, g: float | None = None) -> Tensor:
        y, g = self.y if y is None else y, self.guidance if g is None else g
        y = y.repeat_interleave(len(x) // len(y))
        if g == 1:
            return self.net(x, torch.full((len(x),), self.t[i]), y)
        both = torch.cat((torch.full_like(y, self.null), y))
        m = self.net(torch.cat((x, x)), torch.full((2 * len(x),), self.t[i]), both)
        bare, told = m.chunk(2)
        return bare + g * (told - bare)

    def x0(self, i: int, x: Tensor, m: Tensor) -> Tensor:
        return self.to_x0[0][i] * x + self.to_x0[1][i] * m

    def eps(self, i: int, x: Tensor, m: Tensor) -> Tensor:
        return self.to_eps[0][i] * x + self.to_eps[1][i] * m

    def spread(self, i: int, eta: float) -> float:
        a, s, a2, s2 = self.alpha[i], self.sigma[i], self.alpha[i + 1], self.sigma[i + 1]
        return eta * s2 / s * max(s**2 - (a / a2 * s2) ** 2, 0.0) ** 0.5

    def mean(self, i: int, x: Tensor, m: Tensor, eta: float) -> Tensor:
        v = self.spread(i, eta)
        along = max(self.sigma[i + 1] ** 2 - v**2, 0.0) ** 0.5
        return self.alpha[i + 1] * self.x0(i, x, m) + along * self.eps(i, x, m)

    def step(self, i: int, x: Tensor, m: Tensor, eta: float = 0.0) -> Tensor:
        return self.mean(i, x, m, eta) + self.spread(i, eta) * torch.randn_like(x)

    def back(self, i: int, x: Tensor, m: Tensor) -> Tensor:
        here = torch.tensor(self.alpha[i + 1]), torch.tensor(self.sigma[i + 1])
        a_x, a_m = (float(v) for v in to_x0(self.kind, *here))
        e_x, e_m = (float(v) for v in to_eps(self.kind, *here))
        return self.alpha[i] * (a_x * x + a_m * m) + self.sigma[i] * (e_x * x + e_m * m)


def _fk(loop: Loop, shape: Any, reward: Any, k: int, lam: float, at: set[int]) -> Tensor:
    b = shape[0]
    x = torch.randn(b * k, *shape[1:])
    logw, before = torch.zeros(b, k), torch.zeros(b, k)
    for i in range(loop.n):
        m = loop.predict(i, x)
        x0 = loop.x0(i, x, m)
        x = loop.step(i, x, m, 1.0)
        if i in at:
            r = reward(x0).view(b, k)
            logw, before = logw + lam * (r - before), r
            w = logw.softmax(1)
            low = 1 / w.square().sum(1) < 0.5 * k
            parents = torch.multinomial(w, k, True)
            parents = torch.where(low[:, None], parents, torch.arange(k))
            index = (torch.arange(b)[:, None] * k + parents).flatten()
            x, before = x[index], before.flatten()[index].view(b, k)
            logw = torch.where(low[:, None], logw.mean(1, keepdim=True), logw)
    return x


def _svdd(loop: Loop, shape: Any, reward: Any, k: int, alpha: float) -> Tensor:
    b = shape[0]
    x = torch.randn(shape)
    for i in range(loop.n):
        many = x.repeat_interleave(k, 0)
        many = loop.step(i, many, loop.predict(i, many), 1.0)
        x0 = many
        if i + 1 < loop.n:
            x0 = loop.x0(i + 1, many, loop.predict(i + 1, many))
        v = reward(x0).view(b, k)
        j = torch.multinomial((v / alpha).softmax(1), 1)[:, 0]
        x = many[torch.arange(b) * k + j]
    return x


def _recomputed(model: Any, shape: Any, reward: Any, k: int, alpha: float, **how: Any) -> Tensor:
    """Our kernels and our moves, the public code's calls."""
    with methods.running(model, shape, **how) as run:
        b = run.batch
        run.fork(k)
        rows = torch.arange(b)[:, None] * k
        for i in range(len(run)):
            run.step(i, run.predict(i))
            x0 = run.x
            if i + 1 < len(run):
                x0 = run.x0(i + 1, run.combined(run.predict(i + 1)))
            j = torch.multinomial((reward(x0).view(b, k) / alpha).softmax(1), 1)
            run.permute((rows + j).expand(b, k).flatten())
        return run.x[::k]


def _guided(loop: Loop, shape: Any, energy: Any, scale: float, loops: int) -> Tensor:
    x = torch.randn(shape)
    for i in range(loop.n):
        for j in range(loops):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                m = loop.predict(i, x)
                (g,) = torch.autograd.grad(energy(loop.x0(i, x, m)).sum(), x)
            x = loop.step(i, x.detach(), m.detach(), 1.0) - scale * g
            if j + 1 < loops:
                c = loop.alpha[i] / loop.alpha[i + 1]
                s = (loop.sigma[i] ** 2 - (c * loop.sigma[i + 1]) ** 2) ** 0.5
                x = c * x + s * torch.randn_like(x)
    return x


def _inverted(loop: Loop, x: Tensor) -> list[Tensor]:
    path = [x]
    for i in reversed(range(loop.n)):
        x = loop.back(i, x, loop.predict(i, x, g=1.0))
        path.append(x)
    return path[::-1]


def _direct(loop: Loop, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    bare = Loop(loop.net, source, 1.0)
    path, both = _inverted(bare, x), torch.cat((source, target))
    b, x = len(x), torch.cat((path[0], path[0]))
    path[0] = x[:b]
    for i in range(loop.n):
        x = loop.step(i, x, loop.predict(i, x, both))
        x = torch.cat((path[i + 1], x[b:]))
    return x[b:]


def _cycle(loop: Loop, x0: Tensor, source: Tensor, target: Tensor, eta: float) -> Tensor:
    x = loop.alpha[0] * x0 + loop.sigma[0] * torch.randn_like(x0)
    first, residuals = x, []
    for i in range(loop.n):
        v = loop.spread(i, eta)
        along = max(loop.sigma[i + 1] ** 2 - v**2, 0.0) ** 0.5
        eps = (x - loop.alpha[i] * x0) / loop.sigma[i]
        new = loop.alpha[i + 1] * x0 + along * eps + v * torch.randn_like(x)
        if i + 1 == loop.n:
            new = x0
        residuals.append(new - loop.mean(i, x, loop.predict(i, x, source, 1.0), eta))
        x = new
    x = first
    for i in range(loop.n):
        x = loop.mean(i, x, loop.predict(i, x, target), eta) + residuals[i]
    return x


def _repaint(loop: Loop, reference: Tensor, mask: Tensor, jump: int, repeats: int) -> Tensor:
    x = torch.randn_like(reference)
    for start in range(0, loop.n, jump):
        stop = min(start + jump, loop.n)
        for visit in range(repeats):
            for i in range(start, stop):
                x = loop.step(i, x, loop.predict(i, x), 1.0)
                a, s = loop.alpha[i + 1], loop.sigma[i + 1]
                x = mask * x + (1 - mask) * (a * reference + s * torch.randn_like(x))
            if visit + 1 < repeats and stop < loop.n:
                c = loop.alpha[start] / loop.alpha[stop]
                s = (loop.sigma[start] ** 2 - (c * loop.sigma[stop]) ** 2) ** 0.5
                x = c * x + s * torch.randn_like(x)
    return x


def _projection(loop: Loop, reference: Tensor, mask: Tensor) -> Tensor:
    x = torch.randn_like(reference)
    for i in range(loop.n):
        m = loop.predict(i, x)
        x0 = mask * loop.x0(i, x, m) + (1 - mask) * reference
        eps = (x - loop.alpha[i] * x0) / loop.sigma[i]
        v = loop.spread(i, 1.0)
        along = max(loop.sigma[i + 1] ** 2 - v**2, 0.0) ** 0.5
        x = loop.alpha[i + 1] * x0 + along * eps + v * torch.randn_like(x)
    return x


def _red_diff(loop: Loop, reference: Tensor, mask: Tensor) -> Tensor:
    mu = ((1 - mask) * reference).requires_grad_()
    adam = torch.optim.Adam([mu], 0.1, (0.9, 0.99))
    for i in range(loop.n):
        a, s = loop.alpha[i], loop.sigma[i]
        if a == 0:
            continue
        with torch.no_grad():
            eps = torch.randn_like(mu)
            x = a * mu + s * eps
            away = loop.eps(i, x, loop.predict(i, x)) - eps
        with torch.enable_grad():
            miss = 0.5 * ((1 - mask) * (mu - reference)).square().sum()
            (miss + 0.25 * s / a * (away * mu).sum()).backward()
        adam.step()
        adam.zero_grad()
    return mu.detach()


def _windows(loop: Loop, shape: Any, stride: int) -> Tensor:
    x = torch.randn(shape)
    places = range(0, shape[-1] - 32 + 1, stride)
    for i in range(loop.n):
        total, count = torch.zeros_like(x), torch.zeros(shape[-1])
        for p in places:
            total[..., p : p + 32] += loop.predict(i, x[..., p : p + 32])
            count[p : p + 32] += 1
        x = loop.step(i, x, total / count)
    return x


class _Timed(nn.Module):
    """A model that adds up the time of its calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner, self.seconds = model, 0.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any) -> Tensor:
        start = time.perf_counter()
        out = self.inner(*args)
        self.seconds += time.perf_counter() - start
        return out


def overheads(rounds: int = 5) -> dict[str, float]:
    """Share of a whole run that is not the model's calls: plain sampling at batch 16, and steering
    of 4 samples by 4 particles with a reward every fifth step (the reward's own time excluded)."""
    model, _ = models.load(MODEL)
    timed = _Timed(model)
    y = torch.arange(16) % 10
    reward = REWARDS["ink"](y[:4])
    spent = [0.0]

    def watched(x: Tensor) -> Tensor:
        start = time.perf_counter()
        out = reward(x)
        spent[0] += time.perf_counter() - start
        return out

    runs = {
        "plain sampling, batch 16": lambda: fastdiff.sample(
            timed, (16, 1, 32, 32), classes=y, steps=STEPS, sampler=DDIM(eta=1.0)
        ),
        "FK steering, 4 x 4 particles": lambda: methods.fk_steering(
            timed, (4, 1, 32, 32), watched, particles=4, classes=y[:4], steps=STEPS,
            sampler=DDIM(eta=1.0),
        ),
    }  # fmt: skip
    found = {}
    for name, run in runs.items():
        run()
        shares = []
        for _ in range(rounds):
            timed.seconds = spent[0] = 0.0
            start = time.perf_counter()
            run()
            whole = time.perf_counter() - start
            shares.append(1 - (timed.seconds + spent[0]) / whole)
        found[name] = sorted(shares)[rounds // 2]
    return found


def cases() -> list[Case]:
    model, card = models.load(MODEL)
    model = model.requires_grad_(False)
    plain = models.plain(model).requires_grad_(False)
    g, shape = card["guidance"], (BATCH, 1, 32, 32)
    y = torch.arange(BATCH) % 10
    target = (y + 5) % 10
    digits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    mask, reward = region_of("bottom", 32), REWARDS["reader"](y)
    ancestral = DDIM(eta=1.0)
    how: dict[str, Any] = dict(steps=STEPS, classes=y, guidance=g)
    loop = Loop(plain, y, g)
    found: list[Case] = []

    def add(name: str, fast: Callable[[], Any], slow: Callable[[], Any], **more: Any) -> None:
        def quiet(fn: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with torch.no_grad():
                    return fn()

            return run

        arms = {"loop": quiet(slow)} | {k: quiet(v) for k, v in more.pop("arms", {}).items()}
        found.append(
            Case(name, quiet(fast), arms, target=TARGET, vs="loop", comparable=False, **more)
        )

    def energy(x: Tensor) -> Tensor:
        return -reward(x)

    def cached(fast: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
        return {"Forecast(2)": lambda: fast(cache=Forecast(2))}

    at = set(range(STEPS // 4, STEPS, 5))
    fk = partial(methods.fk_steering, model, shape, reward, sampler=ancestral, **how)
    add(
        "FK steering, 4 particles", fk, lambda: _fk(loop, shape, reward, 4, 10.0, at),
        arms=cached(fk),
    )  # fmt: skip
    small = dict(steps=STEPS, classes=y[:2], guidance=1.0, sampler=ancestral)
    few, ink = Loop(plain, y[:2], 1.0), REWARDS["reader"](y[:2])
    add(
        "value-based decoding, 8 candidates",
        lambda: methods.svdd(model, (2, 1, 32, 32), ink, candidates=8, **small),
        lambda: _svdd(few, (2, 1, 32, 32), ink, 8, 1.0),
        arms={"recomputed": lambda: _recomputed(model, (2, 1, 32, 32), ink, 8, 1.0, **small)},
        also={"recomputed": 1.7},
    )
    add(
        "steered, gradient through the model, 2 loops",
        lambda: methods.steered(model, shape, energy, loops=2, sampler=ancestral, **how),
        lambda: _guided(loop, shape, energy, 1.0, 2),
    )
    direct = partial(
        methods.direct_inversion, model, digits, target, classes=y, guidance=g, steps=STEPS,
        source_calls=0,
    )  # fmt: skip
    add("direct inversion", direct, lambda: _direct(loop, digits, y, target), arms=cached(direct))
    cycle = partial(
        methods.cycle_diffusion, model, model, digits, source_classes=y, classes=target,
        guidance=g, steps=STEPS,
    )  # fmt: skip
    add(
        "CycleDiffusion", partial(cycle, time_batch=5),
        lambda: _cycle(loop, digits, y, target, 0.1), arms=cached(cycle),
    )  # fmt: skip
    one = dict(classes=y[:1], steps=STEPS)
    found.append(
        Case(
            "DPM-Encoder of one picture, 20 levels a call",
            lambda: methods.encode(model, digits[:1], time_batch=20, **one).residuals[0],
            {"sequential": lambda: methods.encode(model, digits[:1], **one).residuals[0]},
            target=2.0,
            vs="sequential",
        )
    )
    add(
        "RePaint, jumps of 5 twice",
        lambda: methods.repaint(
            model, shape, digits, mask, jump=5, repeats=2, sampler=ancestral, **how
        ),
        lambda: _repaint(loop, digits, mask, 5, 2),
    )
    known = methods.Mask(1 - mask)
    measured = known.apply(digits)
    project = partial(methods.projected, model, shape, known, measured, sampler=ancestral, **how)
    add(
        "projection (DDNM), inpainting", project, lambda: _projection(loop, digits, mask),
        arms=cached(project),
    )  # fmt: skip
    add(
        "RED-Diff, inpainting",
        lambda: methods.red_diff(
            model, shape, known, measured, at=[[i] for i in range(1, STEPS)], **how
        ),
        lambda: _red_diff(loop, digits, mask),
    )
    windows = partial(
        methods.multi_diffusion, model, (BATCH, 1, 32, 80), size=(32, 32), stride=(16, 16), **how
    )
    add(
        "MultiDiffusion, 32 x 80, stride 16", windows,
        lambda: _windows(loop, (BATCH, 1, 32, 80), 16), arms=cached(windows),
    )  # fmt: skip
    return found


def distances() -> dict[str, float]:
    """PSNR of programs with Forecast(2) to themselves without, over pictures in [-1, 1], dB."""
    found = {}
    for case in cases():
        if "Forecast(2)" in case.baselines:
            exact, cached = case.fast(), case.baselines["Forecast(2)"]()
            x, y = (getattr(t, "target", getattr(t, "x", t)) for t in (exact, cached))
            found[case.name] = float(10 * torch.log10(4 / (x - y).square().mean()))
    return found


if __name__ == "__main__":
    for name, share in overheads().items():
        print(f"{name}: {100 * share:.2f} % of the time is not the model's")
    for name, psnr in distances().items():
        print(f"{name}: with Forecast(2) {psnr:.1f} dB from without")
