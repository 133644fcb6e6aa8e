"""Run LSUV: choose how the batches are gone through, normalise, verify, report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from minitrain.bars import Bar
from minitrain.errors import InitError
from minitrain.init.calls import OutOfStep
from minitrain.init.forward import Forward, at_rest, has_lazy
from minitrain.init.inputs import Batches
from minitrain.init.layers import Layer, choose, find_layers, unowned_parameters
from minitrain.init.lockstep import LockStep, lock_step_bytes
from minitrain.init.meeting import Probe
from minitrain.init.normalizer import UNIT, Normalizer, Wanted
from minitrain.init.orthogonal import make_orthonormal
from minitrain.init.report import InitReport, LayerRow, LSUVReport
from minitrain.init.rollback import Rollback, rolled_back, rolled_back_on_error
from minitrain.init.sample import Sample
from minitrain.init.streaming import Streaming
from minitrain.init.sweep import Norms, Sweep, Together, batch_norms, measure
from minitrain.init.watch import Watch
from minitrain.random_states import RandomState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minitrain.init.lsuv import LSUV

MAX_STRANDS = 256
"""More batches than this are not held in lock-step unless that is asked for: each takes a thread."""
LOST = 0.01
"""The signal share below which a warning is given."""


class Engine:
    """One run of LSUV.

    Args:
        options: What is wanted.
        model: What is changed.
        batches: What statistics are taken over.
        bar: Shows how it goes on.
    """

    def __init__(self, options: LSUV, model: nn.Module, batches: Batches, bar: Bar) -> None:
        self._options, self._model, self._batches, self._bar = options, model, batches, bar
        self._forward = Forward(model, options.forward)
        channels = options.scope == "channel"
        self._probe, self._exact_probe = Probe(channels), Probe(channels, exact=True)
        self._why, self._verify_seconds = "", 0.0

    def run(self) -> LSUVReport:
        """Normalise, verify, report."""
        start, options, model = time.perf_counter(), self._options, self._model
        training_norms = options.mode == "batch"
        with (
            _collector_paused(len(self._batches) == 1),
            rolled_back_on_error(model),
            _random_state_kept_on_error(),
            self._bar,
        ):
            before = self._make_orthonormal() if options.orthonormal else {}
            with at_rest(model, training_norms):
                self._find_layers()
                self._wanted = self._what_is_wanted()
                norms = batch_norms(model, training_norms) if training_norms or len(self._batches) > 1 else {}
                self._watch = Watch(model, self._layers, norms, behind=options.where == "activation")
                sweep, normalizer, found = self._normalize()
                _put_back_unmet(before, self._layers, normalizer.rows)
                if found is None and options.verify:
                    found = self._measure(sweep)
                if found is not None:
                    normalizer.verify(found)
            return self._report(sweep, normalizer, found is not None, time.perf_counter() - start)

    def _what_is_wanted(self) -> Wanted:
        options = self._options
        target = options.target_std
        return Wanted(
            center=options.center,
            channels=options.scope == "channel",
            target_std=_checked(target) if callable(target) else lambda name: float(target),
            tol=options.tol,
            include_frozen=options.include_frozen,
            strict=options.strict,
        )

    def _find_layers(self) -> None:
        self._layers = shaped_layers(self._model, self._forward, self._batches)
        self._chosen = choose(self._model, self._layers, self._options.layers, self._options.skip)

    def _make_orthonormal(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Not at rest: random numbers come from the global generator, which moves on."""
        with at_rest(self._model):
            self._find_layers()
        layers = [layer for layer in self._layers if layer.name in self._chosen and not layer.latent]
        return make_orthonormal(layers, self._options.include_frozen)

    # -- one batch, lock-step, streaming ------------------------------------------------------------------------------

    def _normalizer(self) -> Normalizer:
        return Normalizer(
            self._layers, self._chosen, self._wanted, self._watch.affine, self._watch.sharing, str(self._batches)
        )

    def _sweep(self, kind: type[Sweep], normalizer: Normalizer) -> Sweep:
        return kind(self._watch, self._forward, self._batches, self._probe, normalizer, self._bar.tick)

    def _normalize(self) -> tuple[Sweep, Normalizer, dict[str, list[Sample]] | None]:
        """Returns the sweep, its normaliser, and what was measured afterwards, where that had to be done."""
        normalizer, n = self._normalizer(), len(self._batches)
        if n == 1:
            sweep = self._sweep(Together, normalizer)
            try:
                sweep.normalize()
            except OutOfStep as why:  # an output that cannot be written to, say
                self._why = str(why)
                sweep = self._stream(normalizer, sweep.norms)
            return sweep, normalizer, None
        if self._choose(normalizer):
            rollback = Rollback(self._model)
            sweep = self._sweep(LockStep, normalizer)
            self._bar.total = self._bar.done + 2 * n
            try:
                sweep.normalize()
            except OutOfStep as why:
                self._why = str(why)
                sweep = self._stream(normalizer, sweep.norms)
            found = self._measure(sweep)
            off = normalizer.off(found)
            if not off:
                return sweep, normalizer, found
            self._why = f"lock-step was undone, since layer {off!r} was measured otherwise afterwards"
            rollback.restore()
            normalizer = self._normalizer()
        return self._stream(normalizer), normalizer, None

    def _stream(self, normalizer: Normalizer, norms: Norms | None = None) -> Sweep:
        sweep = self._sweep(Streaming, normalizer)
        if norms is not None:
            sweep.norms = norms
        self._bar.total = self._bar.done + len(self._batches) * (len(self._chosen) - len(normalizer.rows) + 2)
        sweep.normalize()
        return sweep

    def _measure(self, sweep: Sweep) -> dict[str, list[Sample]]:
        start = time.perf_counter()
        found = sweep.measure(self._exact_probe)
        self._verify_seconds += time.perf_counter() - start
        return found

    def _choose(self, normalizer: Normalizer) -> bool:
        """Whether to go in lock-step."""
        options, n = self._options, len(self._batches)
        if options.strategy != "auto":
            self._why = "as asked for"
            return options.strategy == "lock-step"
        if n > MAX_STRANDS:
            self._why = f"there are more than {MAX_STRANDS} batches"
            return False
        need = lock_step_bytes(self._sweep(LockStep, normalizer))
        self._why = f"lock-step takes about {_mib(need)}, max_memory is {_mib(options.max_memory)}"
        if need + self._batches.kept_bytes > options.max_memory >= need:
            self._batches.let_go()
        return need <= options.max_memory

    def _report(self, sweep: Sweep, normalizer: Normalizer, verified: bool, seconds: float) -> LSUVReport:
        rows = tuple(normalizer.rows.values())
        used = [layer for layer in self._layers if layer.name in normalizer.rows]
        report = LSUVReport(
            "LSUV",
            rows,
            self._forward.count,
            seconds,
            batch=self._batches.shape,
            batches=len(self._batches),
            strategy=sweep.name,
            why=self._why,
            verified=verified,
            verify_seconds=self._verify_seconds,
            unowned=unowned_parameters(self._model, used),
        )
        unit = [row for row in rows if row.status in UNIT and row.signal_share is not None]
        if not unit or unit[-1].signal_share >= LOST:  # type: ignore[operator]
            return report
        last = unit[-1]
        warning = (
            f"the signal is lost: of the variance of the last layer, {last.name!r}, only {last.signal_share:.1%} lies "
            "between samples (signal share, below 1 %), the rest is an offset that all samples share. Behind a global pool, "
            "or on noise, that may be harmless; a deep plain net hardly tells its inputs apart then: use another activation, "
            "fewer layers, or skip connections."
        )
        return replace(report, warnings=(warning,))


def shaped_layers(model: nn.Module, forward: Forward, batches: Batches) -> list[Layer]:
    """Every weight layer, after lazy ones have got their shapes by a forward pass."""
    if has_lazy(model):
        forward(batches.first)
    layers = find_layers(model)
    if not layers:
        raise InitError(
            f"the model ({type(model).__name__}) has no weight layer (linear, bilinear, convolution): there is nothing to "
            "normalise."
        )
    return layers


def measure_layers(model: nn.Module, batches: Batches, select: Any, forward: Callable[..., Any] | None) -> InitReport:
    """A report of what every weight layer puts out, with nothing changed."""
    start = time.perf_counter()
    with rolled_back(model), at_rest(model):
        run = Forward(model, forward)
        layers = shaped_layers(model, run, batches)
        chosen = choose(model, layers, select)
        watch = Watch(model, layers, batch_norms(model, False) if len(batches) > 1 else {})
        found = measure(watch, run, batches, Probe(exact=True), Norms(), lambda: None)
    by_name = {layer.name: layer for layer in layers if layer.name in chosen}
    order = [name for name in found if name in by_name]
    order += [name for name, layer in by_name.items() if name not in found and not layer.latent]
    rows = tuple(_measured(by_name[name], found.get(name, [])) for name in order)
    return InitReport("layer_stats", rows, run.count, time.perf_counter() - start)


def _measured(layer: Layer, samples: list[Sample]) -> LayerRow:
    row = LayerRow(layer.name, layer.class_name, "measured", calls=len(samples))
    if samples:
        stats, share = samples[0].moments, samples[0].share
        return replace(row, mean_before=stats.mean, std_before=stats.std, count=stats.count, signal_share=share)
    if layer.problem:
        return replace(row, status="unhandled", reason=layer.problem)
    return replace(row, status="unreached", reason="never called in this forward pass")


def _put_back_unmet(before: dict[str, tuple[Tensor, Tensor]], layers: list[Layer], rows: dict[str, LayerRow]) -> None:
    """A layer that was never called keeps the weight that it had, unless that is also the weight of one that was."""
    called = [layer.matrix for layer in layers if layer.name in rows and rows[layer.name].calls]
    met = {matrix.tensor.data_ptr() for matrix in called if matrix is not None}
    for weight, value in before.values():
        if weight.data_ptr() not in met:
            weight.copy_(value)


def _checked(target_std: Callable[[str], float]) -> Callable[[str], float]:
    known: dict[str, float] = {}

    def target(name: str) -> float:
        if name not in known:
            value = target_std(name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise InitError(f"target_std({name!r}) gave {value!r}, wanted a number above 0.")
            known[name] = float(value)
        return known[name]

    return target


@contextmanager
def _random_state_kept_on_error() -> Iterator[None]:
    state = RandomState()
    try:
        yield
    except BaseException:
        state.restore()
        raise


@contextmanager
def _collector_paused(paused: bool) -> Iterator[None]:
    """For a single pass: what a snapshot makes of small objects would have all that torch has loaded walked over."""
    if not paused or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _mib(n: float) -> str:
    return f"{n / 2**20:,.0f} MiB"
