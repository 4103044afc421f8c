"""``fastdiff tune`` and ``fastdiff report`` as a person uses them."""

import json
import sys

import pytest
from PIL import Image

from fastdiff import cli, tune


def run(capsys, *argv):
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


QUICK = ("tune", "--model", "dit-digits", "--steps", 6, "--pictures", 2, "--rounds", 1)
ONE = (*QUICK, "--cache", "taylor:3", "--fewer", 3)


def test_the_table_the_json_and_the_plot(capsys, tmp_path):
    out, plot = tmp_path / "report.json", tmp_path / "tune.png"
    argv = (*ONE, "--cache", "taylor:2/broadcast:2", "--target", "psnr=-50")
    code, text, err = run(capsys, *argv, "--out", out, "--plot", plot)
    assert code == 0 and "PSNR >= -50 dB" in text and "| 3 steps |" in text
    assert "| Forecast() |" in text and "| Forecast(interval=2) + Broadcast() |" in text
    assert "fastdiff tune: Forecast()" in err
    report = tune.Report.load(out)
    assert len(report.rows) == 3 and report.about["pictures"] == 2
    assert report.about["model"] == "dit-digits" and not any(r.stopped for r in report.rows)
    with Image.open(plot) as image:
        assert image.size[0] > 300
    code, text, _ = run(capsys, *ONE, "--target", "psnr=500", "--json", "--out", out)
    assert code == 0 and json.loads(text)["chosen"] is None  # its own file is overwritten
    code, _, err = run(capsys, "sample", "--cache", out, "--out", tmp_path / "s.png")
    assert code == 2 and "no cache is applied" in err and len(err.splitlines()) == 1


def test_a_report_is_a_cache(capsys, tmp_path):
    policy = [tune.policies.Forecast(3), tune.policies.Broadcast()]
    row = tune.Row("pair", tune.policy_dict(policy), None, 2.0, 30.0, 0.1, 1.0, 1.0, 25.0)
    tune.Report("t", [row], "pair").save(tmp_path / "r.json")
    argv = ("sample", "--model", "dit-digits", "--steps", 6, "--batch", 1, "--json")
    code, text, _ = run(capsys, *argv, "--cache", tmp_path / "r.json", "--out", tmp_path / "s.png")
    (found,) = json.loads(text)
    assert code == 0 and found["cache"]["policy"] == "Forecast() + Broadcast()"
    assert found["cache"]["parts_reused"] > 0


@pytest.mark.parametrize("cache", ["taylor:3", "firstblock:0.3", "taylor:3/broadcast:2"])
def test_report_draws_and_sums_up(capsys, tmp_path, cache):
    out = tmp_path / "report.png"
    argv = ("report", "--model", "dit-digits", "--cache", cache, "--steps", 6, "--batch", 2)
    code, text, _ = run(capsys, *argv, "--out", out)
    assert code == 0 and "samples' parts not computed" in text and str(out) in text
    with Image.open(out) as image:
        assert image.info["Software"] == "fastdiff"
    assert run(capsys, *argv, "--out", out)[0] == 0, "its own file is overwritten"


@pytest.mark.parametrize(
    "argv, words",
    [
        ((*ONE, "--target", "35"), "--target is '35', need psnr=DECIBELS"),
        ((*ONE, "--target", "psnr=high"), "--target is 'psnr=high'"),
        ((*ONE, "--target", "psnr=inf"), "need a finite number"),
        ((*ONE, "--target", "psnr=9", "--fewer", "6"), "fewer has 6"),
        ((*ONE, "--target", "psnr=9", "--out", "/no/such/x.json"), "need a folder that exists"),
        ((*ONE, "--target", "psnr=9", "--plot", "x.gif"), "ends in .png"),
        ((*ONE, "--target", "psnr=9", "--sampler", "magic"), "--sampler is 'magic'"),
        ((*QUICK, "--target", "psnr=9", "--cache", "deepcache:2,branch=99"), "DeepCache"),
        ((*QUICK, "--target", "psnr=9", "--cache", "no.json"), "no.json"),
        (("tune", "--target", "psnr=9"), "--model"),
        (("report", "--model", "dit-digits"), "--cache"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1


def test_foreign_files_are_kept(capsys, tmp_path):
    for name, option in (("x.json", "--out"), ("x.png", "--plot")):
        path = tmp_path / name
        path.write_text("mine")
        code, _, err = run(capsys, *ONE, "--target", "psnr=9", option, path)
        assert code == 2 and "need another" in err and path.read_text() == "mine"


def test_without_matplotlib_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = ("report", "--model", "dit-digits", "--cache", "taylor:3", "--steps", 2)
    code, _, err = run(capsys, *argv, "--out", tmp_path / "x.png")
    assert code == 2 and "needs matplotlib, which is not installed" in err
    assert len(err.splitlines()) == 1
