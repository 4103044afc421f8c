"""Fine-tuning of the small networks: what is written, what comes back, what is refused."""

import json

import pytest
import torch

from fastdiff import adapters, cli, cli_finetune, data, finetune, models, quality
from fastdiff.finetune import Recipe

pytest.importorskip("mlxtend")
SHORT = dict(steps=3, batch=4, warmup_steps=1)


@pytest.mark.parametrize("model", ["dit-digits", "unet-digits"])
@pytest.mark.parametrize("method", ["sara", "lora", "difffit", "diffscaler"])
def test_an_adapter_is_written_and_loads(model, method, tmp_path):
    out = tmp_path / "a.safetensors"
    told = []
    card = finetune.finetune(
        model,
        out,
        Recipe(method=method, ratio=0.02, **SHORT),
        progress=lambda step, steps, loss: told.append((step, steps)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)] and len(card["curve"]) == 3
    assert json.loads(out.with_suffix(".json").read_text()) == card
    assert card["file_bytes"] == out.stat().st_size
    assert 0 < card["trained_parameters"] < 0.06 * card["base_parameters"]
    assert card["gradient_bytes"] == 4 * card["trained_parameters"]
    assert card["moment_bytes"] == 8 * card["trained_parameters"]
    base, _ = models.load(model)
    tuned, _ = models.load(model)
    adapter = adapters.load(tuned, out)
    x, t, y = torch.randn(2, 1, 32, 32), torch.tensor([900.0, 100.0]), torch.tensor([3, 10])
    with torch.no_grad():
        want, got = base(x, t, y), tuned(x, t, y)
        assert not torch.equal(got, want)
        adapter.detach()
        assert torch.equal(tuned(x, t, y), want)


def test_the_whole_network_is_a_checkpoint(tmp_path):
    out = tmp_path / "w.safetensors"
    card = finetune.finetune("dit-digits", out, Recipe(method="full", **SHORT))
    assert card["trained_parameters"] == card["moment_bytes"] // 8
    network, facts = models.load(out)
    assert facts["training"]["recipe"]["method"] == "full"
    base, _ = models.load("dit-digits")
    assert not torch.equal(network.blocks[0].mlp.fc1.weight, base.blocks[0].mlp.fc1.weight)


def test_the_same_seed_gives_the_same_adapter(tmp_path):
    cards = [
        finetune.finetune("dit-digits", tmp_path / f"{i}.safetensors", Recipe(seed=s, **SHORT))
        for i, s in enumerate((1, 1, 2))
    ]
    assert cards[0]["curve"] == cards[1]["curve"] != cards[2]["curve"]
    (_, a), (_, b) = (adapters.read(tmp_path / f"{i}.safetensors") for i in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys()


def test_a_run_that_is_stopped_keeps_what_there_is(tmp_path):
    out = tmp_path / "a.safetensors"

    def stop(step, steps, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.finetune("dit-digits", out, Recipe(**SHORT), progress=stop)
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["steps"] == 2 and card["stopped"]
    network, _ = models.load("dit-digits")
    adapters.load(network, out).detach()


def test_the_loss_falls_on_new_data(tmp_path):
    recipe = Recipe(data="inverted", steps=40, batch=8, lr=5e-3, ratio=0.1, warmup_steps=5)
    card = finetune.finetune("dit-digits", tmp_path / "a.safetensors", recipe)
    assert card["loss_last"] < 0.7 * card["loss_first"]


def test_as_many_parameters_as_sara_has():
    network, _ = models.load("dit-digits", plain=True)
    sara = adapters.SaRA(network, ratio=0.05)
    count = sara.count
    sara.detach()
    lora = adapters.LoRA(network, finetune.rank_for(network, count))
    found = sum(p.numel() for p in lora.trainable())
    assert abs(found - count) < 0.06 * count


@pytest.mark.parametrize("name", ["digits", "rotated", "inverted", "sklearn"])
def test_targets(name):
    found = data.target(name)
    assert found.x.shape[1:] == (1, 32, 32) and found.x.dtype == torch.float32
    assert -1 <= found.x.min() < -0.9 and 0.9 < found.x.max() <= 1
    assert found.y.bincount().min() >= 100 and found.held_y.bincount().min() >= 20
    corner = found.x[:, 0, 0, 0].mean()
    assert corner == (1 if name == "inverted" else -1)
    classifier = quality.load_classifier()
    back = data.change_back(name, found.held_x)
    right = (classifier(back).argmax(1) == found.held_y).float().mean()
    assert right > (0.85 if name == "sklearn" else 0.97)  # it was not trained on these


def test_quality_is_read_in_the_frame_of_the_data(tmp_path):
    card = finetune.finetune(
        "dit-digits",
        tmp_path / "a.safetensors",
        Recipe(**SHORT),
        evaluate=dict(per_class=2, steps=3),
    )
    assert {"agreement", "frechet_to_held_out"} <= card["before"].keys() & card["after"].keys()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (dict(data="faces"), "name is 'faces'"),
        (dict(method="magic"), "method is 'magic'"),
        (dict(steps=0), "steps is 0"),
        (dict(ratio=2.0), "ratio is 2.0"),
    ],
)
def test_bad_recipes(recipe, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune.finetune("dit-digits", tmp_path / "a.safetensors", Recipe(**recipe))
    assert not list(tmp_path.iterdir())


def test_bad_places(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        finetune.finetune("dit-digits", tmp_path / "a.bin")
    with pytest.raises(ValueError, match="folder that exists"):
        finetune.finetune("dit-digits", tmp_path / "none" / "a.safetensors")
    with pytest.raises(ValueError, match="not of scenes"):
        finetune.finetune("dit-scenes", tmp_path / "a.safetensors", Recipe(**SHORT))


def test_the_command_offers_what_there_is():
    assert cli_finetune.METHODS == finetune.METHODS
    assert set(cli_finetune.DATA) == data.TARGETS.keys()


def test_the_commands(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot, grid = (tmp_path / n for n in ("a.safetensors", "loss.png", "grid.png"))
    line = (
        "finetune --model unet-digits --data rotated --method sara --ratio 0.02 --steps 2 --batch 2"
    )
    assert cli.main([*line.split(), "--out", str(out), "--plot", str(plot)]) == 0
    told = capsys.readouterr().out
    assert "sara on rotated" in told and "2 steps" in told and "moments" in told
    assert plot.read_bytes()[:4] == b"\x89PNG"
    line = (
        "sample --model unet-digits --steps 2 --classes 0-1 --batch 2 --compare --repeat 1 --json"
    )
    assert cli.main([*line.split(), "--adapter", str(out), "--out", str(grid)]) == 0
    report = json.loads(capsys.readouterr().out)[0]
    assert report["adapters"] == [str(out)] and report["finite"]
    assert report["compare"]["torch eager"]["largest_difference"] < 1e-3
    assert cli.main(["sample", "--adapter", str(out), "--out", str(grid)]) == 2
    assert "--adapter is given for 2 models" in capsys.readouterr().err
    wrong = ["sample", "--model", "dit-digits", "--adapter", str(out), "--out", str(grid)]
    assert cli.main(wrong) == 2
    assert "does not fit this network" in capsys.readouterr().err
