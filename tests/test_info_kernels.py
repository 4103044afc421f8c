"""The table of kernels: README.md has what `fastdiff info --kernels` prints, and no empty cell."""

from pathlib import Path

import pytest

from fastdiff import info, info_kernels, testing_cuda

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
MARKS = ("<!-- kernels: fastdiff info --kernels -->", "<!-- end of kernels -->")
STALE = "paste the output of `fastdiff info --kernels` into README.md"


def page():
    return TEXT.split(MARKS[0])[1].split(MARKS[1])[0].strip().splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_what_needs_no_compiler_is_current():
    """Ops, implementations, dtypes, where they ran and the targets."""
    want = [cells(line)[:5] for line in info_kernels.rows(None, None)]
    assert [cells(line)[:5] for line in page()[4:]] == want, STALE


def test_which_ops_have_levels_of_their_own_for_vnni():
    sources = (Path(__file__).parents[1] / "csrc" / "cpu").glob("*.cpp")
    assert {p.stem for p in sources if "FASTDIFF_RUN_INT8" in p.read_text()} == set(
        info_kernels.INT8
    )


def test_no_cell_is_empty():
    lines = page()[4:]
    assert len(lines) == 3 * len(info.op_names())
    for line in lines:
        row = cells(line)
        assert len(row) == 8 and all(row), line
        assert ("-" in row) == row[2].startswith("none"), line


def test_a_kernel_without_spills_is_what_the_table_promises():
    for line in page()[4:]:
        row = cells(line)
        if row[1] in ("Triton", "CUDA") and row[6] != "-":
            assert row[6] == "0", line


def test_reasons_are_of_ops():
    names = set(info.op_names())
    for reasons in (info_kernels.NO_CUDA, info_kernels.NO_TRITON):
        assert set(reasons) <= names
    assert all(testing_cuda.has_kernel(op) != (op in info_kernels.NO_CUDA) for op in names)


@pytest.mark.slow
def test_readme_has_the_compiled_figures():
    pytest.importorskip("triton")
    if testing_cuda.why_not():
        pytest.skip(testing_cuda.why_not())
    if info_kernels.versions() not in page()[0]:
        pytest.skip(f"README.md's figures are of other compilers than {info_kernels.versions()}")
    assert info_kernels.markdown().splitlines() == page(), STALE
