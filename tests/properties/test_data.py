"""Properties of loaders: an order is a pure function of (seed, epoch), and drawing ahead is what training would see."""

import random
from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from minitrain.batch import concatenate, describe_batch, n_samples, to_device
from minitrain.data import BatchLoader, DataLoaders
from minitrain.peek import peek

seeds = st.integers(0, 2**40)
epochs = st.integers(0, 2**40)


@st.composite
def batch_loaders(draw, **options):
    """A BatchLoader over 0, 1, 2, ... in up to three tensors of different shapes, and its number of samples."""
    n = draw(st.integers(1, 40))
    shapes = draw(st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=3))
    tensors = [torch.arange(n).reshape(n, *[1] * len(shape)).expand(n, *shape) for shape in shapes]
    drop_last = draw(st.booleans())
    size = draw(st.integers(1, n if drop_last else n + 3))
    options = {"shuffle": draw(st.booleans()), "seed": draw(seeds)} | options
    return BatchLoader(*tensors, batch_size=size, drop_last=drop_last, **options), n


def rows(loader, start=0):
    """Batches as lists of indices; every tensor of a batch must tell the same ones."""
    found = []
    for batch in loader.batches(start):
        parts = batch if isinstance(batch, tuple) else (batch,)
        indices = [part.flatten(1)[:, 0].tolist() if part.ndim > 1 else part.tolist() for part in parts]
        assert all(index == indices[0] for index in indices)
        found.append(indices[0])
    return found


@settings(deadline=None)
@given(batch_loaders(), epochs)
def test_an_epoch_gives_every_sample_once_in_batches_of_the_stated_sizes(made, epoch):
    loader, n = made
    loader.set_epoch(epoch)
    batches = rows(loader)
    assert len(batches) == len(loader) > 0
    assert all(len(batch) == loader.batch_size for batch in batches[:-1])
    seen = [i for batch in batches for i in batch]
    assert len(seen) == (n - n % loader.batch_size if loader.drop_last else n)
    assert set(Counter(seen).values()) == {1}
    assert set(seen) <= set(range(n))
    if not loader.shuffle:
        assert seen == list(range(len(seen)))


@settings(deadline=None)
@given(batch_loaders(), st.lists(epochs, min_size=1, max_size=4), st.data())
def test_the_order_depends_on_nothing_but_seed_and_epoch(made, visited, data):
    loader, _ = made
    epoch = data.draw(epochs)
    fresh = BatchLoader(
        *loader.tensors,
        batch_size=loader.batch_size,
        shuffle=loader.shuffle,
        drop_last=loader.drop_last,
        seed=loader.seed,
    )
    fresh.set_epoch(epoch)
    expected = rows(fresh)
    for other in visited:
        loader.set_epoch(other)
        torch.rand(1), random.random(), np.random.rand()
        rows(loader, data.draw(st.integers(0, len(loader))))
    loader.set_epoch(epoch)
    before = torch.get_rng_state(), random.getstate()
    assert rows(loader) == rows(loader) == expected
    start = data.draw(st.integers(0, len(loader)))
    assert rows(loader, start) == expected[start:]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@settings(deadline=None)
@given(seeds, epochs, seeds, epochs)
def test_other_seeds_and_epochs_have_other_orders(seed, epoch, other_seed, other_epoch):
    def order(seed, epoch):
        loader = BatchLoader(torch.arange(100), batch_size=100, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return next(iter(loader)).tolist()

    same = (seed, epoch) == (other_seed, other_epoch)
    assert (order(seed, epoch) == order(other_seed, other_epoch)) == same
    assert (order(seed, epoch) == order(seed + 1, epoch)) is False
    assert (order(seed + 1, epoch) == order(seed, epoch + 1)) is False


@settings(deadline=None)
@given(batch_loaders(), st.booleans())
def test_a_batch_never_shares_memory_with_the_tensors(made, bare):
    loader, _ = made
    loader.tensors = tuple(t.contiguous().clone() for t in loader.tensors)
    if not bare:
        loader.transform = lambda *batch: [part.neg_() for part in batch]
    kept = [t.clone() for t in loader.tensors]
    for batch in loader:
        for part in batch if isinstance(batch, (tuple, list)) else (batch,):
            part.fill_(-7)
    assert all(map(torch.equal, loader.tensors, kept))


class Noisy(Dataset):
    def __init__(self, n, noise):
        self.n, self.noise = n, noise

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        noise = {"python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(()).item()}
        return torch.tensor([float(i), *(noise[name]() for name in self.noise)])


@st.composite
def loaders(draw):
    """Anything that `peek` takes, with its own generators."""
    n, size = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    dataset = Noisy(n, draw(st.lists(st.sampled_from(["python", "numpy", "torch"]), unique=True)))
    drop_last = draw(st.booleans()) and size <= n

    def generator():
        seed = draw(st.none() | st.integers(0, 99))
        return None if seed is None else torch.Generator().manual_seed(seed)

    sampler = RandomSampler(range(n), replacement=draw(st.booleans()), generator=generator())
    options = draw(
        st.sampled_from(
            [
                {"batch_size": size, "drop_last": drop_last},
                {"batch_size": size, "drop_last": drop_last, "shuffle": True},
                {"batch_size": size, "drop_last": drop_last, "sampler": sampler},
                {"batch_sampler": BatchSampler(sampler, size, drop_last)},
                {"batch_size": None, "shuffle": True},
            ]
        )
    )
    own = generator()
    noisy = st.sampled_from([None, lambda x: x + torch.rand(())])
    in_memory = BatchLoader(torch.arange(n), batch_size=size, shuffle=draw(st.booleans()), transform=draw(noisy))
    loader = draw(st.sampled_from([DataLoader(dataset, generator=own, **options), in_memory, list(in_memory)]))
    return loader, [g for g in (own, sampler.generator) if g is not None]


def states(generators):
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        [g.get_state().tolist() for g in generators],
    )


@settings(deadline=None)
@given(loaders(), st.integers(0, 99), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_peek_draws_what_training_would_see_and_moves_no_stream(made, seed, pauses):
    loader, generators = made
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    start = states(generators)
    saved = torch.get_rng_state(), random.getstate(), np.random.get_state()
    peeked, used = [], 0
    for batch in peek(loader):
        peeked.append(batch)
        k = pauses[len(peeked) % len(pauses)]  # the consumer's own random numbers lie in between
        torch.rand(k), np.random.rand(k), [random.random() for _ in range(k)]
        used += k
    torch.set_rng_state(saved[0]), random.setstate(saved[1]), np.random.set_state(saved[2])
    assert states(generators) == start
    again = list(peek(loader))
    assert states(generators) == start
    trained = list(loader)
    assert len(peeked) == len(again) == len(trained)
    assert all(map(torch.equal, peeked, trained))
    assert all(map(torch.equal, again, trained))


@settings(deadline=None)
@given(loaders(), st.integers(0, 99), st.integers(0, 3))
def test_the_consumer_of_peek_has_its_own_random_numbers(made, seed, k):
    loader, _ = made
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    mine = [(torch.rand(k), random.random(), np.random.rand()) for _ in peek(loader)]
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    for values, python, array in mine:
        assert torch.equal(torch.rand(k), values)
        assert (random.random(), np.random.rand()) == (python, array)


@settings(deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.lists(
        st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool]), min_size=1, max_size=3
    ),
)
def test_a_tensor_dataset_gives_what_a_data_loader_would_give(n, size, dtypes):
    dataset = TensorDataset(*[torch.randint(0, 2, (n, 2)).to(dtype) for dtype in dtypes])
    dls = DataLoaders.from_dataset(dataset, dataset, batch_size=size)
    for mine, theirs in zip(dls.valid, DataLoader(dataset, size), strict=True):
        mine = mine if isinstance(mine, tuple) else (mine,)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    whole = concatenate([batch if isinstance(batch, tuple) else (batch,) for batch in dls.train])
    for mine, theirs in zip(whole, dataset.tensors, strict=True):  # the same rows in another order
        assert sorted(map(tuple, mine.tolist())) == sorted(map(tuple, theirs.tolist()))


nested = st.recursive(
    st.builds(torch.zeros, st.lists(st.integers(1, 3), min_size=1, max_size=3))
    | st.none()
    | st.integers()
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner)
    ),
    max_leaves=8,
)


def leaves(batch):
    if isinstance(batch, (list, tuple)):
        return [leaf for item in batch for leaf in leaves(item)]
    return [leaf for item in batch.values() for leaf in leaves(item)] if isinstance(batch, dict) else [batch]


def form(batch):
    if isinstance(batch, (list, tuple)):
        return type(batch), [form(item) for item in batch]
    if isinstance(batch, dict):
        return dict, {key: form(item) for key, item in batch.items()}
    return tuple(batch.shape) if isinstance(batch, torch.Tensor) else batch


@settings(deadline=None)
@given(nested)
def test_to_device_moves_every_tensor_and_keeps_the_form(batch):
    assert to_device(batch, "cpu") is batch
    moved = to_device(batch, torch.device("meta"))
    assert form(moved) == form(batch)
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert [leaf.is_meta for leaf in leaves(moved) if isinstance(leaf, torch.Tensor)] == [True] * len(tensors)
    assert not any(tensor.is_meta for tensor in tensors)
    assert isinstance(describe_batch(batch), str)
    if tensors:
        assert n_samples(batch) == len(tensors[0])
