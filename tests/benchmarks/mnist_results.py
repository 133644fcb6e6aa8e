"""The four results of the README: this net on MNIST, AdamW and SGD, LSUV and PyTorch's default, seeds 0 to 4.

    python tests/benchmarks/mnist_results.py --data DIR    # DIR holds MNIST; about 25 minutes on two cores

AdamW: the example's defaults, test accuracy after the last epoch. SGD (lr 0.05, momentum 0.9, batch size 128, the same
one-cycle over five epochs): accuracy after the first one. Prints a Markdown table.
"""

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.datasets import MNIST

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from mnist import INITS, make_loaders, make_net

from minitrain import Callback, Learner
from minitrain.metrics import accuracy

SEEDS = range(5)
RUNS = {  # optimiser, highest learning rate, batch size, epochs after which the test set is read
    "AdamW, lr 1e-2, batch 64, after 5 epochs": (None, 1e-2, 64, 5),
    "SGD, lr 0.05, momentum 0.9, batch 128, after the first of 5 epochs": (
        partial(torch.optim.SGD, momentum=0.9),
        0.05,
        128,
        1,
    ),
}


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def after_epoch(self, learn):
        if learn.epoch + 1 == self.epochs:
            learn.stop("that is all that is asked for")


def test_accuracy(data, run, init, seed):
    """One run: the accuracy on the official test set, a fraction."""
    torch.set_num_threads(1)
    opt_func, lr, batch_size, epochs = RUNS[run]
    full, test = (MNIST(data, train=train) for train in (True, False))
    torch.manual_seed(seed)
    dls, test_loader = make_loaders(full, test, batch_size=batch_size, seed=seed)
    learn = Learner(
        make_net(),
        dls,
        F.cross_entropy,
        opt_func=opt_func,
        lr=lr,
        metrics=[accuracy],
        init=INITS[init],
        cbs=[StopAfter(epochs)],
        seed=seed,
        progress=False,
    )
    learn.fit_one_cycle(5)
    return learn.validate(test_loader)["valid_accuracy"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [(run, init, seed) for run in RUNS for init in ("lsuv", "none") for seed in SEEDS]
    with ProcessPoolExecutor(args.workers) as pool:
        results = dict(zip(jobs, pool.map(partial(test_accuracy, args.data), *zip(*jobs, strict=True)), strict=True))
    print("| run | initialisation | test accuracy, mean (lowest to highest) of seeds 0 to 4 |\n|---|---|---|")
    for run in RUNS:
        for init, name in (("lsuv", "LSUV"), ("none", "PyTorch's default")):
            found = [100 * results[run, init, seed] for seed in SEEDS]
            print(f"| {run} | {name} | {statistics.mean(found):.2f} % ({min(found):.2f} to {max(found):.2f}) |")
        better = sum(results[run, "lsuv", seed] > results[run, "none", seed] for seed in SEEDS)
        print(f"<!-- {run}: LSUV is above the default on {better} of {len(SEEDS)} seeds -->")
    print({" ".join(map(str, job)): round(100 * value, 2) for job, value in results.items()}, file=sys.stderr)


if __name__ == "__main__":
    main()
