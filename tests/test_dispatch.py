import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastdiff
from fastdiff import Impl, NoImpl, dispatch
from fastdiff.ops import geglu, gelu_tanh, linear, qk_norm_rope

ROWS = (
    Impl("a", lambda x: "a", lambda x: None if x > 1 else "x is not above 1"),
    Impl("b", lambda x: "b", lambda x: None if x > 0 else "x is not above 0"),
)
X = torch.ones(2, 4)
Q = torch.ones(1, 2, 3, 4)
CALLS = [(gelu_tanh, (X,)), (geglu, (X,)), (linear, (X, X)), (qk_norm_rope, (Q, Q))]


def run(x, impl=None):
    return dispatch.pick("op", ROWS, impl, x)(x)


def test_the_first_row_that_does_not_refuse_runs():
    assert [run(2), run(1)] == ["a", "b"]
    with pytest.raises(NoImpl, match="every row refuses: a: x is not above 1; b: x is not above 0"):
        run(0)


def test_a_forced_row_runs_or_gives_its_sentence():
    assert run(2, impl="b") == "b"
    with pytest.raises(NoImpl, match="op: row a refuses: x is not above 1"):
        run(1, impl="a")
    with pytest.raises(NoImpl, match="op: no row named c; this op has a, b"):
        run(1, impl="c")


def test_use_nests_and_ends_with_an_exception():
    with fastdiff.use("b"):
        assert run(2) == "b"
        with fastdiff.use():
            assert run(2) == "a"
        with fastdiff.use("c", "a"):
            assert run(2) == "a"
            with pytest.raises(NoImpl, match="x is not above 1"):
                run(1)  # the first name that the table has; no falling through to another row
        assert run(2, impl="a") == "a"  # the argument goes before the block
        with pytest.raises(NoImpl, match="no row named c or d"), fastdiff.use("c", "d"):
            run(2)
        assert run(2) == "b"
    assert run(2) == "a"


def test_use_and_record_belong_to_their_context():
    seen = {}
    with fastdiff.use("b"), fastdiff.record() as counter:
        thread = threading.Thread(target=lambda: seen.update(thread=run(2)))
        thread.start()
        thread.join()
        copied = contextvars.copy_context()
        assert run(2) == "b"
    assert seen["thread"] == "a"  # a thread starts with the force of the process, not of this block
    assert counter == {("op", "b"): 1}
    assert run(2) == "a" and copied.run(run, 2) == "b"


def test_record_counts_what_ran_and_nests():
    with fastdiff.record() as outer:
        run(2)
        with fastdiff.record() as inner:
            run(1)
            run(1)
    assert outer == {("op", "a"): 1} and inner == {("op", "b"): 2}


@pytest.mark.parametrize("op, args", CALLS)
def test_explain_gives_none_or_a_sentence_for_every_row(op, args):
    names = [row.name for row in sys.modules[op.__module__].IMPLS]
    leaves = [a.clone().requires_grad_() for a in args]
    for call in (args, leaves, [a.double() for a in args], [a.to("meta") for a in args]):
        why = fastdiff.explain(op, *call)
        assert list(why) == names and why["ref"] is None
        for name, sentence in why.items():
            assert sentence is None or len(sentence.split()) > 3, (name, sentence)
    with fastdiff.use("ref"), fastdiff.record() as counter:
        op(*args)
    assert counter == {(op.__name__, "ref"): 1}


def test_a_native_row_that_refuses_is_an_error_when_forced():
    x = X.clone().requires_grad_()
    with pytest.raises(NoImpl, match="no backward"), fastdiff.use("native"):
        gelu_tanh(x)
    with torch.no_grad(), fastdiff.use("native"):
        gelu_tanh(x) if fastdiff.cpu_levels() else None


def test_start_value_from_the_environment():
    code = (
        "import torch, fastdiff\n"
        "with fastdiff.record() as c: fastdiff.ops.gelu_tanh(torch.ones(3))\n"
        "print(*[row for _, row in c])"
    )
    env = {**os.environ, "FASTDIFF_IMPL": "nope, ref ,native"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "ref", run.stderr


def test_a_compiled_function_keeps_the_row_of_its_trace():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gelu_tanh(x), fullgraph=True, backend="eager")
    with fastdiff.use("ref"):
        first = compiled(X)
    with fastdiff.use("nope"):
        torch.testing.assert_close(compiled(X), first)


def test_forward_mode_runs_the_reference():
    """A row without a forward-mode derivative would give a tangent of zero, silently."""
    x, w = torch.randn(3, 16), torch.randn(5, 16)

    def f(x):
        return gelu_tanh(linear(x, w))

    value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    with fastdiff.use("ref"):
        assert torch.equal(value, f(x))
    step = 1e-3
    slope = (f(x + step) - f(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=1e-2, atol=1e-2)
    with pytest.raises(fastdiff.NoImpl, match="native refuses: an input has a tangent"):
        torch.func.jvp(lambda x: gelu_tanh(x, impl="native"), (x,), (x,))
