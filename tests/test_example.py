"""`examples/mnist.py` as a user runs it, and as a user gets it wrong."""

import csv
import gzip
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from minitrain import LSUV, layer_stats
from minitrain.callbacks import Diagnose

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "mnist.py"
ARCHIVES = ROOT.parent / "shared" / "data" / "MNIST"  # where CI has it


def load():
    spec = importlib.util.spec_from_file_location("example_mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script in an empty folder, without a network; returns exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["mnist.py", *options])
        status = 0
        try:
            load().main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_it_is_short_enough_to_be_read():
    assert len(SCRIPT.read_text().splitlines()) <= 150


@pytest.mark.parametrize("init", ["none", "he", "lsuv"])
def test_a_smoke_run_on_the_digits_prints_and_writes_everything(run, init, tmp_path):
    status, out, _ = run("--smoke", "--dataset", "digits", "--init", init)
    assert status == 0
    assert re.search("layer +class +µ +σ$", out, re.MULTILINE)
    assert bool(re.search("σ before +µ after +σ after +(signal +)?status", out)) == (init != "none")
    assert "epoch 1/1" in out
    assert "test accuracy" in out
    (row,) = csv.DictReader((tmp_path / "runs/mnist/history.csv").read_text().splitlines())
    assert float(row["train_accuracy"]) <= 1
    for picture in ("curves.png", "activations.png"):
        assert (tmp_path / "runs/mnist" / picture).read_bytes().startswith(b"\x89PNG")


def test_without_mnist_and_network_it_says_so_in_one_line_and_takes_the_digits(run):
    status, out, err = run("--smoke")
    assert status == 0
    assert out.startswith("MNIST is neither in data/MNIST/raw nor to be downloaded: training on the digits")
    assert out.splitlines()[1].startswith("digits: 512 images")
    assert err == ""


def test_a_second_run_without_a_network_does_the_same(run):
    assert run("--smoke")[0] == run("--smoke")[0] == 0


def test_an_interrupted_run_goes_on_and_a_finished_one_returns_at_once(run, tmp_path, monkeypatch, capsys):
    def results(out):
        rows = list(csv.DictReader((tmp_path / "runs/mnist/history.csv").read_text().splitlines()))
        return re.search("test accuracy.*", out)[0], [row | {"seconds": None} for row in rows]

    options = ("--dataset", "digits", "--epochs", "3")
    status, out, _ = run(*options)
    whole = results(out)
    assert results(run(*options, "--resume")[1]) == whole
    shutil.rmtree(tmp_path / "runs")

    def interrupted(self, learn):
        if learn.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Diagnose, "before_train", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(*options)
    capsys.readouterr()
    status, out, _ = run(*options, "--resume")
    assert status == 0
    assert "epoch 1/3" not in out
    assert "epoch 3/3" in out
    assert results(out) == whole


def test_the_digits_are_learnt(run):
    """The bar of the embedded default: 95.6 % without LSUV, 98.6 % with it, by a plain loop."""
    status, out, _ = run("--dataset", "digits")
    assert status == 0
    assert float(out.split("test accuracy ")[1].split(" %")[0]) >= 97


WRONG = {
    "no folder": (["--data", "nowhere"], "--data: there is no folder 'nowhere'. Make it first."),
    "mnist is a must": (["--dataset", "mnist"], "MNIST in data/MNIST/raw can be neither read nor downloaded"),
    "unknown option": (["--epoch-count", "3"], "unrecognized arguments: --epoch-count"),
    "unknown init": (["--init", "best"], "argument --init: invalid choice: 'best'"),
    "no epochs": (["--epochs", "0"], "argument --epochs: 0 is out of range"),
    "text for a number": (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    "negative rate": (["--lr", "-1"], "argument --lr: -1.0 is out of range"),
    "rate not a number": (["--lr", "nan"], "argument --lr: nan is out of range"),
    "negative seed": (["--seed", "-1"], "argument --seed: -1 is out of range"),
    "unknown device": (["--device", "gpu"], "argument --device"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_status_2(run, name):
    options, message = WRONG[name]
    status, _, err = run(*options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def damage(raw, how):
    """Put MNIST-like files there of which one is damaged."""
    raw.mkdir(parents=True)
    for url, _ in MNIST.resources:
        (raw / url.removesuffix(".gz")).write_bytes(bytes.fromhex("00000801") + (0).to_bytes(4, "big"))
    victim = raw / "train-images-idx3-ubyte"
    if how == "archive":
        victim.unlink()
        (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not MNIST"))
    elif how == "truncated":
        victim.write_bytes(
            bytes.fromhex("00000803") + b"".join(n.to_bytes(4, "big") for n in (60000, 28, 28)) + bytes(99)
        )
    elif how == "nonsense":
        victim.write_bytes(b"\xff" * 100)
    elif how == "empty":
        victim.write_bytes(b"")
    elif how == "unreadable":
        victim.unlink()
        victim.mkdir()


@pytest.mark.parametrize("how", ["archive", "truncated", "nonsense", "empty", "unreadable"])
def test_a_damaged_or_unreadable_file_is_said_with_status_2(run, tmp_path, how):
    damage(tmp_path / "data/MNIST/raw", how)
    status, _, err = run("--data", "data")
    assert status == 2
    assert "MNIST in data/MNIST/raw can be neither read nor downloaded" in err
    assert "Traceback" not in err


@pytest.mark.skipif(not ARCHIVES.is_dir(), reason=f"the MNIST archives do not lie in {ARCHIVES}")
def test_the_real_mnist_is_unpacked_and_used(run, tmp_path):
    shutil.copytree(ARCHIVES, tmp_path / "data/MNIST", copy_function=shutil.copyfile)
    status, out, _ = run("--smoke", "--data", "data", "--dataset", "mnist")
    assert status == 0
    assert "mnist: 512 images to train on, 128 to test" in out


def test_after_lsuv_every_layer_of_this_net_is_normalised_to_a_millionth():
    net, x = load().make_net(), torch.rand(64, 1, 28, 28)
    assert [row.kind for row in LSUV()(net, [x])] == ["Conv2d"] * 4 + ["Linear"]
    for row in layer_stats(net, x):
        assert abs(row.mean_before) < 1e-6
        assert abs(row.std_before - 1) < 1e-6
