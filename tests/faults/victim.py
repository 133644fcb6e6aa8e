"""A training process to be killed: a drawn run, points at which it kills itself, and a digest of all that it leaves.

python tests/faults/victim.py '{"seed": 7}' FOLDER     # one run, from the newest checkpoint on; prints its digest
"""

import contextlib
import csv
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import minitrain.checkpoint.format as file_format
from minitrain import BatchLoader, Callback, CancelStep, DataLoaders, Learner
from minitrain.callbacks import ActivationStats, Checkpoint, Diagnose, OneCycle, ParameterStats
from minitrain.metrics import accuracy
from minitrain.preserve import loader_generators
from minitrain.random_states import RandomState

POINTS = ("forward", "backward", "step", "batch", "validate", "epoch", "fit", "writing", "written", "renamed", "clock")


@dataclass(frozen=True)
class Run:
    """A run, drawn from a seed."""

    loader: str
    n: int
    batch_size: int
    drop_last: bool
    epochs: int
    optimizer: str
    schedule: str
    ema: bool
    scaler: bool
    accumulate: int
    stats: bool
    stop_at: int | None
    every: object
    async_write: bool
    model_seed: int
    patience: bool
    log: bool

    @classmethod
    def draw(cls, seed):
        rng = random.Random(seed)
        every = rng.choice(["epoch", 1, 2, 3, 5, timedelta(milliseconds=5)])
        n, batch_size = rng.randint(20, 60), rng.randint(3, 9)
        return cls(
            loader=rng.choice(["tensors", "shuffled", "own generator", "augmented", "workers", "list", "stateful"]),
            n=n + (n % batch_size == 1),  # batch norm refuses a batch of one sample
            batch_size=batch_size,
            drop_last=rng.random() < 0.5,
            epochs=rng.randint(1, 3),
            optimizer=rng.choice(["SGD", "AdamW", "Adam", "RMSprop"]),
            schedule=rng.choice(["none", "OneCycle", "StepLR"]),
            ema=rng.random() < 0.5,
            scaler=rng.random() < 0.3,
            accumulate=rng.choice([1, 1, 2, 3]),
            stats=rng.random() < 0.4,
            stop_at=rng.choice([None, None, None, rng.randint(1, 20)]),
            every=every,
            async_write=rng.random() < 0.6,
            model_seed=rng.randint(0, 99),
            patience=rng.random() < 0.3,
            log=rng.random() < 0.5,
        )


# -- data -------------------------------------------------------------------------------------------------------------


class Points(Dataset):
    """Samples with noise from every random generator that there is, or from none."""

    def __init__(self, n, noisy):
        rng = torch.Generator().manual_seed(5)
        self.x, self.y = torch.randn(n, 4, generator=rng), torch.randint(0, 3, (n,), generator=rng)
        self.noisy = noisy
        self.own = torch.Generator().manual_seed(9)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i]
        if self.noisy:
            import numpy as np

            x = x + torch.randn(4) * 0.1 + torch.rand(4, generator=self.own) * 0.1
            x = x + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return x, self.y[i]


class Stateful:
    """A loader that keeps its place by itself, as torchdata's StatefulDataLoader does."""

    def __init__(self, dataset, batch_size):
        self.dataset, self.batch_size, self.epoch, self.at, self.start = dataset, batch_size, 0, 0, 0
        self.under_way = False

    def __len__(self):
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch, self.at, self.start, self.under_way = self.epoch + 1, self.start, 0, True
        while self.at < len(self):
            part = order[self.at * self.batch_size :][: self.batch_size]
            self.at += 1
            yield torch.stack([self.dataset[i][0] for i in part]), torch.stack([self.dataset[i][1] for i in part])
        self.under_way = False

    def state_dict(self):
        return {"epoch": self.epoch - 1, "at": self.at} if self.under_way else {"epoch": self.epoch, "at": 0}

    def load_state_dict(self, state):
        self.epoch, self.start = state["epoch"], state["at"]


def make_loader(run):
    data = Points(run.n, noisy=run.loader == "augmented")
    options = dict(batch_size=run.batch_size, drop_last=run.drop_last)
    if run.loader == "tensors":
        return BatchLoader(data.x, data.y, shuffle=True, seed=3, **options)
    if run.loader == "list":
        return list(zip(data.x.split(run.batch_size), data.y.split(run.batch_size), strict=True))
    if run.loader == "stateful":
        return Stateful(data, run.batch_size)
    generator = torch.Generator().manual_seed(4) if run.loader == "own generator" else None
    workers = 1 if run.loader == "workers" else 0
    return DataLoader(data, shuffle=True, generator=generator, num_workers=workers, **options)


# -- callbacks that keep a state --------------------------------------------------------------------------------------


class Accumulate(Callback):
    """A step every n batches."""

    def __init__(self, n):
        self.n, self.count = n, 0

    def after_backward(self, learn):
        self.count += 1
        if self.count % self.n:
            raise CancelStep

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Average(Callback):
    """Weights averaged by torch, and used in validation."""

    def before_fit(self, learn):
        self.model = torch.optim.swa_utils.AveragedModel(
            learn.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )

    def after_step(self, learn):
        self.model.update_parameters(learn.model)

    @contextlib.contextmanager
    def during_validate(self, learn):
        if learn.phase != "fit":
            yield
            return
        own, learn.model = learn.model, self.model.module
        try:
            self.model.module.eval()
            yield
        finally:
            learn.model = own

    def state_dict(self):
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])


class Steps(Callback):
    """torch's StepLR, moved after every step."""

    def before_fit(self, learn):
        self.rates = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler = torch.optim.lr_scheduler.StepLR(learn.opt, 3, 0.8)

    def after_step(self, learn):
        self.rates.append(learn.opt.param_groups[0]["lr"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler.step()

    def state_dict(self):
        return {"scheduler": self.scheduler.state_dict(), "rates": self.rates}

    def load_state_dict(self, state):
        self.scheduler.load_state_dict(state["scheduler"])
        self.rates = list(state["rates"])


class Noise(Callback):
    """Draws from the global generators, and remembers."""

    def before_fit(self, learn):
        self.seen = [random.random()]

    def before_epoch(self, learn):
        self.seen.append(torch.rand(()).item())

    def after_batch(self, learn):
        self.seen.append(random.random() + learn.loss.item())

    def after_epoch(self, learn):
        self.seen.append(random.random())

    def after_fit(self, learn):
        self.seen.append(random.random())

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


class StopAt(Callback):
    """The graceful end, after so many batches."""

    def __init__(self, n):
        self.n, self.count = n, 0

    def after_batch(self, learn):
        self.count += learn.training
        if self.count == self.n:
            learn.stop("far enough")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Patience(Callback):
    """Early stopping: no more than one epoch that is not better than the best one."""

    def before_fit(self, learn):
        self.best, self.since = float("inf"), 0

    def after_epoch(self, learn):
        loss = learn.history[-1]["valid_loss"]
        self.best, self.since = min(loss, self.best), 0 if loss < self.best else self.since + 1
        if self.since == 1:
            learn.stop("no better")

    def state_dict(self):
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state):
        self.best, self.since = float(state["best"]), int(state["since"])


class Log(Callback):
    """A logger: a line a batch in a file, which is cut back to where the checkpoint saw it."""

    def __init__(self, path):
        self.path = path

    @contextlib.contextmanager
    def during_fit(self, learn):
        with open(self.path, "a+") as self.file:
            if not learn.resumed:
                self.file.truncate(0)
            yield

    def after_batch(self, learn):
        self.file.write(f"{learn.epoch},{learn.batch_idx},{learn.training},{learn.loss.item()!r}\n")
        self.file.flush()

    def state_dict(self):
        return {"length": self.path.stat().st_size}

    def load_state_dict(self, state):
        self.file.truncate(state["length"])


class Scaler(Callback):
    """Mixed precision's scaler, by a callback that makes it anew in each fit."""

    @contextlib.contextmanager
    def during_fit(self, learn):
        learn.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        try:
            yield
        finally:
            self.last, learn.scaler = learn.scaler, None


# -- killing ----------------------------------------------------------------------------------------------------------


class Killer(Callback):
    """Kills this process the n-th time that it comes by a point."""

    order = -50

    def __init__(self, point, nth):
        self.point, self.nth, self.seen = point, nth, Counter()

    def at(self, point):
        self.seen[point] += 1
        if point == self.point and self.seen[point] == self.nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_pred(self, learn):
        self.at("forward" if learn.training else "validate")

    def after_backward(self, learn):
        self.at("backward")

    def after_step(self, learn):
        self.at("step")

    def after_batch(self, learn):
        self.at("batch")

    def before_epoch(self, learn):
        self.at("epoch")

    def after_epoch(self, learn):
        self.at("epoch")

    def before_fit(self, learn):
        self.at("fit")

    def after_fit(self, learn):
        self.at("fit")

    def watch_files(self):
        """Kill in the midst of a file, before it is moved to its place, and right after."""
        save, replace = file_format.torch.save, os.replace

        def half(state, file, *args, **kwargs):
            if self.point == "writing":
                count, inner, write = 0, file, file.write

                class Half:
                    def __getattr__(_, name):
                        return getattr(inner, name)

                    def write(_, data):
                        nonlocal count
                        count += 1
                        if count % 40 == 20:
                            inner.flush()
                            self.at("writing")
                        return write(data)

                file = Half()
            return save(state, file, *args, **kwargs)

        def move(*args, **kwargs):
            self.at("written")
            replace(*args, **kwargs)
            self.at("renamed")

        file_format.torch = type(
            "torch", (), {"__getattr__": lambda _, name: half if name == "save" else getattr(torch, name)}
        )()
        os.replace = move


# -- a run ------------------------------------------------------------------------------------------------------------


def make(run, folder, killer=None, log=None):
    """A Learner and its callbacks for one process."""
    torch.manual_seed(run.model_seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    cbs = [Noise()]
    if run.accumulate > 1:
        cbs.append(Accumulate(run.accumulate))
    if run.schedule == "OneCycle":
        cbs.append(OneCycle(0.05, total_steps=None))
    if run.schedule == "StepLR":
        cbs.append(Steps())
    if run.ema:
        cbs.append(Average())
    if run.scaler:
        cbs.append(Scaler())
    if run.stats:
        cbs += [ActivationStats(), ParameterStats(every=2), Diagnose(show=lambda text: None)]
    if run.stop_at is not None:
        cbs.append(StopAt(run.stop_at))
    if run.patience:
        cbs.append(Patience())
    if run.log and log is not None:
        cbs.append(Log(log))
    if folder is not None:
        cbs.append(Checkpoint(folder, every=run.every, async_write=run.async_write))
    if killer is not None:
        cbs.append(killer)
    data = Points(12, noisy=False)
    valid = BatchLoader(data.x, data.y, batch_size=5)
    options = dict(lr=0.01, momentum=0.9) if run.optimizer == "SGD" else dict(lr=0.01)
    return Learner(
        model,
        DataLoaders(make_loader(run), valid),
        nn.functional.cross_entropy,
        opt_func=lambda params: getattr(torch.optim, run.optimizer)(params, **options),
        metrics=[accuracy],
        cbs=cbs,
        seed=11,
        progress=False,
    )


def train(run, folder=None, killer=None, log=None):
    """Train to the end, or to the bullet; return what is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OneCycle's, where updates are skipped
        learn = make(run, folder, killer, log)
        if killer is not None:
            killer.watch_files()
        learn.fit(run.epochs, resume=None if folder is None else "auto")
    return digest(learn)


def _csv(learn):
    """The lines of the history's file, without the column of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.csv"
        learn.history.to_csv(path)
        rows = list(csv.DictReader(path.read_text().splitlines()))
    return [[value for key, value in row.items() if key != "seconds"] for row in rows]


def digest(learn):
    """What must not depend on being killed, part by part."""
    cbs = [cb for cb in learn.cbs if not isinstance(cb, (Checkpoint, Killer))]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in learn.history]
    parts = {
        "model": learn.model.state_dict(),
        "optimizer": learn.opt.state_dict(),
        "scaler": [cb.last.state_dict() for cb in cbs if isinstance(cb, Scaler)],
        "callbacks": {type(cb).__name__: cb.state_dict() for cb in cbs},
        "history": rows,
        "csv": _csv(learn),
        "log": [cb.path.read_text() for cb in cbs if isinstance(cb, Log)],
        "rng": RandomState(loader_generators(learn.dls.train)).state_dict(),
        "counters": [learn.step_idx, learn.epoch, learn._fits, learn._epochs_begun, learn.stop_reason],
    }
    return {name: hashlib.sha256(_bytes(part)).hexdigest()[:16] for name, part in parts.items()}


def _bytes(value):
    if isinstance(value, dict):
        return b"{" + b",".join(sorted(_bytes(key) + b":" + _bytes(item) for key, item in value.items())) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().contiguous().numpy().tobytes()
    return repr(value).encode()


def main():
    plan = json.loads(sys.argv[1])
    killer = Killer(plan["point"], plan["nth"]) if "point" in plan else None
    folder = Path(sys.argv[2])
    print(json.dumps(train(Run.draw(plan["seed"]), folder, killer, folder.with_suffix(".log"))))


if __name__ == "__main__":
    main()
