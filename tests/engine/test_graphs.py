"""Runners: static buffers, checks, aliasing rules; the real capture where there is a GPU."""

import pytest
import torch

import fastdiff
from fastdiff.engine import EagerRunner, Pool, capture, check, runner


def ema(x, state):
    state["mean"].mul_(0.5).add_(x, alpha=0.5)
    return {"twice": x * 2, "mean": state["mean"], "none": None}


def ema_inputs(device="cpu"):
    return {
        "x": torch.ones(2, 3, device=device),
        "state": {"mean": torch.zeros(2, 3, device=device)},
    }


def test_replay_equals_the_step_over_many_updates():
    run, mean = EagerRunner(ema, ema_inputs()), torch.zeros(2, 3)
    addresses = [t.data_ptr() for t in (run.inputs["x"], run.outputs["twice"], run.outputs["mean"])]
    for k in range(5):
        x = torch.full((2, 3), float(k))
        out = run(x=x)
        mean = 0.5 * mean + 0.5 * x
        assert torch.equal(out["twice"], 2 * x) and torch.equal(out["mean"], mean)
        assert out is run.outputs and out["none"] is None
    now = [t.data_ptr() for t in (run.inputs["x"], run.outputs["twice"], run.outputs["mean"])]
    assert now == addresses
    assert torch.equal(run.inputs["state"]["mean"], mean)


def test_making_a_runner_leaves_buffers_and_inputs_as_they_were():
    torch.use_deterministic_algorithms(False)  # which would fill new memory with NaN by itself
    given = ema_inputs()
    run = EagerRunner(ema, given)
    assert torch.equal(run.inputs["state"]["mean"], torch.zeros(2, 3))
    assert run.outputs["twice"].isnan().all()  # nothing has run
    assert run.outputs["mean"] is run.inputs["state"]["mean"]
    run.replay()
    assert torch.equal(given["state"]["mean"], torch.zeros(2, 3))


def test_shared_buffers_are_the_tensors_themselves():
    given = ema_inputs()
    one, two = (EagerRunner(ema, given, share=True) for _ in range(2))
    one.replay()
    two.replay()
    assert torch.equal(given["state"]["mean"], torch.full((2, 3), 0.75))


def test_outputs_are_overwritten_by_the_next_replay():
    run = EagerRunner(lambda x: x + 1, (torch.zeros(2),))
    first = run()
    second = run(torch.ones(2))
    assert first is second and torch.equal(first, torch.full((2,), 2.0))


def test_a_pool_invalidates_the_outputs_of_its_other_runners():
    pool = Pool()
    one = EagerRunner(lambda x: (x + 1, x.long()), (torch.zeros(2),), pool=pool)
    two = EagerRunner(lambda x: x.mul_(2), (torch.ones(2),), pool=pool)
    alone = EagerRunner(lambda x: x + 1, (torch.zeros(2),))
    out, kept, apart = one(), two(), alone()
    assert out[0].isnan().all() and (out[1] == torch.iinfo(torch.int64).max).all()
    one()
    assert torch.equal(kept, torch.full((2,), 2.0))  # lies in a buffer: safe
    assert torch.equal(apart, torch.ones(2))


def test_values_that_are_buffers_are_read_before_any_is_written():
    run = EagerRunner(lambda a, b: a - b, (torch.zeros(3), torch.ones(3)))
    a, b = run.inputs
    run.update(b, a)
    assert torch.equal(a, torch.ones(3)) and torch.equal(b, torch.zeros(3))
    chain = EagerRunner(lambda x: x + 1, (torch.zeros(3),))
    for _ in range(3):
        chain.update(chain())
    assert torch.equal(chain.inputs[0], torch.full((3,), 3.0))


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((), dict(x=torch.ones(3)), r"inputs\['x'\] has shape \[3\], need \[2, 3\]"),
        (
            (),
            dict(x=torch.ones(2, 3).double()),
            r"inputs\['x'\] is torch.float64, need torch.float32",
        ),
        ((), dict(x=torch.ones(2, 3, device="meta")), r"inputs\['x'\] is on meta, need cpu"),
        ((), dict(x=3.0), r"inputs\['x'\] is float 3.0, need a torch.Tensor"),
        ((), dict(x=None), r"inputs\['x'\] is None, need a tensor"),
        ((), dict(y=torch.ones(2, 3)), r"inputs\['y'\] is unknown, need one of x, state"),
        ((), dict(state=torch.ones(2, 3)), r"inputs\['state'\] is Tensor of 1 leaves"),
        ((), dict(state={"mean": torch.ones(2)}), r"inputs\['state'\]\['mean'\] has shape \[2\]"),
        ((torch.ones(2, 3),), {}, "1 positional values, need names"),
    ],
)
def test_update_says_what_does_not_fit_and_writes_nothing(args, kwargs, message):
    run = EagerRunner(ema, ema_inputs())
    with pytest.raises(ValueError, match=f"^update: .*{message}"):
        run.update(*args, **kwargs)
    with pytest.raises(ValueError, match=message):
        run.update(*args, **{"state": {"mean": torch.full((2, 3), 9.0)}, **kwargs})
    assert torch.equal(run.inputs["state"]["mean"], torch.zeros(2, 3))


def test_update_of_a_tuple():
    run = EagerRunner(lambda a, b: a + b, (torch.zeros(2), torch.ones(2)))
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))  # the second keeps its value
    with pytest.raises(ValueError, match="a, b given by name, need positions"):
        run.update(a=torch.ones(2), b=torch.ones(2))
    with pytest.raises(ValueError, match="3 values, need at most 2"):
        run.update(*[torch.ones(2)] * 3)


def swap(state):
    state["x"] = state["x"] + 1
    return state["x"]


def shrink(state):
    state["x"].resize_(1)
    return state["x"] + 1


def drop(state):
    return state.pop("x") + 1


@pytest.mark.parametrize(
    "step, message",
    [
        (swap, r"put another tensor in the place of inputs\[0\]\['x'\]"),
        (shrink, r"moved or resized the buffer inputs\[0\]\['x'\]"),
        (drop, r"took away the buffer inputs\[0\]\['x'\]"),
    ],
)
def test_a_step_that_moves_its_buffers_is_an_error(step, message):
    with pytest.raises(RuntimeError, match=message):
        EagerRunner(step, ({"x": torch.ones(2)},))


class Unsteady:
    """Other outputs at every call."""

    def __init__(self, *outputs):
        self.outputs, self.calls = outputs, 0

    def __call__(self, x):
        self.calls += 1
        return self.outputs[self.calls - 1](x)


@pytest.mark.parametrize(
    "second, message",
    [
        (lambda x: x[:1] + 1, "output 0 has"),
        (lambda x: (x + 1).double(), "output 0 has"),
        (lambda x: x, "output 0 has"),
        (lambda x: None, "output 0 is None in some runs"),
        (lambda x: (x + 1, x), "another structure"),
    ],
)
def test_outputs_that_change_are_an_error(second, message):
    run = EagerRunner(Unsteady(lambda x: x + 1, second), (torch.ones(2),))
    with pytest.raises(RuntimeError, match=message):
        run.replay()


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([torch.ones(2)], "inputs is list, need a dict or a tuple"),
        ({}, "inputs has no tensor, need at least one"),
        ((torch.ones(2), 3), r"inputs\[1\] is int 3, need a torch.Tensor: a capture freezes"),
        ((torch.ones(2), torch.ones(2, device="meta")), r"inputs\[1\] is on meta, need cpu"),
        ((torch.ones(2).to_sparse(),), r"inputs\[0\] has layout torch.sparse_coo"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        EagerRunner(lambda *a, **k: torch.ones(1), inputs)


def test_bad_outputs_and_shared_gradients():
    with pytest.raises(ValueError, match=r"output\[1\] is float 2.0, need a torch.Tensor"):
        EagerRunner(lambda x: (x, 2.0), (torch.ones(2),))
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"inputs\[0\] requires a gradient"):
        EagerRunner(lambda x: x + 1, (leaf,), share=True)
    assert not EagerRunner(lambda x: x + 1, (leaf,))().requires_grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_capture_without_a_gpu_says_what_is_needed():
    with pytest.raises(
        RuntimeError, match="sees no CUDA device, need an NVIDIA GPU .* EagerRunner"
    ):
        capture(ema, ema_inputs())
    with pytest.raises(ValueError, match="warmup is 0, need an integer of at least 1"):
        capture(ema, ema_inputs(), warmup=0)
    assert isinstance(runner(ema, ema_inputs()), EagerRunner)


STEPS = 6


def sample_of(model, inputs):
    """What ``sample`` gives from the start and for the classes of ``inputs``."""
    return fastdiff.sample(
        model, inputs["x"], sampler="dpmpp_2m_sde", steps=STEPS, classes=inputs["y"][2:],
        guidance=2.0, guidance_rescale=0.5, clip=1.0, seed=7,
    )  # fmt: skip


def test_a_run_of_replays_is_sample(sampling):
    model, step, inputs = sampling("dpmpp_2m_sde", STEPS)
    expected = sample_of(model, inputs)
    run = runner(step, inputs)
    for _ in range(2):  # and again from the start: nothing of the first run is left
        run.update(**inputs)
        for _ in range(STEPS):
            out = run.replay()
        assert torch.equal(out, expected)
    assert check(step, inputs).ok


def test_two_interleaved_runners_are_two_separate_ones(sampling):
    model, step, inputs = sampling("dpmpp_2m_sde", STEPS)
    expected = sample_of(model, inputs)
    other = inputs | {"seeds": torch.tensor([8, 9])}
    one, two, alone = (EagerRunner(step, given) for given in (inputs, other, other))
    for _ in range(STEPS):
        one.replay()
        two.replay()
    for _ in range(STEPS):
        alone.replay()
    assert torch.equal(one.outputs, expected)
    assert torch.equal(two.outputs, alone.outputs) and not torch.equal(two.outputs, expected)


@pytest.mark.gpu
def test_a_captured_run_is_sample(sampling):
    model, step, inputs = sampling("dpmpp_2m_sde", STEPS, device="cuda")
    expected = sample_of(model, inputs)
    torch.use_deterministic_algorithms(False)
    eager = EagerRunner(step, inputs)
    graph = capture(step, inputs)
    assert torch.equal(graph.inputs["x"], inputs["x"])  # warm-up and capture left no trace
    address = graph.outputs.data_ptr()
    for _ in range(2):
        eager.update(**inputs)
        graph.update(**inputs)
        for _ in range(STEPS):
            eager.replay()
            graph.replay()
        torch.testing.assert_close(graph.outputs, eager.outputs)
        torch.testing.assert_close(graph.outputs, expected, rtol=1e-4, atol=1e-4)
    assert graph.outputs.data_ptr() == address


@pytest.mark.gpu
def test_captured_programs_share_a_pool_and_their_buffers():
    given, pool = ema_inputs("cuda"), Pool()
    one, two = (capture(ema, given, share=True, pool=pool) for _ in range(2))
    one.replay()
    two.replay()
    assert torch.equal(given["state"]["mean"], torch.full((2, 3), 0.75, device="cuda"))


@pytest.mark.gpu
def test_cuda_refuses_what_the_check_refuses():
    def step(x):
        return x * x.sum().item()

    with pytest.raises(RuntimeError, match="CUDA refused the step"):
        capture(step, (torch.ones(2, device="cuda"),))
    assert not check(step, (torch.ones(2),)).ok
    with pytest.raises(RuntimeError, match="inputs are on cpu, need a CUDA device"):
        capture(step, (torch.ones(2),))
