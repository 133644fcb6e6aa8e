"""`Learner`: the loop, on one page."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minitrain import checkpoint, checks, restore, runs
from minitrain.batch import concatenate, n_samples, split_batch, to_device
from minitrain.callback import Callback
from minitrain.callbacks import History, OneCycle
from minitrain.data import DataLoaders
from minitrain.errors import Cancel, CancelStep, LoopError
from minitrain.init import InitReport, InitStage
from minitrain.metrics import Mean, Metric, as_metrics, compute_metrics
from minitrain.optim import Splitter, learning_rate, rate_of
from minitrain.passes import Pass, set_epoch
from minitrain.peek import shuffles
from minitrain.preserve import loader_generators, preserve_training
from minitrain.random_states import RandomState
from minitrain.resume import Resume
from minitrain.snapshot import snapshot
from minitrain.stages import Stages
from minitrain.undo import Undo
from minitrain.weights import export_weights

_Measured = tuple[Tensor, int, tuple[Any, Any] | None]  # of a batch: loss, number of samples, predictions and targets


class Learner:
    """Train a model: what a step computes is a method to override, when to look or intervene is a callback.

    Args:
        model: The network. It stays on its device unless `device` is given.
        dls: The loaders. A batch is `(x, y)`, `(x1, x2, ..., y)`, or a bare tensor (its own input, without a target).
        loss_func: `loss_func(preds, yb)` returns a scalar tensor; without a target it is `loss_func(preds)`. If it has
            parameters of its own to be trained, give them to a ready optimiser or by a `splitter`.
        opt_func: Called as `opt_func(params, lr=lr)`, or `opt_func(params)` where `lr` is None. A ready optimiser is taken
            as it is. None: AdamW, fused where the parameters allow it.
        lr: The learning rate. None: the optimiser's default.
        splitter: `splitter(model)` returns parameter groups for the optimiser.
        metrics: Functions `(preds, targets) -> scalar tensor`, averaged over samples, or objects with `update`, `compute`
            and `reset` (torchmetrics); a list, or a dict `{name: metric}`. They are measured in validation.
        init: An init stage, for example `LSUV()`, or a list of stages: run once, before the first batch of the first fit.
        cbs: Callbacks. They run by their `order`; ties keep the order of the list.
        device: Where to train; the model is moved there at once. None: where the model is.
        seed: Seeds python, numpy and torch once, before the init stage of the first fit. None: nothing is seeded.
        progress: Show bars on a terminal or in a notebook, one line an epoch elsewhere. A `Progress` in `cbs` replaces it.

    Raises:
        TypeError: An argument is of the wrong type (a class instead of an instance, a callback in place of a list).
        ValueError: An argument has a wrong value (lr <= 0, all parameters frozen, two callbacks with one state key).

    Example:
        >>> from minitrain import BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        >>> dls = DataLoaders(BatchLoader(x, 3 * x, batch_size=16))
        >>> learn = Learner(nn.Linear(1, 1), dls, nn.MSELoss(), lr=0.1, seed=0, progress=False)
        >>> learn.fit(20)
        >>> learn.history[-1]["train_loss"] < 0.01
        True
    """

    # Given by the user. A callback may replace the model for a while (compiled, averaged), if it puts it back.
    model: nn.Module
    dls: DataLoaders
    loss_func: Callable[..., Any]
    metrics: dict[str, Metric]  # name -> metric
    scaler: torch.amp.GradScaler | None  # set by a mixed-precision callback; `backward` and `step` use it
    opts: dict[str, Optimizer]  # further optimisers (GANs), registered by whoever overrides `train_batch`
    # Set by the loop.
    history: History  # a row an epoch, over all fits
    init_reports: list[InitReport | None]  # what each init stage said
    initialized: bool  # the init stages have run
    resumed: bool  # this fit goes on from a checkpoint
    n_epochs: int  # of this fit
    epoch: int  # from 0 within a fit
    step_idx: int  # optimiser steps made in this fit
    batch_idx: int  # from 0 within one pass over a loader
    training: bool  # in the training part of an epoch
    phase: str | None  # "fit", "validate" or "predict"; None when nothing runs
    dl: Iterable[Any] | None  # the loader of the present pass
    running_loss: Mean  # over the present pass; `.compute()` reads it
    stop_reason: str | None  # what `stop` was told
    position: tuple[int, int] | None  # (epochs done, batches of the next one done); None where no fit could go on from
    rng_of_epoch: RandomState | None  # as it was before the training loader was begun; None where it never was
    save_points: list[Callable[[Learner], None]]  # called between two batches or epochs, when nothing is under way
    # Set for one batch and released after it; `before_batch` may replace the first three.
    batch: Any
    xb: Any
    yb: Any
    preds: Any
    loss: Any
    _backward_loss: Any  # None: that is `loss`
    _pending: _Measured | None  # not counted yet
    _strays: list[nn.Parameter]  # parameters that the optimiser does not hold: it drops no gradient of these
    # Bound to the dispatch table of a run, for as long as it lasts.
    _stages: Stages | None
    _run: Callable[[str, Callable[[], None]], bool]
    _fire: Callable[[str], None]
    _during: Callable[[str], AbstractContextManager[None]]
    _explain: Callable[[Exception], None]

    def __init__(
        self,
        model: nn.Module,
        dls: DataLoaders,
        loss_func: Callable[..., Any],
        *,
        opt_func: Optimizer | Callable[..., Optimizer] | None = None,
        lr: float | None = None,
        splitter: Splitter | None = None,
        metrics: Sequence[Any] | Mapping[str, Any] = (),
        init: InitStage | Sequence[InitStage] | None = None,
        cbs: Iterable[Callback] = (),
        device: torch.device | str | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> None:
        checks.check_model(model)
        checks.check_dls(dls)
        checks.check_function("loss_func", loss_func, module_class_hint=True)
        checks.check_optimizer(opt_func, lr, splitter, model, loss_func)
        checks.check_seed(seed)
        checks.check_bool("progress", progress)
        self._cbs = checks.check_callbacks(cbs)
        self._init = checks.check_stages(init)
        self._device = checks.check_device(device)
        self.metrics = as_metrics(metrics)
        self.model = model if self._device is None else model.to(self._device)
        self.dls, self.loss_func = dls, loss_func
        self._opt: Optimizer | None = None
        self._opt_args = (opt_func, lr, splitter)
        self._progress, self._seed, self._seeded = progress, seed, False
        self._retry: RandomState | None = None  # where the seed has led to, if what followed has failed
        self.opts, self.scaler = {}, None
        self.history, self.init_reports, self.initialized = History(), [], False
        self.n_epochs = self.epoch = self.step_idx = self.batch_idx = self._fits = self._epochs_begun = 0
        self.resumed = self._touched = self._initializing = False
        self.position, self.rng_of_epoch, self.save_points = (0, 0), None, []
        self._lr: float | None = None  # what the present fit was given
        self._groups_at_rest: list[dict[str, Any]] = []  # values of the parameter groups when the present fit began
        self._began = 0.0  # when the present epoch began, by the clock
        self._resume: Resume | None = None  # from where this fit goes on
        self._fingerprint: dict[str, Any] | None = None  # of the present fit, once it was asked for
        self._scaled_by: torch.amp.GradScaler | None = None
        self._before: runs.Before | None = None
        self._undo: Undo | None = None
        self.stop_reason = None
        self.running_loss = Mean()
        vars(self).update(runs.AT_REST)

    # -- the loop, top to bottom --------------------------------------------------------------------------------------

    def fit(
        self,
        n_epochs: int,
        *,
        lr: float | None = None,
        cbs: Iterable[Callback] = (),
        resume: str | os.PathLike[str] | None = None,
        allow_changes: bool = False,
    ) -> None:
        """Train for `n_epochs`, validating after each; a row an epoch goes to `history`.

        Args:
            n_epochs: How many passes over the training loader; with `resume` in all, those before the checkpoint included.
            lr: The learning rate of every parameter group, for this fit only. None: as the optimiser has it.
            cbs: Callbacks for this fit only.
            resume: A checkpoint from which the fit goes on, exactly, as if it had not been interrupted; or a folder, of which
                the newest is taken; or "auto": the folder of the `Checkpoint` among the callbacks, and a new fit where that is
                empty. None: a new fit.
            allow_changes: Go on although data, seed or callbacks are not those of the checkpoint.

        Raises:
            LoopError: Called inside a callback, or a callback raised a cancel that has nothing to cancel.
            DataError: A loader is empty or exhausted, or a batch is not of the form that `split_batch` expects.
            CheckpointError: There is nothing to go on from, it is damaged, or of another run; nothing is changed then.
        """
        going_on = runs.check_fit(self, n_epochs, lr, cbs, resume, allow_changes)
        self._touched = False
        if going_on is not None and going_on.is_over:
            runs.take_over(self, n_epochs, lr, going_on)
            return
        with runs.running(self, "fit", cbs), runs.seeded(self), runs.resuming(self, going_on):
            runs.prepare(self)
            with runs.new_fit(self, n_epochs, lr), learning_rate(self.opt, lr), self._during("during_fit"):
                if not self._run("fit", self._epochs):
                    self.position = None  # a cancelled fit is not to be gone on with
                self._finish_resume()

    def _finish_resume(self) -> None:
        """Load what is loaded late, if that is still to be done: a cancel may have come before."""
        going_on, self._resume = self._resume, None
        if going_on is not None:
            going_on.finish(self)

    def _epochs(self) -> None:
        start = 0
        if self._resume is not None:
            start = self._resume.position["epoch"]
            if not self._resume.in_epoch:
                self._finish_resume()
        for epoch in range(start, self.n_epochs):
            if self.stop_reason is not None:
                break
            self.epoch = epoch
            self._run("epoch", self._epoch)
            self._finish_resume()
            self._at_rest(epoch + 1, 0)

    def _epoch(self) -> None:
        self._began = time.perf_counter()
        whole = self._train_epoch()
        row: dict[str, Any] = {"fit": self._fits - 1, "epoch": self.epoch, "train_loss": _read(self.running_loss)}
        if self.dls.valid is not None:
            measured, validated = self._validate(self.dls.valid)
            row, whole = row | measured, whole and validated
        row |= {"lr": rate_of(self.opt.param_groups[0]), "seconds": time.perf_counter() - self._began}
        self.history.append(row if whole else row | {"partial": True})
        self._touch()
        self.position = self.epoch + 1, 0

    def _train_epoch(self) -> bool:
        """Train on every batch; False if it ended before the last one."""
        self.dl, self.training, self.running_loss = self.dls.train, True, Mean()
        n_done = self._resume.position["batch"] if self._resume is not None else 0
        drawing = Pass(self.dl, "training", lambda: self.stop_reason is not None, self._begin_batches, n_done)
        set_epoch(self.dl, self._epochs_begun)
        self._epochs_begun += 1
        self.model.train()
        try:
            whole = self._run("train", lambda: self._train_batches(drawing))
            self._finish_resume()
            return whole and drawing.complete
        finally:
            self.training = False

    def _train_batches(self, drawing: Pass) -> None:
        try:
            self._batches(drawing, self._train_batch)
        except Cancel:
            self.position = None  # from here it would go on with a batch that is not to come
            raise
        self.position = None

    def _begin_batches(self) -> Iterable[Any]:
        going_on, self._resume = self._resume, None
        if going_on is not None and going_on.in_epoch:
            return going_on.enter(self, self.dls.train)
        self.rng_of_epoch = RandomState(loader_generators(self.dls.train))
        return self.dls.train

    def _batches(self, drawing: Pass, body: Callable[[], None]) -> None:
        device = self.device
        for batch in drawing:
            self.batch_idx = drawing.n_drawn - 1
            if self.training:
                self.position = None
            self.batch = to_device(batch, device)
            del batch  # or it would live on while the next one is made
            try:
                self.xb, self.yb = self.split_batch(self.batch)
                self._run("batch", body)
            except Exception as error:
                self._explain(error)
                raise
            finally:
                self._release()
            if self.training:
                self._at_rest(self.epoch, drawing.n_drawn)

    def _at_rest(self, epoch: int, batch: int) -> None:
        """Between two batches, or two epochs: a checkpoint that is taken now can be gone on from."""
        self.position = epoch, batch
        for act in self.save_points:
            act(self)

    def _train_batch(self) -> None:
        overridden = self._has_own_train_batch
        if overridden:
            self._touch()  # it may have trained, and left gradients, wherever it ends
        try:
            self.train_batch()
        except Cancel:
            if overridden:
                self._drop_gradients()
            raise
        self._commit()
        self.position = self.epoch, self.batch_idx + 1

    @property
    def _has_own_train_batch(self) -> bool:
        return getattr(self.train_batch, "__func__", None) is not Learner.train_batch

    def train_batch(self) -> None:
        """One training batch: forward, loss, backward, step. Override it where there are several losses or optimisers.

        An override sets `learn.loss` (what is reported) and may fire no event between `before_batch` and `after_batch`.
        """
        self._forward_and_loss()
        self._fire("before_backward")
        checks.check_differentiable(self.backward_loss)
        self._touch()
        try:
            self.backward(self.backward_loss)
            stepped = self._run("step", self._step)
        except Cancel:  # the batch will not count, so nothing of it may reach a later step
            self._drop_gradients()
            raise
        if stepped:
            self._zero_grad()

    def _forward_and_loss(self) -> None:
        with self._during("during_forward"):
            self.preds = self.forward(self.xb)
            self._fire("after_pred")
            self.loss = self.compute_loss(self.preds, self.yb)
        checks.check_loss(self.loss)
        self._fire("after_loss")
        self._pending = self._measured()

    def _step(self) -> None:
        self._fire("before_step")
        self.step()
        self.step_idx += 1

    def _measured(self) -> _Measured:
        """The loss, and what metrics need: put aside, since it counts only once the batch has come through."""
        outputs = None if self.training else (self.preds, self.yb)
        return self.loss.detach().clone(), self.n_samples(self.batch), outputs

    def _commit(self) -> None:
        pending = self._pending
        if pending is None:
            if self.loss is None:  # an overridden train_batch that reports nothing
                return
            checks.check_loss(self.loss)
            pending = self._measured()
        loss, n, outputs = pending
        self.running_loss.add(loss, n)
        if outputs is not None:
            for metric in self.metrics.values():
                if isinstance(metric, Mean) and type(metric).update is Mean.update:
                    metric.update(*outputs, n)
                else:
                    metric.update(*outputs)

    def _validate(self, dl: Iterable[Any]) -> tuple[dict[str, float], bool]:
        """What `validate` returns, and whether it is over the whole loader."""
        self.running_loss = Mean()
        for metric in self.metrics.values():
            if hasattr(metric, "to"):
                metric.to(self.device)
            metric.reset()
        whole = self._evaluate(dl, self._validate_batch)
        if self.running_loss.count == 0:  # all of it was cancelled: an empty loader has been refused by now
            return {}, whole
        measured = {"loss": self.running_loss.compute(), **compute_metrics(self.metrics)}
        return {f"valid_{name}": value for name, value in measured.items()}, whole

    def _validate_batch(self) -> None:
        self._forward_and_loss()
        self._commit()

    def _evaluate(self, dl: Iterable[Any], body: Callable[[], None]) -> bool:
        """One pass in evaluation mode and without gradients, of which training notices nothing. False if it was cancelled."""
        try:
            self.dl, self.training, self._evaluating = dl, False, True
            untouched = preserve_training(self.model, loader_generators(dl))
            with untouched, torch.no_grad(), self._during("during_validate"):
                self.model.eval()
                drawing = Pass(dl, "prediction" if self.phase == "predict" else "validation")
                return self._run("validate", lambda: self._batches(drawing, body))
        finally:
            self._evaluating = False

    # -- what a step computes: override these -------------------------------------------------------------------------

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """`(xb, yb)`: all but the last element, and the last. One input stays bare, several are a tuple.

        A bare tensor is its own input, and `yb` is None.
        """
        return split_batch(batch)

    def n_samples(self, batch: Any) -> int:
        """How much this batch counts in means: the leading dimension of its first tensor."""
        return n_samples(batch)

    def forward(self, xb: Any) -> Any:
        """`model(xb)`; several inputs (a tuple) are the model's positional arguments."""
        return self.model(*xb) if type(xb) is tuple else self.model(xb)

    def compute_loss(self, preds: Any, yb: Any) -> Any:
        """`loss_func(preds, yb)`, or `loss_func(preds)` where there is no target."""
        return self.loss_func(preds) if yb is None else self.loss_func(preds, yb)

    def backward(self, loss: Tensor) -> None:
        """Differentiate the loss, scaled where there is a `scaler`."""
        self._scaled_by = self.scaler
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """One update of `opt`. A step that the `scaler` skips (gradients overflowed) is a cancelled one."""
        if self.scaler is None:
            self.opt.step()
            return
        scale = self.scaler.get_scale()
        self.scaler.step(self.opt)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self._zero_grad()  # they are not finite
            raise CancelStep

    # -- around the loop ----------------------------------------------------------------------------------------------

    def fit_one_cycle(
        self,
        n_epochs: int,
        lr_max: float | None = None,
        *,
        cbs: Iterable[Callback] = (),
        resume: str | os.PathLike[str] | None = None,
        allow_changes: bool = False,
    ) -> None:
        """`fit` under a one-cycle schedule of learning rate and momentum.

        Args:
            n_epochs: How many passes over the training loader.
            lr_max: The highest learning rate. None: the optimiser's present one.
            cbs: Callbacks for this fit only.
            resume: As in `fit`.
            allow_changes: As in `fit`.

        References:
            Smith, Topin, *Super-Convergence*, 2018, https://arxiv.org/abs/1708.07120.
        """
        cbs = checks.check_callbacks(cbs)
        if any(isinstance(cb, OneCycle) for cb in (*self._cbs, *cbs)):
            raise ValueError(
                "fit_one_cycle, but there is a OneCycle among the callbacks already: call fit, or remove it."
            )
        self.fit(n_epochs, cbs=[*cbs, OneCycle(lr_max)], resume=resume, allow_changes=allow_changes)

    def validate(self, dl: Iterable[Any] | None = None) -> dict[str, float]:
        """Loss and metrics over a loader, in evaluation mode; training does not notice it.

        Args:
            dl: The loader. None: the validation loader.

        Returns:
            `{"valid_loss": ..., "valid_<metric>": ...}`; without any entry if a callback cancelled all of it.

        Raises:
            DataError: There is no loader, or it is empty.
            LoopError: Called inside another validation or prediction.
        """
        dl = runs.loader_of(self, dl)
        with runs.aside(self, "validate", dl):
            return self._validate(dl)[0]

    def predict(self, batch: Any) -> Any:
        """What the model makes of one batch, in evaluation mode and without gradients.

        Args:
            batch: As the loaders give it, with its target, or a bare tensor.

        Returns:
            The predictions, on the model's device.
        """
        preds = self._predictions([batch])
        if not preds:
            raise LoopError("a callback cancelled the batch that was to be predicted: there is nothing to return.")
        return preds[0][0]

    def get_preds(self, dl: Iterable[Any] | None = None) -> tuple[Any, Any]:
        """Predictions and targets over a whole loader.

        Args:
            dl: The loader. None: the validation loader.

        Returns:
            `(preds, targets)`, concatenated along the first dimension, on the CPU; `targets` is None where there are none.
        """
        dl = runs.loader_of(self, dl)
        if shuffles(dl):
            warnings.warn("get_preds over a shuffling loader: rows come in shuffled order.", UserWarning, stacklevel=2)
        rows = self._predictions(dl, torch.device("cpu"))
        if not rows:
            raise LoopError("a callback cancelled every batch that was to be predicted: there is nothing to return.")
        return concatenate([preds for preds, _ in rows]), concatenate([yb for _, yb in rows])

    def initialize(self) -> InitReport | None:
        """Run the init stages now; the first `fit` will not repeat them.

        Returns:
            What the last stage reported.

        Raises:
            LoopError: There is no init stage, or a run is in progress.
            InitError: A stage failed; the model is as it was before.
        """
        if self._stages is not None:
            raise LoopError(f"initialize() during a {self.phase}: it must come before any hook or callback is active.")
        if not self._init:
            raise LoopError("initialize(), but init=None. Pass a stage: Learner(..., init=LSUV()).")
        with runs.seeded(self):
            runs.run_init(self)
        return self.init_report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that this Learner is to a file: whole or not at all, and safe from a loss of power.

        It holds model, optimisers, scaler, callbacks, history, random states, and where a fit stands. A fit can go on from what
        was saved between fits, in `after_epoch` or in `after_batch`: `fit(n, resume=path)`.

        Args:
            path: Where to. A file that is there is replaced.

        Raises:
            CheckpointError: The file cannot be written (what was there is left intact), or the state of a callback or of the
                model is not made of plain types and tensors.
        """
        checkpoint.write(path, snapshot(self))

    def load(self, path: str | os.PathLike[str], *, strict: bool = True, with_opt: bool = True) -> None:
        """Take back what `save` or a `Checkpoint` has written, but for random states and position: the next fit is a new one.

        The model counts as initialised, unless it was saved before its init stages had run. Callbacks of this Learner get their
        state where the file has one. Learning rates and momenta are those from before the fit that the file is of: what a
        schedule had made of them belongs to that fit.

        Args:
            path: The file.
            strict: False loads what fits: the tensors that have the same name and shape, and the optimisers if they are the
                same.
            with_opt: False loads the model alone, and leaves optimisers, callbacks and history as they are.

        Raises:
            CheckpointError: The file is missing, damaged, or does not fit (what is missing, unexpected or of another shape is
                listed). Nothing is changed then.
            LoopError: A run is in progress.
        """
        if self._stages is not None:
            raise LoopError(f"load(path={str(path)!r}) during a {self.phase}: call it afterwards.")
        for name, value in (("strict", strict), ("with_opt", with_opt)):
            checks.check_bool(name, value)
        restore.load(self, path, strict=strict, with_opt=with_opt, build=runs.prepare)

    def export_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the model's weights and buffers as a safetensors file, which other tools read, and which cannot hold code.

        Args:
            path: Where to. A file that is there is replaced.

        Raises:
            ImportError: `safetensors` is not installed.
            CheckpointError: The file cannot be written; what was there is left intact.

        References:
            https://github.com/huggingface/safetensors
        """
        export_weights(self.model, path)

    def stop(self, reason: str) -> None:
        """End the fit gracefully: this batch ends, no other is drawn; validation and the epoch's row still follow.

        Args:
            reason: Why, for whoever reads the log.

        Raises:
            LoopError: No fit is in progress.
        """
        if self._stages is None or "fit" not in self._stages.open:
            raise LoopError(f"stop(reason={reason!r}), but no fit is in progress that could be stopped.")
        if not isinstance(reason, str) or not reason:
            raise TypeError(f"reason={reason!r}, wanted a text that says why.")
        self.stop_reason = self.stop_reason or reason

    def describe(self) -> None:
        """Print who runs when: each event with the callbacks that override it, in order."""
        print(Stages(self, runs.participants(self)) if self._stages is None else self._stages)  # noqa: T201

    @property
    def opt(self) -> Optimizer:
        """The optimiser: built once, on first use and after the init stages."""
        if self._opt is None:
            if self._initializing:
                raise LoopError("opt inside an init stage, but the optimiser is built after the stages.")
            if self._stages is not None and self.phase != "fit":
                raise LoopError(f"opt during a {self.phase}, but the optimiser is only built for the first fit.")
            with runs.seeded(self):
                runs.prepare(self)
        assert self._opt is not None
        return self._opt

    @property
    def cbs(self) -> Sequence[Callback]:
        """The callbacks: a list of yours, and during a run the tuple of those that take part, in order."""
        return self._cbs if self._stages is None else self._stages.cbs

    @cbs.setter
    def cbs(self, cbs: Iterable[Callback]) -> None:
        if self._stages is not None:
            raise LoopError(
                "learn.cbs cannot change during a run. Pass callbacks to Learner(cbs=[...]) or fit(cbs=[...])."
            )
        self._cbs = checks.check_callbacks(cbs)

    @property
    def device(self) -> torch.device:
        """Where batches go: the `device` given, or the model's own."""
        if self._device is not None:
            return self._device
        tensor = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def backward_loss(self) -> Any:
        """What is differentiated: `loss`, unless a callback has set another."""
        return self.loss if self._backward_loss is None else self._backward_loss

    @backward_loss.setter
    def backward_loss(self, loss: Any) -> None:
        self._backward_loss = loss

    @property
    def init_report(self) -> InitReport | None:
        """What the last init stage that reports has said (`init_reports` has all of them)."""
        return next((report for report in reversed(self.init_reports) if report is not None), None)

    # -- the plumbing (runs.py has the rest) --------------------------------------------------------------------------

    def _predictions(self, dl: Iterable[Any], device: torch.device | None = None) -> list[tuple[Any, Any]]:
        rows: list[tuple[Any, Any]] = []

        def body() -> None:
            with self._during("during_forward"):
                self.preds = self.forward(self.xb)
                self._fire("after_pred")
            row = (self.preds, self.yb)
            rows.append(row if device is None else to_device(row, device))

        with runs.aside(self, "predict", dl):
            self._evaluate(dl, body)
        return rows

    def _touch(self) -> None:
        """From here on it is too late to put everything back."""
        self._touched, self._before, self._undo = True, None, None

    def _drop_gradients(self) -> None:
        self._zero_grad()
        if self.scaler is not None and self.scaler is self._scaled_by:
            self.scaler.update(self.scaler.get_scale())  # it may have noted that these gradients are unscaled

    def _zero_grad(self) -> None:
        self.opt.zero_grad()
        for p in self._strays:
            p.grad = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made in the midst of a run runs nothing.
        return vars(self) | runs.AT_REST | {"_before": None, "_undo": None}

    def _release(self) -> None:
        self.batch = self.xb = self.yb = self.preds = self.loss = self._backward_loss = self._pending = None


def _read(mean: Mean) -> float | None:
    return mean.compute() if mean.count else None
