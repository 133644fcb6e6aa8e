import collections
import copy
import dataclasses
import gc
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import minitrain
from minitrain import capture
from minitrain.errors import LoopError


class Net(nn.Module):
    """A layer that is called twice, one that is never called, activations in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
        self.idle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(self.body(F.relu_(self.stem(x)))))


class Returns(nn.Module):
    """A layer whose output is whatever `make` makes of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


X = torch.linspace(-1, 1, 20).reshape(5, 4)


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_the_layers_before_anything_was_written_into_them():
    model = Net()
    with capture(model, ["stem", "body.*", "head"]) as outputs:
        y = model(X)
    stem = model.stem(X)
    first, second = model.body[0](stem.relu()), None
    second = model.body[0](first.relu())
    assert list(outputs) == ["stem", "body.0", "body.1", "head"]
    assert torch.equal(outputs["stem"], stem)
    assert torch.equal(outputs["body.0"], first)
    assert all(map(torch.equal, outputs.calls["body.0"], [first, second]))
    assert all(map(torch.equal, outputs.calls["body.1"], [first.relu(), second.relu()]))
    assert torch.equal(outputs["head"], y)
    assert hooks_in(model) == 0


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (None, ["stem", "body.0", "body.1", "head"]),
        ("head", ["head"]),
        (nn.ReLU, ["body.1"]),
        (["body", nn.ReLU], ["body.1", "body"]),
        (lambda name, module: name.endswith("m"), ["stem"]),
        ("Net", ["Net"]),
    ],
)
def test_names_may_be_all_that_select_takes(names, found):
    with capture(Net(), names) as outputs:
        outputs_of = list(outputs)
        assert outputs_of == []
    model = Net()
    with capture(model, names) as outputs:
        model(X)
    assert list(outputs) == found
    assert len(outputs) == len(found)


def test_copies_are_detached_and_share_nothing():
    model = Net()
    with capture(model) as outputs:
        y = model(X)
        y.data.fill_(7.0)
    for name, output in outputs.items():
        assert not output.requires_grad, name
        assert output.grad_fn is None
        assert output.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
    assert not (outputs["head"] == 7.0).any()
    y.sum().backward()  # the graph of the model is as it was


Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    words: str


@dataclasses.dataclass
class Slotted:
    __slots__ = ("hidden", "logits")
    logits: torch.Tensor
    hidden: object


@dataclasses.dataclass
class HalfMade:
    logits: torch.Tensor
    later: object = dataclasses.field(init=False)


class Tagged(dict):
    tag = None


class Rows(list):
    pass


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """As in transformers: what is None is no item."""

    loss: object = None
    logits: object = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        cls, _, *rest = super().__reduce__()
        return cls, tuple(getattr(self, field.name) for field in dataclasses.fields(self)), *rest


def captured_from(make):
    model = Returns(make)
    with capture(model, "Returns") as outputs:
        given = model(X.clone().requires_grad_())
    return outputs["Returns"], given


def is_copy(tensor, of):
    return (
        torch.equal(tensor, of)
        and not tensor.requires_grad
        and tensor.untyped_storage().data_ptr() != of.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x * 2, None, "words"),
        lambda x: [x * 2, [x]],
        lambda x: {"y": x * 2, "n": 3},
        lambda x: Pair(x, (x * 2,)),
        lambda x: Frozen(x * 2, "words"),
        lambda x: Slotted(x * 2, [x]),
        lambda x: HalfMade(x * 2),
        lambda x: Rows([x, x]),
        lambda x: collections.OrderedDict(a=x, b=(x, 1)),
        lambda x: collections.defaultdict(list, a=x),
        lambda x: ModelOutput(logits=x * 2),
        lambda x: ModelOutput(loss=x.sum(), logits=(x, None)),
        lambda x: x.max(dim=1),
        lambda x: torch.Size([2, 3]),
        lambda x: None,
    ],
)
def test_containers_keep_their_kind(make):
    copied, given = captured_from(make)

    def compare(a, b):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert is_copy(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
                assert not hasattr(a, key) or getattr(a, key) is a[key]
        elif isinstance(a, (tuple, list)):
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                compare(one, other)
        elif dataclasses.is_dataclass(a):
            for field in dataclasses.fields(a):
                assert hasattr(a, field.name) == hasattr(b, field.name)
                if hasattr(a, field.name):
                    compare(getattr(a, field.name), getattr(b, field.name))
        else:
            assert a is b or a == b

    compare(copied, given)
    assert copied is not given or not isinstance(given, (list, dict, torch.Tensor))


def test_a_dict_keeps_its_other_attributes_and_a_proxy_becomes_a_dict():
    def make(x):
        output = Tagged(y=x)
        output.tag = "kept"
        return output

    copied, _ = captured_from(make)
    assert (type(copied), copied.tag) == (Tagged, "kept")
    copied, given = captured_from(lambda x: types.MappingProxyType({"y": x}))
    assert is_copy(copied["y"], given["y"])


def test_packed_sequences_are_copied():
    lstm = nn.LSTM(2, 3)
    packed = pack_sequence([torch.ones(2, 2), torch.ones(4, 2)], enforce_sorted=False)
    with capture(lstm) as outputs:
        y, (h, c) = lstm(packed)
    copied, (h_copied, c_copied) = outputs["LSTM"]
    assert type(copied) is PackedSequence
    assert is_copy(copied.data, y.data)
    assert is_copy(h_copied, h)
    assert is_copy(c_copied, c)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(copied)
    assert (padded.shape, lengths.tolist()) == ((4, 2, 3), [2, 4])


def test_what_occurs_twice_in_an_output_occurs_twice_in_the_copy_and_a_circle_stays_one():
    def make(x):
        output = [x, {"again": x}]
        output.append(output)
        return output

    copied, _ = captured_from(make)
    assert copied[2] is copied
    assert copied[1]["again"] is copied[0]


# -- one forward pass -------------------------------------------------------------------------------------------------


def test_each_call_of_the_model_begins_anew():
    model = Net()
    with capture(model) as outputs:
        model(X)
        model(2 * X)
        assert [len(calls) for calls in outputs.calls.values()] == [1, 2, 2, 1]
        assert torch.equal(outputs["stem"], model.stem(2 * X))
    model.idle = None
    assert len(outputs.calls["stem"]) == 2  # that was a call past the model itself


def test_a_layer_that_one_call_skips_is_not_left_over_from_the_call_before():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, deep):
            return self.b(self.a(x)) if deep else self.a(x)

    model = Sometimes()
    with capture(model) as outputs:
        model(torch.ones(1, 2), True)
        assert "b" in outputs
        model(torch.ones(1, 2), False)
        assert "b" not in outputs
        with pytest.raises(KeyError, match="'b' was selected, but was not called in this forward pass"):
            outputs["b"]


def test_an_unknown_name_is_answered_with_a_near_one():
    model = Net()
    with capture(model, ["stem", "body.*"]) as outputs:
        model(X)
    with pytest.raises(KeyError, match=r"'stemm' was not selected\. Did you mean 'stem'\? There are 'stem', 'body\.0'"):
        outputs["stemm"]
    with pytest.raises(KeyError, match="'head' was not selected"):
        outputs["head"]
    assert outputs.get("nothing") is None
    assert outputs.names == ["stem", "body.0", "body.1"]


def test_a_shared_layer_is_found_under_each_of_its_names():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with capture(model, ["2"]) as outputs:
        model(X)
    assert list(outputs) == ["0"]
    assert outputs["2"] is outputs["0"]
    assert len(outputs.calls["0"]) == 2


def test_a_layer_named_outright_that_was_not_called_is_warned_about():
    model = Net()
    with pytest.warns(UserWarning, match="no hook fired on 'idle'") as record, capture(model, ["stem", "idle"]):
        model(X)
    assert record[0].filename == __file__


def test_what_was_captured_before_an_exception_stays_readable():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="shape"), capture(model) as outputs:
        model(X)
    assert list(outputs) == ["0"]
    assert outputs["0"].shape == (5, 3)
    assert hooks_in(model) == 0


def test_each_entry_has_outputs_of_its_own():
    model = Net()
    context = capture(model, "stem")
    with context as one:
        model(X)
        with pytest.raises(LoopError, match="on already"), context:
            pass
        assert len(one) == 1
    with context as other:
        model(2 * X)
    assert torch.equal(other["stem"], model.stem(2 * X))
    assert torch.equal(one["stem"], model.stem(X))


def test_repr_lists_what_was_called():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with capture(model) as outputs:
        assert repr(outputs) == "<Captured: nothing yet>"
        model(X)
        assert repr(outputs) == "<Captured: 0, 1>"


# -- nothing is disturbed, nothing is kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_every_grad_mode(grad):
    model = Net()
    with grad(), capture(model) as outputs:
        y = model(X)
    assert torch.equal(outputs["head"], y)


def test_it_works_under_autocast():
    model = Net()
    with torch.autocast("cpu", dtype=torch.bfloat16), capture(model, "head") as outputs:
        y = model(X)
    assert outputs["head"].dtype == y.dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_second_run_of_checkpointing_adds_to_the_calls_only(use_reentrant):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=use_reentrant)

    model, x = Saving(), X.clone().requires_grad_()
    with capture(model) as outputs:
        model(x).sum().backward()
    assert torch.equal(outputs["body.0"], model.body[0](X))
    assert len(outputs.calls["body.0"]) == 2


def test_outputs_gradients_random_numbers_and_modes_are_as_without():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 1))
    model[1].eval()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    y = model(X)
    y.sum().backward()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with capture(other):
        again = other(X)
        again.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, y)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    assert not other[1].training


def test_neither_graph_nor_model_is_kept_alive():
    model, x = Net(), X.clone().requires_grad_()
    freed = []
    with capture(model) as outputs:
        y = model(x)
        weakref.finalize(y, freed.append, True)
        weakref.finalize(y.grad_fn.next_functions[1][0].metadata.setdefault("mark", Net()), freed.append, True)
        del y
        gc.collect()
        assert freed == [True, True]
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert outputs["head"].shape == (5, 2)


def test_a_copy_of_the_model_made_inside_captures_nothing():
    model = Net()
    with capture(model) as outputs:
        copy.deepcopy(model)(X)
        assert not outputs.calls
        model(X)
        copy.deepcopy(model)(X)
        assert len(outputs.calls["stem"]) == 1


@pytest.mark.filterwarnings("default")  # torch's own, about what it meets as it traces
def test_a_compiled_model_is_captured_and_one_that_was_traced_before_warns():
    model = Net()
    compiled = torch.compile(model, backend="eager")
    torch.compiler.reset()
    with capture(compiled, ["stem", "head"]) as outputs:
        y = compiled(X)
        compiled(X)
    assert torch.equal(outputs["head"], y)
    assert torch.equal(outputs["stem"], outputs["_orig_mod.stem"])
    assert len(outputs.calls["_orig_mod.stem"]) == 1
    torch.compiler.reset()
    compiled(X)
    with pytest.warns(UserWarning, match=r"torch\.compile has traced") as record, capture(model) as outputs:
        compiled(X)
    assert record[0].filename == __file__
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: capture(Net(), "stemm"), ValueError, ["names='stemm'", "Did you mean 'stem'"]),
        (lambda: capture(Net(), 3), TypeError, ["names=3", "predicate"]),
        (lambda: capture(Net), TypeError, ["did you forget ()?"]),
        (lambda: capture(Net(), nn.Conv2d), ValueError, ["names=<class", "matches no module"]),
    ],
)
def test_wrong_arguments_are_refused_at_construction(make, error, words):
    with pytest.raises(error) as info:
        make()
    assert all(word in str(info.value) for word in words), str(info.value)


def test_capture_is_public():
    assert minitrain.capture is capture
    assert "capture" in minitrain.__all__
