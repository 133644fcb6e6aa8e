"""`Sweep`: how the layers are met, in order of execution, all batches together at each one; with a single batch at once.

Several batches go in lock-step (`lockstep.py`), or are streamed (`streaming.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from minitrain.init.channels import Channels, channels_of
from minitrain.init.forward import Forward
from minitrain.init.inputs import Batches
from minitrain.init.meeting import Held, Probe
from minitrain.init.normalizer import Normalizer
from minitrain.init.sample import Sample
from minitrain.init.watch import NormUse, Use, Watch

Key = tuple[str, int]
"""What is waited for: a layer's name and -1, or a norm's name and the index of its call."""


class Norms:
    """The statistics that norms take from the batch: here from all batches."""

    def __init__(self) -> None:
        self.known: dict[Key, tuple[Tensor, Tensor]] = {}

    def learn(self, key: Key, channels: Channels) -> None:
        """This is what a norm would find in one batch of everything: its mean, and its variance without Bessel's correction."""
        self.known[key] = channels.mean, channels.m2 / channels.count

    def apply(self, use: NormUse) -> None:
        """Have the norm use them; its own are put back with all buffers, after the pass."""
        for name, value in zip(("running_mean", "running_var"), self.known[use.name, use.nth], strict=True):
            own, weight = use.module._buffers.get(name), use.module._parameters.get("weight")
            like = own if own is not None else weight if weight is not None else use.input
            use.module._buffers[name] = value.to(use.input.device, like.dtype)


class Sweep(ABC):
    """Meets each layer once, and has it normalised.

    Args:
        watch: Watches the layers.
        forward: Runs the model.
        batches: On these.
        probe: Measures outputs.
        normalizer: Decides and changes.
        tick: Called after each forward pass.

    Attributes:
        norms: The statistics that norms take from the batch.
        name: What the report calls it.
    """

    name = ""

    def __init__(
        self,
        watch: Watch,
        forward: Forward,
        batches: Batches,
        probe: Probe,
        normalizer: Normalizer,
        tick: Callable[[], None],
    ) -> None:
        self.watch, self.forward, self.batches = watch, forward, batches
        self.probe, self.normalizer, self.tick = probe, normalizer, tick
        self.norms = Norms()
        self._calls: Counter[str] = Counter()

    def normalize(self) -> None:
        """Meet all layers."""
        with self.watch.attached():
            self._meet_all()
        self.normalizer.settle_rest()
        self.normalizer.count_calls(self._calls)

    @abstractmethod
    def _meet_all(self) -> None: ...

    def is_settled(self, use: Use) -> bool:
        """The layer has had its turn."""
        return use.layer.name in self.normalizer.rows

    def complete(self, counts: Counter[str]) -> None:
        """A pass has come to its end: these are the calls in it."""
        self._calls |= counts
        self.tick()

    def measure(self, probe: Probe) -> dict[str, list[Sample]]:
        """A plain pass over every batch that changes nothing: for each layer the sample of each of its calls."""
        return measure(self.watch, self.forward, self.batches, probe, self.norms, self.tick)


def measure(
    watch: Watch, forward: Forward, batches: Batches, probe: Probe, norms: Norms, tick: Callable[[], None]
) -> dict[str, list[Sample]]:
    """A pass over every batch that changes nothing.

    Returns:
        For each layer that was called, in order of execution, the sample of each of its calls, over all batches.

    Raises:
        InitError: A layer puts out NaN or infinite values.
    """
    found: dict[str, list[Sample]] = {}
    calls: Counter[str] = Counter()

    def visit(use: Use) -> None:
        sample = probe(use)
        if sample is None:
            return
        samples, index = found.setdefault(use.layer.name, []), calls[use.layer.name]
        calls[use.layer.name] += 1
        if index == len(samples):
            samples.append(sample)
        else:
            samples[index] = samples[index].merge(sample)

    def visit_norm(use: NormUse) -> None:
        if (use.name, use.nth) in norms.known:
            norms.apply(use)

    with watch.attached():
        for inputs in batches:
            calls.clear()
            watch.run(forward, inputs, visit, visit_norm)
            tick()
    return found


class Together(Sweep):
    """A single batch: each layer is normalised at once, where it is met."""

    name = "one batch"

    def _meet_all(self) -> None:
        counts: Counter[str] = Counter()

        def visit(use: Use) -> Tensor | None:
            if is_empty(use):
                return None
            counts[use.layer.name] += 1
            if self.is_settled(use):
                return None
            sample = self.probe(use)
            if sample is None:
                self.normalizer.settle_unmeasurable(use.layer, use.output)
                return None
            meeting = Held([use], [sample], self.probe)
            self.normalizer.settle(meeting)
            return meeting.outputs[0]

        def visit_norm(use: NormUse) -> None:
            self.norms.learn((use.name, use.nth), channels_of(use.input, 1))
            self.norms.apply(use)

        self.watch.run(self.forward, self.batches.first, visit, visit_norm)
        self.complete(counts)


class Stop(NamedTuple):
    """Where a batch waits for the others."""

    key: Key
    use: Use | None = None
    sample: Sample | None = None
    channels: Channels | None = None
    more: bool = False  # behind it there are others that wait


def activation_of(use: Use | None) -> str:
    """The name of the activation behind a use; empty where none is looked for, or found."""
    return use.behind.name if use is not None and use.behind is not None else ""


def is_empty(use: Use) -> bool:
    """An expert that got no sample, say."""
    return isinstance(use.output, Tensor) and not use.output.numel()


def batch_norms(model: nn.Module, all_of_them: bool) -> dict[str, nn.Module]:
    """The norms that mix samples: all of them, or only those that take their statistics from the batch even in evaluation."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (all_of_them or module.running_mean is None)
    }
