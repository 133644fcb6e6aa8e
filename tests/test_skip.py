import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from minitrain import BatchLoader
from minitrain.errors import DataError
from minitrain.preserve import loader_generators, preserve_rng
from minitrain.random_states import RandomState
from minitrain.skip import enter, inexact, loader_state

# -- data that draws random numbers -----------------------------------------------------------------------------------

AUGMENTATIONS = ["none", "python", "numpy", "torch", "own python", "own numpy", "own torch", "own legacy"]


class Data(Dataset):
    """Samples (index, a number drawn from somewhere)."""

    def __init__(self, n: int, augmentation: str) -> None:
        self.n, self.augmentation, self.fetched = n, augmentation, 0
        self.rng: Any = {
            "own python": random.Random(5),
            "own numpy": np.random.Generator(np.random.MT19937(5)),
            "own torch": torch.Generator().manual_seed(5),
            "own legacy": np.random.RandomState(5),
        }.get(augmentation)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[int, float]:
        self.fetched += 1
        match self.augmentation:
            case "none":
                return int(i), 0.0
            case "python":
                return int(i), random.random()
            case "numpy":
                return int(i), np.random.randn()
            case "torch":
                return int(i), torch.randn(3)[0].item()
            case "own torch":
                return int(i), torch.rand((), generator=self.rng).item()
            case "own numpy":
                return int(i), self.rng.standard_normal()
        return int(i), self.rng.random() if self.augmentation == "own python" else self.rng.randn()


class Stream(IterableDataset):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self):
        for _ in range(self.data.n):
            yield self.data[random.randrange(100)]


class Custom:
    """A loader of one's own: nothing but `__iter__`."""

    def __init__(self, data: Data, batch_size: int) -> None:
        self.dataset, self.batch_size = data, batch_size

    def __iter__(self):
        order = np.random.permutation(len(self.dataset)).tolist()
        for i in range(0, len(order), self.batch_size):
            yield [self.dataset[j] for j in order[i : i + self.batch_size]]


class OwnState:
    """A small loader that keeps its own state, and draws its batches one at a time."""

    def __init__(self, data: Data, batch_size: int) -> None:
        self.dataset, self.batch_size, self.left, self.given = data, batch_size, [], None

    def __iter__(self):
        self.left = random.sample(range(len(self.dataset)), len(self.dataset)) if self.given is None else self.given
        self.given = None
        return self.draw()

    def draw(self):
        while self.left:
            now, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
            yield [self.dataset[i] for i in now]

    def state_dict(self):
        return {"left": list(self.left)}

    def load_state_dict(self, state):
        self.given = list(state["left"])


class Numbered:
    """A loader with a method `batches(start)`."""

    def __init__(self, data: Data, batch_size: int) -> None:
        self.dataset, self.batch_size = data, batch_size

    def __iter__(self):
        return self.batches(0)

    def batches(self, start: int):
        for i in range(start * self.batch_size, len(self.dataset), self.batch_size):
            yield [self.dataset[j] for j in range(i, min(i + self.batch_size, len(self.dataset)))]


class OwnBatches(Sampler):
    """A batch sampler that draws at once when iteration begins, before the DataLoader draws the seed of its workers."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n, self.batch_size = n, batch_size

    def __iter__(self):
        return iter(torch.randperm(self.n).split(self.batch_size))


class OwnInit(DataLoader):
    def __init__(self, data: Data, size: int) -> None:
        super().__init__(data, batch_size=size, shuffle=True, collate_fn=list)


class OwnIter(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch, torch.rand(())


def jitter(x):
    return x + torch.rand(x.shape)


def make_loader(kind: str, augmentation: str, n: int, size: int, drop_last: bool, own: bool, workers: int = 0) -> Any:
    data = Data(n, augmentation)
    generator = torch.Generator().manual_seed(7) if own else None
    torch_loader = partial(DataLoader, data, num_workers=workers, generator=generator)
    batched = partial(torch_loader, batch_size=size, drop_last=drop_last)
    match kind:
        case "list":
            return [torch.full((2,), i) for i in range(n)]
        case "BatchLoader":
            loader = BatchLoader(torch.arange(float(n)), batch_size=size, shuffle=own, transform=jitter)
            loader.set_epoch(3)
            return loader
        case "in order":
            return batched()
        case "shuffled":
            return batched(shuffle=True)
        case "replacement":
            return batched(sampler=RandomSampler(data, replacement=True, num_samples=3 * n, generator=generator))
        case "many times":
            return batched(sampler=RandomSampler(data, num_samples=2 * n + 1, generator=generator))
        case "weighted":
            return batched(sampler=WeightedRandomSampler([1.0 + i for i in range(n)], 2 * n, generator=generator))
        case "subset":
            return batched(sampler=SubsetRandomSampler(range(0, n, 2), generator=generator))
        case "batch sampler":
            return torch_loader(batch_sampler=BatchSampler(RandomSampler(data, generator=generator), size, drop_last))
        case "own batches":
            return torch_loader(batch_sampler=OwnBatches(n, size))
        case "no batches":
            return torch_loader(batch_size=None, shuffle=True)
        case "no batches, batch sampler":
            batches = BatchSampler(SequentialSampler(data), size, drop_last)
            return DataLoader(IndexLists(data), batch_size=None, sampler=batches, generator=generator)
        case "subset of data":
            return DataLoader(Subset(data, range(0, n, 2)), batch_size=size, shuffle=True, generator=generator)
        case "own init":
            return OwnInit(data, size)
        case "own iter":
            return OwnIter(data, batch_size=size, shuffle=True, generator=generator)
        case "stream":
            return DataLoader(Stream(data), batch_size=size, drop_last=drop_last, generator=generator)
        case "custom":
            return Custom(data, size)
        case "own state":
            return OwnState(data, size)
    assert kind == "numbered"
    return Numbered(data, size)


class IndexLists(Dataset):
    def __init__(self, dataset: Data) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: list[int]) -> Any:
        return [self.dataset[i] for i in indices]


BY_INDEX = ["in order", "shuffled", "replacement", "many times", "weighted", "subset", "batch sampler", "own batches"]
BY_INDEX += ["no batches", "no batches, batch sampler", "subset of data", "own init"]
OTHERS = ["list", "BatchLoader", "own iter", "stream", "custom", "own state", "numbered"]

# -- a process that is broken off, and one that goes on ---------------------------------------------------------------


def train() -> list[float]:
    """What happens between two batches: random numbers are drawn from everywhere."""
    return [random.random(), np.random.randn(), *torch.rand(2).tolist()]


def numbers(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.dtype, batch.tolist()
    return [numbers(part) for part in batch] if isinstance(batch, (list, tuple)) else batch


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Process:
    """Training over one loader: `log` has every batch and every random number drawn."""

    def __init__(self, make: Any, seed: int) -> None:
        seed_all(seed)
        self.loader = make()
        self.generators = loader_generators(self.loader)
        self.log: list[Any] = []
        self.n_drawn, self.ended = 0, False

    def begin(self) -> None:
        self.began = RandomState(self.generators).state_dict()
        self.batches = iter(self.loader)

    def go_on(self, saved: Any) -> None:
        self.began, self.n_drawn, present, state = saved
        RandomState.from_state_dict(self.began, self.generators).restore()
        self.batches = enter(self.loader, self.n_drawn, state)
        RandomState.from_state_dict(present, self.generators).restore()

    def draw(self, n: int | None = None) -> None:
        for _ in range(10**6 if n is None else n):
            try:
                self.log.append(numbers(next(self.batches)))
            except StopIteration:
                self.ended = True
                return
            self.log.append(train())
            self.n_drawn += 1

    def save(self) -> Any:
        present = RandomState(self.generators).state_dict()
        return self.began, self.n_drawn, present, loader_state(self.loader)

    def finish(self) -> list[Any]:
        """The rest of this epoch and all of the next one."""
        self.draw()
        self.log.append(train())
        self.begin()
        self.draw()
        self.log.append(train())
        self.log.append(repr(RandomState(self.generators).state_dict()))
        return self.log


def check_exact(make: Any, start: int, again: int) -> None:
    """Break off after `start` batches, go on in another process, and after `again` more batches in a third."""
    with preserve_rng():
        first = Process(make, 1)
        first.begin()
        first.draw(start)
        if first.ended:  # to go on then is to begin the next epoch: break off after the last batch
            check_exact(make, first.n_drawn, again)
            return
        saved = first.save()
        done = len(first.log)
        log = first.finish()

        second = Process(make, 2)
        train()
        second.go_on(saved)
        second.draw(again)
        saved = second.save()
        assert second.log == log[done : done + len(second.log)]
        done += len(second.log)
        if second.ended:
            return

        third = Process(make, 3)
        third.go_on(saved)
        assert third.finish() == log[done:]


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(BY_INDEX + OTHERS),
    augmentation=st.sampled_from(AUGMENTATIONS),
    n=st.integers(1, 40),
    size=st.integers(1, 9),
    drop_last=st.booleans(),
    own=st.booleans(),
    start=st.integers(0, 40),
    again=st.integers(0, 10),
)
def test_a_pass_goes_on_as_if_it_had_not_been_broken_off(kind, augmentation, n, size, drop_last, own, start, again):
    if kind == "BatchLoader":
        drop_last = False
    check_exact(partial(make_loader, kind, augmentation, n, size, drop_last and n >= size, own), start, again)


@pytest.mark.parametrize("kind", BY_INDEX)
@pytest.mark.parametrize("own", [False, True])
def test_every_kind_of_sampler_goes_on_exactly(kind, own):
    for start in (0, 1, 3, 6):  # at 6 some have nothing left
        check_exact(partial(make_loader, kind, "torch", 24, 4, False, own), start, 1)


@pytest.mark.parametrize("kind", BY_INDEX)
def test_nothing_is_fetched_to_get_there(kind):
    loader = make_loader(kind, "none", 24, 3, False, True)
    data: Any = loader.dataset
    while not isinstance(data, Data):
        data = data.dataset
    batches = enter(loader, 3)
    assert data.fetched == 0
    next(batches)
    assert data.fetched == (1 if kind == "no batches" else 3)


def test_the_first_batch_fetched_is_the_one_to_go_on_at():
    loader = DataLoader(Data(10, "none"), batch_size=2)
    assert next(enter(loader, 3))[0].tolist() == [6, 7]
    assert loader.dataset.fetched == 2


@pytest.mark.parametrize("own", [False, True])
def test_workers_go_on_exactly_where_samples_are_a_function_of_the_index(own):
    check_exact(partial(make_loader, "shuffled", "none", 23, 3, False, own, workers=2), 3, 2)


def test_workers_go_on_exactly_with_a_sampler_that_draws_on_the_way():
    check_exact(partial(make_loader, "replacement", "none", 30, 4, False, True, workers=2), 7, 2)


def test_a_stream_of_workers_goes_on_exactly():
    check_exact(lambda: DataLoader(Stream(Data(12, "torch")), batch_size=2, num_workers=2), 3, 2)


# -- what a DataLoader was made with ----------------------------------------------------------------------------------


def note_worker(worker_id):
    torch.set_num_threads(1)
    get_worker_info().dataset.augmentation = f"worker {worker_id}"


class Told(Data):
    def __getitem__(self, i):
        return i, self.augmentation


def test_the_arguments_of_a_loader_are_kept():
    options = dict(collate_fn=tuple, worker_init_fn=note_worker, timeout=60, prefetch_factor=3, num_workers=2)
    options |= dict(multiprocessing_context="fork", persistent_workers=True)
    entered = enter(DataLoader(Told(8, "none"), batch_size=2, **options), 1)
    assert list(entered) == [
        ((2, "worker 0"), (3, "worker 0")),
        ((4, "worker 1"), (5, "worker 1")),
        ((6, "worker 0"), (7, "worker 0")),
    ]


def test_the_length_is_that_of_what_is_left():
    assert len(enter(DataLoader(range(10), batch_size=2), 2)) == 3


def test_a_loader_can_be_entered_many_times_and_is_not_changed():
    loader = DataLoader(range(6), batch_size=2)
    assert [len(list(enter(loader, k))) for k in (0, 1, 2, 3)] == [3, 2, 1, 0]
    assert len(list(loader)) == 3


# -- too few batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [[1, 2], (1, 2), BatchLoader(torch.zeros(4), batch_size=2), DataLoader(range(4), batch_size=2, shuffle=True)],
)
def test_a_loader_known_to_be_too_short_is_refused_before_anything_is_drawn(loader):
    before = RandomState().state_dict()
    with pytest.raises(DataError, match=r"cannot go on at batch 3: the loader \(\w+\) has only 2 batches"):
        enter(loader, 3)
    assert repr(RandomState().state_dict()) == repr(before)
    assert list(enter(loader, 2)) == []


@pytest.mark.parametrize(
    "make", [lambda: (i for i in range(2)), lambda: DataLoader(range(4), batch_sampler=OwnBatches(4, 2))]
)
def test_a_loader_that_comes_out_too_short_is_refused(make):
    with pytest.raises(DataError, match=r"cannot go on at batch 3: .* has only 2 batches"):
        enter(make(), 3)


def test_the_estimated_length_of_a_stream_does_not_count():
    class Sized(Stream):
        def __len__(self):
            return 1

    loader = DataLoader(Sized(Data(6, "none")), batch_size=2)
    assert len(list(enter(loader, 1))) == 2


# -- loaders with a state of their own --------------------------------------------------------------------------------


def test_only_loaders_with_a_state_of_their_own_have_one():
    assert loader_state(OwnState(Data(3, "none"), 1)) == {"left": []}
    for loader in ([1], DataLoader([1]), BatchLoader(torch.zeros(1)), Custom(Data(3, "none"), 1)):
        assert loader_state(loader) is None


def test_a_state_for_a_loader_that_cannot_take_it_is_refused():
    with pytest.raises(
        DataError, match=r"there is a saved state for the loader, but DataLoader has no load_state_dict"
    ):
        enter(DataLoader([1, 2]), 1, {"left": [1]})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("default")
def test_torchdatas_loader_goes_on_by_its_own_state(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    augmentation = "none" if workers else "torch"
    for own in (False, True):
        generator = torch.Generator() if own else None

        def make(generator=generator):
            options = dict(batch_size=3, shuffle=True, num_workers=workers, generator=generator)
            return stateful.StatefulDataLoader(Data(20, augmentation), **options)

        assert inexact(make()) is None
        check_exact(make, 3, 2)


@pytest.mark.filterwarnings("default")
def test_torchdatas_loader_does_not_save_what_is_random_in_a_worker():
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    make = partial(stateful.StatefulDataLoader, batch_size=3, num_workers=2)
    assert "the samples of Data are random" in inexact(make(Data(20, "torch")))
    with pytest.raises(AssertionError):
        check_exact(lambda: make(Data(20, "torch")), 3, 2)

    class Stateful(Data):
        def state_dict(self):
            return RandomState([self.rng]).state_dict()["generators"]

        def load_state_dict(self, state):
            self.rng.set_state(state[0]["state"])

    assert inexact(make(Stateful(20, "own torch"))) is None
    check_exact(lambda: make(Stateful(20, "own torch")), 3, 2)


# -- what cannot be exact ---------------------------------------------------------------------------------------------


def workers(data: Any, **options: Any) -> DataLoader:
    return DataLoader(data, num_workers=2, **options)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS[1:])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_random_samples_in_workers_are_told(augmentation, batch_size):
    loader = workers(Data(5, augmentation), batch_size=batch_size)
    generators = loader_generators(loader)
    before = repr(RandomState(generators).state_dict())
    said = inexact(loader)
    assert said.startswith("num_workers=2 and the samples of Data are random")
    for remedy in ("use num_workers=0", "a function of the index", "StatefulDataLoader"):
        assert remedy in said
    assert repr(RandomState(generators).state_dict()) == before


def test_it_is_so_indeed():
    with pytest.raises(AssertionError):
        check_exact(partial(make_loader, "in order", "torch", 30, 3, False, True, workers=2), 3, 1)


def test_samples_that_are_a_function_of_the_index_are_exact():
    class Seeded(Data):
        def __getitem__(self, i):
            torch.manual_seed(i)
            return {"x": torch.rand(3), "nan": float("nan"), "y": [np.full(2, np.nan), np.float32("nan"), "name"]}

    assert inexact(workers(Seeded(5, "none"))) is None
    assert inexact(workers(TensorDataset(torch.full((3, 2), float("nan"))))) is None


def test_a_flip_of_a_coin_that_falls_the_same_way_twice_is_told():
    class Coin(Data):
        def __getitem__(self, i):
            return i, torch.rand(()).item() < 0.25

    with preserve_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            assert torch.rand(2).min() > 0.25, "the seeds that inexact uses first: choose another coin"
    assert inexact(workers(Coin(5, "none"))) is not None


def test_a_random_collate_function_is_told():
    assert inexact(workers(range(5), collate_fn=lambda batch: torch.rand(1))) is not None
    assert inexact(DataLoader(range(5), collate_fn=lambda batch: torch.rand(1))) is None


def test_a_random_generator_made_anew_for_each_sample_is_told():
    class Fresh(Data):
        def __getitem__(self, i):
            return np.random.default_rng().random(3)

    assert inexact(workers(Fresh(5, "none"), collate_fn=list)) is not None


class Same:
    pass


class Unwilling:
    def __eq__(self, other):
        raise RuntimeError("do not compare me")

    __hash__ = None


@pytest.mark.parametrize("value", [Same, lambda: np.array([Same(), 3], dtype=object), Unwilling, lambda: 1 / 0])
def test_samples_that_cannot_be_compared_or_drawn_are_not_held_against_the_loader(value):
    class Odd(Data):
        def __getitem__(self, i):
            return value()

    assert inexact(workers(Odd(5, "none"), collate_fn=list)) is None


def test_what_lies_in_objects_is_compared():
    class Box(Data):
        def __getitem__(self, i):
            box = Same()
            box.x = {"sparse": [torch.rand(2, 2).to_sparse()]}
            return box

    assert inexact(workers(Box(5, "none"), collate_fn=list)) is not None


def test_without_workers_nothing_is_drawn_to_tell():
    loader = DataLoader(Data(5, "torch"))
    assert inexact(loader) is None
    assert loader.dataset.fetched == 0


@pytest.mark.parametrize("kind", ["list", "BatchLoader", "own state", "numbered"])
def test_loaders_with_numbered_batches_or_a_state_are_exact(kind):
    assert inexact(make_loader(kind, "torch", 6, 2, False, True)) is None


@pytest.mark.parametrize("kind", ["stream", "custom", "own iter"])
def test_loaders_without_an_index_are_exact_on_a_condition(kind):
    said = inexact(make_loader(kind, "torch", 6, 2, False, True))
    assert "exact only if they are a function of the random states" in said
    assert "StatefulDataLoader" in said
    assert "batches(start)" in said


def test_a_sequence_that_shuffles_in_its_iter_is_not_taken_by_number():
    class Shuffled(list):
        def __iter__(self):
            return iter(random.sample(self[:], len(self)))

    check_exact(lambda: Shuffled(range(8)), 3, 2)
    assert inexact(Shuffled(range(8))) is not None


def test_persistent_workers_draw_another_number_of_seeds():
    assert "use persistent_workers=False" in inexact(workers(Data(5, "none"), persistent_workers=True))
    assert "carries into later epochs" in inexact(workers(Data(5, "torch"), persistent_workers=True))


def test_persistent_workers_are_not_exact_indeed():
    with pytest.raises(AssertionError):
        check_exact(lambda: workers(Data(8, "none"), batch_size=2, shuffle=True, persistent_workers=True), 1, 1)


def test_workers_that_give_batches_out_of_order_are_told():
    assert "use in_order=True" in inexact(workers(Data(5, "none"), in_order=False))


def test_a_sampler_that_is_an_iterator_is_told():
    assert "an object whose __iter__ begins anew" in inexact(DataLoader(Data(5, "none"), sampler=iter(range(5))))
