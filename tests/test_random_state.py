import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from minitrain.passes import set_epoch
from minitrain.preserve import loader_generators, preserve_rng, with_samplers
from minitrain.random_states import RandomState

BIT_GENERATORS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


def make_generators(seed: int = 0) -> list[Any]:
    numpy = [np.random.Generator(getattr(np.random, name)(seed)) for name in BIT_GENERATORS]
    legacy = np.random.RandomState(seed)
    return [torch.Generator().manual_seed(seed), random.Random(seed), *numpy, legacy]


def draw(generators: list[Any]) -> list[Any]:
    """Numbers from everywhere; an odd number of 32 bits and of normal ones, so that halves lie in store."""
    drawn: list[Any] = [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), np.random.bytes(3)]
    drawn += [torch.rand(3).tolist(), torch.randn(5).tolist(), torch.randn(17).tolist()]
    for g in generators:
        if isinstance(g, torch.Generator):
            drawn += [torch.rand(1, generator=g).item(), torch.randn(3, generator=g).tolist()]
        elif isinstance(g, random.Random):
            drawn += [g.random(), g.gauss(0, 1)]
        elif isinstance(g, np.random.RandomState):
            drawn += [g.rand(), g.randn()]
        else:
            drawn += [g.random(dtype=np.float32), g.integers(10, dtype=np.int32), g.standard_normal()]
    return drawn


def through_a_file(state: Any, tmp_path: Any) -> Any:
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("n_before", [0, 1, 2, 700])
def test_a_state_that_went_through_a_file_goes_on_where_it_was(tmp_path, n_before):
    with preserve_rng():
        generators = make_generators()
        for _ in range(n_before):
            draw(generators)
        state = RandomState(generators).state_dict()
        expected = [draw(generators) for _ in range(3)]
        loaded = through_a_file(state, tmp_path)

        fresh = make_generators(seed=1)
        RandomState.from_state_dict(loaded, fresh).restore()
        assert [draw(fresh) for _ in range(3)] == expected


def test_the_state_consists_of_plain_types_and_cpu_tensors_of_its_own():
    plain = {dict, list, int, float, str, type(None), torch.Tensor}

    def check(value):
        assert type(value) in plain
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part)

    snapshot = RandomState(make_generators())
    state = snapshot.state_dict()
    check(state)
    state["torch"].zero_()
    assert snapshot.state_dict()["torch"].any()


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_numpys_global_generator_may_be_of_any_kind(tmp_path, name):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, name)(3))
        np.random.randn()
        state = through_a_file(RandomState().state_dict(), tmp_path)
        expected = draw([])
        np.random.set_bit_generator(getattr(np.random, name)(4))
        RandomState.from_state_dict(state).restore()
        assert draw([]) == expected
        np.random.set_bit_generator(np.random.PCG64(3) if name != "PCG64" else np.random.SFC64(3))
        with pytest.raises(ValueError, match=r"numpy"):
            RandomState.from_state_dict(state)
    finally:
        np.random.set_bit_generator(before)


def test_a_snapshot_of_fewer_or_other_generators_is_refused_and_nothing_moves():
    generators = make_generators()
    state = RandomState(generators).state_dict()
    others = [*generators[:1], *generators[2:], generators[1]]
    before = RandomState(generators).state_dict()
    with pytest.raises(ValueError, match=r"hold 8 generators .* there are 2 \(torch.Generator on cpu, random.Random\)"):
        RandomState.from_state_dict(state, generators[:2])
    with pytest.raises(
        ValueError, match=r"generators\[1\].kind is 'random.Random', wanted 'numpy.random.Generator of MT19937'"
    ):
        RandomState.from_state_dict(state, others)
    assert_same(before, RandomState(generators).state_dict())


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is that could be garbage; of long lists the ends."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)) if len(value) < 20 else (0, 1, len(value) - 1):
            found += places(value[i], (*path, i))
    return found


def replaced(value: Any, path: tuple[Any, ...], garbage: Any) -> Any:
    if not path:
        return garbage
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], garbage)
    return value


GARBAGE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 5, 625, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 1 << 127, 1 << 128, 1 << 2000])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        [
            torch.zeros(5056, dtype=torch.uint8),
            torch.full((5056,), 255, dtype=torch.uint8),
            torch.zeros(1),
            torch.zeros((), dtype=torch.uint8),
            torch.zeros(16, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.uint8).expand(5056),
            torch.zeros(1, dtype=torch.uint8).expand(1 << 40),
            torch.zeros(3, 3).to_sparse(),
            torch.zeros(5056, dtype=torch.uint8, device="meta"),
            torch.tensor([1, 2]),
            torch.tensor(True),
            3j,
            b"MT19937",
            "MT19937",
            [0] * 624,
            [0] * 625,
            [1] * 624 + [10**9],
            {"kind": "random.Random"},
        ]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_garbage_anywhere_is_a_value_error_or_a_valid_state_and_nothing_moves(data):
    generators = make_generators()
    state = RandomState(generators).state_dict()
    path = data.draw(st.sampled_from(places(state)))
    hostile = replaced(state, path, data.draw(GARBAGE))
    with preserve_rng(generators):
        try:
            snapshot = RandomState.from_state_dict(hostile, generators)
        except ValueError:
            assert_same(state, RandomState(generators).state_dict())
            return
        assert_same(state, RandomState(generators).state_dict())
        snapshot.restore()
        for _ in range(400):  # beyond the words in store
            draw(generators)


@pytest.mark.parametrize("state", [None, 1, "x", [], {}, {"python": 1}, torch.zeros(3), {1: 2}])
def test_something_else_is_refused(state):
    with pytest.raises(ValueError, match=r"^the random states do not fit"):
        RandomState.from_state_dict(state)


@pytest.mark.parametrize("name", ["pos", "buffer_pos"])
def test_a_position_beyond_numpys_words_is_refused(name):
    generators = make_generators()
    state = RandomState(generators).state_dict()
    for path in places(state):
        if path and path[-1] == name:
            with pytest.raises(ValueError, match=rf"{name} is 1000, wanted an integer from 0"):
                RandomState.from_state_dict(replaced(state, path, 1000), generators)


@pytest.mark.parametrize(("left", "after"), [(624, 624), (2, 1 << 40), (600, 300), (0, 0), (-1, 0), (5, -5)])
def test_a_position_beyond_torchs_words_is_refused(left, after):
    state = RandomState().state_dict()
    state["torch"][8:12].view(torch.int32).fill_(left)
    state["torch"][16:24].view(torch.int64).fill_(after)
    with pytest.raises(ValueError, match="torch is"):
        RandomState.from_state_dict(state)


def test_torchs_twister_can_be_saved_at_every_position():
    with preserve_rng():
        torch.manual_seed(0)
        for _ in range(1300):
            RandomState.from_state_dict(RandomState().state_dict())
            torch.empty((), dtype=torch.int32).random_()


def test_states_of_devices_that_are_not_here_are_left_out():
    state = RandomState().state_dict()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 2)
    RandomState.from_state_dict(state).restore()
    for wrong in (3, [3], [torch.zeros(16)]):
        with pytest.raises(ValueError, match="cuda"):
            RandomState.from_state_dict(state | {"cuda": wrong})
    with pytest.raises(ValueError, match="mps"):
        RandomState.from_state_dict(state | {"mps": "x"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_of_the_gpu_come_back(tmp_path):
    own = torch.Generator("cuda").manual_seed(3)
    torch.rand(3, device="cuda")
    state = through_a_file(RandomState([own]).state_dict(), tmp_path)
    expected = torch.rand(3, device="cuda"), torch.rand(3, device="cuda", generator=own)
    fresh = torch.Generator("cuda")
    for loaded in (state, torch.load(tmp_path / "state.pt", weights_only=True, map_location="cuda")):
        torch.cuda.manual_seed_all(9)
        RandomState.from_state_dict(loaded, [fresh]).restore()
        assert torch.rand(3, device="cuda").equal(expected[0])
        assert torch.rand(3, device="cuda", generator=fresh).equal(expected[1])
    with pytest.raises(ValueError, match=r"kind is 'torch.Generator on cuda', wanted 'torch.Generator on cpu'"):
        RandomState.from_state_dict(state, [torch.Generator()])
    with pytest.raises(ValueError, match=r"cuda\[0\]"):
        RandomState.from_state_dict(state | {"cuda": [torch.full((16,), 255, dtype=torch.uint8)]}, [fresh])


def test_without_numpy_its_state_is_left_out(monkeypatch):
    state = RandomState().state_dict()
    monkeypatch.setitem(sys.modules, "numpy", None)  # an import of it fails
    snapshot = RandomState.from_state_dict(state)
    monkeypatch.undo()
    before = RandomState().state_dict()["numpy"]
    np.random.rand()
    moved = RandomState().state_dict()["numpy"]
    snapshot.restore()
    assert RandomState().state_dict()["numpy"] == moved != before


def test_another_process_goes_on_where_this_one_was(tmp_path):
    state = RandomState().state_dict()
    torch.save(state, tmp_path / "state.pt")
    with preserve_rng():
        expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    code = (
        "import sys, random, torch; from minitrain.preserve import RandomState;"
        "RandomState.from_state_dict(torch.load(sys.argv[1], weights_only=True)).restore();"
        "import numpy as np; print([random.random(), float(np.random.rand()), torch.rand(1).item()])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state.pt")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert out.stdout.strip() == str([float(x) for x in expected])


# -- the generators of a loader ---------------------------------------------------------------------------------------


class Owner(Dataset):
    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> int:
        return i


def test_generators_of_nested_datasets_are_found_once_each():
    a, b, c = np.random.default_rng(0), random.Random(0), torch.Generator()
    legacy = np.random.RandomState(0)
    data = ConcatDataset([Subset(Owner(a), [0]), Subset(Subset(Owner(b), [1]), [0]), Owner(c), Owner(a), Owner(legacy)])
    found = loader_generators(DataLoader(data, shuffle=True, generator=c))
    assert len(found) == 4
    assert all(any(g is f for f in found) for g in (a, b, c, legacy))


def test_generators_of_an_iterable_dataset_are_found():
    class Stream(IterableDataset):
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def __iter__(self):
            return iter(())

    data = Stream()
    assert loader_generators(DataLoader(data)) == [data.rng]


def test_a_generator_without_a_state_is_no_reason_to_fail():
    RandomState(loader_generators(DataLoader(Owner(random.SystemRandom()))))


def test_a_dataset_that_contains_itself_is_followed_once():
    data = Owner(None)
    data.dataset = data
    data.datasets = [data]
    assert with_samplers(data) == [data]


def test_a_dataset_that_cannot_be_had_yet_is_passed_over():
    class Loader:
        @property
        def dataset(self):
            raise RuntimeError("call setup() first")

    loader = Loader()
    assert with_samplers(loader) == [loader]


def test_datasets_and_samplers_are_told_the_epoch_once():
    told = []

    class Told(Owner):
        def set_epoch(self, epoch):
            told.append((self, epoch))

    inner, sampler = Told(None), RandomSampler(range(5))
    sampler.set_epoch = lambda epoch: told.append((sampler, epoch))
    data = ConcatDataset([Subset(inner, [0, 1]), inner])
    set_epoch(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)), 7)
    assert told == [(sampler, 7), (inner, 7)]


def test_an_iterable_dataset_is_told_the_epoch():
    class Stream(IterableDataset):
        epoch = 0

        def __iter__(self):
            return iter(())

        def set_epoch(self, epoch):
            self.epoch = epoch

    data = Stream()
    set_epoch(DataLoader(data), 3)
    assert data.epoch == 3
