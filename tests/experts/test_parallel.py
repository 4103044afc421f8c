"""Experts over two processes give what one process gives, forward and backward."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from fastdiff.experts import ExpertParallel
from fastdiff.nn import MoE

WORKER = Path(__file__).parent / "parallel_worker.py"
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="no torch.distributed")


@pytest.mark.parametrize("case", ["even", "one expert takes all", "a process without tokens"])
def test_two_processes(case, tmp_path):
    command = [sys.executable, str(WORKER), case, str(tmp_path / "store")]
    workers = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, _ = worker.communicate(timeout=180)
        assert worker.returncode == 0, out


def test_one_process_is_the_layer_itself(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        moe, x = MoE(16, 8, 4, 2), torch.randn(2, 5, 16)
        with torch.no_grad():
            assert torch.equal(ExpertParallel(moe)(x), moe(x))
        with pytest.raises(ValueError, match="moe has capacity 3, need None"):
            ExpertParallel(MoE(16, 8, 4, 2, capacity=3))
    finally:
        distributed.destroy_process_group()
