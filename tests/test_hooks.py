import contextlib
import copy
import dataclasses
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections import OrderedDict, namedtuple
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from minitrain.errors import CancelFit, LoopError
from minitrain.hooks import Hooks, _Hook, first_tensor, select_modules, tensors_in


def make_net():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), nn.Linear(3, 2))


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def nothing(*args):
    return None


# -- what is selected -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (None, ["0.0", "0.1", "1"]),
        (nn.Linear, ["0.0", "1"]),
        ((nn.Linear, nn.ReLU), ["0.0", "0.1", "1"]),
        ("1", ["1"]),
        ("0.*", ["0.0", "0.1"]),
        ("0", ["0"]),
        (["1", "0.0"], ["0.0", "1"]),
        ([nn.ReLU, "1", lambda name, module: name == "0"], ["0", "0.1", "1"]),
        (lambda name, module: isinstance(module, nn.Linear) and module.out_features == 2, ["1"]),
        ("Sequential", ["Sequential"]),
        ({"1"}, ["1"]),
    ],
)
def test_select_takes_types_names_globs_predicates_and_lists_of_these(select, names):
    assert list(select_modules(make_net(), select)) == names


def test_a_default_predicate_may_stand_in_for_none():
    assert list(select_modules(make_net(), None, lambda name, m: isinstance(m, nn.ReLU))) == ["0.1"]


def test_a_model_that_is_a_leaf_itself_goes_by_the_name_of_its_class():
    with Hooks(nn.Linear(2, 2), nothing) as hooks:
        assert hooks.names == ["Linear"]


def test_a_child_that_bears_the_name_of_the_models_class_is_not_confused_with_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.Net = nn.Linear(1, 1)

    assert list(select_modules(Net(), nn.Module)) == ["", "Net"]


def test_a_shared_module_is_hooked_once_and_found_under_both_names():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with Hooks(model, nothing, nn.Linear) as hooks:
        model(torch.zeros(1, 2))
        assert hooks.calls == {"0": 2}
    assert list(select_modules(model, "2")) == ["0"]


def test_a_parametrised_layer_is_still_a_leaf():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.ReLU())
    assert list(select_modules(model)) == ["0", "1"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Hooks(make_net(), nothing, nn.Conv2d), ValueError, ["Conv2d", "'0.1'", "'1'"]),
        (lambda: Hooks(make_net(), nothing, "0.01"), ValueError, ["'0.01'", "Did you mean '0.1'"]),
        (lambda: Hooks(make_net(), nothing, ["1", "nope.*"]), ValueError, ["'nope.*'", "'0.0'"]),
        (lambda: Hooks(make_net(), nothing, []), ValueError, ["select=[]"]),
        (lambda: Hooks(make_net(), nothing, 3), TypeError, ["select=3", "int", "predicate"]),
        (lambda: Hooks(make_net(), "fn"), TypeError, ["fn='fn'", "str"]),
        (lambda: Hooks(make_net(), nothing, kind="sideways"), ValueError, ["kind='sideways'", "'forward_pre'"]),
        (lambda: Hooks(nn.Linear, nothing), TypeError, ["Linear", "did you forget ()?"]),
        (lambda: Hooks("net", nothing), TypeError, ["model='net'"]),
    ],
)
def test_wrong_arguments_are_refused_at_construction(make, error, words):
    with pytest.raises(error) as info:
        make()
    assert all(word in str(info.value) for word in words), str(info.value)


def test_the_list_of_names_in_an_error_is_shortened():
    with pytest.raises(ValueError, match="and 21 more"):
        Hooks(nn.Sequential(*[nn.Identity() for _ in range(40)]), nothing, "x")


# -- what fn gets -----------------------------------------------------------------------------------------------------


def test_forward_gets_name_module_inputs_and_output():
    model, seen = make_net(), {}

    def fn(name, module, inputs, output):
        seen[name] = (module, inputs[0].shape, output.shape)

    with Hooks(model, fn, nn.Linear) as hooks:
        model(torch.zeros(5, 4))
    assert seen == {"0.0": (model[0][0], (5, 4), (5, 3)), "1": (model[1], (5, 3), (5, 2))}
    assert list(hooks) == ["0.0", "1"]
    assert len(hooks) == 2


def test_forward_pre_comes_before_the_module():
    model, seen = make_net(), []
    with Hooks(model, lambda *args: seen.append(args), "1", kind="forward_pre"):
        model(torch.zeros(5, 4))
    ((name, module, inputs, output),) = seen
    assert (name, module, inputs[0].shape, output) == ("1", model[1], (5, 3), None)


def test_backward_gets_the_gradient_of_the_output_before_an_in_place_relu():
    torch.manual_seed(0)
    model, x, seen = make_net(), torch.randn(5, 4), {}

    def fn(name, module, inputs, grad):
        assert inputs == ()
        seen[name] = grad

    with Hooks(model, fn, nn.Linear, kind="backward"):
        model(x).sum().backward()
    a = model[0][0](x).detach().requires_grad_()
    y = model[1](a.relu())
    y.sum().backward()
    assert torch.equal(seen["0.0"], a.grad)
    assert torch.equal(seen["1"], torch.ones(5, 2))


def test_the_return_value_is_ignored_unless_it_may_replace():
    model, x = make_net(), torch.ones(2, 4)
    y = model(x)
    with Hooks(model, lambda *args: torch.zeros(2, 2), "1"):
        assert torch.equal(model(x), y)
    with Hooks(model, lambda *args: torch.full((2, 2), 7.0), "1", replace=True):
        assert (model(x) == 7).all()
    with Hooks(model, nothing, "1", replace=True):
        assert torch.equal(model(x), y)


def test_replace_takes_inputs_before_the_module_and_gradients_backward():
    model = nn.Linear(1, 1, bias=False)
    with Hooks(model, lambda n, m, inputs, o: (torch.full((1, 1), 3.0),), kind="forward_pre", replace=True):
        assert model(torch.zeros(1, 1)) == 3 * model.weight
    with Hooks(model, lambda n, m, i, grad: grad * 5, kind="backward", replace=True):
        model(torch.ones(1, 1)).sum().backward()
    assert model.weight.grad == 5


def test_calls_are_counted_anew_at_each_entry_and_the_uncalled_are_known():
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "idle": nn.Linear(1, 1)})
    hooks = Hooks(model, nothing)
    with hooks:
        for _ in range(3):
            model["used"](torch.zeros(1, 1))
    assert (hooks.calls, hooks.uncalled) == ({"used": 3, "idle": 0}, ["idle"])
    with hooks:
        pass
    assert hooks.uncalled == ["used", "idle"]


def test_first_tensor_looks_into_tuples_lists_and_dicts():
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor((None, {"x": [a, b]})) is a
    assert first_tensor(b) is b
    assert first_tensor(("x", 3)) is None


@dataclasses.dataclass
class Output:
    loss: object = None
    logits: object = None
    more: object = None


class ModelOutput(OrderedDict):
    """As in transformers: a dataclass and an OrderedDict in one, which leaves out what is None."""

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


@dataclasses.dataclass
class CausalOutput(ModelOutput):
    loss: object = None
    logits: object = None
    hidden: object = None


Pair = namedtuple("Pair", "left right")
A, B = torch.zeros(1), torch.ones(1)
EVERY_OUTPUT = [
    (A, [A]),
    ((None, [A], {"x": {"y": B}}), [A, B]),
    (Output(logits=B, more=(A, None)), [B, A]),
    (CausalOutput(logits=B, hidden=(A,)), [B, A]),
    (Pair(3, B), [B]),
    (MappingProxyType({"mask": A}), [A]),
    (torch.ones(2, 2).max(dim=0), None),
    (pack_sequence([A, B], enforce_sorted=False), None),
    ("words", []),
    (Output, []),
    (None, []),
]


@pytest.mark.parametrize(("output", "tensors"), EVERY_OUTPUT, ids=lambda value: type(value).__name__)
def test_every_kind_of_output_is_walked(output, tensors):
    found = list(tensors_in(output))
    wanted = [item for item in output if item is not None] if tensors is None else tensors
    assert len(found) == len(wanted)
    assert all(a is b for a, b in zip(found, wanted, strict=True))
    assert first_tensor(output) is (found[0] if found else None)


def test_an_output_that_contains_itself_is_walked_once():
    output = [A, {"b": B}]
    output.append(output)
    output[1]["all"] = output
    assert list(tensors_in(output)) == [A, B]


# -- gradients --------------------------------------------------------------------------------------------------------


def test_backward_takes_the_first_tensor_that_requires_a_gradient():
    class Masked(nn.Linear):
        def forward(self, x):
            return {"mask": torch.ones(len(x), dtype=torch.int64), "detached": x.detach(), "y": super().forward(x)}

    seen = []
    with Hooks(Masked(2, 3), lambda n, m, i, grad: seen.append(grad.shape), kind="backward") as hooks:
        hooks._modules["Masked"](torch.zeros(4, 2))["y"].sum().backward()
    assert seen == [(4, 3)]


def test_backward_of_a_tuple_and_of_outputs_without_a_tensor():
    class Odd(nn.Module):
        def forward(self, x):
            return "words"

    lstm, seen = nn.LSTM(2, 3), []
    with Hooks(lstm, lambda n, m, i, grad: seen.append(grad.shape), kind="backward"):
        lstm(torch.zeros(4, 1, 2))[0].sum().backward()
    assert seen == [(4, 1, 3)]
    with Hooks(Odd(), nothing, kind="backward") as hooks:
        assert hooks._modules["Odd"](0) == "words"
    with torch.no_grad(), Hooks(lstm, nothing, kind="backward") as hooks:
        lstm(torch.zeros(4, 1, 2))
    assert hooks.uncalled == ["LSTM"]


class InPlace(nn.Module):
    """What follows each layer writes into its output, or into what its output is a view of."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.flat = nn.Conv1d(1, 2, 2), nn.ReLU(inplace=True), nn.Flatten()
        self.a, self.b, self.drop, self.same = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity()

    def forward(self, x):
        x = self.flat(self.conv(x))  # a view
        x.sigmoid_()  # into the view, and into the output of conv
        x = F.relu_(self.a(x))
        y = self.drop(self.same(self.b(x)))  # three names for one tensor
        y += x
        return self.relu(y.mul_(2.0))


def test_gradients_are_those_of_the_values_that_the_layers_returned():
    torch.manual_seed(3)
    model = InPlace().double().eval()
    x, grads, eps = torch.randn(3, 1, 3, dtype=torch.float64), {}, 1e-6

    def note(name, module, inputs, grad):
        grads[name] = grad.clone()

    with Hooks(model, note, kind="backward") as hooks:
        (model(x) ** 2).sum().backward()
    assert hooks.calls == dict.fromkeys(["conv", "relu", "flat", "a", "b", "drop", "same"], 1)

    def loss_with(name, i, change):
        def push(n, m, inputs, output):
            output.data.view(-1)[i] += change  # past autograd, and in place: x keeps its identity

        with torch.no_grad(), Hooks(model, push, name):
            return (model(x) ** 2).sum().item()

    for name, grad in grads.items():
        slope = [(loss_with(name, i, eps) - loss_with(name, i, -eps)) / (2 * eps) for i in range(grad.numel())]
        torch.testing.assert_close(grad.flatten(), torch.tensor(slope, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2), (2, 1, 3, 2)])
def test_a_view_has_its_gradient_whatever_is_written_into_it(shape, inplace):
    """`nn.Linear` returns a view for inputs of three dimensions, attention and LSTM with `batch_first` transposed ones."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Flatten(), nn.ReLU(inplace)), torch.randn(shape)
    z = model[0](x).detach().requires_grad_()
    z.relu().pow(2).sum().backward()
    grads = {}
    with Hooks(model, lambda name, m, i, grad: grads.update({name: grad}), kind="backward") as hooks:
        model(x).pow(2).sum().backward()
    assert hooks.calls == {"0": 1, "1": 1, "2": 1}
    assert torch.equal(grads["0"], z.grad)
    assert torch.equal(grads["1"], z.grad.flatten(1))


def test_a_transposed_output_that_is_written_into():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)
    z, grads = attention(x, x, x)[0].detach().requires_grad_(), []
    (z.sigmoid() * x).sum().backward()
    with Hooks(attention, lambda name, m, i, grad: grads.append(grad), "MultiheadAttention", "backward"):
        (attention(x, x, x)[0].sigmoid_() * x).sum().backward()
    torch.testing.assert_close(grads, [z.grad])


def test_of_a_view_that_was_used_and_then_written_into_the_whole_gradient_counts():
    model, x, grads = nn.Linear(2, 2), torch.randn(1, 3, 2), []
    with Hooks(model, lambda name, m, i, grad: grads.append(grad), kind="backward"):
        y = model(x)
        before = y.sum()
        (before + y.mul_(3.0).sum()).backward()
    assert torch.equal(grads[0], torch.full((1, 3, 2), 4.0))
    assert len(grads) == 1


def test_a_view_that_is_written_into_between_two_backward_passes():
    model, x, grads = nn.Linear(2, 2), torch.randn(1, 3, 2), []
    with Hooks(model, lambda name, m, i, grad: grads.append(grad.mean().item()), kind="backward"):
        y = model(x)
        y.sum().backward(retain_graph=True)
        y.mul_(3.0).sum().backward(retain_graph=True)
        y.mul_(2.0).sum().backward()
    assert grads == [1.0, 3.0, 6.0]


def test_no_gradient_is_told_of_a_view_that_the_loss_does_not_use():
    class Both(nn.Module):
        def forward(self, x):
            return x.view(-1)

    model, a = nn.Sequential(Both()), nn.Linear(2, 2)
    with Hooks(model, nothing, kind="backward") as hooks:
        h = a(torch.ones(3, 2))
        unused = model(h)
        h.sum().backward()
    assert hooks.uncalled == ["0"]
    assert unused.shape == (6,)


def test_a_gradient_may_be_replaced_in_a_view_that_was_written_into():
    model, x = nn.Linear(2, 2), torch.ones(1, 3, 2)
    with Hooks(model, lambda n, m, i, grad: grad * 5, kind="backward", replace=True):
        model(x).mul_(2.0).sum().backward()
    assert torch.equal(model.bias.grad, torch.full((2,), 30.0))


def test_the_graph_of_a_watched_view_is_freed():
    model, refs = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), []
    with Hooks(model, nothing, kind="backward"):
        for _ in range(3):
            y = model(torch.ones(1, 3, 2))
            marker = torch.ones(1).requires_grad_()
            refs.append(weakref.ref(marker))
            (y * marker).sum().backward()
            y = model(torch.ones(1, 3, 2)) * marker  # never differentiated
        del y, marker
        gc.collect()
        assert [ref() for ref in refs] == [None] * 3


def test_one_tensor_with_several_names_is_reported_under_each():
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Dropout(0.5), nn.ReLU(inplace=True)).eval(), []
    with Hooks(model, lambda name, m, i, grad: seen.append(name), kind="backward"):
        model(torch.ones(1, 2)).sum().backward()
    assert sorted(seen) == ["0", "1", "2", "3"]


def test_a_parameter_as_an_output_is_counted_once_a_backward_pass():
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.weight

    model, seen = nn.ModuleDict({"a": Prompt(), "b": nn.Identity()}), []
    with Hooks(model, lambda name, m, i, grad: seen.append(name), kind="backward") as hooks:
        for _ in range(4):
            model["b"](model["a"]()).sum().backward()
        assert len(model["a"].weight._backward_hooks) == 2
    assert hooks.calls == {"a": 4, "b": 4}
    assert not model["a"].weight._backward_hooks


def test_each_backward_pass_through_a_retained_graph_counts():
    model = nn.Linear(1, 1)
    with Hooks(model, nothing, kind="backward") as hooks:
        y = model(torch.ones(1, 1)).sum()
        y.backward(retain_graph=True)
        y.backward()
    assert hooks.calls == {"Linear": 2}


@pytest.mark.parametrize(("use_reentrant", "last"), [(False, 1), (True, 2)])
def test_activation_checkpointing_calls_its_layers_again(use_reentrant, last):
    model, x = make_net(), torch.ones(2, 4, requires_grad=True)
    with Hooks(model, nothing) as hooks:
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert hooks.calls == {"0.0": 2, "0.1": 2, "1": last}  # the other kind stops when it has all that it needs


# -- what was not called ----------------------------------------------------------------------------------------------


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return F.linear(self.used(x), self.idle.weight)


X = torch.ones(3, 2)


@pytest.mark.parametrize("select", ["idle", ["used", "idle"], {"idle", "used"}, [nn.ReLU, "idle"]])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
def test_a_layer_that_was_named_and_never_called_is_warned_about(select, kind):
    model = Idle()
    model.act = nn.ReLU()
    with (
        pytest.warns(UserWarning, match=r"no hook fired on 'idle'") as record,
        Hooks(model, nothing, select, kind) as hooks,
    ):
        model(X)
    assert record[0].filename == __file__
    assert "idle" in hooks.uncalled
    assert n_hooks(model) == 0


@pytest.mark.parametrize(
    "select", [None, nn.Linear, "*", "i*", ["used", "id??"], lambda name, module: name == "idle", "used"]
)
def test_what_was_not_named_outright_may_stay_uncalled(select):
    model = Idle()
    with Hooks(model, nothing, select):
        model(X)
    with Hooks(nn.MultiheadAttention(2, 1), nothing, nn.Linear) as hooks:
        hooks._model(X, X, X)
    assert hooks.uncalled == ["out_proj"]


def test_no_warning_if_the_model_was_not_called_or_something_else_went_wrong():
    model = Idle()
    with Hooks(model, nothing, "idle"):
        pass

    def fail():
        with Hooks(model, nothing, "idle"):
            model(X)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with Hooks(model, nothing, "idle"), contextlib.suppress(RuntimeError):
        model(X.T)  # who catches an error inside knows that not all was called
    with torch.no_grad(), Hooks(model, nothing, "used", kind="backward"):
        model(X)  # it was called, only that there is no gradient


def test_a_second_name_of_a_shared_layer_counts_as_called():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with Hooks(model, nothing, "2"):
        model(X)


def test_the_warning_comes_after_the_hooks_are_gone():
    model = Idle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), Hooks(model, nothing, "idle"):
            model(X)
    assert n_hooks(model) == 0


def test_repr_tells_kind_state_counts_and_what_was_not_called():
    model = Idle()
    hooks = Hooks(model, nothing)
    assert repr(hooks) == "<Hooks: kind='forward', off, 2 modules, 0 calls, not called: 'used', 'idle'>"
    with hooks:
        model(X)
        assert repr(hooks) == "<Hooks: kind='forward', on, 2 modules, 1 call, not called: 'idle'>"
    assert repr(Hooks(nn.ModuleList([nn.ReLU()] + [nn.Tanh() for _ in range(30)]), nothing)).endswith("and 11 more>")


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("error", [ValueError, StopIteration, GeneratorExit, KeyboardInterrupt, CancelFit])
def test_hooks_are_removed_whatever_happened_and_those_of_others_stay(kind, error):
    model, calls = make_net(), []
    model[1].register_forward_hook(lambda *args: calls.append("user"))

    def use():
        with Hooks(model, nothing, kind=kind):
            model(torch.zeros(1, 4))
            raise error

    with pytest.raises(error):
        use()
    assert n_hooks(model) == 1
    model(torch.zeros(1, 4))
    assert calls == ["user", "user"]


def test_an_error_in_fn_surfaces_and_leaves_nothing():
    model = make_net()

    def fn(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Hooks(model, fn):
        model(torch.zeros(1, 4))
    assert n_hooks(model) == 0


def test_entering_twice_is_an_error_that_says_so_and_harms_nothing():
    model = make_net()
    with Hooks(model, nothing) as hooks:
        with pytest.raises(LoopError, match="entering them twice"), hooks:
            pass
        assert n_hooks(model) == 3
    assert n_hooks(model) == 0


def test_remove_may_be_called_at_any_time_and_twice():
    model = make_net()
    hooks = Hooks(model, nothing)
    hooks.remove()
    with hooks:
        hooks.remove()
        assert n_hooks(model) == 0
        hooks.remove()


def test_a_registration_that_fails_half_way_is_undone(monkeypatch):
    model = make_net()

    def refuse(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(model[1], "register_forward_hook", refuse)
    hooks = Hooks(model, nothing)
    with pytest.raises(RuntimeError, match="no"), hooks:
        pass
    assert n_hooks(model) == 0
    monkeypatch.undo()
    with hooks:
        assert n_hooks(model) == 3


def test_a_gradient_that_comes_after_the_exit_is_not_seen():
    model, seen = make_net(), []
    with Hooks(model, lambda *args: seen.append(args), kind="backward"):
        y = model(torch.ones(1, 4))
        assert len(y._backward_hooks) == 1
    assert len(y._backward_hooks) == 0
    y.sum().backward()
    assert seen == []


def test_a_hook_on_a_tensor_that_a_ctrl_c_made_us_forget_is_silent():
    model, seen = make_net(), []
    with Hooks(model, lambda *args: seen.append(args), kind="backward") as hooks:
        y = model(torch.ones(1, 4))
        hooks._tensor_handles.clear()
    y.sum().backward()
    assert seen == []


def test_handles_of_graphs_that_are_gone_are_let_go():
    model, kept = make_net(), []
    with Hooks(model, nothing, kind="backward") as hooks:
        for k in range(200):
            y = model(torch.ones(1, 4))
            y.sum().backward()
            kept += [y] if k < 5 else []  # some graphs stay
        assert len(hooks._tensor_handles) <= 110
    assert not hooks._tensor_handles


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, saved_and_loaded, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_of_the_model_made_inside_has_no_live_hook(kind, make_copy):
    model, seen = make_net(), []
    with Hooks(model, lambda *args: seen.append(args), ["0.0", "1", nn.ReLU], kind) as hooks:
        copied = make_copy(model)
        copied(torch.zeros(1, 4)).sum().backward()
        assert not seen
        assert not [hook for m in copied.modules() for hook in m._forward_hooks.values() if isinstance(hook, _Hook)]
        model(torch.zeros(1, 4)).sum().backward()
        assert set(hooks.calls.values()) == {1}
    copied(torch.zeros(1, 4)).sum().backward()
    assert len(seen) == 3


def test_modules_that_come_and_go_inside_do_not_matter():
    model, seen = make_net(), []
    old = model[1]
    with Hooks(model, lambda name, *args: seen.append(name)):
        model[1] = nn.Linear(3, 2)
        model.append(nn.ReLU())
        model(torch.zeros(1, 4))
        del model[0][1]
        model(torch.zeros(1, 4))
    assert seen == ["0.0", "0.1", "0.0"]
    assert n_hooks(model) == n_hooks(old) == 0


def test_hooks_of_others_may_come_and_go_inside_and_keep_their_order():
    model, order = make_net(), []
    first = model[1].register_forward_hook(lambda *args: order.append("first"))
    model[1].register_forward_hook(lambda *args: order.append("second"))
    with Hooks(model, lambda *args: order.append("ours"), "1"):
        first.remove()
        model[1].register_forward_hook(lambda *args: order.append("third"))
        model[1].register_forward_hook(lambda *args: order.append("zeroth"), prepend=True)
        model[1].register_forward_hook(lambda *args: order.append("always"), always_call=True)
        model[1].register_full_backward_hook(lambda *args: order.append("back"))
        model(torch.zeros(1, 4))
    model(torch.zeros(1, 4)).sum().backward()
    assert order == ["zeroth", "second", "ours", "third", "always", "zeroth", "second", "third", "always", "back"]
    assert len(model[1]._forward_hooks_always_called) == 1


def test_two_at_once_leave_in_any_order():
    model = make_net()
    one, other = Hooks(model, nothing), Hooks(model, nothing, "1")
    one.__enter__()
    other.__enter__()
    one.remove()
    assert {hook.owner for m in model.modules() for hook in m._forward_hooks.values()} == {other}
    other.remove()
    assert n_hooks(model) == 0


def test_an_interrupt_at_any_line_of_ours_leaves_no_hook():
    """Ctrl-C while hooks are being registered or removed: an exception on the k-th line that runs in our file."""
    file, seen = sys.modules[Hooks.__module__].__file__, set()
    for kind in ("forward", "forward_pre", "backward"):
        for k in range(400):
            model, users = make_net(), nothing
            model[1].register_forward_hook(users)
            left, at = k, None

            def count(frame, event, arg):
                nonlocal left, at
                if frame.f_code.co_filename != file:
                    return None
                if event == "line":
                    left -= 1
                    if left < 0 and at is None:
                        at = frame.f_code.co_name
                        raise KeyboardInterrupt
                return count

            hooks = Hooks(model, nothing, ["0.*", "1"], kind)
            try:
                sys.settrace(count)
                try:
                    with hooks:
                        model(torch.ones(1, 4)).sum().backward()
                finally:
                    sys.settrace(None)
            except KeyboardInterrupt:
                pass
            if at in ("__exit__", "remove") and hooks._on:  # before the removal has begun: nobody could
                hooks.remove()
            seen.add(at)
            assert [hook for m in model.modules() for hook in m._forward_hooks.values()] == [users], (kind, k, at)
            assert n_hooks(model) == 1
            if at is None:
                break
    assert seen >= {"__enter__", "_sweep", "_called", "_await_gradient", None}


def test_a_script_is_refused_with_a_remedy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        trace = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    for model in (script, trace, nn.Sequential(nn.ReLU(), script)):
        with pytest.raises(TypeError, match=r"torch\.jit.*Hook the model that it was made from"):
            Hooks(model, nothing)
    with Hooks(nn.Sequential(nn.ReLU(), script), nothing, "0") as hooks:
        hooks._model(torch.zeros(1, 2))
    assert hooks.calls == {"0": 1}


def test_a_traced_graph_module_is_a_model_like_any_other():
    model = torch.fx.symbolic_trace(make_net())
    with Hooks(model, nothing, nn.Linear) as hooks:
        model(torch.zeros(1, 4))
    assert hooks.calls == {"0.0": 1, "1": 1}


def test_there_is_no_finaliser():
    assert not hasattr(Hooks, "__del__")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Hooks(make_net(), nothing).__enter__()
        gc.collect()


# -- torch.compile ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Sigmoid()

    def forward(self, x):
        return self.b(self.a(x))


class Whole(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, width)

    def forward(self, x):
        return self.head(self.block(x))


def in_a_row():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), nn.Linear(4, 2))


def wrapped(model):
    compiled = torch.compile(model, backend="eager")
    return compiled, compiled


def original(model):
    return model, torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model, model


def only_a_part(model):
    name = next(name for name, _ in model.named_children())
    setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    return model, model


def a_part_of(model):
    return next(model.children()), torch.compile(model, backend="eager")


def a_function(model):
    return model, torch.compile(lambda x: model(x) * 2, backend="eager")


def only_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model, model


def called_with(hooks, call):
    """How many of the hooked modules were reached, and whether there was a warning on entry."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with hooks:
            warned = ["torch.compile has traced" in str(w.message) for w in record if w.filename == __file__]
            y = call(torch.ones(5, 4))
            if hooks._kind == "backward":
                y.sum().backward()
    return len(hooks) - len(hooks.uncalled), any(warned)


@pytest.fixture
def dynamo():
    torch.compiler.reset()
    yield torch._dynamo
    torch.compiler.reset()


WAYS = [wrapped, original, in_place, only_a_part, a_part_of, a_function, only_forward]


@pytest.mark.filterwarnings("default")  # torch's own, about what it meets as it traces
@pytest.mark.parametrize("make", [Whole, in_a_row])
@pytest.mark.parametrize("way", WAYS)
def test_hooks_before_the_first_compiled_call_fire_and_later_ones_warn(dynamo, make, way):
    hooked, call = way(make())
    n = len(Hooks(hooked, nothing))
    for _ in range(2):  # again too: those of the first time have broken the code up around them
        assert called_with(Hooks(hooked, nothing), call) == (n, False)

    dynamo.reset()
    hooked, call = way(make())
    call(torch.ones(5, 4))
    reached, warned = called_with(Hooks(hooked, nothing), call)
    assert warned
    assert reached < n
    dynamo.reset()  # as the warning says
    assert called_with(Hooks(hooked, nothing), call) == (n, False)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_kind_fires_in_compiled_code_and_compiles_it_once(dynamo, kind, backend):
    model, seen = in_a_row(), []
    compiled = torch.compile(model, backend=backend)
    with Hooks(compiled, lambda name, m, i, o: seen.append(None if o is None else o.mean().item()), kind=kind) as hooks:
        for k in range(10):
            compiled(torch.ones(5, 4)).sum().backward()
            if k == 0:
                dynamo.utils.counters.clear()
    assert set(hooks.calls.values()) == {10}
    assert len(seen) == 30
    assert not dynamo.utils.counters["frames"]


@pytest.mark.filterwarnings("default")
def test_a_new_model_for_which_torch_takes_the_code_of_an_old_one_is_warned_about(dynamo):
    torch.compile(Whole(), backend="eager")(torch.ones(5, 4))
    new = torch.compile(Whole(), backend="eager")
    assert called_with(Hooks(new, nothing), new) == (0, True)
    wider = torch.compile(Whole(3), backend="eager")
    assert called_with(Hooks(wider, nothing), wider) == (3, False)
    alone = Whole()
    assert called_with(Hooks(alone, nothing), alone) == (3, False)  # it is not compiled at all


@pytest.mark.filterwarnings("default")
def test_it_is_told_across_autocast_and_modes_of_gradient(dynamo):
    model = Whole()
    compiled = torch.compile(model, backend="eager")

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return compiled(x)

    call(torch.ones(5, 4))
    assert called_with(Hooks(model, nothing), call) == (0, True)


@pytest.mark.filterwarnings("default")
def test_hooks_that_torch_guards_do_not_warn(dynamo):
    """A table of hooks that was not empty when it was traced is looked at, and the code compiled anew."""
    model = Whole()
    model.head.register_forward_hook(nothing)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(5, 4))
    assert called_with(Hooks(model, nothing, "head"), compiled) == (1, False)
    dynamo.reset()
    compiled(torch.ones(5, 4))
    assert called_with(Hooks(model, nothing, "block.a"), compiled) == (0, True)


@pytest.mark.filterwarnings("default")
def test_to_ask_changes_nothing_of_the_compiled_code(dynamo):
    model = Whole()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(5, 4))
    dynamo.utils.counters.clear()
    for _ in range(3):
        called_with(Hooks(model, nothing), compiled)
        compiled(torch.ones(5, 4))
    assert not dynamo.utils.counters["frames"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("gone", ["convert_frame.input_codes", "eval_frame._debug_get_cache_entry_list"])
def test_without_what_is_private_to_torch_every_traced_model_warns(dynamo, gone, monkeypatch):
    compiled = torch.compile(in_a_row(), backend="eager")
    assert called_with(Hooks(compiled, nothing), compiled) == (3, False)
    monkeypatch.delattr(f"torch._dynamo.{gone}")
    assert called_with(Hooks(compiled, nothing), compiled) == (3, True)
    assert called_with(Hooks(in_a_row(), nothing), lambda x: x)[1] is False


@pytest.mark.filterwarnings("default")
def test_a_warning_that_is_an_error_leaves_no_hook(dynamo):
    compiled = torch.compile(in_a_row(), backend="eager")
    compiled(torch.ones(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"torch\.compiler\.reset\(\)"), Hooks(compiled, nothing):
            pass
    assert n_hooks(compiled) == 0


def test_layers_inside_of_a_compiled_model_go_by_their_plain_names_too():
    compiled = torch.compile(Whole(), backend="eager")
    assert list(select_modules(compiled, "block.a")) == ["_orig_mod.block.a"]
    assert list(select_modules(compiled, "_orig_mod.block.*")) == ["_orig_mod.block.a", "_orig_mod.block.b"]


def test_nothing_compiled_means_no_compiler_is_imported():
    code = (
        "import sys, torch, minitrain\n"
        "model = torch.nn.Linear(1, 1)\n"
        "with minitrain.Hooks(model, print), minitrain.capture(model) as outputs: pass\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
