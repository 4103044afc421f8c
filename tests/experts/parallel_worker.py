"""One of two processes of test_parallel.py: python parallel_worker.py case store rank."""

import sys

import torch
from torch import distributed, nn

from fastdiff.experts import ExpertParallel
from fastdiff.nn import MoE


def main(case, store, rank):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2
    )
    torch.manual_seed(0)
    moe = MoE(16, 12, 6, 2, shared=nn.Linear(16, 16), bias=True)
    nn.init.normal_(moe.up_bias)
    if case == "one expert takes all":
        nn.init.zeros_(moe.router)  # ties go to the lowest: both experts lie on process 0
    tokens = (0, 9) if case == "a process without tokens" else (7, 9)
    x = torch.randn(sum(tokens), 16)
    mine = slice(0, tokens[0]) if rank == 0 else slice(tokens[0], None)
    spread = ExpertParallel(moe)
    with torch.no_grad():
        torch.testing.assert_close(spread(x[mine]), moe(x)[mine], rtol=0, atol=0)
    whole = x.clone().requires_grad_()
    moe(whole).square().sum().backward()
    part = x[mine].clone().requires_grad_()
    spread(part).square().sum().backward()
    torch.testing.assert_close(part.grad, whole.grad[mine])
    for name in ("up", "down", "up_bias", "down_bias"):
        got, want = getattr(spread.moe, name).grad, getattr(moe, name).grad[rank * 3 : rank * 3 + 3]
        torch.testing.assert_close(got, want)
    try:
        ExpertParallel(MoE(16, 12, 5, 2))
        raise AssertionError("five experts over two processes were taken")
    except ValueError as error:
        assert "moe has 5 experts, need a multiple of 2" in str(error)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
