"""What the statistics callbacks cost: a fit with them over the same fit without, and fastai's beside ours.

python tests/benchmarks/stats_cost.py [--rounds N] [--threads N]
python -m pip install --no-deps fastai fastcore fasttransform plum-dispatch ...    # for fastai's; without it ours stand alone

The seed's net, batches of 512 images that are made beforehand, all five weight layers, SGD. In each round every variant
makes one short fit, in random order; the figures are medians of the ratios within a round, with their quartiles.
"""

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F

from minitrain import DataLoaders, Learner
from minitrain.callbacks import ActivationStats, Diagnose, GradientStats, ParameterStats

STEPS = 10


def seed_net():
    from lsuv_cost import seed_net  # beside this file, which is run as a script

    return seed_net()


def ours(batches, *cbs):
    torch.manual_seed(0)
    options = {"opt_func": torch.optim.SGD, "lr": 0.01, "progress": False}
    learn = Learner(seed_net(), DataLoaders(batches), F.cross_entropy, cbs=cbs, **options)
    return lambda: learn.fit(1)


def fastais(batches, *cbs):
    from fastai.basics import SGD, CrossEntropyLossFlat
    from fastai.basics import DataLoaders as FastaiLoaders
    from fastai.basics import Learner as FastaiLearner

    torch.manual_seed(0)
    dls = FastaiLoaders(batches, [])
    options = {"opt_func": SGD, "lr": 0.01, "cbs": [cb() for cb in cbs]}
    learn = FastaiLearner(dls, seed_net(), loss_func=CrossEntropyLossFlat(), **options)
    learn.logger = len  # it would print
    learn.validate = learn._do_epoch_validate = lambda *args, **kwargs: None  # there is nothing to validate on

    def fit():
        learn.fit(1)

    return fit


def variants(batches):
    """By name: a fit, and the name of the one that it is compared with."""
    found = {
        "minitrain": (ours(batches), "minitrain"),
        "A/A": (ours(batches), "minitrain"),
        "ActivationStats()": (ours(batches, ActivationStats()), "minitrain"),
        "  histogram_every=10": (ours(batches, ActivationStats(histogram_every=10)), "minitrain"),
        "  histogram_every=1": (ours(batches, ActivationStats(histogram_every=1)), "minitrain"),
        "GradientStats()": (ours(batches, GradientStats()), "minitrain"),
        "ParameterStats(every=1)": (ours(batches, ParameterStats(every=1)), "minitrain"),
        "Diagnose(every=10)": (ours(batches, Diagnose(every=10, show=len)), "minitrain"),
    }
    try:
        from fastai.callback.hook import ActivationStats as FastaiStats

        found["fastai"] = fastais(batches), "fastai"
        found["fastai ActivationStats"] = fastais(batches, FastaiStats), "fastai"
        found["  with_hist=True"] = fastais(batches, lambda: FastaiStats(with_hist=True)), "fastai"
    except ImportError as error:
        print(f"fastai is left out: {error}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batches = [(torch.randn(512, 1, 28, 28), torch.randint(0, 10, (512,))) for _ in range(STEPS)]
    fits = variants(batches)
    for fit, _ in fits.values():
        fit()
    ratios = {name: [] for name in fits}
    base = []
    for _ in range(args.rounds):
        seconds = {}
        for name in random.sample(list(fits), len(fits)):
            start = time.perf_counter()
            fits[name][0]()
            seconds[name] = time.perf_counter() - start
        base.append(seconds["minitrain"])
        for name, (_, over) in fits.items():
            ratios[name].append(seconds[name] / seconds[over])
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {1000 * statistics.median(base) / STEPS:.0f} ms a step"
    )
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:<28} {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
