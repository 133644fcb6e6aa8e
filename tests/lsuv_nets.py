"""What the tests of LSUV share."""

import itertools

import torch
from torch import nn

CLAIMS = {"normalized", "no_bias", "scaled", "reused"}  # the statuses that claim a standard deviation


def bits(tensor):
    """Every bit of a tensor: NaN equals itself, and 0.0 is not -0.0."""
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8).tolist()


def statuses(report):
    return {row.name: row.status for row in report}


def mlp(*sizes, act=nn.ReLU, **options):
    layers = [f for a, b in itertools.pairwise(sizes) for f in (nn.Linear(a, b, **options), act())]
    return nn.Sequential(*layers[:-1])
