"""`Finding`: one thing that is wrong inside a net, as a sentence with names and numbers, and the knob to turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MOST_NAMED = 5

ADVICE = {
    "nonfinite": "Look for NaN in the data, for a log, a root or a division; lower the learning rate, or clip the gradients.",
    "cut_off": "See whether forward uses them, and for a detach behind them; or freeze them: requires_grad_(False).",
    "dead": "Lower the learning rate or warm it up, initialise by LSUV(), or use an activation that always lets a gradient "
    "through (LeakyReLU, GELU).",
    "small_std": "Initialise by LSUV(), or put a normalisation layer behind.",
    "large_std": "Scale the inputs, initialise by LSUV(), or put a normalisation layer behind; lower the learning rate.",
    "vanishing": "Initialise by LSUV(), or give the net normalisation layers or residual connections.",
    "exploding": "Initialise by LSUV(), clip the gradients, or give the net normalisation layers.",
    "slow": "Raise the learning rate, or look whether a part of the net is cut off from the loss.",
    "fast": "Lower the learning rate, or warm it up.",
}


OUTSIDE = {
    ("first_std", 0): ("small_std", "Outputs had a standard deviation below {limit} at the first step", "layer"),
    ("first_std", 1): ("large_std", "Outputs had a standard deviation above {limit} at the first step", "layer"),
    ("std", 0): ("small_std", "Outputs have a standard deviation below {limit}", "layer"),
    ("std", 1): ("large_std", "Outputs have a standard deviation above {limit}", "layer"),
    ("gradient", 0): ("vanishing", "Gradients vanish: their norm is below {limit} of that at the last one", "layer"),
    ("gradient", 1): (
        "exploding",
        "Gradients explode: their norm is above {limit} times that at the last one",
        "layer",
    ),
    ("update_ratio", 0): ("slow", "Updates are smaller than {limit} of the weights", "parameter"),
    ("update_ratio", 1): ("fast", "Updates are larger than {limit} of the weights", "parameter"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, at one or several layers.

    Attributes:
        kind: "nonfinite", "cut_off", "dead", "small_std", "large_std", "vanishing", "exploding", "slow" or "fast".
        layers: The layers (of update ratios: the parameters) with their numbers, the worst first.
        what: What was found, as a sentence with numbers and names.
        advice: Which knob to turn.
    """

    kind: str
    layers: dict[str, float]
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what} {self.advice}"


def listed(values: dict[str, float], unit: str, form: Callable[[float], str] | None = None) -> str:
    """`3 layers: 'a' (0.9), 'b' (0.8), ...`, the worst first."""
    named = [f"{name!r} ({(form or _number)(value)})" for name, value in list(values.items())[:_MOST_NAMED]]
    more = len(values) - len(named)
    return f"{len(values)} {unit}{'s' * (len(values) > 1)}: {', '.join(named)}" + (f" and {more} more" if more else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if value < 1e5 and (value >= 10 or value == int(value)) else f"{value:.2g}"
