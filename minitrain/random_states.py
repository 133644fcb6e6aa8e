"""`RandomState`: a snapshot of every random number generator, to be put back, or kept in a checkpoint as plain data."""

from __future__ import annotations

import copy
import importlib
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch


class RandomState:
    """A snapshot of every global random number generator, and of the given ones (torch's, numpy's, python's).

    Covers python's `random`, numpy (when it is loaded), torch's CPU generator and those of every CUDA device (when CUDA
    is in use) and of MPS.

    Example:
        >>> state = RandomState()
        >>> a = torch.rand(3)
        >>> state.restore()
        >>> bool((torch.rand(3) == a).all())
        True
    """

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = sys.modules["numpy"].random.get_state(legacy=False) if "numpy" in sys.modules else None
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self._generators = [(g, _get_state(g)) for g in generators]

    def restore(self) -> None:
        """Put every generator back to where it was when the snapshot was taken."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
        for generator, state in self._generators:
            _set_state(generator, state)

    def state_dict(self) -> dict[str, Any]:
        """The snapshot as plain types and CPU tensors, which `torch.load(weights_only=True)` reads."""
        return {
            "python": _plain_state(self._python),
            "numpy": _plain_state(self._numpy),
            "torch": _plain_state(self._torch),
            "cuda": _plain_state(self._cuda),
            "mps": _plain_state(self._mps),
            "generators": [{"kind": _kind(g), "state": _plain_state(state)} for g, state in self._generators],
        }

    @classmethod
    def from_state_dict(cls, state: Any, generators: Iterable[Any] = ()) -> RandomState:
        """A snapshot from what `state_dict` gave, maybe in another process; `restore` then puts it in force.

        What this machine does not have is left out: numpy, MPS, CUDA devices beyond its own.

        Args:
            state: What `state_dict` gave. It may come from a stranger: no random state changes before all of it is checked.
            generators: As they were given when the snapshot was taken: as many, of the same kinds, in the same order.

        Raises:
            ValueError: It does not fit; the message says what.

        Example:
            >>> own = torch.Generator()
            >>> state = RandomState([own]).state_dict()
            >>> a = torch.rand(3), torch.rand(3, generator=own)
            >>> RandomState.from_state_dict(state, [own]).restore()
            >>> b = torch.rand(3), torch.rand(3, generator=own)
            >>> bool((a[0] == b[0]).all() and (a[1] == b[1]).all())
            True
        """
        generators = list(generators)
        _want(type(state) is dict, "it", state, "a dict")
        names = {"python", "numpy", "torch", "cuda", "mps", "generators"}
        _want(set(state) == names, "it", list(state), f"the entries {sorted(names)}")
        self = cls.__new__(cls)
        self._python = _checked("python", random.Random(), state["python"])
        self._torch = _checked("torch", torch.Generator(), state["torch"])
        self._numpy = self._cuda = self._mps = None
        if state["numpy"] is not None and (numpy := _numpy()):
            self._numpy = _checked(
                "numpy", numpy.random.RandomState(copy.deepcopy(numpy.random.get_bit_generator())), state["numpy"]
            )
        if state["cuda"] is not None:
            _want(type(state["cuda"]) is list, "cuda", state["cuda"], "a list")
            n = torch.cuda.device_count() if torch.cuda.is_available() else 0
            saved = [_bytes(f"cuda[{i}]", value) for i, value in enumerate(state["cuda"])]
            self._cuda = [
                _checked(f"cuda[{i}]", torch.Generator(f"cuda:{i}"), value) for i, value in enumerate(saved[:n])
            ]
        if state["mps"] is not None:
            mps = _bytes("mps", state["mps"])
            if torch.backends.mps.is_available():
                self._mps = _checked("mps", torch.Generator("mps"), mps)
        self._generators = _checked_generators(state["generators"], generators)
        return self


def _get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)  # numpy.random.RandomState


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


# -- random states in a file ------------------------------------------------------------------------------------------


def _kind(generator: Any) -> str:
    """What a state must fit to: a torch generator of a device type, python's, or one of numpy's."""
    if isinstance(generator, torch.Generator):
        return f"torch.Generator on {generator.device.type}"
    if isinstance(generator, random.Random):
        return "random.Random"
    name = "Generator" if hasattr(generator, "bit_generator") else "RandomState"
    return f"numpy.random.{name} of {_get_state(generator)['bit_generator']}"


def _plain_state(state: Any) -> Any:
    """The same in dicts, lists, numbers, strings and CPU tensors: numpy's arrays become lists."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _plain_state(value) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        return [_plain_state(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state  # an array or a number of numpy


def _checked_generators(states: Any, generators: list[Any]) -> list[tuple[Any, Any]]:
    _want(type(states) is list, "generators", states, "a list")
    if len(states) != len(generators):
        now, then = (", ".join(kinds) or "none" for kinds in (map(_kind, generators), _kinds(states)))
        raise ValueError(
            f"the random states hold {len(states)} generators of the loader ({then}), but there are {len(generators)} ({now})."
        )
    found = []
    for i, (entry, generator) in enumerate(zip(states, generators, strict=True)):
        name = f"generators[{i}]"
        _want(type(entry) is dict and set(entry) == {"kind", "state"}, name, entry, "a dict of kind and state")
        _want(_same(entry["kind"], _kind(generator)), f"{name}.kind", entry["kind"], repr(_kind(generator)))
        is_torch = isinstance(generator, torch.Generator)
        scratch = torch.Generator(generator.device) if is_torch else copy.deepcopy(generator)
        found.append((generator, _checked(name, scratch, entry["state"])))
    return found


def _kinds(states: list[Any]) -> list[str]:
    kinds = [entry.get("kind") if type(entry) is dict else None for entry in states]
    return [kind[:60] if type(kind) is str else "unknown" for kind in kinds]


def _checked(name: str, scratch: Any, plain: Any) -> Any:
    """A state from its plain form, after it has been put into `scratch`, a generator of the same kind."""
    if isinstance(scratch, torch.Generator):
        state = _bytes(name, plain)
        _want(state.numel() == scratch.get_state().numel(), name, plain, f"{scratch.get_state().numel()} bytes")
        if scratch.device.type == "cpu":
            _check_twister(name, state)
    else:
        state = _filled(name, plain, _get_state(scratch))
    try:
        _set_state(scratch, state)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the random states do not fit: {name} is not a valid state ({error}).") from error
    return state


def _bytes(name: str, value: Any) -> torch.Tensor:
    fits = type(value) is torch.Tensor and value.dtype == torch.uint8 and value.layout == torch.strided
    fits = fits and value.dim() == 1 and value.numel() <= 1 << 16 and value.device.type != "meta"
    _want(fits, name, value, "a tensor of bytes")
    result: torch.Tensor = value.detach().cpu().clone()  # map_location may have moved it
    return result


def _check_twister(name: str, state: torch.Tensor) -> None:
    """That torch's twister reads none but its own 624 words: it looks at each of these two numbers alone."""
    if state.numel() != 5056:  # a layout that we do not know
        return
    left, after = int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64))
    _want(0 < left <= 624 and after >= 0 and left + after <= 625, name, (left, after), "a position among 624 words")


# How far a position may go: numpy believes what it is told, and would read beyond its array.
_AT_MOST = {"pos": 624, "buffer_pos": 4, "has_uint32": 1, "has_gauss": 1, "uinteger": (1 << 32) - 1}


def _filled(name: str, plain: Any, like: Any, at_most: int | None = None) -> Any:
    """`plain` with the types of `like`, an actual state: the same keys, lengths and kinds of numbers."""
    if isinstance(like, dict):
        _want(type(plain) is dict and set(plain) == set(like), name, plain, f"a dict of {', '.join(like)}")
        return {key: _filled(f"{name}.{key}", plain[key], like[key], _AT_MOST.get(key)) for key in like}
    if isinstance(
        like, tuple
    ):  # python's: version, 624 words and a position, the second normal number of a pair or None
        _want(type(plain) is list and len(plain) == 3 and _same(plain[0], like[0]), name, plain, f"version {like[0]}")
        words, normal = plain[1:]
        _want(type(words) is list and len(words) == len(like[1]), name, words, f"{len(like[1])} numbers")
        _want(all(type(word) is int and 0 <= word < 1 << 32 for word in words), name, words, "numbers of 32 bits")
        _want(normal is None or type(normal) is float, name, normal, "a float or None")
        return like[0], tuple(words), normal
    if hasattr(like, "dtype") and hasattr(like, "shape"):
        most = 1 << 8 * like.dtype.itemsize
        _want(type(plain) is list and len(plain) == len(like), name, plain, f"{len(like)} numbers")
        _want(all(type(x) is int and 0 <= x < most for x in plain), name, plain, f"numbers of type {like.dtype}")
        return sys.modules["numpy"].array(plain, dtype=like.dtype)
    if isinstance(like, str):
        _want(_same(plain, like), name, plain, repr(like))
        return like
    if isinstance(like, float):
        _want(type(plain) in (int, float) and abs(plain) < 1e300, name, plain, "a number")
        return float(plain)
    most = (1 << 128) - 1 if at_most is None else at_most
    _want(type(plain) is int and 0 <= plain <= most, name, plain, f"an integer from 0 to {most}")
    return plain


def _same(value: Any, wanted: int | str) -> bool:
    """Equal and of the same plain type: a tensor would answer `==` with a tensor."""
    return type(value) is type(wanted) and bool(value == wanted)


def _want(fits: bool, name: str, value: Any, wanted: str) -> None:
    if not fits:
        got = f"{value!r:.60}" if isinstance(value, (int, str, float, tuple, type(None))) else type(value).__name__
        raise ValueError(f"the random states do not fit: {name} is {got}, wanted {wanted}.")


def _numpy() -> Any:
    """Numpy, or None where it is not installed: a saved state is for code that may not have loaded it yet."""
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None
