"""SparseIndex: every way to make one, and what it takes from and puts to a weight."""

import pytest
import torch

from fastdiff.ops import SparseIndex


def mask_of(shape, density):
    mask = torch.rand(shape) < density
    if 0 < density < 1 and mask.shape[0] > 2:
        mask[1] = False  # a row without entries
        mask[-1] = True  # and one that is full
    return mask


def whole(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("shape", [(1, 1), (13, 17), (6, 5, 3, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize("density", (0.0, 0.05, 0.4, 1.0))
def test_every_constructor_gives_the_same_index(shape, density):
    mask = mask_of(shape, density)
    index = SparseIndex.of_mask(mask)
    flat = mask.reshape(shape[0], -1) if mask.numel() else mask.view(shape[0], shape[1])
    linear = mask.flatten().nonzero()[:, 0]
    assert torch.equal(index.linear, linear) and index.count == int(mask.sum())
    assert index.crow.dtype == index.col.dtype == torch.int32
    others = [
        SparseIndex.of_positions(linear, shape),
        SparseIndex.of_positions(tuple(flat.nonzero().t().contiguous()), shape),
        SparseIndex.of_csr(index.crow.long(), index.col.long(), shape),
        SparseIndex.of_blocks(flat, (1, 1), shape),
        index.to("cpu"),
    ]
    for other in others:
        assert torch.equal(other.crow, index.crow) and torch.equal(other.col, index.col)
        assert other.shape == index.shape == shape and other.block == (1, 1)


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 1), (1, 45), (8, 45)])
def test_values_are_taken_and_put(block):
    mask = torch.rand(8 // block[0], 45 // block[1]) < 0.4
    index = SparseIndex.of_blocks(mask, block, (8, 5, 3, 3))
    entries = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1).view(8, 5, 3, 3)
    for weight in (torch.randn(8, 5, 3, 3), torch.randn(8, 3, 3, 5).movedim(-1, 1)):
        values = index.take(weight)
        assert values.shape == index.values_shape and index.count == int(entries.sum())
        assert torch.equal(values.flatten().sort()[0], weight[entries].sort()[0])
        before = weight.clone()
        assert index.put_(weight, values + 1) is weight
        assert torch.equal(weight, torch.where(entries, before + 1, before))
    half = weight.half()
    index.put_(half, torch.full(index.values_shape, 1 / 3))
    assert (half[entries] == torch.tensor(1 / 3).half()).all()


def test_whole_rows():
    rows = torch.tensor([0, 3, 4])
    index = SparseIndex.of_rows(rows, (6, 2, 2, 2))
    weight = torch.randn(6, 2, 2, 2)
    assert index.block == (1, 8) and index.values_shape == (3, 1, 8)
    assert torch.equal(index.take(weight), weight[rows].view(3, 1, 8))


def test_values_carry_gradients_to_the_weight():
    weight = torch.randn(5, 7, requires_grad=True)
    mask = mask_of((5, 7), 0.4)
    SparseIndex.of_mask(mask).take(weight).sum().backward()
    assert torch.equal(weight.grad, mask.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseIndex.of_mask(torch.ones(3, 4)), "mask is torch.float32, need torch.bool"),
        (lambda: SparseIndex.of_mask([True]), "mask is list, need torch.bool"),
        (
            lambda: SparseIndex.of_mask(torch.ones(3, dtype=torch.bool)),
            r"mask has shape \[3\], need at least 2 dimensions",
        ),
        (
            lambda: SparseIndex.of_blocks(torch.ones(2, 2) > 0, (2, 2), (4, 5)),
            r"block_mask has shape \[2, 2\] with blocks of 2 x 2, need a weight of shape \[4, 5\]",
        ),
        (lambda: SparseIndex.of_positions(whole(3), (2,)), r"shape is \[2\], need at least 2 dim"),
        (
            lambda: SparseIndex.of_positions(whole(3).int(), (2, 3)),
            r"positions is torch.int32 of shape \[1\], need a vector of torch.int64",
        ),
        (
            lambda: SparseIndex.of_positions(whole(3)[None], (2, 3)),
            r"positions is torch.int64 of shape \[1, 1\], need a vector",
        ),
        (lambda: SparseIndex.of_positions([whole(1)], (2, 3)), "positions has 1 parts, need rows"),
        (
            lambda: SparseIndex.of_positions((whole(0), whole(0, 1)), (2, 3)),
            r"columns has shape \[2\], need \[1\], that of rows",
        ),
        (
            lambda: SparseIndex.of_positions((whole(0), whole(3)), (2, 3)),
            "columns has value 3, need 0 to 2",
        ),
        (
            lambda: SparseIndex.of_positions((whole(2), whole(0)), (2, 3)),
            "rows has value 2, need 0",
        ),
        (lambda: SparseIndex.of_positions(whole(6), (2, 3)), "positions has value 6, need 0 to 5"),
        (lambda: SparseIndex.of_positions(whole(-1), (2, 3)), "positions has value -1, need 0 to"),
        (
            lambda: SparseIndex.of_positions(whole(4, 2), (2, 3)),
            "positions has value 2 after 4, need ascending values",
        ),
        (
            lambda: SparseIndex.of_positions(whole(2, 2), (2, 3)),
            "positions has value 2 twice, need each at most once",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 1), whole(0), (2, 3)),
            r"crow has shape \[2\], need \[3\]",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 1, 1).float(), whole(0), (2, 3)),
            r"crow is torch.float32 of shape \[3\], need a vector of torch.int32 or torch.int64",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 1, 1), whole(0, 1), (2, 3)),
            "crow goes from 0 to 1, need 0 to 2, the entries",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 2, 1, 2), whole(0, 1), (3, 3)),
            "crow has value 1 after 2, need ascending values",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 9, 2), whole(0, 1), (2, 3)),
            "crow has value 9, need 0 to 2",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 0, 2), whole(1, 3), (2, 3)),
            "col has value 3, need 0 to 2",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 1, 3), whole(2, 1, 0), (2, 3)),
            "col, in row 1, has value 0 after 1, need ascending values",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 2, 3), whole(2, 2, 0), (2, 3)),
            "col, in row 0, has value 2 twice, need each at most once",
        ),
        (
            lambda: SparseIndex.of_csr(whole(0, 1), whole(0), (2, 3), (2, 2)),
            r"block is \(2, 2\), need divisors of 2 rows and 3 columns",
        ),
        (lambda: SparseIndex.of_rows(whole(2), (2, 3)), "rows has value 2, need 0 to 1"),
        (lambda: SparseIndex.of_rows(whole(1, 0), (2, 3)), "rows has value 0 after 1, need ascend"),
        (lambda: SparseIndex.of_rows(whole(1, 1), (2, 3)), "rows has value 1 twice, need each"),
        (
            lambda: SparseIndex(whole(0, 1), whole(0).int(), (1, 3)),
            r"crow is torch.int64 of shape \[2\], need a vector of torch.int32",
        ),
        (
            lambda: SparseIndex(whole(0, 1).int(), whole(0).int().to("meta"), (1, 3)),
            "col is on meta, need cpu, the device of crow",
        ),
        (
            lambda: SparseIndex.of_rows(whole(1), (2, 3)).take(torch.ones(3, 2)),
            r"weight has shape \[3, 2\] on cpu, need \[2, 3\] on cpu",
        ),
        (
            lambda: SparseIndex.of_rows(whole(1), (2, 3)).put_(torch.ones(2, 3), torch.ones(3)),
            r"values has shape \[3\], need \[1, 1, 3\]",
        ),
        (lambda: SparseIndex.of_rows(whole(), (2**31, 3)), "shape is .2147483648, 3., need rows"),
    ],
)
def test_bad_indices(call, message):
    with pytest.raises(ValueError, match=f"SparseIndex: {message}"):
        call()
