"""Reads machine code of GPU kernels: registers, stack, spills, tensor-core instructions.

NVIDIA's with ``cuobjdump``, which the triton wheel carries; AMD's from the text of the assembly.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

# SASS mnemonic of a matrix product on tensor cores: the PTX instruction that it comes from.
# H: of 16 bits, I: of int8, Q: of float8.
TENSOR = {
    **dict.fromkeys(("HMMA", "IMMA", "QMMA"), "mma.sync"),
    **dict.fromkeys(("HGMMA", "IGMMA", "QGMMA"), "wgmma"),
    **dict.fromkeys(("UTCHMMA", "UTCIMMA", "UTCQMMA"), "tcgen05.mma"),
}


class Code(NamedTuple):
    """One kernel of a binary."""

    name: str  # mangled
    registers: int  # of a thread; AMD: vector registers
    stack: int  # bytes of a thread in local (AMD: scratch) memory
    spills: int  # instructions that store to or load from local memory; AMD: registers spilled
    tensor: str  # PTX name of its tensor-core instruction (AMD: v_mfma), "" without one


def tools() -> Path:
    """The folder of ``cuobjdump``.

    Raises:
        RuntimeError: triton is not installed.
    """
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("gpu_code: cuobjdump comes with triton, which is not installed")
    return Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"


def _tensor(sass: str) -> str:
    seen = [ptx for name, ptx in TENSOR.items() if re.search(rf"\b{name}\b", sass)]
    return " ".join(dict.fromkeys(seen))


def read_cuda(path: Path, arch: str = "") -> list[Code]:
    """The kernels of a cubin, or of a library's code for ``arch``, such as "sm_90a"."""

    def dump(what: str) -> str:
        choice = ["--gpu-architecture", arch] if arch else []
        command = [str(tools() / "cuobjdump"), *choice, what, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    sass: dict[str, str] = {}
    for part in re.split(r"\n\s*Function : ", dump("--dump-sass"))[1:]:
        name, _, body = part.partition("\n")
        sass[name.strip()] = body
    found = []
    usage = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for name, registers, stack, local in re.findall(usage, dump("--dump-resource-usage")):
        body = sass[name]
        spills = len(re.findall(r"\b(?:STL|LDL)\b", body))
        found.append(Code(name, int(registers), int(stack) + int(local), spills, _tensor(body)))
    return found


@cache
def read_cubin(cubin: bytes) -> Code:
    """The one kernel of a cubin that Triton compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = read_cuda(Path(file.name))
    return code


def read_amdgcn(text: str) -> Code:
    """The one kernel of an assembly listing, from the metadata at its end."""

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)$", text, re.M)
        if found is None:
            raise ValueError(f"gpu_code: the assembly has no field .{name}")
        return int(found[1])

    name = re.search(r"^\s*\.name:\s*(\w+)$", text, re.M)
    return Code(
        name[1] if name else "",
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        field("vgpr_spill_count"),
        "v_mfma" if "v_mfma" in text else "",
    )
