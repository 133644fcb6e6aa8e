"""`examples/lsuv.py` as a user runs it, and as a user gets it wrong."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from minitrain import LSUV, layer_stats

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "lsuv.py"
WAYS = [
    "PyTorch's default",
    "He normal",
    "LSUV on one minibatch",
    "LSUV on 8 minibatches",
    "LSUV on all 512 images",
]
DEEP = ["PyTorch's default", "He normal", "LSUV"]


def load():
    spec = importlib.util.spec_from_file_location("example_lsuv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as for a script: its neighbour mnist.py is found
    monkeypatch.delitem(sys.modules, "mnist", raising=False)
    return load()


@pytest.fixture
def run(example, tmp_path, monkeypatch, capsys):
    """Run the script in an empty folder, without a network; returns exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["lsuv.py", *options])
        status = 0
        try:
            example.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def sections(out):
    """What is printed under each line that begins with ---, by what that line says."""
    parts = re.split(r"^--- (.*)$", out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(table):
    """The name, class and numbers of each line of a table."""
    found = re.findall(r"^(\w+) +(Conv2d|Linear) +(.*)$", table, re.MULTILINE)
    return [(name, kind, [float(n) for n in numbers.split()[:4] if n[-1].isdigit()]) for name, kind, numbers in found]


def test_it_is_short_enough_to_be_read():
    assert len(SCRIPT.read_text().splitlines()) <= 150


def test_a_smoke_run_prints_every_table_and_draws_every_picture(run, tmp_path):
    status, out, _ = run("--smoke", "--dataset", "digits")
    assert status == 0
    assert out.startswith("digits: 512 images to train on, 128 to test\n")
    parts = sections(out)
    assert list(parts) == WAYS + [f"the deep net, {name}" for name in DEEP]

    for name in WAYS:
        first, test = parts[name].split(f"\n{name}, on the 128 test images:\n")
        for table in (first, test):
            assert [row[:2] for row in rows(table)] == [
                *((f"conv{i}", "Conv2d") for i in (1, 2, 3, 4)),
                ("linear", "Linear"),
            ]
        assert re.search("^layer +class +µ +σ$", test, re.MULTILINE)
        after_lsuv = re.search("µ before +σ before +µ after +σ after", first)
        assert bool(after_lsuv) == name.startswith("LSUV")
        if after_lsuv:
            assert all(abs(mean) < 1e-5 and std == 1 for _, _, (*_, mean, std) in rows(first))
            assert "5 layers: 5 normalized" in first
            assert all(abs(std - 1) < 0.05 for _, _, (_, std) in rows(test))  # near to it on images that it did not see
    assert "8 batches as one, in lock-step" in parts["LSUV on 8 minibatches"]

    assert "21 layers: 21 normalized" in parts["the deep net, LSUV"]
    for name in DEEP:
        assert "epoch 1/1" in parts[f"the deep net, {name}"]
        assert re.search(rf"^{name} +[\d.]+ %$", out, re.MULTILINE)
    for picture in ("curves.png", "depth.png", "depth_as_met.png"):
        assert (tmp_path / "runs/lsuv" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_worst_layer_of_each_way_is_that_of_its_test_table(run):
    out = run("--smoke", "--dataset", "digits")[1]
    summary = out.split("worst layer on the test images")[1].split("---")[0]
    for name in WAYS:
        mean, std = map(float, re.search(rf"^{name} +([\d.]+) +([\d.]+)$", summary, re.MULTILINE).groups())
        test = rows(sections(out)[name].split("test images:\n")[1].split("worst layer")[0])
        assert mean == pytest.approx(max(abs(numbers[0]) for _, _, numbers in test), abs=1e-3)
        assert std == pytest.approx(max(abs(numbers[1] - 1) for _, _, numbers in test), abs=1e-3)


def test_two_runs_print_the_same(run):
    def without_times(out):
        return re.sub(r"[\d.]+ s\b", "", out)

    first, second = (without_times(run("--smoke", "--dataset", "digits", "--seed", "1")[1]) for _ in range(2))
    assert first == second


def test_without_mnist_and_network_it_says_so_in_one_line_and_takes_the_digits(run):
    status, out, err = run("--smoke")
    assert status == 0
    assert out.startswith("MNIST is neither in data/MNIST/raw nor to be downloaded: training on the digits")
    assert out.splitlines()[1].startswith("digits: 512 images")
    assert err == ""


def test_the_deep_net_loses_its_signal_by_default_and_not_by_lsuv(example):
    net, x = example.make_deep_net(), torch.rand(64, 1, 28, 28)
    convs = [m for m in net if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 20
    assert not [m for m in net.modules() if "Norm" in type(m).__name__]
    assert layer_stats(net, x)["conv20"].signal_share < 1e-9  # what is left of the spread is that of the biases
    LSUV()(net, [x])
    after = layer_stats(net, x)
    assert all(abs(row.std_before - 1) < 1e-5 for row in after)
    assert after["conv20"].signal_share > 1e-3


WRONG = {
    "no folder": (["--data", "nowhere"], "--data: there is no folder 'nowhere'. Make it first."),
    "mnist is a must": (["--dataset", "mnist"], "MNIST in data/MNIST/raw can be neither read nor downloaded"),
    "unknown dataset": (["--dataset", "cifar"], "argument --dataset: invalid choice: 'cifar'"),
    "unknown option": (["--epoch-count", "3"], "unrecognized arguments: --epoch-count"),
    "no epochs": (["--epochs", "0"], "argument --epochs: 0 is out of range"),
    "text for a number": (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    "negative rate": (["--lr", "-1"], "argument --lr: -1.0 is out of range"),
    "rate not a number": (["--lr", "nan"], "argument --lr: nan is out of range"),
    "negative seed": (["--seed", "-1"], "argument --seed: -1 is out of range"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_status_2(run, name, tmp_path):
    options, message = WRONG[name]
    status, _, err = run(*options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
