"""Loaders, and what the loop does with a batch: what is built from which dataset, and what is refused."""

import copy
import gzip
import random
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from minitrain.batch import concatenate, describe_batch, n_samples, split_batch, to_device
from minitrain.data import BatchLoader, DataLoaders
from minitrain.errors import DataError, InitError
from minitrain.peek import peek, shuffles

X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10)
POINT = namedtuple("POINT", "x y")


class Squares(Dataset):
    """A map-style dataset without tensors at hand; `noise` draws from all three global random states."""

    def __init__(self, n=10, noise=False):
        self.n, self.noise = n, noise

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(()) if self.noise else 0.0
        return torch.tensor([float(i), i**2]) + noise, i


class Batched(Squares):
    def __getitems__(self, indices):
        return [self[i] for i in reversed(indices)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X, Y)])

    def __len__(self):
        return 1


def equal(a, b):
    """Whether two batches have the same form and the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


# -- DataLoaders ------------------------------------------------------------------------------------------------------


def test_data_loaders_take_any_iterables_of_batches():
    for loader in (
        [(X, Y)],
        ((X, Y),),
        DataLoader(Squares()),
        BatchLoader(X, Y),
        iter([(X, Y)]),
        (b for b in [(X, Y)]),
    ):
        dls = DataLoaders(loader, loader)
        assert dls.train is loader
        assert dls.valid is loader
    assert DataLoaders([(X, Y)]).valid is None


LOADERS = {
    "none": (None, "train=None, wanted an iterable of batches"),
    "a number": (3, "train=3, wanted an iterable"),
    "a dataset": (
        TensorDataset(X, Y),
        "train=TensorDataset.*by DataLoaders.from_dataset",
    ),
    "an iterable dataset": (Stream(), "train=Stream.*make a torch DataLoader"),
    "a tensor": (X, r"train=float32 \(10, 3\) cpu.*BatchLoader\(x, y\)"),
    "an array": (X.numpy(), "train=ndarray.*BatchLoader"),
    "a text": ("train", "train='train'.*iterable of batches"),
    "a dict": ({"x": X}, r"train=\{'x': float32 \(10, 3\) cpu\}"),
    "a class": (BatchLoader, r"train=class BatchLoader.*did you forget \(\)"),
    "an object": (object(), "train=object, wanted an iterable"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_data_loaders_refuse(name):
    wrong, match = LOADERS[name]
    with pytest.raises(TypeError, match=match):
        DataLoaders(wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match=match.replace("train=", "valid=")):
            DataLoaders([(X, Y)], wrong)


def test_data_loaders_say_what_they_hold():
    dls = DataLoaders(BatchLoader(X, Y, batch_size=4), iter([(X, Y)]))
    assert repr(dls) == "DataLoaders(train=BatchLoader of 3 batches, valid=list_iterator)"
    assert repr(DataLoaders(DataLoader(Stream(), batch_size=None))).startswith(
        "DataLoaders(train=DataLoader of 1 batches"
    )


# -- from_dataset -----------------------------------------------------------------------------------------------------


def test_from_dataset_slices_the_tensors_of_a_tensor_dataset_as_they_are():
    images = torch.randint(0, 256, (10, 4, 4), dtype=torch.uint8)
    dls = DataLoaders.from_dataset(
        TensorDataset(images, Y.float()), TensorDataset(images, Y), batch_size=4, valid_batch_size=6
    )
    assert isinstance(dls.train, BatchLoader)
    assert (dls.train.shuffle, dls.valid.shuffle) == (True, False)
    assert [len(y) for _, y in dls.train] == [4, 4, 2]
    assert [len(y) for _, y in dls.valid] == [6, 4]
    x, y = next(iter(dls.train))
    assert (x.dtype, y.dtype) == (torch.uint8, torch.float32)
    assert equal(list(dls.valid), [tuple(b) for b in DataLoader(TensorDataset(images, Y), batch_size=6)])


def test_from_dataset_shares_the_memory_of_a_tensor_dataset():
    assert DataLoaders.from_dataset(TensorDataset(X, Y)).train.tensors[0].data_ptr() == X.data_ptr()


def test_from_dataset_follows_subsets_of_subsets():
    dataset = Subset(Subset(TensorDataset(X, Y), [9, 7, 5, 3]), [2, 0, -1])
    loader = DataLoaders.from_dataset(dataset, shuffle=False).train
    assert isinstance(loader, BatchLoader)
    assert loader.tensors[1].tolist() == [dataset[i][1].item() for i in range(3)] == [5, 9, 3]
    split = torch.utils.data.random_split(TensorDataset(X, Y), [6, 4], torch.Generator().manual_seed(0))
    dls = DataLoaders.from_dataset(*split)
    assert sorted(dls.train.tensors[1].tolist() + dls.valid.tensors[1].tolist()) == list(range(10))


def test_from_dataset_reads_other_datasets_by_a_data_loader():
    dls = DataLoaders.from_dataset(Squares(), Squares(3), batch_size=4, drop_last=True)
    assert isinstance(dls.train, DataLoader)
    assert isinstance(dls.train.sampler, RandomSampler)
    assert [len(y) for _, y in dls.train] == [4, 4]
    assert [y.tolist() for _, y in dls.valid] == [[0, 1, 2]]

    class Changed(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] * 2

    assert isinstance(DataLoaders.from_dataset(Changed(X, Y)).train, DataLoader)
    assert isinstance(DataLoaders.from_dataset([(x, y) for x, y in zip(X, Y, strict=True)]).train, DataLoader)


def test_from_dataset_gives_its_data_loaders_a_generator_of_their_own():
    def orders(seed):
        dls = DataLoaders.from_dataset(Squares(40), Squares(4), batch_size=40, seed=seed)
        before = random_states()
        drawn = [y.tolist() for _ in range(2) for _, y in dls.train]
        list(dls.valid)
        assert random_states() == before
        return drawn

    assert orders(1) == orders(1) != orders(2)
    assert orders(1)[0] != orders(1)[1]


def test_from_dataset_takes_a_data_loader_wherever_its_options_are_given():
    dls = DataLoaders.from_dataset(TensorDataset(X, Y), batch_size=4, shuffle=False, collate_fn=len)
    assert isinstance(dls.train, DataLoader)
    assert list(dls.train) == [4, 4, 2]


FROM_DATASET = {
    "none": ({"train": None}, TypeError, "train=None, wanted a map-style dataset"),
    "a tensor": ({"train": X}, TypeError, r"train=float32.*TensorDataset\(x, y\)"),
    "an array": ({"train": X.numpy()}, TypeError, "train=ndarray.*TensorDataset"),
    "a text": ({"train": "mnist"}, TypeError, "train='mnist'"),
    "a dict": ({"train": {0: 1}}, TypeError, r"train=\{0: 1\}"),
    "a generator": ({"train": iter([1])}, TypeError, "train=list_iterator, wanted a map-style dataset"),
    "a class": ({"train": Squares}, TypeError, r"train=class Squares.*did you forget \(\)"),
    "a loader": ({"train": DataLoader(Squares())}, TypeError, r"loader already, use DataLoaders\(train, valid\)"),
    "a batch loader": ({"train": BatchLoader(X)}, TypeError, "loader already"),
    "an iterable dataset": ({"train": Stream()}, TypeError, "train=Stream.*make a torch DataLoader"),
    "an empty dataset": ({"train": Squares(0)}, ValueError, "train=Squares is empty"),
    "an empty validation set": ({"valid": Squares(0)}, ValueError, "valid=Squares is empty"),
    "batch size zero": ({"batch_size": 0}, ValueError, "batch_size=0, wanted an integer >= 1"),
    "batch size zero, by samples": ({"train": Squares(), "batch_size": 0}, ValueError, "batch_size=0"),
    "batch size negative": ({"batch_size": -1}, ValueError, "batch_size=-1"),
    "batch size a bool": ({"train": Squares(), "batch_size": True}, TypeError, r"batch_size=True \(type=bool\)"),
    "validation batch size": ({"valid_batch_size": 0}, ValueError, "valid_batch_size=0"),
    "seed negative": ({"train": Squares(), "seed": -1}, ValueError, "seed=-1"),
    "shuffle a text": ({"shuffle": "yes"}, TypeError, "shuffle='yes'.*True or False"),
    "drop_last leaves nothing": (
        {"drop_last": True, "batch_size": 11},
        ValueError,
        "drop_last=True with 10 samples gives no batch",
    ),
    "drop_last leaves nothing, by samples": (
        {"train": Squares(3), "drop_last": True, "batch_size": 8},
        ValueError,
        "drop_last=True with 3 samples gives no batch of batch_size=8",
    ),
    "transform of samples": (
        {"train": Squares(), "transform": len},
        ValueError,
        "transform=.* is for batches made from tensors",
    ),
    "transform of samples in validation": (
        {"valid": Squares(), "transform": len},
        ValueError,
        "valid=Squares is read sample by",
    ),
    "transform beside options": ({"transform": len, "num_workers": 0}, ValueError, "transform=.*num_workers"),
    "transform not callable": ({"transform": 3}, TypeError, "transform=3.*not callable"),
    "device of samples": (
        {"train": Squares(), "device": "cpu"},
        ValueError,
        "device=.* is for batches made from tensors",
    ),
    "unknown option": ({"num_werkers": 1}, TypeError, "num_werkers"),
}


@pytest.mark.parametrize("name", FROM_DATASET)
def test_from_dataset_refuses(name):
    options, error, match = FROM_DATASET[name]
    with pytest.raises(error, match=match):
        DataLoaders.from_dataset(**{"train": TensorDataset(X, Y)} | options)


# -- from_dataset: torchvision ----------------------------------------------------------------------------------------


def vision(name, data, targets, transform=None, target_transform=None, **attributes):
    """A dataset of torchvision in memory, without its files."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    dataset = kind.__new__(kind)
    datasets.VisionDataset.__init__(dataset, "nowhere", transform=transform, target_transform=target_transform)
    dataset.data = data
    setattr(dataset, "labels" if name in ("SVHN", "STL10", "SEMEION") else "targets", targets)
    vars(dataset).update(attributes)
    return dataset


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


VISION = {
    "MNIST, tensors": ("MNIST", torch.from_numpy(pixels(5, 28, 28)), torch.tensor([3, 1, 4, 1, 5]), (1, 28, 28)),
    "FashionMNIST": ("FashionMNIST", torch.from_numpy(pixels(5, 28, 28)), torch.tensor([3, 1, 4, 1, 5]), (1, 28, 28)),
    "CIFAR10, list of targets": ("CIFAR10", pixels(5, 32, 32, 3), [3, 1, 4, 1, 5], (3, 32, 32)),
    "CIFAR100": ("CIFAR100", pixels(5, 32, 32, 3), [3, 1, 4, 1, 5], (3, 32, 32)),
    "SVHN, labels": ("SVHN", np.transpose(pixels(32, 32, 3, 5), (3, 2, 0, 1)), np.array([3, 1, 4, 1, 5]), (3, 32, 32)),
    "STL10": ("STL10", pixels(5, 3, 96, 96), np.array([3, 1, -1, 1, 5]), (3, 96, 96)),
    "USPS": ("USPS", pixels(5, 16, 16), [3, 1, 4, 1, 5], (1, 16, 16)),
    "SEMEION": ("SEMEION", pixels(5, 16, 16), np.array([3, 1, 4, 1, 5]), (1, 16, 16)),
}


@pytest.mark.parametrize("name", VISION)
def test_images_of_torchvision_are_what_to_tensor_makes_of_them(name):
    from torchvision.transforms import ToTensor

    kind, data, targets, shape = VISION[name]
    plain, transformed = vision(kind, data, targets), vision(kind, data, targets, transform=ToTensor())
    loader = DataLoaders.from_dataset(Subset(plain, [4, 0, 2]), batch_size=2, shuffle=False).train
    assert isinstance(loader, BatchLoader)
    assert loader.tensors[0].dtype == torch.uint8
    assert loader.tensors[0].is_contiguous()
    batches = list(loader)
    assert batches[0][0].shape == (2, *shape)
    expected = [tuple(batch) for batch in DataLoader(Subset(transformed, [4, 0, 2]), batch_size=2)]
    assert equal(batches, expected)  # float32 and int64, to the bit


def test_real_mnist_is_what_to_tensor_makes_of_it(tmp_path):
    import torchvision

    archives = Path(__file__).parents[2] / "shared/data/MNIST/raw"
    if not archives.exists():
        pytest.skip("MNIST is not at hand")
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("images-idx3", "labels-idx1"):
        (raw / f"t10k-{part}-ubyte").write_bytes(gzip.decompress((archives / f"t10k-{part}-ubyte.gz").read_bytes()))
        (raw / f"train-{part}-ubyte").touch()  # must exist, is not read
    plain = torchvision.datasets.MNIST(tmp_path, train=False)
    transformed = torchvision.datasets.MNIST(tmp_path, train=False, transform=torchvision.transforms.ToTensor())
    loader = DataLoaders.from_dataset(plain, batch_size=50, seed=1).train
    assert len(loader) == 200
    loader.set_epoch(3)
    x, y = next(iter(loader))
    places = {image.numpy().tobytes(): i for i, image in enumerate(plain.data)}
    order = [places[(image * 255).round().byte().numpy().tobytes()] for image in x]
    assert equal((x, y), tuple(next(iter(DataLoader(Subset(transformed, order), batch_size=50)))))


def test_a_transform_replaces_the_scaling_of_images():
    def double(x, y):
        assert x.dtype == torch.uint8
        return x.float() * 2, y

    kind, data, targets, _ = VISION["CIFAR10, list of targets"]
    x, y = next(iter(DataLoaders.from_dataset(vision(kind, data, targets), shuffle=False, transform=double).train))
    assert torch.equal(x, torch.from_numpy(data).permute(0, 3, 1, 2).float() * 2)
    assert equal(y, torch.tensor(targets))


def test_transforms_of_torchvision_are_never_skipped():
    kind, data, targets, _ = VISION["MNIST, tensors"]
    for options in ({"transform": np.asarray}, {"target_transform": float}):
        loader = DataLoaders.from_dataset(vision(kind, data, targets, **options), batch_size=2, collate_fn=list).train
        assert isinstance(loader, DataLoader)
        assert isinstance(DataLoaders.from_dataset(vision(kind, data, targets, **options)).train, DataLoader)
    dataset = vision(kind, data, targets)
    dataset.transform = np.asarray  # set after it was made
    assert isinstance(DataLoaders.from_dataset(dataset).train, DataLoader)
    assert isinstance(DataLoaders.from_dataset(Subset(dataset, [0])).train, DataLoader)


def test_datasets_that_make_their_samples_in_another_way_are_read_by_sample():
    from torchvision import datasets

    class Inverted(datasets.MNIST):
        def __getitem__(self, index):
            return 255 - self.data[index], int(self.targets[index])

    class Renamed(datasets.MNIST):
        """Where the files lie changes nothing."""

    kind, data, targets, _ = VISION["MNIST, tensors"]
    for change, expected in ((Inverted, DataLoader), (datasets.QMNIST, DataLoader), (Renamed, BatchLoader)):
        dataset = vision(kind, data, targets)
        dataset.__class__ = change
        assert isinstance(DataLoaders.from_dataset(dataset).train, expected)
    assert isinstance(DataLoaders.from_dataset(vision(kind, data.float(), targets)).train, DataLoader)
    assert isinstance(DataLoaders.from_dataset(vision(kind, data, None)).train, DataLoader)


# -- BatchLoader ------------------------------------------------------------------------------------------------------


def test_one_tensor_gives_bare_tensors_and_several_give_tuples():
    assert equal(list(BatchLoader(X, batch_size=4)), [X[:4], X[4:8], X[8:]])
    assert equal(list(BatchLoader(X, Y, batch_size=5)), [(X[:5], Y[:5]), (X[5:], Y[5:])])
    assert equal(list(BatchLoader(X, X, Y)), [(X, X, Y)])


def test_the_last_batch_is_smaller_or_left_out():
    assert [len(b) for b in BatchLoader(X, batch_size=4)] == [4, 4, 2]
    assert [len(b) for b in BatchLoader(X, batch_size=4, drop_last=True)] == [4, 4]
    assert len(BatchLoader(X, batch_size=4, drop_last=True)) == 2
    assert len(BatchLoader(X, batch_size=5)) == len(BatchLoader(X, batch_size=5, drop_last=True)) == 2


def test_a_transform_makes_the_batch():
    loader = BatchLoader(X, Y, batch_size=4, transform=lambda x, y: {"x": x / 2, "y": y})
    assert equal([b["x"] for b in loader], [X[:4] / 2, X[4:8] / 2, X[8:] / 2])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("transform", [None, lambda x, y: (x.zero_(), y.zero_())])
def test_a_change_of_a_batch_never_reaches_the_tensors(shuffle, transform):
    x, y = X.clone(), Y.clone()
    for xb, yb in BatchLoader(x, y, batch_size=10, shuffle=shuffle, transform=transform):
        xb.fill_(-1), yb.fill_(-1)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_the_order_is_that_of_the_epoch_when_the_iteration_began():
    loader = BatchLoader(torch.arange(100), batch_size=10, shuffle=True)
    expected = list(loader)
    batches = iter(loader)
    loader.set_epoch(1)
    assert equal(list(batches), expected)
    assert not equal(list(loader), expected)
    loader.set_epoch(0)
    assert equal(list(loader), expected)


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        loader = BatchLoader(torch.arange(50), batch_size=50, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return tuple(next(iter(loader)).tolist())

    assert len({order(seed, epoch) for seed in range(8) for epoch in range(8)}) == 64  # seed + epoch would give 15
    assert set(order(0, 0)) == set(range(50))


def test_tensors_are_moved_once():
    loader = BatchLoader(X, Y, device="meta", shuffle=True)
    assert all(t.is_meta for t in loader.tensors)
    assert all(t.is_meta for t in next(iter(loader)))
    assert BatchLoader(X, device="cpu").tensors[0] is X


def test_batches_can_start_anywhere():
    loader = BatchLoader(X, Y, batch_size=4, shuffle=True)
    everything = list(loader)
    for start in range(4):
        assert equal(list(loader.batches(start)), everything[start:])
    with pytest.raises(ValueError, match="start=4, but an epoch has 3 batches"):
        loader.batches(4)
    with pytest.raises(ValueError, match="start=-1"):
        loader.batches(-1)
    with pytest.raises(TypeError, match=r"start=1.0 \(type=float\)"):
        loader.batches(1.0)


def test_batches_that_are_skipped_are_never_made():
    made = []
    loader = BatchLoader(Y, batch_size=2, transform=lambda y: made.append(y) or y)
    list(loader.batches(3))
    assert [y.tolist() for y in made] == [[6, 7], [8, 9]]


def test_a_batch_loader_is_copied_and_shown():
    loader = BatchLoader(X, Y, batch_size=4, shuffle=True, seed=3)
    assert repr(loader) == (
        "BatchLoader(float32 (10, 3) cpu, int64 (10,) cpu, batch_size=4, shuffle=True, drop_last=False, seed=3)"
    )
    assert equal(list(copy.deepcopy(loader)), list(loader))
    assert (loader.batch_size, loader.shuffle, loader.drop_last, loader.seed, loader.epoch, loader.transform) == (
        *(4, True, False, 3, 0, None),
    )


BATCH_LOADER = {
    "nothing": ((), {}, TypeError, "no tensors"),
    "an array": ((X.numpy(),), {}, TypeError, r"tensors\[0\] is a ndarray.*torch.as_tensor"),
    "a list": ((X, [1, 2]), {}, TypeError, r"tensors\[1\] is a list.*torch.as_tensor"),
    "different lengths": ((X, Y[:9]), {}, ValueError, r"len\(tensors\[0\]\)=10, len\(tensors\[1\]\)=9"),
    "no dimension": ((X, torch.tensor(1)), {}, ValueError, r"tensors\[1\] has no dimension"),
    "empty": ((X[:0], Y[:0]), {}, ValueError, r"tensors are empty: \(float32 \(0, 3\) cpu"),
    "batch size zero": ((X,), {"batch_size": 0}, ValueError, "batch_size=0, wanted an integer >= 1"),
    "batch size float": ((X,), {"batch_size": 2.0}, TypeError, r"batch_size=2.0 \(type=float\)"),
    "batch size bool": ((X,), {"batch_size": True}, TypeError, r"batch_size=True \(type=bool\)"),
    "seed negative": ((X,), {"seed": -1}, ValueError, "seed=-1"),
    "seed none": ((X,), {"seed": None}, TypeError, r"seed=None \(type=NoneType\)"),
    "transform a number": ((X,), {"transform": 1}, TypeError, "transform=1.*not callable"),
    "shuffle a number": ((X,), {"shuffle": 1}, TypeError, "shuffle=1.*True or False"),
    "drop_last leaves nothing": (
        (X[:3],),
        {"drop_last": True, "batch_size": 8},
        ValueError,
        "drop_last=True with 3 samples gives no batch of batch_size=8. Use a smaller batch_size",
    ),
    "an unknown device": ((X,), {"device": "gpu"}, RuntimeError, "gpu"),
}


@pytest.mark.parametrize("name", BATCH_LOADER)
def test_batch_loader_refuses(name):
    tensors, options, error, match = BATCH_LOADER[name]
    with pytest.raises(error, match=match):
        BatchLoader(*tensors, **options)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)])
def test_set_epoch_refuses(epoch, error):
    loader = BatchLoader(X)
    with pytest.raises(error, match=f"epoch={epoch}"):
        loader.set_epoch(epoch)
    assert loader.epoch == 0


# -- to_device --------------------------------------------------------------------------------------------------------


class Movable:
    moved = None

    def to(self, device):
        other = Movable()
        other.moved = device
        return other


class Frozen(dict):
    """A mapping that is not made from a dict."""

    def __init__(self):
        super().__init__(x=X)


class Names(NamedTuple):
    image: torch.Tensor
    name: str


def test_to_device_keeps_containers_and_moves_what_is_in_them():
    batch = (X, [Y, "a"], {"x": X, "n": 3}, POINT(X, None), Names(X, "b"), OrderedDict(x=X), UserDict(x=X))
    moved = to_device(batch, "meta")
    assert [type(item) for item in moved] == [type(item) for item in batch]
    assert moved[0].is_meta
    assert moved[1][0].is_meta
    assert moved[1][1] == "a"
    assert moved[2]["x"].is_meta
    assert moved[2]["n"] == 3
    assert moved[3].x.is_meta
    assert moved[3].y is None
    assert moved[4].image.is_meta
    assert moved[4].name == "b"
    assert moved[5]["x"].is_meta
    assert moved[6]["x"].is_meta
    assert not X.is_meta


def test_to_device_makes_a_dict_of_a_mapping_that_cannot_be_made_anew():
    for mapping in (Frozen(), defaultdict(list, x=X)):
        moved = to_device(mapping, "meta")
        assert type(moved) is dict
        assert moved["x"].is_meta
    moved = to_device(types.MappingProxyType({"x": X}), "meta")
    assert type(moved) is types.MappingProxyType


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y),
        [X, [Y]],
        {"x": X, "y": (Y,)},
        POINT(X, Y),
        defaultdict(list, x=X),
        Frozen(),
        "a",
        3,
        None,
        (),
        Movable,
        {X},
    ],
    ids=lambda batch: type(batch).__name__,
)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_to_device_returns_what_is_there_already(batch, device):
    assert to_device(batch, device) is batch


def test_to_device_asks_objects_that_can_move_themselves():
    moved = to_device([Movable(), "a"], "meta")
    assert moved[0].moved == "meta"
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_device((packed, Y), "meta")[0]
    assert moved.data.is_meta
    assert not moved.batch_sizes.is_meta  # torch wants them on the CPU
    edge = namedtuple("edge", "start to")(X, Y)  # a field of that name is no method
    assert to_device(edge, "meta").to.is_meta


# -- peek -------------------------------------------------------------------------------------------------------------


class Eager(torch.utils.data.Sampler):
    """A sampler that draws when `iter` is called, not at the first `next`."""

    def __iter__(self):
        return iter(torch.randperm(10).tolist())

    def __len__(self):
        return 10


def generator():
    return torch.Generator().manual_seed(7)


PEEKED = {
    "in order": lambda: DataLoader(Squares(), batch_size=4),
    "shuffled": lambda: DataLoader(Squares(), batch_size=4, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(Squares(), batch_size=4, shuffle=True, generator=generator()),
    "noise": lambda: DataLoader(Squares(noise=True), batch_size=4, shuffle=True),
    "noise and a generator": lambda: DataLoader(Squares(noise=True), batch_size=4, shuffle=True, generator=generator()),
    "a generator for the sampler": lambda: DataLoader(
        Squares(), batch_size=4, sampler=RandomSampler(range(10), generator=generator())
    ),
    "batch sampler": lambda: DataLoader(
        Squares(), batch_sampler=BatchSampler(RandomSampler(range(10), generator=generator()), 3, drop_last=True)
    ),
    "no automatic batches": lambda: DataLoader(Squares(noise=True), batch_size=None, shuffle=True),
    "an eager sampler": lambda: DataLoader(Squares(), batch_size=3, sampler=Eager()),
    "an eager sampler, no automatic batches": lambda: DataLoader(Squares(), batch_size=None, sampler=Eager()),
    "batches fetched at once": lambda: DataLoader(Batched(), batch_size=3, shuffle=True),
    "collate_fn": lambda: DataLoader(Squares(noise=True), batch_size=3, shuffle=True, collate_fn=lambda items: items),
    "BatchLoader": lambda: BatchLoader(X, Y, batch_size=4, shuffle=True),
    "BatchLoader with noise": lambda: BatchLoader(
        X, batch_size=4, shuffle=True, transform=lambda x: x + torch.rand(())
    ),
    "list": lambda: [(X, Y), (X + 1, Y)],
    "tuple": lambda: ((X, Y), (X + 1, Y)),
}


@pytest.mark.parametrize("name", PEEKED)
def test_peek_gives_the_batches_of_training_and_moves_nothing(name):
    loader = PEEKED[name]()
    generators = [
        g for g in (getattr(loader, "generator", None), getattr(getattr(loader, "sampler", 0), "generator", None)) if g
    ]
    before = random_states(), [g.get_state().tolist() for g in generators]
    peeked = []
    for batch in peek(loader):
        peeked.append(batch)
        assert (random_states(), [g.get_state().tolist() for g in generators]) == before
    assert (random_states(), [g.get_state().tolist() for g in generators]) == before
    assert peeked
    assert equal(peeked, list(loader))


@pytest.mark.parametrize("name", PEEKED)
def test_peek_does_not_mind_random_numbers_in_between(name):
    loader = PEEKED[name]()
    peeked = []
    batches = iter(peek(loader))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for _ in range(2):
        torch.rand(5), random.random(), np.random.rand(3)
        peeked.append(next(batches))
    torch.set_rng_state(state[0]), random.setstate(state[1]), np.random.set_state(state[2])
    assert equal(peeked, [batch for batch, _ in zip(loader, range(2), strict=False)])


def test_peek_leaves_the_consumer_its_own_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    seen = []
    for _, _ in zip(peek(PEEKED["noise"]()), range(3), strict=False):
        seen.append(torch.rand(()))
    assert torch.equal(torch.stack(seen), expected)


def test_peek_begins_anew_each_time_and_draws_no_more_than_asked():
    fetched = []

    class Counting(Squares):
        def __getitem__(self, i):
            fetched.append(i)
            return super().__getitem__(i)

    batches = peek(DataLoader(Counting(), batch_size=4, shuffle=True))
    assert fetched == []
    first = next(iter(batches))
    assert len(fetched) == 4
    assert equal(next(iter(batches)), first)


def test_peek_uses_no_worker_process():
    loader = DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context="forkserver")
    assert equal(next(iter(peek(loader))), next(iter(DataLoader(Squares(), batch_size=4))))
    assert loader._iterator is None


def test_peek_puts_random_states_back_when_the_dataset_fails():
    class Broken(Squares):
        def __getitem__(self, i):
            torch.rand(1)
            raise OSError("disk")

    before = random_states()
    with pytest.raises(OSError, match="disk"):
        next(iter(peek(DataLoader(Broken(), shuffle=True))))
    assert random_states() == before


class Own(DataLoader):
    def __iter__(self):
        return iter([1])


@pytest.mark.parametrize(
    "loader",
    [
        iter([(X, Y)]),
        (b for b in [(X, Y)]),
        DataLoader(Stream(), batch_size=None),
        Own(Squares()),
        {"x": X}.items(),
        DataLoader(Squares(), sampler=iter(range(10))),
        DataLoader(Squares(), batch_sampler=iter([[0, 1]])),
        X,
    ],
    ids=lambda loader: type(loader).__name__,
)
def test_peek_refuses_what_it_would_move(loader):
    name = type(loader).__name__
    with pytest.raises(InitError, match=rf"cannot draw a batch .* from {name} without moving.*LSUV\(data=\.\.\.\)"):
        peek(loader)


@pytest.mark.parametrize("loader", [[], (), DataLoader(Squares(3), batch_size=4, drop_last=True)])
def test_peek_refuses_an_empty_loader(loader):
    batches = peek(loader)
    with pytest.raises(DataError, match=f"{type(loader).__name__}.*no batch.*drop_last"):
        next(iter(batches))


# -- batches ----------------------------------------------------------------------------------------------------------


def test_split_batch_takes_the_last_element_for_the_target():
    assert split_batch(X) == (X, None)
    assert split_batch((X, Y)) == (X, Y)
    assert split_batch([X, Y]) == (X, Y)
    xb, yb = split_batch([X, X, Y])
    assert type(xb) is tuple
    assert len(xb) == 2
    assert yb is Y
    assert split_batch(POINT(X, Y)) == (X, Y)
    xb, yb = split_batch(namedtuple("Three", "a b y")(X, X, Y))
    assert type(xb) is tuple
    assert split_batch(({"x": X}, Y)) == ({"x": X}, Y)


WRONG_BATCHES = {
    "one element": ((X,), r"a batch is \(float32 \(10, 3\) cpu,\)"),
    "a list of one": ([X], r"a batch is \[float32 \(10, 3\) cpu\]"),
    "empty": ((), r"a batch is \(\)"),
    "a dict": ({"x": X, "y": Y}, r"a batch is \{'x': float32 \(10, 3\) cpu, 'y': int64 \(10,\) cpu\}"),
    "a number": (3, "a batch is 3"),
    "none": (None, "a batch is None"),
    "a packed sequence": (pack_sequence([X, X]), "a batch is PackedSequence"),
    "an object": (Movable(), "a batch is Movable"),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_split_batch_refuses(name):
    batch, match = WRONG_BATCHES[name]
    with pytest.raises(DataError, match=match + r".*wanted \(x, y\).*override Learner.split_batch"):
        split_batch(batch)


def test_n_samples_is_the_leading_dimension_of_the_first_tensor():
    assert n_samples(X) == 10
    assert n_samples((["a"], {"x": X[:4]}, Y)) == 4
    assert n_samples((X[:0], Y)) == 0
    assert n_samples((pack_sequence([torch.ones(5), torch.ones(2)]), Y[:2])) == 2  # not the 7 time steps


@pytest.mark.parametrize("batch", [3, None, (), {"a": "b"}, torch.tensor(1.0), (torch.tensor(1.0), X)])
def test_n_samples_refuses(batch):
    with pytest.raises(DataError, match=r"how many samples.*override Learner\.n_samples"):
        n_samples(batch)


def test_batches_are_described():
    x = torch.zeros(64, 1, 28, 28)
    assert describe_batch((x, torch.zeros(64).long())) == "(float32 (64, 1, 28, 28) cpu, int64 (64,) cpu)"
    assert describe_batch({"x": [X.half()], "m": None}) == "{'x': [float16 (10, 3) cpu], 'm': None}"
    assert describe_batch(POINT(X.to("meta"), "a")) == "POINT(x=float32 (10, 3) meta, y='a')"
    assert describe_batch([1] * 9) == "[1, 1, 1, 1, 1, 1, 1, 1, ...]"
    assert describe_batch("a" * 100) == "'" + "a" * 39
    assert describe_batch((3.5, True, Movable())) == "(3.5, True, Movable)"


def test_batches_of_one_form_are_joined():
    parts = [(X[:4], {"y": Y[:4], "n": None}, POINT(X[:4], "a")), (X[4:], {"y": Y[4:], "n": None}, POINT(X[4:], "b"))]
    joined = concatenate(parts)
    assert equal(joined[0], X)
    assert equal(joined[1]["y"], Y)
    assert joined[1]["n"] is None
    assert equal(joined[2].x, X)
    assert joined[2].y == ["a", "b"]
    assert concatenate([torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
    assert concatenate([None, None]) is None


def test_what_shuffles_is_known():
    weighted = WeightedRandomSampler([1.0] * 10, 10)
    shuffling = [
        BatchLoader(X, shuffle=True),
        DataLoader(Squares(), shuffle=True),
        DataLoader(Squares(), sampler=SubsetRandomSampler([1, 2])),
        DataLoader(Squares(), sampler=weighted),
        DataLoader(Squares(), batch_sampler=BatchSampler(weighted, 2, False)),
    ]
    assert all(map(shuffles, shuffling))
    ordered = [
        BatchLoader(X),
        DataLoader(Squares()),
        DataLoader(Squares(), sampler=SequentialSampler(Y)),
        [(X, Y)],
        iter([]),
    ]
    assert not any(map(shuffles, ordered))
