"""What a multiprocessor has, and how much of it a kernel fills (occupancy).

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; allocation in
steps as in NVIDIA's ``cuda_occupancy.h``, with which the tests compare.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
WARP = 32  # threads
REGISTERS = 65536  # of a multiprocessor, 32-bit; on all architectures below
REGISTER_STEP = 256  # registers are given to a warp in such steps
PARTITIONS = 4  # of a multiprocessor: a warp's registers lie in one
SHARED_STEP = 128  # bytes
SHARED_SYSTEM = 1 * KIB  # of shared memory, taken by CUDA in every block


class Limits(NamedTuple):
    """One multiprocessor's."""

    warps: int
    blocks: int
    shared: int  # bytes
    block_shared: int  # bytes that one block may ask for


LIMITS = {
    "sm_80": Limits(64, 32, 164 * KIB, 163 * KIB),
    "sm_86": Limits(48, 16, 100 * KIB, 99 * KIB),
    "sm_89": Limits(48, 24, 100 * KIB, 99 * KIB),
    "sm_90": Limits(64, 32, 228 * KIB, 227 * KIB),
    "sm_100": Limits(64, 32, 228 * KIB, 227 * KIB),
    "sm_120": Limits(48, 24, 100 * KIB, 99 * KIB),
}
# Bytes of shared memory that one block may have; AMD's CDNA 3: 64 KiB of LDS.
BLOCK_SHARED = {name: limits.block_shared for name, limits in LIMITS.items()} | {"gfx942": 64 * KIB}


class Occupancy(NamedTuple):
    """Blocks and warps that are resident on one multiprocessor at once, and what sets their number.

    ``share``: warps, as a part of the most that the architecture has.
    """

    blocks: int
    warps: int
    share: float
    limit: str  # "warps", "blocks", "registers" or "shared memory"


def _round_up(x: int, step: int) -> int:
    return -(-x // step) * step


def occupancy(target: str, threads: int, registers: int, shared: int) -> Occupancy:
    """Occupancy of a kernel with ``threads`` in a block, ``registers`` in a thread.

    Args:
        target: one of ``LIMITS``.
        threads: of a block, 1 to 1024.
        registers: of a thread, 1 to 255.
        shared: bytes of a block, static and dynamic together.

    Returns:
        0 blocks where one alone does not fit.

    Raises:
        ValueError: an argument is outside these bounds.
    """
    if target not in LIMITS:
        raise ValueError(f"occupancy: target is {target!r}, need one of {', '.join(LIMITS)}")
    if not 1 <= threads <= 1024:
        raise ValueError(f"occupancy: threads is {threads}, need 1 to 1024")
    if not 1 <= registers <= 255:
        raise ValueError(f"occupancy: registers is {registers}, need 1 to 255")
    if shared < 0:
        raise ValueError(f"occupancy: shared is {shared}, need at least 0")
    sm = LIMITS[target]
    warps = -(-threads // WARP)
    of_warp = _round_up(registers * WARP, REGISTER_STEP)
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    if _round_up(warps, PARTITIONS) * of_warp > REGISTERS:  # what a launch checks
        by_registers = 0
    by_shared = sm.shared // _round_up(shared + SHARED_SYSTEM, SHARED_STEP)
    if shared > sm.block_shared:
        by_shared = 0
    bounds = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": by_registers,
        "shared memory": by_shared,
    }
    limit = min(bounds, key=lambda name: bounds[name])
    blocks = bounds[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / sm.warps, limit)
