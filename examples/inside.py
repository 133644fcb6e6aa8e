"""See inside a net while it trains: the same net on MNIST, from PyTorch's default initialisation and from LSUV, in pictures.

SGD at a rate at which the default does not get going in its first epoch, and LSUV does. The pictures show why, and `Diagnose`
says it in a sentence. About two minutes on two CPU cores, torch 2.14.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mnist import load_digits, load_mnist, make_loaders, make_net  # examples/mnist.py, beside this file
from torch.utils.data import Subset

from minitrain import LSUV, Learner, capture
from minitrain.callbacks import ActivationStats, Diagnose, GradientStats, ParameterStats
from minitrain.metrics import accuracy

RUN = Path("runs/inside")
EPOCHS = {"mnist": 2, "digits": 10}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="the folder that holds MNIST, or shall hold it (default: data)")
    add("--dataset", choices=EPOCHS, help="default: mnist, or digits where it is not to be had")
    add("--epochs", type=int, help=f"default: {EPOCHS['mnist']}; {EPOCHS['digits']} for the digits")
    add("--lr", type=float, default=0.05, help="highest rate of the one-cycle schedule")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="512 images and one epoch: does everything run?")
    args = parser.parse_args()
    for name, least in {"epochs": 1, "lr": 1e-12, "seed": 0}.items():
        if (value := getattr(args, name)) is not None and not least <= value < 2**32:
            parser.error(f"argument --{name}: {value} is out of range")
    return args, parser.error


def train(name, init, data, args, epochs):
    """Train with everything recorded, draw it, and return the statistics of the activations."""
    torch.manual_seed(args.seed)
    dls, test_loader = make_loaders(*data, 128, args.seed)
    activations = ActivationStats(histogram_every=5)
    gradients, parameters, diagnose = GradientStats(), ParameterStats(every=5), Diagnose()
    learn = Learner(
        *(make_net(), dls, F.cross_entropy),
        opt_func=partial(torch.optim.SGD, momentum=0.9),
        metrics=[accuracy],
        init=init,
        cbs=[activations, gradients, parameters, diagnose],
        seed=args.seed,
    )
    print(f"\n--- {name}")
    learn.fit_one_cycle(epochs, args.lr)
    print(f"test accuracy {100 * learn.validate(test_loader)['valid_accuracy']:.2f} %")

    activations.plot(save=RUN / f"{name}_activations.png")
    activations.plot_histograms(save=RUN / f"{name}_histograms.png")
    parameters.plot_dead(save=RUN / f"{name}_dead.png")
    gradients.plot_flow(save=RUN / f"{name}_gradients.png")
    parameters.plot_heatmap("update_ratio", save=RUN / f"{name}_updates.png")
    activations.to_csv(RUN / f"{name}_activations.csv")

    x, _ = next(iter(test_loader))
    with torch.no_grad(), capture(learn.model, ["relu*"]) as outputs:
        learn.model(x)
    for layer, output in outputs.items():
        print(
            f"{layer}: {tuple(output.shape)}, {100 * (output == 0).float().mean():.0f} % zeros on {len(x)} test images"
        )
    return activations


def draw_side_by_side(found):
    """The histograms of all runs in one picture: a row a run, a column a layer."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    rows = figure.subplots(len(found), len(next(iter(found.values())).names), squeeze=False)
    for (name, stats), row in zip(found.items(), rows, strict=True):
        stats.plot_histograms(ax=row)
        for axes in row:
            axes.set_title(f"{name}: {axes.get_title()}", fontsize=11)
    figure.savefig(RUN / "histograms.png", dpi=100)


def main():
    args, fail = parse_args()
    found = None if args.dataset == "digits" else load_mnist(args, fail)
    dataset, (train_set, test_set) = ("mnist", found) if found else ("digits", load_digits())
    if args.smoke:
        train_set, test_set = Subset(train_set, range(512)), Subset(test_set, range(128))
    RUN.mkdir(parents=True, exist_ok=True)  # now, not after the training
    print(f"{dataset}: {len(train_set)} images to train on, {len(test_set)} to test")

    epochs = args.epochs or (1 if args.smoke else EPOCHS[dataset])
    inits = {"default": None, "lsuv": LSUV()}
    draw_side_by_side({name: train(name, init, (train_set, test_set), args, epochs) for name, init in inits.items()})
    print(f"\nwrote pictures and tables to {RUN}")


if __name__ == "__main__":
    main()
