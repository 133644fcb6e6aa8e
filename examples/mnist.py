"""Train a small convolutional net on MNIST, initialised by LSUV: the model of an end-to-end script.

RESULT_PLACEHOLDER

    python examples/mnist.py                # MNIST, downloaded to data/ once; where it is not to be had, scikit-learn's digits
    python examples/mnist.py --init none    # PyTorch's default initialisation, for comparison
    python examples/mnist.py --help

It writes runs/mnist/history.csv, curves.png and activations.png.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

from minitrain import LSUV, DataLoaders, KaimingNormal, Learner, layer_stats
from minitrain.callbacks import ActivationStats
from minitrain.metrics import accuracy

RUN = Path("runs/mnist")
EPOCHS = {"mnist": 5, "digits": 20}
INITS = {"none": None, "he": KaimingNormal(), "lsuv": LSUV()}


def positive(kind):
    def parse(text):
        if not 0 < (value := kind(text)) < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse says: invalid positive int value: '0'
    return parse


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder that holds MNIST, or shall hold it (default: data)")
    parser.add_argument("--dataset", choices=EPOCHS, help="default: mnist, or digits where it is not to be had")
    parser.add_argument(
        "--epochs", type=positive(int), help=f"default: {EPOCHS['mnist']}; {EPOCHS['digits']} for the digits"
    )
    parser.add_argument("--batch-size", type=positive(int), default=64)
    parser.add_argument("--lr", type=positive(float), default=1e-2, help="highest rate of the one-cycle schedule")
    parser.add_argument("--init", choices=INITS, default="lsuv", help="PyTorch's default, He normal, or LSUV (default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="one epoch on 512 images: does everything run?")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: wanted 0 <= seed < 2**32, got {args.seed}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch that was built without it
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    return args, parser.error


def load_mnist(args, fail):
    """The official training and test set; None where they are neither there nor to be downloaded."""
    from torchvision.datasets import MNIST

    if args.data is not None and not args.data.is_dir():
        fail(f"argument --data: there is no folder {str(args.data)!r}. Make it first.")
    folder = args.data or Path("data")
    raw = folder / "MNIST" / "raw"
    try:
        there = raw.is_dir() and any(raw.iterdir())
        return [MNIST(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError) as error:  # what torchvision raises, undocumented
        why = str(error).replace("\n", " ") or "a file is not of the size that its header says"
        if isinstance(error, OSError) or there:
            fail(f"MNIST in {raw} cannot be read; delete what is damaged, and it will be downloaded anew. {why}")
        if args.dataset == "mnist":
            fail(f"MNIST is neither in {raw} nor to be downloaded. {why}")
        print(f"MNIST is neither in {raw} nor to be downloaded: training on the digits that scikit-learn ships.")
        return None


def load_digits():
    """1,797 real handwritten digits of 8x8 pixels, scaled to 28x28. Every fifth one is for the test."""
    from sklearn import datasets

    digits = datasets.load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] * 255 / 16  # (N, 1, 8, 8), in [0, 255] as MNIST's
    x, y = F.interpolate(x, size=28, mode="bilinear"), torch.from_numpy(digits.target)
    test = torch.arange(len(x)) % 5 == 0
    return TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])


def normalize(x, y):
    """Of a batch of images in [0, 255]: mean 0 and standard deviation 1 over MNIST's training set."""
    return (x.float() / 255 - 0.1307) / 0.3081, y


def make_loaders(full, test, batch_size, seed=0, device=None):
    """Training and validation loader, of MNIST over 59,000 and 1,000 images, and the test loader."""
    n_valid = max(len(full) // 60, 100)
    train, valid = torch.utils.data.random_split(full, [len(full) - n_valid, n_valid])
    options = {"valid_batch_size": 1000, "seed": seed, "transform": normalize, "device": device}
    dls = DataLoaders.from_dataset(train, valid, batch_size=batch_size, **options)
    return dls, DataLoaders.from_dataset(train, test, **options).valid


def make_net():
    """Five weight layers; (batch, 1, 28, 28) images in, (batch, 10) scores out."""
    layers = OrderedDict()
    for i, (before, after, kernel, stride, padding) in enumerate(
        [(1, 8, 5, 2, 1), (8, 16, 3, 1, 2), (16, 32, 3, 1, 2), (32, 32, 3, 1, 2)], start=1
    ):
        layers[f"conv{i}"] = nn.Conv2d(before, after, kernel, stride, padding)
        layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers | {"avg": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "linear": nn.Linear(32, 10)})


def main():
    args, fail = parse_args()
    loaded = None if args.dataset == "digits" else load_mnist(args, fail)
    (full, test), dataset = (load_digits(), "digits") if loaded is None else (loaded, "mnist")
    if args.smoke:
        full, test = Subset(full, range(512)), Subset(test, range(128))
    try:
        RUN.mkdir(parents=True, exist_ok=True)  # now, not after the training
    except OSError as error:
        fail(f"cannot write to {RUN}: {error}")

    torch.manual_seed(args.seed)
    dls, test_loader = make_loaders(full, test, args.batch_size, args.seed, args.device)
    net = make_net().to(args.device)
    x, _ = next(iter(dls.train))  # the very batch that LSUV will see

    print(
        f"{dataset}: {len(full)} images to train on ({len(dls.valid.tensors[0])} of them to validate), {len(test)} to test"
    )
    print("\nPyTorch's default initialisation, on the first minibatch:", layer_stats(net, x), sep="\n")
    stats = ActivationStats()
    learn = Learner(
        net, dls, F.cross_entropy, lr=args.lr, metrics=[accuracy], init=INITS[args.init], cbs=[stats], seed=args.seed
    )  # the optimiser is AdamW
    if args.init != "none":
        print(f"\nInitialised by {args.init}:", learn.initialize(), sep="\n")
    print()
    learn.fit_one_cycle(1 if args.smoke else args.epochs or EPOCHS[dataset])

    print(f"\ntest accuracy {100 * learn.validate(test_loader)['valid_accuracy']:.2f} %")  # read once, at the end
    learn.history.to_csv(RUN / "history.csv")
    learn.history.plot(save=RUN / "curves.png")
    stats.plot(save=RUN / "activations.png")
    print(f"wrote {', '.join(str(RUN / name) for name in ('history.csv', 'curves.png', 'activations.png'))}")


if __name__ == "__main__":
    main()
