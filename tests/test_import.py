"""What `import minitrain` brings along, and what it does not."""

import subprocess
import sys

import pytest

import minitrain

OPTIONAL = (
    "matplotlib",
    "torchvision",
    "hypothesis",
    "fastprogress",
    "tensorboard",
    "sklearn",
    "torchmetrics",
    "safetensors",
)


def modules_after(code):
    """The names of all modules that are loaded after `code` in a new interpreter."""
    run = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())


def test_import_pulls_in_no_optional_package():
    loaded = modules_after("import minitrain, minitrain.callbacks, minitrain.metrics, minitrain.plot")
    assert "torch" in loaded
    assert loaded.isdisjoint(OPTIONAL)


def test_import_adds_our_own_modules_and_few_of_the_standard_library_to_torch():
    added = {
        name for name in modules_after("import minitrain") - modules_after("import torch") if "minitrain" not in name
    }
    assert {name.split(".")[0] for name in added} <= sys.stdlib_module_names | {"torch"}
    assert not [
        name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "torch.onnx", "torch.fx"))
    ]


def test_the_public_face_is_sorted_and_complete():
    assert minitrain.__all__ == sorted(
        minitrain.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    assert all(hasattr(minitrain, name) for name in minitrain.__all__)


@pytest.mark.parametrize("name", ["LoopError", "DataError", "InitError", "CheckpointError"])
def test_each_error_is_also_a_builtin(name):
    error = getattr(minitrain, name)
    assert issubclass(error, minitrain.MinitrainError)
    assert issubclass(error, (RuntimeError, ValueError))


def test_cancels_are_no_builtin_error_that_somebody_might_catch():
    assert minitrain.CancelFit.__mro__[1:] == (
        minitrain.errors.Cancel,
        minitrain.MinitrainError,
        Exception,
        BaseException,
        object,
    )
