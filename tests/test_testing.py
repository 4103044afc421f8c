import pytest
import torch

from fastdiff import testing


@pytest.mark.parametrize("dtype", (*testing.DTYPES, torch.int64, torch.uint8))
def test_guarded_sees_a_stray_write(dtype):
    x = torch.arange(7).to(dtype)
    with testing.guarded(x, x) as (a, b):
        torch.testing.assert_close(a, x)
        b.zero_()
    for at, message in ((-1, "before the start of tensor 1"), (7, "past the end of tensor 1")):
        with pytest.raises(AssertionError, match=message), testing.guarded(x, x) as (_, b):
            b.as_strided((1,), (1,), b.storage_offset() + at).zero_()


def test_unchanged_sees_a_hidden_write():
    x = torch.tensor([1.0, torch.nan])
    with testing.unchanged(x, None):
        x.clone().zero_()
    with pytest.raises(AssertionError, match="was written to"), testing.unchanged(x):
        x[0] = 2


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_lay_keeps_values(layout):
    for shape in ((6,), (4, 6), (2, 4, 6), (0, 6)):
        x = torch.randn(shape)
        assert torch.equal(testing.lay(x, layout), x)


def test_assert_close_allows_twice_the_error_of_eager_and_no_more():
    exact = torch.ones(4, dtype=torch.float64)
    eager = torch.full((4,), 1 + 2.0**-16)
    testing.assert_close(torch.full((4,), 1 + 2.0**-15), exact, eager)
    with pytest.raises(AssertionError, match="row: error"):
        testing.assert_close(torch.full((4,), 1 + 2.0**-14), exact, eager, what="row")
    with pytest.raises(AssertionError, match="non-finite"):
        testing.assert_close(torch.full((4,), torch.nan), exact, eager)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close(torch.ones(3), exact, eager)


def test_run_configs_runs_them_all_and_sees_a_hidden_write():
    def launch(x, *, config):
        return x + config if config < 3 else x.add_(1)

    x = torch.zeros(2)
    assert [(n, r[0].item()) for n, r in testing.run_configs(launch, [1, 2], x)] == [
        ("1", 1.0),
        ("2", 2.0),
    ]
    with pytest.raises(AssertionError, match="was written to"):
        list(testing.run_configs(launch, [3], x))
