"""What keeping a run on disk costs: how long training stands still for a file, and the whole of an MNIST run.

python tests/benchmarks/checkpoint_cost.py [--rounds N] [--threads N]

Stall: a state of the size of a ResNet-50 with AdamW (161 tensors of 25.6 million parameters, and twice as many moments).
Between two batches `Checkpoint` copies it, and a thread writes it; the time of the save point is compared with that of
cloning each tensor, and of `copy.deepcopy`. Throughput: the net and batches of the MNIST example with a checkpoint every 50
steps over the same fit without. The variants of a round are run in random order; the figures are medians with their quartiles.
"""

import argparse
import copy
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minitrain import BatchLoader, DataLoaders, Learner
from minitrain.callbacks import Checkpoint


class Tensors(nn.Module):
    """As many parameters, of such shapes, as a ResNet-50; a forward pass that costs nothing."""

    def __init__(self):
        super().__init__()
        shapes, inputs = [(64, 3, 7, 7)], 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
                shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
                inputs = 4 * width
        norms = [shape for conv in shapes for shape in [(conv[0],)] * 2]
        self.all = nn.ParameterList(torch.randn(shape) for shape in [*shapes, *norms, (1000, 2048), (1000,)])

    def forward(self, x):
        return x.mean() * sum(p.sum() for p in self.all)


class Timed(Checkpoint):
    """Notes how long each save point takes."""

    def _at_save_point(self, learn):
        start = time.perf_counter()
        super()._at_save_point(learn)
        self.seconds.append(time.perf_counter() - start)
        if self._writing is not None:
            self._writing.result()  # the next copy begins when the disk is at rest


def stall(rounds, folder):
    """Seconds of a save point, of cloning all tensors, and of copying the states deeply, by turns."""
    torch.manual_seed(0)
    net, x = Tensors(), torch.zeros(1, 1)
    cb = Timed(folder, every=1, keep_last=1)
    cb.seconds, clones, deep = [], [], []
    learn = Learner(
        net,
        DataLoaders([(x, x)] * rounds),
        lambda preds, y: preds,
        lr=1e-3,
        cbs=[cb],
        progress=False,
        opt_func=torch.optim.AdamW,
    )

    def clone(learn):
        state = [*net.state_dict().values(), *(v for s in learn.opt.state.values() for v in s.values())]
        start = time.perf_counter()
        copies = [tensor.clone() for tensor in state]
        clones.append(time.perf_counter() - start)
        del copies
        start = time.perf_counter()
        copies = copy.deepcopy((net.state_dict(), learn.opt.state_dict()))
        deep.append(time.perf_counter() - start)
        del copies

    learn.save_points.append(clone)
    learn.fit(1)
    n = sum(p.numel() for p in net.parameters())
    size = next(folder.glob("0*")).stat().st_size
    print(f"{len(list(net.parameters()))} tensors, {n / 1e6:.1f} million parameters, {size / 1e6:.0f} MB")
    return cb.seconds[:rounds], clones[:rounds], deep[:rounds]


def seed_net():
    sys.path.insert(0, str(Path(__file__).parent))
    from lsuv_cost import seed_net

    return seed_net()


def throughput(rounds, folder, n_steps, batch_size):
    """The ratio of a fit with a checkpoint every 50 steps to one without, and of one without to another."""
    torch.manual_seed(0)
    x, y = torch.randn(n_steps * batch_size, 1, 28, 28), torch.randint(0, 10, (n_steps * batch_size,))

    def run(*cbs):
        torch.manual_seed(0)
        dls = DataLoaders(BatchLoader(x, y, batch_size=batch_size, shuffle=True))
        learn = Learner(seed_net(), dls, F.cross_entropy, lr=1e-3, cbs=cbs, progress=False)

        def fit():
            start = time.perf_counter()
            learn.fit(1)
            return time.perf_counter() - start

        return fit

    fits = {
        "none": run(),
        "A/A": run(),
        "every=50": run(Checkpoint(folder / "a", every=50)),
        "every=50, in training's thread": run(Checkpoint(folder / "b", every=50, async_write=False)),
    }
    seconds = {name: [] for name in fits}
    for _ in range(rounds + 1):
        for name in random.sample(list(fits), len(fits)):
            seconds[name].append(fits[name]())
    for name in list(fits)[1:]:
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["none"][1:], strict=True)]  # the first one warms up
        show(f"{name} over none", ratios, 100)
    print(
        f"({n_steps} steps of {batch_size} images, {1000 * statistics.median(seconds['none']) / n_steps:.2f} ms a step)"
    )


def show(name, values, scale):
    low, middle, high = statistics.quantiles([scale * value for value in values], n=4)
    print(f"{name:<40} {middle:8.1f}   ({low:.1f} to {high:.1f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_cost"))
    try:
        points, clones, deep = stall(args.rounds, folder)
        show("save point, ms", points[1:], 1000)  # the first one gets its memory from the system
        show("cloning every tensor, ms", clones[1:], 1000)
        show("copy.deepcopy, ms", deep[1:], 1000)
        show("save point over clones, %", [a / b for a, b in zip(points[1:], clones[1:], strict=True)], 100)
        show("save point over deepcopy, %", [a / b for a, b in zip(points[1:], deep[1:], strict=True)], 100)
        throughput(args.rounds, folder, n_steps=300, batch_size=64)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
