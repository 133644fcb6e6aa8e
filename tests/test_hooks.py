import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from minitrain.errors import LoopError
from minitrain.hooks import Hooks, first_tensor, select_modules


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


def test_backward_takes_the_first_tensor_of_a_tuple_and_ignores_other_outputs():
    class Odd(nn.Module):
        def forward(self, x):
            return "words"

    lstm, seen = nn.LSTM(2, 3), []
    with Hooks(lstm, lambda n, m, i, grad: seen.append(grad.shape), kind="backward"):
        lstm(torch.zeros(4, 1, 2))[0].sum().backward()
    assert seen == [(4, 1, 3)]
    with Hooks(Odd(), nothing, kind="backward") as hooks:
        assert hooks._modules["Odd"](0) == "words"


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
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


def test_handles_of_graphs_that_are_gone_are_let_go():
    model = make_net()
    with Hooks(model, nothing, kind="backward") as hooks:
        for _ in range(20):
            model(torch.ones(1, 4)).sum().backward()
        gc.collect()
        model(torch.ones(1, 4))
        assert len(hooks._tensor_handles) <= 6


def test_a_copy_of_the_model_made_inside_goes_quiet_afterwards():
    model, seen = make_net(), []
    with Hooks(model, lambda *args: seen.append(args)):
        copied = copy.deepcopy(model)
    copied(torch.zeros(1, 4))
    assert seen == []


def test_there_is_no_finaliser():
    assert not hasattr(Hooks, "__del__")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Hooks(make_net(), nothing).__enter__()
        gc.collect()
