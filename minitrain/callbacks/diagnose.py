"""`Diagnose`: what is wrong inside a net, in plain sentences, and which knob to turn."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from minitrain.callback import Callback
from minitrain.callbacks.findings import ADVICE, OUTSIDE, Finding, listed
from minitrain.callbacks.parameters import ParameterStats
from minitrain.callbacks.recorder import Recorder
from minitrain.callbacks.stats import ActivationStats, GradientStats, LayerStats
from minitrain.passes import loader_length

if TYPE_CHECKING:
    from minitrain.learner import Learner

_ROWS_AN_EPOCH = 50
_LATEST = 10  # rows over which a layer is judged
_DRIFT = 100.0  # by how much training may change the scale of a layer
_ENOUGH = 32  # samples: in fewer steps than that a dead unit must have been silent on so many
_SOLVED = 1e-3  # of its first norm, the gradient at the last layer: little is left to learn, and so updates are small


class Diagnose(Callback):
    """Say what is wrong inside the net, at the end of the first epoch and at the end of the fit; else "no findings".

    Looked for are values that are not finite, layers of which many units are dead (their gradient was zero in all of the
    last ten recorded steps), layers whose output has a standard deviation that is too small or too large, gradients that
    vanish or explode on their way from the last layer, weights that are updated too slowly or too fast, and trainable weights
    that never get a gradient.

    Standard deviations are judged at the first step, as the initialisation has left them. Training makes its own scales: from
    then on a layer may have a hundred times less or more. Gradients, and later standard deviations, are judged by the median
    over the last ten recorded steps, updates by that over the epoch, since a schedule may end in tiny steps.

    What is small or slow by design is left out: at the first step recurrent layers, whose gates make it so, and the last layer,
    behind which nothing can fade; layers that begin as zero, those behind them, and how fast these grow; of embeddings, how
    slow they are, since a step moves a few rows only. Of a problem that is solved nothing is dead or slow. Gradients of a step
    that a `GradScaler` skips do not count.

    A fit that ends early, by a cancel, an error or Ctrl-C, is reported on, too; after an error only where there is something
    to say.

    Args:
        select: Which layers, as in `Hooks`. None: the layers with a weight of two or more dimensions.
        every: Look at every n-th batch. None: about fifty times an epoch, where its length is known, else every tenth batch.
        dead: The largest fraction of dead units in a layer that is healthy.
        std: The smallest and the largest healthy standard deviation of a layer's output at the first step; later on a hundred
            times less or more.
        gradient: The smallest and largest healthy ratio of the norm of the gradient at a layer's output to that at the
            output of the layer nearest to the loss.
        update_ratio: The smallest and largest healthy ratio ||update|| / ||weights|| of a step.
        show: What the report is given to, as a text.

    Attributes:
        findings: What the last report found, a list of `Finding`.
        activations: The `ActivationStats` behind it; likewise `gradients` and `parameters`. They can be read and drawn.

    Raises:
        TypeError: `every` is no int, or `show` no function.
        ValueError: `every` is not positive, a threshold is no number, or a pair is not in order.

    Example:
        >>> import torch
        >>> from minitrain import LSUV, BatchLoader, DataLoaders, Learner
        >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> dls = DataLoaders(BatchLoader(x, x, batch_size=16))
        >>> options = {"init": LSUV(), "seed": 0, "progress": False}
        >>> Learner(model, dls, torch.nn.MSELoss(), lr=1e-2, cbs=[Diagnose()], **options).fit(1)
        Diagnose, epoch 1: no findings
        >>> Learner(model, dls, torch.nn.MSELoss(), lr=1e-9, cbs=[Diagnose()], **options).fit(1)  # doctest: +ELLIPSIS
        Diagnose, epoch 1: 1 finding
        - Updates are smaller than 1e-05 of the weights in 2 parameters: '0.weight' (...). Raise the learning rate, ...
    """

    order = 110  # after the progress bar has written the row of the epoch

    def __init__(
        self,
        select: Any = None,
        *,
        every: int | None = None,
        dead: float = 0.5,
        std: tuple[float, float] = (0.1, 10.0),
        gradient: tuple[float, float] = (1e-3, 1e3),
        update_ratio: tuple[float, float] = (1e-5, 1e-1),
        show: Callable[[str], Any] = print,
    ) -> None:
        if not _is_amount(dead) or dead > 1:
            raise ValueError(f"dead={dead!r}, wanted a fraction from 0 to 1.")
        for name, pair in {"std": std, "gradient": gradient, "update_ratio": update_ratio}.items():
            _check_pair(name, pair)
        if not callable(show):
            raise TypeError(f"show={show!r} (type={type(show).__name__}), wanted a function that takes a text.")
        self.select, self.every, self.show = select, every, show
        self.max_dead, self.std, self.gradient, self.update_ratio = dead, std, gradient, update_ratio
        self.findings: list[Finding] = []
        self._set_up(1 if every is None else every)

    @contextmanager
    def during_fit(self, learn: Learner) -> Iterator[None]:
        """Hooks and tables of the three statistics. A fit that fails is reported on, too."""
        if self.every is None:
            n = loader_length(learn.dls.train)
            self._set_up(10 if n is None else max(1, n // _ROWS_AN_EPOCH))
        self._start, self._reported = 0, True
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.during_fit(learn))
            self._know(learn.model)
            try:
                yield
            except BaseException:
                with suppress(Exception):  # it is the error of the fit that is to be seen
                    if not self._reported and (findings := self._find()):
                        self._report(learn, findings, ", cut short")
                raise

    def before_epoch(self, learn: Learner) -> None:
        """Updates of earlier epochs do not count any longer."""
        self._start, self._reported = self.parameters._counts["train"], False

    def before_batch(self, learn: Learner) -> None:
        """Pass the event on."""
        if learn.phase == "fit":
            self._stepping = self._overflowed = False
        self.activations.before_batch(learn)
        self.gradients.before_batch(learn)

    def before_step(self, learn: Learner) -> None:
        """Pass the event on."""
        self._stepping = True
        self.parameters.before_step(learn)

    def after_step(self, learn: Learner) -> None:
        """Pass the event on."""
        self.parameters.after_step(learn)

    def after_cancel_step(self, learn: Learner) -> None:
        """Pass the event on. A step that the scaler has skipped is none: it is looking for its scale."""
        self._overflowed = self._stepping and learn.scaler is not None
        self.parameters.after_cancel_step(learn)

    def after_batch(self, learn: Learner) -> None:
        """Pass the event on."""
        self.activations.after_batch(learn)
        if learn.phase == "fit" and not self._overflowed:
            self.gradients.after_batch(learn)
            if learn.training and learn.loss is not None:
                self._batch_size = max(self._batch_size, learn.n_samples(learn.batch))

    def after_epoch(self, learn: Learner) -> None:
        """Report on the first epoch, and on the last."""
        if self._is_due(learn):
            self._report(learn, self._find())

    def after_cancel_epoch(self, learn: Learner) -> None:
        """Likewise."""
        if self._is_due(learn):
            self._report(learn, self._find(), ", cut short")

    def after_fit(self, learn: Learner) -> None:
        """Report on an epoch that has turned out to be the last."""
        if not self._reported:
            self._report(learn, self._find())

    def after_cancel_fit(self, learn: Learner) -> None:
        """Report on what there is."""
        if not self._reported:
            self._report(learn, self._find(), ", cut short")

    def state_dict(self) -> dict[str, Any]:
        """That of the three statistics, with which step the epoch began, and what was zero then."""
        parts = [part.state_dict() for part in self._parts]
        return {"parts": parts, "start": self._start, "zero": sorted(self._zero)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: As in `ActivationStats`; nothing is changed then.
        """
        try:
            takes = [part._checked(saved) for part, saved in zip(self._parts, state["parts"], strict=True)]
            start, zero = int(state["start"]), set(state["zero"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no state of Diagnose ({type(error).__name__}: {error}).") from error
        for take in takes:
            take()
        self._start, self._zero = start, zero

    # -----------------------------------------------------------------------------------------------------------------

    _start: int  # the optimiser step with which the epoch began
    _layer_of: dict[str, str]  # of each parameter
    _trained: set[str]  # parameters that require a gradient
    _matrices: set[str]  # parameters of two or more dimensions
    _zero: set[str]  # of these the ones that began as zero
    _embeddings: set[str]  # parameters of which a step may change a few rows only
    _recurrent: set[str]  # layers
    _batch_size: int  # the largest so far

    def _set_up(self, every: int) -> None:
        self.activations = ActivationStats(self.select, every=every, window=_LATEST)
        self.gradients = GradientStats(self.select, every=every, window=_LATEST)
        self.parameters = ParameterStats(self.select, every=every, window=_LATEST)
        self._parts: list[Recorder] = [self.activations, self.gradients, self.parameters]
        self._start, self._batch_size = 0, 0
        self._reported, self._stepping, self._overflowed = True, False, False
        self._layer_of, self._trained, self._matrices, self._zero = {}, set(), set(), set()
        self._embeddings, self._recurrent = set(), set()

    def _know(self, model: nn.Module) -> None:
        """What is to be known of the model's layers: names and kinds only, the model itself is let go."""
        parameters = {name: p for name, (p, _) in self.parameters._parameters.items()}
        self._layer_of = {name: _layer(name) or type(model).__name__ for name in parameters}
        self._trained = {name for name, p in parameters.items() if p.requires_grad}
        self._matrices = {name for name, p in parameters.items() if p.ndim >= 2}
        self._zero = {name for name in self._matrices if not parameters[name].detach().any()}
        self._embeddings = {name for name, (_, dim) in self.parameters._parameters.items() if dim is None}
        recurrent = (nn.RNNBase, nn.RNNCellBase)
        named = ((name or type(model).__name__, module) for name, module in model.named_modules())
        self._recurrent = {name for name, module in named if isinstance(module, recurrent)}

    def _is_due(self, learn: Learner) -> bool:
        last = learn.epoch == learn.n_epochs - 1 or learn.stop_reason is not None
        return not self._reported and (learn.epoch == 0 or last)

    def _report(self, learn: Learner, findings: list[Finding], how: str = "") -> None:
        self._reported, self.findings = True, findings
        n = len(findings)
        head = f"Diagnose, epoch {learn.epoch + 1}{how}: {n or 'no'} finding{'s' * (n != 1)}"
        self.show("\n".join([head, *(f"- {finding}" for finding in findings)]))

    def _find(self) -> list[Finding]:
        norms = self._latest(1, "norm")
        last = next((name for name in self.gradients.called if name in norms), "")  # the layer nearest to the loss
        top = norms.get(last, math.nan)
        nonfinite, dead = self._nonfinite(), None
        if top > 0:  # else the loss is at its minimum, and nothing is to be learned
            dead = self._dead()
        found = [finding for finding in (nonfinite, self._cut_off(), dead) if finding is not None]
        explained = self._behind_zero() if dead is None else self._behind_zero() | set(dead.layers)
        found += self._spread()
        flow = {name: norm / top for name, norm in norms.items() if top > 0 and (norm > 0 or not self._learns(name))}
        found += self._outside("gradient", _without(flow, explained), self.gradient)
        explained |= {name for finding in found if finding.kind == "vanishing" for name in finding.layers}
        return found + self._updates(explained, top <= _SOLVED * self._first(1, "norm").get(last, 0.0))

    def _learns(self, layer: str) -> bool:
        """Whether its weights get a gradient: by a second call, if the output of the first one goes unused."""
        return any(norm > 0 for name, norm in self._latest(2, "grad_norm").items() if self._layer_of[name] == layer)

    def _behind_zero(self) -> set[str]:
        """The layers to which weights that began as zero let no gradient pass at the first step: by and by they will."""
        first = self.gradients.norm[:1].tolist() if self._zero else []
        return {name for row in first for name, norm in zip(self.gradients.names, row, strict=True) if norm == 0}

    def _latest(self, i: int, field: str) -> dict[str, float]:
        return _medians(self._parts[i].names, self._parts[i][field][-_LATEST:])

    def _first(self, i: int, field: str) -> dict[str, float]:
        """For each layer the value of its first call, if that was among the first recorded steps."""
        return _last(self._parts[i].names, self._parts[i][field][:_LATEST].flip(0))

    def _nonfinite(self) -> Finding | None:
        """In all steps of the fit; named is where it began, since from there it spreads."""
        counts = [self._bad(i, field) for i, field, _ in _NONFINITE]
        bad = [(rows > 0).any(1).nonzero().flatten().tolist() for _, _, rows in counts]
        where = [i for i, rows in enumerate(bad) if rows]
        if not where:
            return None
        begin, source = min((counts[i][1][bad[i][0]], i) for i in where)
        end = max(counts[i][1][bad[i][-1]] for i in where)
        lasting = any(bad[i][-1] == len(counts[i][1]) - 1 for i in where)
        names, _, rows = counts[source]
        first = {name: count for name, count in zip(names, rows[bad[source][0]].tolist(), strict=True) if count > 0}
        total: dict[str, float] = dict.fromkeys(first, 0)
        for names, _, rows in counts:
            for name, count in zip(names, rows.sum(0).tolist(), strict=True):
                if count > 0:
                    total[name] = total.get(name, 0) + count
        when = f"in steps {begin} to {end}" if end > begin else f"in step {begin}"
        when = f"are NaN or infinite since step {begin}" if lasting else f"were NaN or infinite {when}"
        more = f", {len(total)} layers in all" if len(total) > len(first) else ""
        text = f"Values {when}: first in {_NONFINITE[source][2]} of {listed(first, 'layer')}{more}."
        return Finding("nonfinite", total, text, ADVICE["nonfinite"])

    def _bad(self, i: int, field: str) -> tuple[list[str], list[int], Tensor]:
        """Layers, in the order in which a step comes to them; batches; and for these how many values are not finite."""
        part = self._parts[i]
        names, steps, rows = part.names, part.steps, part[field].nan_to_num()
        if isinstance(part, LayerStats):
            rank = {name: k for k, name in enumerate(part.called)}
            order = sorted(range(len(names)), key=lambda k: rank.get(names[k], len(rank)))
            return [names[k] for k in order], steps, rows[:, order]
        batches, made = self.activations._counts["train"], part._counts["train"]
        n = max(1, round(batches / max(1, made)))  # so many batches are accumulated for a step
        return [self._layer_of[name] for name in names], [n * step + n - 1 for step in steps], rows

    def _cut_off(self) -> Finding | None:
        """Parameters that are to be trained, of which no recorded step has found a gradient."""
        part = self.parameters
        none = (
            part.update_ratio.isnan() & part.grad_norm.isnan()
        )  # a sparse gradient has no norm here, but it moves weights
        none &= part.nonfinite == 0
        cut = none.all(0).tolist() if len(none) else []
        bad = {name: 0.0 for name, is_cut in zip(part.names, cut, strict=False) if is_cut and name in self._trained}
        if not bad:
            return None
        text = f"No gradient has come in any step to {listed(bad, 'parameter')}."
        return Finding("cut_off", bad, text, ADVICE["cut_off"])

    def _dead(self) -> Finding | None:
        """Units are dead if neither their outputs nor their weights get a gradient.

        Weights alone get none behind a layer that is dead, and outputs alone none where the first of several calls goes unused.
        """
        n = min(len(self.gradients.steps), _LATEST)
        if n < _LATEST and n * self._batch_size < _ENOUGH:
            return None
        dead = _last(self.gradients.names, self.gradients.dead[-_LATEST:])
        of_weights: dict[str, float] = {}
        for name, value in _last(self.parameters.names, self.parameters.dead[-_LATEST:]).items():
            layer = self._layer_of[name]
            of_weights[layer] = min(value, of_weights.get(layer, 1.0))
        for layer, value in of_weights.items():
            dead[layer] = min(value, dead.get(layer, 1.0))
        order = {name: i for i, name in enumerate(self.gradients.called)}
        spared = self._behind_zero() if n < _LATEST else set()
        bad = {name: value for name, value in dead.items() if value > self.max_dead and name not in spared}
        if not bad:
            return None
        bad = dict(sorted(bad.items(), key=lambda item: (-item[1], order.get(item[0], len(order)))))
        text = f"More than {self.max_dead:.0%} of the units are dead (no gradient) in {listed(bad, 'layer', '{:.0%}'.format)}."
        return Finding("dead", bad, text, ADVICE["dead"])

    def _spread(self) -> list[Finding]:
        """Standard deviations at the first call, and where these were healthy, those of now, by wider limits.

        Small may be what began as zero; what gates make small, in recurrent layers; and the last layer, behind which nothing
        fades.
        """
        low, high = self.std[0] / _DRIFT, self.std[1] * _DRIFT
        small = {self._layer_of[name] for name in self._zero} | self._recurrent | set(self.gradients.called[:1])
        first = {k: v for k, v in self._first(0, "std").items() if k not in small or v > self.std[0]}
        found = self._outside("first_std", first, self.std)
        known = {name for finding in found for name in finding.layers}
        now = {k: v for k, v in _without(self._latest(0, "std"), known).items() if k not in small or v > low}
        return found + self._outside("std", now, (low, high))

    def _updates(self, explained: set[str], solved: bool) -> list[Finding]:
        """Update ratios of matrices; those that grow from zero have no scale of their own, by which they could be fast."""
        low, high = self.update_ratio
        start = bisect_left(self.parameters.steps, self._start)
        rows = self.parameters.update_ratio
        rows = rows[start if start < len(rows) else -1 :]
        ratios = {k: v for k, v in _medians(self.parameters.names, rows).items() if k in self._matrices}
        slow = {k: v for k, v in ratios.items() if k not in self._embeddings and self._layer_of[k] not in explained}
        still = {
            k for k, norm in self._latest(2, "grad_norm").items() if norm == 0 and not slow.get(k)
        }  # no fault of the rate
        slow = {} if solved else _without(slow, still)
        fast = _without(ratios, self._zero)
        return self._outside("update_ratio", slow, (low, math.inf)) + self._outside("update_ratio", fast, (0.0, high))

    def _outside(self, what: str, values: dict[str, float], limits: tuple[float, float]) -> list[Finding]:
        findings = []
        for side, limit in zip((0, 1), limits, strict=True):
            bad = {name: value for name, value in values.items() if (value < limit if side == 0 else value > limit)}
            if bad:
                bad = dict(sorted(bad.items(), key=lambda item: item[1], reverse=side == 1))
                kind, text, unit = OUTSIDE[what, side]
                sentence = f"{text.format(limit=f'{limit:g}')} in {listed(bad, unit)}."
                findings.append(Finding(kind, bad, sentence, ADVICE[kind]))
        return findings


_NONFINITE = (  # where to look, in the order in which a step comes by
    (2, "nonfinite", "the weights"),
    (0, "nonfinite", "the outputs"),
    (1, "nonfinite", "the gradients of the outputs"),
    (2, "grad_nonfinite", "the gradients of the weights"),
)


def _medians(names: list[str], rows: Tensor) -> dict[str, float]:
    """The median of each column, of those that have a finite value."""
    if not len(rows):
        return {}
    values = rows.masked_fill(rows.isinf(), math.nan).nanmedian(0).values.tolist()
    return {name: value for name, value in zip(names, values, strict=True) if not math.isnan(value)}


def _without(values: dict[str, float], names: set[str]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in names}


def _last(names: list[str], rows: Tensor) -> dict[str, float]:
    """The last finite value of each column, where there is one."""
    found: dict[str, float] = {}
    for row in rows.tolist():
        found |= {name: value for name, value in zip(names, row, strict=True) if math.isfinite(value)}
    return found


def _layer(parameter: str) -> str:
    """The layer of a parameter: the name without its last part."""
    layer, found, _ = parameter.partition(".parametrizations.")
    return layer if found else parameter.rpartition(".")[0]


def _check_pair(name: str, pair: Any) -> None:
    fits = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_is_amount(value) for value in pair)
    if not fits or pair[0] > pair[1]:
        raise ValueError(f"{name}={pair!r}, wanted two numbers from 0 up: (smallest, largest).")


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
