"""The command line as a person uses it: exit codes, one-line errors, files written or kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import cli

ROOT = Path(__file__).parents[1]


def run(capsys, *argv):
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


QUICK = ("--steps", "2", "--classes", "3,5-6", "--batch", "3")


@pytest.mark.parametrize("name", cli.MODELS)
def test_sample_writes_a_grid(capsys, tmp_path, name):
    out = tmp_path / "grid.png"
    code, text, _ = run(capsys, "sample", "--model", name, *QUICK, "--out", out)
    assert code == 0 and str(out) in text
    with Image.open(out) as image:
        assert image.mode == "L" and image.size == (2 * (3 * 34 + 2), 2 * 36)
        assert json.loads(image.info["Settings"])["seed"] == 0
    code, _, _ = run(capsys, "sample", "--model", name, *QUICK, "--out", out)
    assert code == 0, "its own file is overwritten"


def test_sample_compares_both_models_as_json(capsys, tmp_path):
    argv = ("sample", *QUICK, "--compare", "--repeat", 1, "--json", "--out", tmp_path / "s.png")
    code, text, _ = run(capsys, *argv)
    reports = json.loads(text)
    assert code == 0 and [r["model"] for r in reports] == list(cli.MODELS)
    for report in reports:
        assert report["finite"] and Path(report["out"]).exists()
        assert report["rows"]["fused_step"] and "attention" in report["rows"]
        eager = report["compare"]["torch eager"]
        assert eager["seconds"] > 0 and eager["largest_difference"] < 1e-3
        assert report["compare"]["fastdiff"]["largest_difference"] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"s-dit-digits.png", "s-unet-digits.png"}


@pytest.mark.parametrize(
    "name, cache, reused",
    [
        ("unet-digits", "deepcache:3", 6),
        ("unet-digits", "encoder:4,parallel=3", 7),
        ("dit-digits", "taylor:3", 6),
        ("dit-digits", "broadcast:2", 4),
        ("dit-digits", "firstblock:0.3", None),
    ],
)
def test_sample_with_a_cache(capsys, tmp_path, name, cache, reused):
    argv = ("sample", "--model", name, "--steps", "10", "--classes", "3,5", "--batch", "2")
    argv = (*argv, "--cache", cache, "--compare", "--repeat", "1", "--out", tmp_path / "s.png")
    code, text, _ = run(capsys, *argv, "--json")
    (report,) = json.loads(text)
    found, without = report["cache"], report["compare"]["without cache"]
    calls = 10 if reused is None else found["calls"]
    assert code == 0 and report["finite"] and found["calls"] == calls
    if reused is not None:
        assert found["parts_reused"] * found["calls"] == reused * found["parts"]
    assert found["parts_reused"] > 0 and without["largest_difference"] > 0
    assert 10 < without["worst_psnr"] <= without["psnr"] < 80 and "attention" in report["rows"]
    assert report["compare"]["fastdiff"]["largest_difference"] == 0
    code, text, _ = run(capsys, *argv)
    assert code == 0 and "samples' parts reused" in text and "; PSNR " in text


def test_same_seed_same_pictures(capsys, tmp_path):
    for name in ("a", "b"):
        argv = ("sample", "--model", "dit-digits", *QUICK, "--seed", "7")
        assert run(capsys, *argv, "--out", tmp_path / f"{name}.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_threads_are_those_asked_for(capsys, tmp_path):
    before = torch.get_num_threads()
    try:
        argv = ("sample", "--model", "dit-digits", *QUICK, "--threads", 1, "--json")
        code, text, _ = run(capsys, *argv, "--out", tmp_path / "t.png")
        assert code == 0 and json.loads(text)[0]["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "required"),
        (("paint",), "paint"),
        (("sample", "--steps", "0"), "--steps: is '0', need a whole number 1 to 10000"),
        (("sample", "--steps", "many"), "--steps: is 'many'"),
        (("sample", "--guidance", "nan"), "--guidance: is 'nan', need a number 0 to 1000"),
        (("sample", "--guidance-rescale", "2"), "need a number 0 to 1"),
        (("sample", "--seed", "-1"), "--seed: is '-1'"),
        (("sample", "--batch", "0"), "--batch: is '0'"),
        (("sample", "--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("sample", "--classes", "9-0"), "range '9-0' is empty"),
        (("sample", "--classes", "cat"), "is 'cat', need labels and ranges"),
        (("sample", "--classes", "3,11"), "--classes has 11, need labels 0 to 9"),
        (("sample", "--sampler", "magic"), "sampler is 'magic', need one of"),
        (("sample", "--model", "no-such"), "no-such"),
        (("sample", "--out", "grid.gif"), "--out is 'grid.gif', need a name that ends in .png"),
        (("sample", "--out", "nowhere/a.png"), "need a folder that exists"),
        (("sample", "--compile"), "need --compare too"),
        (("sample", "--cache", "magic:3"), "--cache: cache is 'magic:3', need one of accumulated"),
        (("sample", "--cache", "deepcache:0"), "--cache: DeepCache: interval is 0"),
        (("sample", "--cache", "encoder:50ls"), "does not run on DiT: DiT is none of"),
        (("sample", "--cache", "deepcache:3,branch=9"), "which needs 19 blocks or more"),
        (("sample", "--model", "dit-digits", "--model", "dit-digits"), "two models would write"),
        (("bench", "no_such_op"), "op is 'no_such_op', need one of"),
        (("bench", "gelu_tanh", "--threads", "0"), "--threads is 0"),
        (("bench", "--level", "mmx"), "invalid choice: 'mmx'"),
        (("train",), "required: --out"),
        (("train", "dit-digits", "--out", "x", "--minutes", "-1"), "--minutes: is '-1'"),
        (("info", "--xml"), "--xml"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and message in err and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("fastdiff")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"precious", None])
def test_foreign_file_is_kept(capsys, tmp_path, content):
    path = tmp_path / "mine.png"
    if content is None:
        Image.new("L", (4, 4)).save(path)
        content = path.read_bytes()
    path.write_bytes(content)
    code, _, err = run(capsys, "sample", "--out", path, "--model", "dit-digits")
    assert code == 2 and "which fastdiff sample did not write" in err
    assert path.read_bytes() == content


def test_broken_checkpoint(capsys, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a checkpoint")
    path.with_suffix(".json").write_text("{")
    code, _, err = run(capsys, "sample", "--model", path, "--out", tmp_path / "x.png")
    assert code == 2 and "broken" in err and len(err.strip().splitlines()) == 1


def test_info(capsys):
    code, text, _ = run(capsys, "info", "--json")
    report = json.loads(text)
    assert code == 0 and report["cpu_level"] == fastdiff.cpu_level()
    assert report["ops"]["gelu_tanh"]["cpu float32"]["ref"] is None
    code, text, _ = run(capsys, "info")
    assert code == 0 and "gelu_tanh\n  cpu float32: native runs" in text
    code, text, _ = run(capsys, "info", "--markdown")
    assert code == 0 and "| gelu_tanh | native |" in text


def test_bench_prints_and_writes_figures(tmp_path):
    csv = tmp_path / "figures.csv"
    argv = ("bench", "gelu_tanh", "--quick", "--no-tests", "--only", "1536] float32", "--csv", csv)
    command = [sys.executable, "-c", "import sys; from fastdiff.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*command, *map(str, argv), "--markdown"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "of copy limit [native]" in done.stdout and "| gelu_tanh | [2, 256, 1536]" in done.stdout
    head, *rows = csv.read_text().splitlines()
    assert head.startswith("time,commit,processor,threads,level") and len(rows) == 3


def test_bench_gives_no_figures_where_outputs_differ(tmp_path):
    shutil.copytree(
        ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "bench" / "wrong.py").write_text(
        "import torch\nfrom _case import Case\n"
        "def cases():\n"
        "    return [Case('a', lambda: torch.ones(3), {'eager': lambda: torch.zeros(3)})]\n"
    )
    command = [sys.executable, tmp_path / "bench" / "run.py", "wrong", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no figures: output 0 is 1 away from eager" in done.stdout
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_wrong.py").write_text("def test_red():\n    assert False\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the tests of wrong are red: 1 failed" in done.stdout


@pytest.mark.parametrize("ours_last", [False, True])
def test_other_fastdiff_is_named(tmp_path, ours_last):
    """PyPI's text differ in the same folder, installed after this package or before it."""
    shutil.copy(ROOT / "fastdiff_engine.py", tmp_path)
    other = tmp_path / "fastdiff"
    other.mkdir()
    (other / "compare.py").write_text("compare = None\n")
    (other / "__init__.py").write_text(
        "" if ours_last else "raise RuntimeError('the text differ')\n"
    )
    if ours_last:
        (other / "dispatch.py").write_text("")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, tmp_path / "fastdiff_engine.py", "info"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2 and "PyPI's unrelated text differ" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "pip uninstall -y fastdiff" in done.stderr


def test_wheel_carries_the_command_and_the_benches(tmp_path):
    """A wheel of the sources (no extension, to be quick), unpacked into an empty folder."""
    skip = shutil.ignore_patterns(
        "__pycache__",
        ".git",
        ".venv",
        ".path",
        "build",
        "*.so",
        "*.egg-info",
        "tests",
        "_build_info*",
    )
    shutil.copytree(ROOT, tmp_path / "tree", ignore=skip, symlinks=True)
    link = tmp_path / "tree" / "fastdiff" / "kernels"
    if link.is_symlink():
        link.unlink()
    env = {**os.environ, "FASTDIFF_NO_EXT": "1"}
    env.pop("PYTHONPATH", None)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    target = tmp_path / "site"
    done = subprocess.run(
        [*pip, "--target", target, tmp_path / "tree"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (target / "fastdiff" / "bench" / "run.py").exists()
    assert (target / "fastdiff" / "kernels" / "gelu_tanh.py").exists()
    assert not (target / "kernels").exists() and not (target / "bench").exists()
    for name in cli.MODELS:
        assert (target / "fastdiff" / "checkpoints" / f"{name}.safetensors").exists()
    env["PYTHONPATH"] = str(target)
    for argv, need in (
        (["info"], "FASTDIFF_NO_EXT=1"),
        (
            ["bench", "gelu_tanh", "--quick", "--only", "1536] float32"],
            "no tests beside this folder",
        ),
    ):
        command = [sys.executable, "-m", "fastdiff_engine", *argv]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and need in done.stdout, done.stderr + done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["train", "--out", "x"],
            "no name is given, need dit-digits, unet-digits, dit-moe-digits or dit-scenes",
        ),
        (
            ["train", "dit-digits", "--experts", "4", "--out", "x"],
            "--experts is given, which dit-digits does not have; need dit-moe-digits",
        ),
        (
            ["train", "--experts", "2", "--top-k", "3", "--out", "x"],
            "DiTMoE: k is 3, need at most 2, the experts",
        ),
        (
            ["train", "unet-digits", "--data", "scenes", "--out", "x"],
            "--data is scenes, which unet",
        ),
        (["sample", "--layout", "3@10", "--model", "dit-scenes"], "need class@top,left of each"),
        (
            ["sample", "--layout", "3@1,2", "--model", "dit-digits"],
            "which dit-digits does not take",
        ),
    ],
)
def test_bad_layouts_and_data(argv, words, capsys, tmp_path):
    if argv[0] == "sample":
        argv = [*argv, "--out", str(tmp_path / "x.png")]
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and words in said and said.count("\n") == 1
