"""``fastdiff sample --program``, ``edit``, ``invert`` and ``inpaint`` as a person uses them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.cli_methods import EDITS, FILLS, REGIONS, REWARDS, region_of


def run(capsys, *argv):
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def report(capsys, *argv):
    code, text, err = run(capsys, *argv, "--json")
    assert code == 0, err
    found = json.loads(text)
    return found[0] if isinstance(found, list) else found


@pytest.mark.parametrize("method", EDITS)
def test_edit(capsys, tmp_path, method):
    out = tmp_path / "e.png"
    argv = ("edit", "--method", method, "--to", 3, "--steps", 12, "--count", 2, "--out", out)
    found = report(capsys, *argv)
    assert found["finite"] and found["method"] == method and len(found["digits"]) == 2
    assert 0 <= found["read_as_asked"] <= 1
    with Image.open(out) as image:
        assert image.info["Software"] == "fastdiff sample"


def test_a_digit_becomes_another(capsys, tmp_path):
    out = tmp_path / "e.png"
    argv = ("edit", "--to", 8, "--steps", 30, "--count", 4, "--classes", "0-7", "--out", out)
    assert report(capsys, *argv)["read_as_asked"] >= 0.75


def test_invert(capsys, tmp_path):
    found = report(capsys, "invert", "--steps", 12, "--count", 2, "--out", tmp_path / "i.png")
    assert found["rms_with_the_stored_path"] == 0
    assert 0 < found["rms_of_the_way_back"] < 0.3 and 0.5 < found["rms_of_noise"] < 1.5


@pytest.mark.parametrize("method", FILLS)
def test_inpaint(capsys, tmp_path, method):
    argv = ("inpaint", "--method", method, "--steps", 12, "--count", 2)
    found = report(capsys, *argv, "--region", "left", "--out", tmp_path / "f.png")
    assert found["finite"] and found["rms_inside"] < 2
    if method != "red_diff":  # which fits what is known and does not force it
        assert found["largest_change_outside"] == 0


@pytest.mark.parametrize("region", REGIONS)
def test_regions(region):
    mask = region_of(region, 32)
    assert mask.sum() == (256 if region == "centre" else 512)


PROGRAMS = (
    "fk:reward=reader,particles=2",
    "svdd:reward=ink,candidates=2",
    "steered:reward=symmetry",
    "superdiff:other=3",
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_sample_with_a_program(capsys, tmp_path, program):
    argv = ("sample", "--model", "dit-digits", "--steps", 8, "--batch", 2, "--program", program)
    found = report(capsys, *argv, "--out", tmp_path / "s.png")
    assert found["finite"] and found["program"].startswith(program.partition(":")[0])


def test_reward_is_followed(capsys, tmp_path):
    ink = {}
    for lam in (-50, 50):
        out = tmp_path / f"{lam}.png"
        argv = ("sample", "--model", "dit-digits", "--steps", 16, "--batch", 4, "--out", out)
        assert run(capsys, *argv, "--program", f"fk:reward=ink,lam={lam}")[0] == 0
        with Image.open(out) as image:
            ink[lam] = np.asarray(image).mean()
    assert ink[50] > ink[-50] + 4


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_one_number_a_picture(name):
    reward = REWARDS[name](torch.tensor([3, 5]))
    assert reward(torch.randn(6, 1, 32, 32)).shape == (6,)


@pytest.mark.parametrize(
    "argv, words",
    [
        (("sample", "--program", "fq"), "is 'fq', need one of fk, svdd"),
        (("sample", "--program", "fk:speed=3"), "fk has no 'speed', need reward"),
        (("sample", "--program", "fk:lam=much"), "lam is 'much', need a number"),
        (("sample", "--program", "fk:reward=beauty"), "reward is 'beauty', need one of reader"),
        (("sample", "--program", "fk", "--sampler", "heun"), "--sampler is 'heun', but --program"),
        (("edit", "--sampler", "ddim"), "--sampler is given, but edit has its own"),
        (("invert", "--model", "dit-scenes"), "does not draw digits of 32 x 32"),
        (("inpaint", "--out", "x.jpg"), "need a name that ends in .png"),
    ],
)
def test_bad_usage(capsys, argv, words):
    code, _, err = run(capsys, *argv)
    assert code == 2 and words in err and len(err.splitlines()) == 1
