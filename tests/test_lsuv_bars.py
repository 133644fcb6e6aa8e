"""The bars of LSUV on nets that people use: how exact, in how many forward passes, and every status."""

import pytest
import torch
import torchvision
from torch import nn

from minitrain.init import lsuv_


def deep_mlp():
    return nn.Sequential(*(module for _ in range(100) for module in (nn.Linear(256, 256), nn.ReLU())))


def seed_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2, 1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 1, 2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 1, 2), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, 1, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


# name: (net, batch, number of layers by status, what else is listed)
NETS = {
    "seed": (seed_net, (64, 1, 28, 28), {"normalized": 5}),
    "vgg16": (torchvision.models.vgg16, (2, 3, 224, 224), {"normalized": 16}),
    "resnet50": (torchvision.models.resnet50, (2, 3, 224, 224), {"normalized": 1, "no_bias": 53}),
    "vit_b_16": (torchvision.models.vit_b_16, (2, 3, 224, 224), {"normalized": 1 + 12 * 6, "dead": 1}),
    "swin_t": (torchvision.models.swin_t, (2, 3, 224, 224), {"normalized": 1 + 12 * 4 + 1, "no_bias": 3}),
    "mlp": (deep_mlp, (256, 256), {"normalized": 100}),
}


def oracle(model, x):
    """Mean, std and has-a-bias of every module that is a weight layer, by hooks, in float64 sums."""
    found = {}

    def keep(name):
        def hook(module, args, y):
            found[name] = y.double().mean().item(), y.double().std().item(), module.bias is not None

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", NETS)
def test_one_forward_pass_normalises_every_layer_to_a_hundred_thousandth(name):
    make, shape, expected = NETS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    report = lsuv_(model, x)
    handle.remove()
    assert len(passes) == report.forwards == 2  # and the second one only looks
    counts = {}
    for row in report:
        counts[row.status] = counts.get(row.status, 0) + 1
    assert counts == expected
    assert [row.name for row in report if row.status == "dead"] == (["heads.head"] if name == "vit_b_16" else [])
    for row in report:
        if row.status in ("normalized", "no_bias"):
            assert abs(row.std_after - 1) < 1e-5, row
        if row.status == "normalized":
            assert abs(row.mean_after) < 1e-5, row
    measured = oracle(model, x)
    assert measured
    for layer, (mean, std, biased) in measured.items():
        if report[layer].status != "dead":
            assert abs(std - 1) < 1e-5
            assert not biased or abs(mean) < 1e-5


def test_without_verifying_it_is_one_forward_pass():
    passes = []
    model = torchvision.models.vit_b_16()
    model.register_forward_hook(lambda *_: passes.append(1))
    assert lsuv_(model, torch.randn(2, 3, 224, 224), verify=False).forwards == len(passes) == 1
