"""`LockStep`: the forward passes of all batches advance together, and wait for one another at each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from minitrain.init.calls import OutOfStep
from minitrain.init.channels import channels_of
from minitrain.init.forward import thread_at_rest
from minitrain.init.inputs import ModelInputs
from minitrain.init.meeting import Held, Noted, is_silent
from minitrain.init.memory import LiveBytes, give_back_freed_memory
from minitrain.init.strands import Strand, abandon
from minitrain.init.sweep import Norms, Stop, Sweep, activation_of, is_empty
from minitrain.init.watch import NormUse, Use

STRAND_BYTES = 8 * 2**20
"""What each thread holds for itself, such as the scratch memory of convolutions (measured: 6 MiB)."""


class LockStep(Sweep):
    """The forward passes of all batches advance together."""

    name = "lock-step"

    def _meet_all(self) -> None:
        with self.forward.state_kept() as restore:
            strands: list[Strand] = []
            before = [(module, dict(vars(module))) for module in self.forward.model.modules()]
            try:
                stops = []
                for inputs in self.batches:  # each is copied before the next one is drawn
                    strands.append(Strand(self._body(inputs)))
                    restore()
                    stops.append(strands[-1].advance())
                while any(stop is not None for stop in stops):
                    if len({None if stop is None else stop.key for stop in stops}) > 1:
                        raise OutOfStep("the batches do not go through the layers in the same order")
                    values = self._settle(stops)
                    stops.clear()
                    give_back_freed_memory()
                    for i, strand in enumerate(strands):
                        value, values[i] = values[i], None
                        stops.append(strand.advance(value))
                        value = None
            except Exception as error:
                if any(_keeps(module, attributes) for module, attributes in before):
                    raise OutOfStep(f"a module keeps tensors on itself ({type(error).__name__}: {error})") from error
                raise
            finally:
                abandon(strands)

    def _body(self, inputs: ModelInputs) -> Callable[[Strand], None]:
        originals = [inputs]
        del inputs

        def body(strand: Strand) -> None:
            fresh = originals.pop().fresh()  # the original is not held: it may come from a loader
            counts: Counter[str] = Counter()

            def visit(use: Use) -> Any:
                if is_empty(use):
                    return None
                counts[use.layer.name] += 1
                if self.is_settled(use):
                    return None
                sample = self.probe(use) if use.note is None else use.note.sample
                return strand.pause(Stop((use.layer.name, -1), use, sample))

            def visit_norm(use: NormUse) -> None:
                key = use.name, use.nth
                if key not in self.norms.known:
                    strand.pause(Stop(key, channels=channels_of(use.input, 1)))
                self.norms.apply(use)

            with thread_at_rest(self.forward.model):
                self.watch.run(self.forward.run_on, fresh, visit, visit_norm, self._note)
            self.complete(counts)

        return body

    def _note(self, use: Use) -> Noted | None:
        if self.is_settled(use) or is_empty(use):
            return None
        return Noted(self.probe(use), is_silent(use))

    def _settle(self, stops: list[Any]) -> list[Any]:
        """All are at the same place: what each of them goes on with."""
        first = stops[0]
        if first.channels is not None:
            total = first.channels
            for stop in stops[1:]:
                total = total.merge(stop.channels)
            self.norms.learn(first.key, total)
            return [None] * len(stops)
        if len({activation_of(stop.use) for stop in stops}) > 1:
            raise OutOfStep(f"what uses the output of layer {first.use.layer.name!r} first differs from batch to batch")
        if any(stop.sample is None for stop in stops):
            self.normalizer.settle_unmeasurable(first.use.layer, first.use.output)
            return [None] * len(stops)
        meeting = Held([stop.use for stop in stops], [stop.sample for stop in stops], self.probe)
        self.normalizer.settle(meeting)
        return list(meeting.outputs)


def _keeps(module: nn.Module, before: dict[str, Any]) -> bool:
    """The module has taken a tensor: another batch may have found it there."""
    return any(isinstance(value, Tensor) and before.get(name) is not value for name, value in vars(module).items())


def lock_step_bytes(sweep: Sweep) -> int:
    """How much memory lock-step would take: a pass over the first batch, in which the tensors that live are counted.

    It is an estimate: batches are taken to need memory in proportion to their size. What is kept of the batches themselves is
    not in it.
    """
    batches, most = sweep.batches, 0

    def visit(use: Use) -> None:
        nonlocal most
        again = isinstance(use.output, Tensor) and (use.layer.name not in sweep.watch.affine or use.behind is not None)
        most = max(most, live.now + (2 * use.output.nbytes if again else 0))

    def visit_norm(use: NormUse) -> None:
        nonlocal most
        most = max(most, live.now)
        if (use.name, use.nth) not in probing.known:
            probing.learn((use.name, use.nth), channels_of(use.input, 1))
        probing.apply(use)

    inputs, probing = batches.first, Norms()
    live = LiveBytes()
    model = sweep.forward.model
    live.ignore([*model.parameters(), *model.buffers(), *inputs.tensors])
    with sweep.watch.attached(), sweep.forward.state_kept(), live:
        sweep.watch.run(sweep.forward.run, inputs, visit, visit_norm, note=lambda use: Noted(None, False))
    sweep.tick()
    size = max(1, batches.nbytes[0])
    held = most * sum(batches.nbytes) / size + live.peak * max(batches.nbytes) / size
    return int(held) + len(batches) * STRAND_BYTES
