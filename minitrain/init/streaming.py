"""`Streaming`: each batch runs up to the layer whose turn it is, and begins anew for the next one. Nothing is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from minitrain.init.channels import channels_of
from minitrain.init.inputs import ModelInputs
from minitrain.init.meeting import Meeting, float64_moments, is_silent
from minitrain.init.sample import Sample
from minitrain.init.sweep import Key, Stop, Sweep, activation_of, is_empty
from minitrain.init.watch import NormUse, Use
from minitrain.moments import Moments


class _Enough(BaseException):
    """Ends a forward pass early. Not an Exception: a model may catch those."""


class Streaming(Sweep):
    """Each batch runs up to the layer whose turn it is, and begins anew for the next one."""

    name = "streaming"

    def _meet_all(self) -> None:
        self._left = set(self._order(self.batches.first))
        while stops := self._first_stops():
            key = next(iter(stops)) if len(stops) == 1 else self._next_in_order(stops)
            if key is None:
                return
            stop = stops[key] if len(stops) == 1 else self._sweep(key)
            if stop is None:  # nobody comes there any more
                return
            if stop.channels is not None:
                self.norms.learn(key, stop.channels)
            elif stop.sample is None:
                assert stop.use is not None
                self.normalizer.settle_unmeasurable(stop.use.layer, stop.use.output)
            else:
                self.normalizer.settle(_Streamed(self, stop))
            self._left.discard(key)
            if not self._left and len(stops) == 1 and not stop.more:
                return  # that was the last one: every batch has run on to its end

    def _first_stops(self) -> dict[Key | None, Stop]:
        """Where each batch meets the first layer that has not had its turn; None for those that meet none."""
        stops: dict[Key | None, Stop] = {}

        def gather(inputs: ModelInputs) -> None:
            stop = self._pass(inputs, lambda key: True)
            key = None if stop is None else stop.key
            stop = stop or Stop(("", 0))
            stops[key] = _merged(stops[key], stop) if key in stops else stop

        for inputs in self.batches:
            gather(inputs)
        return {} if set(stops) == {None} else stops

    def _sweep(self, key: Key, look: Callable[[Use], Sample | None] | None = None) -> Stop | None:
        """Measure this layer in all batches that meet it."""
        found: Stop | None = None
        for inputs in self.batches:
            stop = self._pass(inputs, key.__eq__, look)
            if stop is not None:
                found = stop if found is None else _merged(found, stop)
        return found

    def _pass(
        self, inputs: ModelInputs, wanted: Callable[[Key], bool], look: Callable[[Use], Sample | None] | None = None
    ) -> Stop | None:
        """One batch, up to the first layer that is wanted (and, if nothing is to be looked at anew, has not had its turn)."""
        found: list[Stop] = []
        counts: Counter[str] = Counter()
        more = False

        def stop(key: Key, made: Callable[[], Stop]) -> None:
            nonlocal more
            if found:
                more = True
            elif wanted(key):
                found.append(made())
            if found and (more or look is not None or not self._left <= {found[0].key}):
                raise _Enough

        def visit(use: Use) -> None:
            if is_empty(use):
                return
            key = use.layer.name, -1
            counts[use.layer.name] += 1
            again = look is not None and counts[use.layer.name] == 1
            if again or not (self.is_settled(use) or any(key == other.key for other in found)):
                stop(key, lambda: Stop(key, use, self.probe(use) if look is None else look(use)))

        def visit_norm(use: NormUse) -> None:
            key = use.name, use.nth
            if key in self.norms.known:
                self.norms.apply(use)
            else:
                stop(key, lambda: Stop(key, channels=channels_of(use.input, 1)))

        try:
            self.watch.run(self.forward, inputs, visit, visit_norm)
        except _Enough:
            self.tick()
        else:
            self.complete(counts)
        return found[0]._replace(more=more) if found else None

    def _next_in_order(self, stops: dict[Key | None, Stop]) -> Key | None:
        """The batches do not meet the same layer first: find one that none of them meets behind another one that waits."""
        orders = [order for inputs in self.batches if (order := self._order(inputs))]
        for order in orders:
            if all(order[0] not in other[1:] for other in orders):
                return order[0]
        return orders[0][0] if orders else None  # they contradict each other: the verifying pass has the last word

    def _order(self, inputs: ModelInputs) -> list[Key]:
        """The layers that wait, in the order in which this batch meets them."""
        order: dict[Key, None] = {}

        def visit(use: Use) -> None:
            if not (is_empty(use) or self.is_settled(use)):
                order.setdefault((use.layer.name, -1))

        def visit_norm(use: NormUse) -> None:
            key = use.name, use.nth
            if key in self.norms.known:
                self.norms.apply(use)
            else:
                order.setdefault(key)

        self.watch.run(self.forward, inputs, visit, visit_norm)
        self.tick()
        return list(order)


class _Streamed(Meeting):
    """A layer whose outputs are not held: to measure again is to run all batches up to it again."""

    def __init__(self, sweep: Streaming, stop: Stop) -> None:
        assert stop.use is not None
        assert stop.sample is not None
        self._sweep, self._key = sweep, stop.key
        self.use, self.sample, self.dtype = stop.use, stop.sample, stop.use.output.dtype

    @property
    def silent(self) -> bool:  # type: ignore[override]
        """Looked at in the first batch, and in the others only if that one is."""
        if not is_silent(self.use):
            return False
        loud: list[bool] = []
        self._again(lambda use: loud.append(True) if not is_silent(use) else None)
        return not loud

    def remeasure(self, factor: float | None = None) -> Sample:
        return self._again(lambda use: self._sweep.probe(use, use.output, signal=False)) or Sample()

    def rescale(self, mean: float, factor: float) -> None:
        """Nothing is held that could be rescaled."""

    def rescale_channels(self, mean: Tensor, factor: Tensor) -> None:
        """Likewise."""

    def in_float64(self) -> Moments | None:
        incapable: list[bool] = []

        def look(use: Use) -> Sample | None:
            found = float64_moments([use])
            if found is None:
                incapable.append(True)
                return None
            return Sample(found)

        sample = self._again(look)
        return None if incapable or sample is None else sample.moments

    def _again(self, look: Callable[[Use], Sample | None]) -> Sample | None:
        stop = self._sweep._sweep(self._key, look)
        return None if stop is None else stop.sample


def _merged(a: Stop, b: Stop) -> Stop:
    """Of two batches at the same place; the use of the first one stands for both."""
    a = a._replace(more=a.more or b.more)
    if a.channels is not None and b.channels is not None:
        return a._replace(channels=a.channels.merge(b.channels))
    if activation_of(a.use) != activation_of(b.use):  # there is no measuring them as one
        return a._replace(sample=None)
    if a.sample is None or b.sample is None:
        return a._replace(sample=None)
    return a._replace(sample=a.sample.merge(b.sample))
