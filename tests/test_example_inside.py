"""`examples/inside.py` as a user runs it, and as a user gets it wrong."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
from torchvision.datasets import MNIST

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "inside.py"
LAYERS = ["conv1", "conv2", "conv3", "conv4", "linear"]
PICTURES = ["activations", "histograms", "dead", "gradients", "updates"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script in an empty folder, without a network; returns exit status, standard output and standard error."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as for a script: its neighbour mnist.py is found
    monkeypatch.delitem(sys.modules, "mnist", raising=False)
    spec = importlib.util.spec_from_file_location("example_inside", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["inside.py", *options])
        status = 0
        try:
            example.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
def test_it_says_what_is_wrong_and_draws_it(run, tmp_path):
    status, out, _ = run("--smoke", "--dataset", "digits")
    assert status == 0
    default, lsuv = out.split("--- lsuv")
    assert "standard deviation below 0.1 at the first step in 2 layers: 'conv4' (" in default
    assert "LSUV()" in default
    assert "standard deviation" not in lsuv
    assert "relu4: (128, 32, 19, 19), " in lsuv
    folder = tmp_path / "runs" / "inside"
    for name in ("default", "lsuv"):
        for picture in PICTURES:
            assert (folder / f"{name}_{picture}.png").read_bytes().startswith(b"\x89PNG")
        with open(folder / f"{name}_activations.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["layer"] for row in rows[:5]] == LAYERS
        assert len(rows) == 5 * 4  # 512 images in batches of 128
        if name == "lsuv":
            assert all(abs(float(row["std"]) - 1) < 1e-3 for row in rows[:5])
    assert (folder / "histograms.png").exists()


@pytest.mark.parametrize(
    ("options", "words"), [(["--epochs", "0"], "--epochs: 0 is out of range"), (["--lr", "-1"], "--lr: -1.0 is out")]
)
def test_wrong_options_are_refused_before_anything_is_written(run, tmp_path, options, words):
    status, _, err = run(*options)
    assert status == 2
    assert words in err
    assert not (tmp_path / "runs").exists()
