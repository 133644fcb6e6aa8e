"""What LSUV costs, and how exact it is: beside a plain forward pass, beside PyPI's `lsuv`, and over the whole of MNIST.

python tests/benchmarks/lsuv_cost.py [--data DIR] [--repeat N]    # DIR holds MNIST; without it the third part is left out
python -m pip install --no-deps lsuv                         # for the second part; without it ours stands alone
"""

import argparse
import copy
import functools
import gc
import multiprocessing
import statistics
import threading
import time

import torch
import torchvision
from torch import nn
from torchvision.datasets import MNIST

from minitrain import BatchLoader
from minitrain.init import lsuv_

MIB = 2**20


def seed_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2, 1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 1, 2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 1, 2), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, 1, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def deep_mlp():
    return nn.Sequential(*(module for _ in range(100) for module in (nn.Linear(256, 256), nn.ReLU())))


def images(n):
    return torch.randn(n, 3, 224, 224)


NETS = {
    "seed's net, 512 images": lambda: (seed_net(), torch.randn(512, 1, 28, 28)),
    "MLP, 100 x 256, 512 inputs": lambda: (deep_mlp(), torch.randn(512, 256)),
    "ResNet-50, 8 images": lambda: (torchvision.models.resnet50(), images(8)),
    "VGG-16, 4 images": lambda: (torchvision.models.vgg16(), images(4)),
    "ViT-B/16, 4 images": lambda: (torchvision.models.vit_b_16(), images(4)),
}


def seconds(function, *args, **options):
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def plain(model, batches):
    with torch.no_grad():
        for x in batches:
            model(x)


def cost(repeat):
    print("Cost of one batch without verifying, as a multiple of a plain forward pass (interleaved; median, quartiles)")
    for name, make in NETS.items():
        torch.manual_seed(0)
        model, x = make()
        model.eval()
        lsuv_(model, x, verify=False)
        plain(model, [x])
        ratios = []
        for _ in range(repeat):
            base = seconds(plain, model, [x])
            ratios.append(seconds(lsuv_, model, x, verify=False) / base)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"  {name:<28} {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


def residuals(model, x):
    """The worst |mean| of layers with a bias and |std - 1| of all, in float64 sums; and the number of layers."""
    means, stds = [], []

    def look(module, args, y):
        y = y.double()
        stds.append(abs(y.std().item() - 1))
        if module.bias is not None:
            means.append(abs(y.mean().item()))

    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d) and m.weight.any()]
    handles = [layer.register_forward_hook(look) for layer in layers]
    plain(model.eval(), [x])
    for handle in handles:
        handle.remove()
    return max(means), max(stds), len(stds)


class Counter:
    """A hook that counts."""

    n = 0

    def __call__(self, *args):
        self.n += 1


def peers():
    rivals = {"minitrain": lsuv_}
    try:
        from lsuv import lsuv_with_singlebatch
    except ImportError:
        print("(PyPI's lsuv is not installed)")
    else:
        rivals["PyPI lsuv"] = functools.partial(lsuv_with_singlebatch, verbose=False)
    print("Side by side, on the same nets and batches (worst over layers that are called as modules)")
    print(
        f"  {'net':<28} {'':<10} {'seconds':>8} {'x plain':>8} {'forwards':>8} {'|mean|':>9} {'|std-1|':>9} {'layers':>6}"
    )
    for name, make in NETS.items():
        torch.manual_seed(0)
        model, x = make()
        model.eval()
        plain(model, [x])
        base = statistics.median(seconds(plain, model, [x]) for _ in range(3))
        for rival, initialise in rivals.items():
            net, count = copy.deepcopy(model), Counter()
            handle = net.register_forward_hook(count)
            took = seconds(initialise, net, x)
            handle.remove()
            mean, std, layers = residuals(net, x)
            print(
                f"  {name:<28} {rival:<10} {took:8.2f} {took / base:8.1f} {count.n:8d} {mean:9.1e} {std:9.1e} {layers:6d}",
                flush=True,
            )


class PeakMemory(threading.Thread):
    """The most memory that this process has held, above what it held at the beginning; sampled, Linux only."""

    def __enter__(self):
        gc.collect()
        self.base = self.peak = self._now()
        self.over = False
        self.start()
        return self

    def run(self):
        while not self.over:
            self.peak = max(self.peak, self._now())
            time.sleep(0.001)

    def __exit__(self, *exc_info):
        self.over = True
        self.join()

    @property
    def extra(self):
        return (self.peak - self.base) / MIB

    @staticmethod
    def _now():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096


def whole_set(data, repeat):
    print(
        "The 60,000 images of MNIST, seed's net, batches of 1024, as a multiple of a plain sweep, verification not counted\n"
        "(each in new processes: what the allocator has kept from before makes a plain sweep twice as fast, or not)"
    )
    for label, options in {
        "lock-step, max_memory 4 GiB": {"max_memory": 4 * 2**30, "strategy": "lock-step"},
        "max_memory 512 MiB": {"max_memory": 512 * MIB},
    }.items():
        runs = []
        for _ in range(repeat):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(one_whole_set, (data, options)))
        ratios, extras, residuals, reports = zip(*runs, strict=True)
        mean, std, _ = residuals[0]
        print(
            f"  {label:<28} {reports[0].strategy:<10} {statistics.median(ratios):.2f} sweeps, {reports[0].forwards} forwards, "
            f"{max(extras):,.0f} MiB at most; union: |mean| {mean:.1e}, |std-1| {std:.1e}\n    ({reports[0].why})",
            flush=True,
        )


def one_whole_set(data, options):
    """The cost in plain sweeps, the extra memory in MiB, the residuals on the union, and the report."""
    raw = MNIST(data, train=True)
    x = raw.data.unsqueeze(1).float().div_(255).sub_(0.1307).div_(0.3081)
    inputs = x.split(1024)
    torch.manual_seed(0)
    model = seed_net().eval()
    base = statistics.median(seconds(plain, model, inputs) for _ in range(2))
    with PeakMemory() as peak:
        report = lsuv_(model, BatchLoader(x, raw.targets, batch_size=1024), batches="all", verify=False, **options)
    ratio = (report.seconds - report.verify_seconds) / base
    return ratio, peak.extra, whole_residuals(model, inputs), report


def whole_residuals(model, inputs):
    """As `residuals`, over the union of the batches."""
    sums = {}

    def look(module, args, y):
        y = y.double()
        n, total, squares = sums.get(module, (0, 0.0, 0.0))
        sums[module] = n + y.numel(), total + y.sum().item(), squares + y.square().sum().item()

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    plain(model, inputs)
    for handle in handles:
        handle.remove()
    means = [total / n for n, total, _ in sums.values()]
    stds = [((q - t * t / n) / (n - 1)) ** 0.5 for n, t, q in sums.values()]
    return max(map(abs, means)), max(abs(std - 1) for std in stds), len(stds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="where MNIST is, unpacked")
    parser.add_argument("--repeat", type=int, default=7, help="how often each ratio is measured")
    args = parser.parse_args()
    cost(args.repeat)
    peers()
    if args.data:
        whole_set(args.data, min(args.repeat, 3))


if __name__ == "__main__":
    main()
