"""The table of what users get wrong: each row says what is wrong and what to do, and changes nothing."""

import math
import random

import numpy as np
import pytest
import torch
from properties.loops import Net, same_values, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from minitrain import LSUV, BatchLoader, Callback, CheckpointError, DataLoaders, Learner, LoopError
from minitrain.metrics import accuracy

X, Y = torch.randn(8, 3), torch.randint(0, 2, (8,))


def loaders(train=None, valid=None):
    return DataLoaders(BatchLoader(X, Y, batch_size=4) if train is None else train, valid)


class Untouched:
    """Inside, an error is expected; afterwards the model, its modes and hooks and all random states are as before."""

    def __init__(self, model, error, match):
        self.model, self.raises = model, pytest.raises(error, match=match)

    def __enter__(self):
        self.before = snapshot(self.model)
        self.rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        return self.raises.__enter__()

    def __exit__(self, *exc_info):
        assert self.raises.__exit__(*exc_info), "no error was raised"
        after = snapshot(self.model)
        assert same_values(self.before["values"], after["values"])
        assert (self.before["modes"], self.before["hooks"]) == (after["modes"], after["hooks"])
        assert torch.equal(self.rng[0], torch.get_rng_state())
        assert self.rng[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        return True


class Quiet(Callback):
    pass


foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)

# what is given instead of a good argument; the error; what its message says
LEARNER = {
    "model class": (dict(model=nn.Linear), TypeError, r"model=Linear is a class.*did you forget \(\)"),
    "model no module": (dict(model=lambda x: x), TypeError, "model=.*not a torch.nn.Module"),
    "loss class": (
        dict(loss_func=nn.CrossEntropyLoss),
        TypeError,
        r"loss_func=CrossEntropyLoss is a class.*forget \(\)",
    ),
    "loss not callable": (dict(loss_func="mse"), TypeError, "loss_func='mse'.*not callable"),
    "dls a loader": (dict(dls=[(X, Y)]), TypeError, r"dls=list, wanted DataLoaders\(train, valid\)"),
    "callback class": (dict(cbs=[Quiet]), TypeError, r"cbs\[0\]=Quiet is a class.*did you forget \(\)"),
    "callback bare": (dict(cbs=Quiet()), TypeError, r"cbs=.*wanted a list"),
    "callback foreign": (dict(cbs=[print]), TypeError, r"cbs\[0\]=.*not a minitrain.Callback"),
    "same state key": (dict(cbs=[Quiet(), Quiet()]), ValueError, r"cbs\[0\] and cbs\[1\].*state_key='Quiet'"),
    "lr zero": (dict(lr=0), ValueError, "lr=0, wanted a positive finite number"),
    "lr negative": (dict(lr=-1e-3), ValueError, "lr=-0.001, wanted a positive"),
    "lr nan": (dict(lr=math.nan), ValueError, "lr=nan, wanted a positive"),
    "lr infinite": (dict(lr=math.inf), ValueError, "lr=inf, wanted a positive"),
    "lr text": (dict(lr="1e-3"), TypeError, r"lr='1e-3' \(type=str\)"),
    "lr bool": (dict(lr=True), TypeError, "lr=True"),
    "foreign optimiser": (dict(opt_func=foreign), ValueError, "2 parameters that are not the model's"),
    "opt_func no function": (dict(opt_func="adam"), TypeError, "opt_func='adam'.*not callable"),
    "splitter no function": (dict(splitter=[1]), TypeError, r"splitter=\[1\].*not callable"),
    "init class": (dict(init=LSUV), TypeError, r"init=LSUV is a class.*did you forget \(\)"),
    "init no stage": (dict(init="lsuv"), TypeError, "init=.*not callable"),
    "metric not in a list": (dict(metrics=accuracy), TypeError, r"metrics=\[accuracy\]"),
    "metric no metric": (dict(metrics=["accuracy"]), TypeError, "accuracy"),
    "same metric twice": (dict(metrics=[accuracy, accuracy]), ValueError, "accuracy"),
    "device unknown": (dict(device="gpu"), ValueError, "device='gpu' is not a device"),
    "seed text": (dict(seed="1"), TypeError, "seed='1'.*wanted an integer"),
    "seed negative": (dict(seed=-1), ValueError, "seed=-1"),
    "progress text": (dict(progress="yes"), TypeError, "progress='yes'.*True or False"),
}


@pytest.mark.parametrize("name", LEARNER)
def test_learner_refuses(name):
    wrong, error, match = LEARNER[name]
    model = Net()
    arguments = {"model": model, "dls": loaders(), "loss_func": F.cross_entropy} | wrong
    with Untouched(model, error, match):
        Learner(**arguments)


def test_learner_refuses_a_model_that_is_frozen_throughout():
    model = Net().requires_grad_(False)
    with Untouched(model, ValueError, "all of its 7 parameters are frozen"):
        Learner(model, loaders(), F.cross_entropy)


@pytest.mark.parametrize("beside", [{"lr": 0.1}, {"splitter": lambda model: model.parameters()}])
def test_learner_refuses_arguments_beside_a_ready_optimiser(beside):
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with Untouched(model, TypeError, f"{next(iter(beside))}=.*beside a ready optimiser"):
        Learner(model, loaders(), F.cross_entropy, opt_func=opt, **beside)


def make(model=None, dls=None, loss_func=F.cross_entropy, **options):
    return Learner(model or Net(), dls or loaders(), loss_func, progress=False, **{"seed": None} | options)


def generator():
    yield X, Y


FIT_ARGUMENTS = {
    "zero": (0, ValueError, "n_epochs=0, wanted at least 1"),
    "negative": (-2, ValueError, "n_epochs=-2"),
    "float": (1.0, TypeError, r"n_epochs=1.0 \(type=float\)"),
    "bool": (True, TypeError, "n_epochs=True"),
    "text": ("3", TypeError, "n_epochs='3'"),
}


@pytest.mark.parametrize("name", FIT_ARGUMENTS)
def test_fit_refuses_a_number_of_epochs(name):
    n_epochs, error, match = FIT_ARGUMENTS[name]
    learn = make(init=LSUV(), seed=3)
    with Untouched(learn.model, error, match):
        learn.fit(n_epochs)
    assert not learn.initialized


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(lr=-1.0), ValueError, "lr=-1.0"),
        (dict(cbs=Quiet()), TypeError, "cbs=.*wanted a list"),
        (dict(cbs=[Quiet]), TypeError, "is a class"),
        (dict(resume="run.ckpt"), CheckpointError, "path='run.ckpt': there is no such file"),
        (dict(resume="auto"), ValueError, "resume='auto', but there are 0 Checkpoint callbacks"),
        (dict(allow_changes=1), TypeError, "allow_changes=1"),
    ],
)
def test_fit_refuses_options(options, error, match):
    learn = make(init=LSUV(), seed=3)
    with Untouched(learn.model, error, match):
        learn.fit(1, **options)
    assert not learn.initialized
    learn.fit(1)


def test_fit_refuses_a_fit_callback_with_the_key_of_another():
    learn = make(cbs=[Quiet()])
    with Untouched(learn.model, ValueError, "state_key='Quiet'"):
        learn.fit(1, cbs=[Quiet()])
    learn.fit(1)


stranger = Net()


def lossy(value):
    return lambda preds, yb: value(preds)


BATCHES = {
    "empty loader": (dict(dls=loaders([])), ValueError, "training loader .list. is empty.*drop_last"),
    "drop_last leaves nothing": (
        dict(dls=loaders(DataLoader(TensorDataset(X, Y), batch_size=9, drop_last=True))),
        ValueError,
        "training loader .DataLoader. is empty.*fewer samples than a batch",
    ),
    "empty validation loader": (dict(dls=loaders(valid=[])), ValueError, "validation loader .list. is empty"),
    "exhausted generator": (dict(dls=loaders(iter([]))), ValueError, "gave no batch.*only once"),
    "batch not (x, y): a dict": (dict(dls=loaders([{"x": X}])), ValueError, "split_batch"),
    "batch not (x, y): one element": (dict(dls=loaders([(X,)])), ValueError, "split_batch"),
    "batch not (x, y): a number": (dict(dls=loaders([3])), ValueError, "split_batch"),
    "dtype mismatch": (
        dict(dls=loaders([(X.double(), Y)])),
        RuntimeError,
        r"(?s)dtype.*epoch 0, batch 0: the batch is .*float64 \(8, 3\).*the model is float32 on cpu",
    ),
    "device mismatch": (
        dict(loss_func=nn.CrossEntropyLoss(weight=torch.ones(2, device="meta"))),
        RuntimeError,
        r"(?s)device.*epoch 0, batch 0: the batch is .*float32 \(4, 3\) cpu.*the model is float32 on cpu",
    ),
    "shape mismatch": (
        dict(dls=loaders([(X[:, :2], Y)])),
        RuntimeError,
        r"(?s)shapes.*epoch 0, batch 0: the batch is .*\(8, 2\)",
    ),
    "loss not scalar": (
        dict(loss_func=nn.CrossEntropyLoss(reduction="none")),
        ValueError,
        r"the loss has shape \(4,\), wanted a scalar.*reduction='mean'",
    ),
    "loss without gradient": (
        dict(loss_func=lossy(lambda p: p.mean().detach())),
        ValueError,
        "the loss has no gradient",
    ),
    "loss an integer": (dict(loss_func=lossy(lambda p: p.argmax(1).sum())), TypeError, "dtype=torch.int64"),
    "loss a number": (dict(loss_func=lossy(lambda p: p.mean().item())), TypeError, r"type=float.*\.item\(\)"),
    "opt_func makes none": (dict(opt_func=lambda params: None), TypeError, "opt_func returned None"),
    "splitter of another model": (
        dict(splitter=lambda model: stranger.parameters(), opt_func=torch.optim.AdamW),
        ValueError,
        "parameters that are not the model's",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_fit_refuses(name):
    options, error, match = BATCHES[name]
    learn = make(**options)
    with Untouched(learn.model, error, match):
        learn.fit(1)
    assert len(learn.history) == 0
    assert learn.phase is None


def test_fit_refuses_a_generator_that_is_exhausted_in_the_second_epoch():
    learn = make(dls=loaders(generator()))
    with pytest.raises(ValueError, match=r"training loader .generator. gave no batch.*only once"):
        learn.fit(2)
    assert len(learn.history) == 1


def test_fit_refuses_a_validation_generator_that_is_exhausted_in_the_second_epoch():
    learn = make(dls=loaders(valid=generator()))
    with pytest.raises(ValueError, match=r"validation loader .generator. gave no batch.*only once"):
        learn.fit(2)


def test_an_error_of_a_loader_says_at_which_batch():
    def broken():
        yield X, Y
        raise OSError("disk")

    with pytest.raises(OSError, match=r"(?s)disk.*while drawing batch 1 from the training loader"):
        make(dls=loaders(broken())).fit(1)


def test_fit_refuses_lazy_modules_that_no_batch_can_shape():
    learn = make(model=nn.Sequential(nn.LazyLinear(2)), dls=loaders(generator()))
    with pytest.raises(RuntimeError, match=r"Call the model once before: model\(x\)"):
        learn.fit(1)


def test_fit_shapes_lazy_modules_by_the_first_batch():
    learn = make(model=nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2)))
    learn.fit(1)
    assert learn.model[0].weight.shape == (4, 3)


ASIDE = {
    "no validation loader": (lambda learn: learn.validate(), ValueError, "there is no validation loader"),
    "no loader for predictions": (lambda learn: learn.get_preds(), ValueError, "there is no validation loader"),
    "an empty loader": (lambda learn: learn.validate([]), ValueError, "loader .list. is empty"),
    "an empty generator": (lambda learn: learn.validate(iter([])), ValueError, "gave no batch"),
    "an empty loader for predictions": (lambda learn: learn.get_preds(iter([])), ValueError, "gave no batch"),
    "a dataset": (lambda learn: learn.validate(TensorDataset(X, Y)), TypeError, "from_dataset"),
    "a number": (lambda learn: learn.validate(3), TypeError, "3"),
    "a batch that is none": (lambda learn: learn.predict({"x": X}), ValueError, "split_batch"),
    "a wrong shape": (lambda learn: learn.predict(X[:, :2]), RuntimeError, r"(?s)batch 0 .prediction.: the batch is"),
    "stop outside a fit": (lambda learn: learn.stop("now"), LoopError, "no fit is in progress"),
    "initialize without a stage": (lambda learn: learn.initialize(), LoopError, "init=None"),
}


@pytest.mark.parametrize("name", ASIDE)
def test_validate_predict_and_others_refuse(name):
    call, error, match = ASIDE[name]
    learn = make(metrics=[accuracy])
    with Untouched(learn.model, error, match):
        call(learn)
    assert learn.phase is None
    learn.fit(1)


def test_get_preds_warns_of_a_shuffling_loader():
    learn = make()
    for dl in (BatchLoader(X, Y, shuffle=True), DataLoader(TensorDataset(X, Y), shuffle=True)):
        with pytest.warns(UserWarning, match="shuffl"):
            learn.get_preds(dl)


def test_a_metric_that_fails_says_on_which_batch():
    def broken(preds, targets):
        raise ValueError("no such class")

    learn = make(dls=loaders(valid=[(X, Y)]), metrics=[broken])
    with pytest.raises(ValueError, match=r"(?s)no such class.*epoch 0, batch 0 \(validation\)"):
        learn.fit(1)


def test_learner_cbs_cannot_change_during_a_run():
    class Late(Callback):
        def before_epoch(self, learn):
            assert isinstance(learn.cbs, tuple)
            learn.cbs = []

    with pytest.raises(LoopError, match="cannot change during a run"):
        make(cbs=[Late()]).fit(1)
