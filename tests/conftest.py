"""Runs every row with no GPU: triton kernels interpreted, uninitialised memory full of NaN."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is

import pytest  # noqa: E402
import torch  # noqa: E402

from fastdiff import kernels  # noqa: E402

if kernels.AVAILABLE and kernels.INTERPRET:
    from fastdiff import testing_triton

    testing_triton.install()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` gives NaN, in C++ too, so that an element left unwritten is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
