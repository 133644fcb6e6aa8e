"""Whatever net, selection and fault: no hook of ours stays, every hook of the user's does, in order."""

import dataclasses
import warnings

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minitrain import capture
from minitrain.errors import CancelBatch, CancelEpoch, CancelFit
from minitrain.hooks import KINDS, Hooks, _Hook, select_modules, tensors_in

FAULTS = (
    ValueError,
    StopIteration,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    AssertionError,
    CancelFit,
    CancelBatch,
    CancelEpoch,
)
WIDTH = 4


# -- nets: a description is drawn, and a model built from it ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spec:
    """`kind` of a part and what is in it; `inplace` decides about every activation and sum."""

    kind: str
    parts: tuple["Spec", ...] = ()

    def build(self, dims=2, inplace=True):
        return PARTS[self.kind](self.parts, dims, inplace)


class Plain(nn.Module):
    """What the parts below have in common: a body of parts."""

    def __init__(self, parts, dims, inplace):
        super().__init__()
        self.inplace = inplace
        self.body = nn.Sequential(*[part.build(dims, inplace) for part in parts])

    def forward(self, x):
        return self.body(x)


class Residual(Plain):
    def forward(self, x):
        y = self.body(x)
        if self.inplace and y is not x and y.grad_fn is not None and y.grad_fn.name().startswith(("View", "Addmm")):
            y += x
            return y
        return y + x


class Twice(Plain):
    def forward(self, x):
        return self.body(self.body(x))


class Outputs(Plain):
    """A part that returns a mask that needs no gradient, and the rest in a dict."""

    class Inner(nn.Linear):
        def forward(self, x):
            return {"mask": torch.ones(len(x), dtype=torch.int64), "y": [super().forward(x), None]}

    def __init__(self, parts, dims, inplace):
        super().__init__(parts, dims, inplace)
        self.inner, self.never = self.Inner(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(self.body(x))["y"][0]


class Recurrent(Plain):
    def __init__(self, parts, dims, inplace):
        super().__init__(parts, dims, inplace)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.lstm(self.body(x).reshape(len(x), -1, WIDTH))[0].reshape(x.shape)


class Convolution(Plain):
    def __init__(self, parts, dims, inplace):
        super().__init__(parts, dims, inplace)
        self.conv, self.relu = nn.Conv1d(1, 1, 3, padding=1), nn.ReLU(inplace)

    def forward(self, x):
        return self.relu(self.conv(self.body(x).reshape(-1, 1, WIDTH)).reshape(x.shape))


def linear():
    return nn.Linear(WIDTH, WIDTH)


def shared(parts, dims, inplace):
    layer = linear()
    return nn.Sequential(layer, *[part.build(dims, inplace) for part in parts], layer)


def dense(parts, dims, inplace):
    return nn.Sequential(linear(), nn.Identity(), nn.Dropout(0.5), nn.ReLU(inplace))


def normed(parts, dims, inplace):
    norm = nn.BatchNorm1d(WIDTH) if dims == 2 else nn.LayerNorm(WIDTH)
    return nn.Sequential(linear(), norm, nn.ReLU(inplace))


PARTS = {
    "linear": lambda *args: linear(),
    "identity": lambda *args: nn.Identity(),
    "sigmoid": lambda *args: nn.Sigmoid(),
    "dense": dense,
    "normed": normed,
    "shared": shared,
    "plain": Plain,
    "residual": Residual,
    "twice": Twice,
    "outputs": Outputs,
    "recurrent": Recurrent,
    "convolution": Convolution,
}
leaves = st.sampled_from(["linear", "identity", "sigmoid", "dense", "normed"]).map(Spec)
deeper = ["shared", "plain", "residual", "twice", "outputs", "recurrent", "convolution"]
specs = st.recursive(
    leaves,
    lambda parts: st.builds(Spec, st.sampled_from(deeper), st.lists(parts, min_size=1, max_size=3).map(tuple)),
    max_leaves=5,
)
nets = specs.map(lambda spec: Spec("plain", (Spec("linear"), spec, Spec("linear"))))


def build(net, dims=2, inplace=True, seed=0):
    torch.manual_seed(seed)
    return net.build(dims, inplace).double().eval()


def batch(dims=2, seed=1):
    torch.manual_seed(seed)
    return torch.randn((3, 2, WIDTH)[3 - dims :], dtype=torch.float64, requires_grad=True)


@st.composite
def selections(draw, net, dims):
    """Something that `select` takes and that matches a module of this net."""
    model = build(net, dims)
    names = [name for name, _ in model.named_modules() if name]
    types = sorted({type(m) for m in model.modules()}, key=str)
    some = st.lists(st.sampled_from(names), min_size=1, max_size=4)
    return draw(
        st.one_of(
            st.none(),
            st.sampled_from([*types, nn.Module, "*", "body.*", "*.0", type(model).__name__]),
            some,
            some.map(set),
            st.lists(st.sampled_from([*types, *names, "*.1"]), min_size=1, max_size=3).filter(lambda s: s != ["*.1"]),
            some.map(lambda chosen: lambda name, module: name in chosen),
        )
    )


def quiet(function, *args):
    """Call it without the warning about what was named and not called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


# -- whatever happens -------------------------------------------------------------------------------------------------

TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def tables_of(model):
    """Every entry of every table of hooks, except those that we put there, by key and in order."""
    found = [[list(getattr(m, table).items()) for table in TABLES] for m in model.modules()]
    flags = [[list(getattr(m, flag)) for flag in FLAGS] for m in model.modules()]
    return [[[item for item in items if not isinstance(item[1], _Hook)] for items in part] for part in found], flags


def ours_in(model):
    return [
        hook for m in model.modules() for table in TABLES for hook in getattr(m, table).values() if type(hook) is _Hook
    ]


class Users:
    """Hooks of the user's own: they note the order in which they run, look at tensors, and may raise."""

    def __init__(self, model):
        self.model, self.modules = model, list(model.modules())
        self.order, self.tensors, self.tensor_hooks, self.handles, self.removed = [], [], [], [], []
        self.raise_in = None

    def seen(self, grad):
        return None

    def add(self, where, kind, prepend):
        module, number = self.modules[where % len(self.modules)], len(self.handles)

        def hook(module, *args):
            self.order.append(number)
            for tensor in tensors_in(args):
                self.tensors.append(tensor)
                if tensor.requires_grad and not tensor.is_leaf and number % 2:
                    self.tensor_hooks.append((tensor, tensor.register_hook(self.seen)))
            if self.raise_in is not None and self.raise_in[0] == number:
                raise self.raise_in[1]

        add = {
            "forward": module.register_forward_hook,
            "pre": module.register_forward_pre_hook,
            "backward": self.model.register_full_backward_hook,  # elsewhere it does not bear activations in place
        }[kind]
        options = {"always_call": True} if kind == "forward" and number % 3 == 2 else {}
        self.handles.append(add(hook, prepend=prepend, **options))


@st.composite
def plans(draw):
    net, dims = draw(nets), draw(st.sampled_from([2, 3]))
    users = st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from(["forward", "pre", "backward"]), st.booleans()), max_size=4
    )
    ours = st.lists(
        st.tuples(selections(net, dims), st.sampled_from([*KINDS, "capture"]), st.booleans()), min_size=1, max_size=3
    )
    return {
        "net": net,
        "dims": dims,
        "before": draw(users),
        "during": draw(users),
        "taken_away": draw(st.integers(0, 8)),
        "ours": draw(ours),
        "nested": draw(st.booleans()),
        "fault": draw(st.sampled_from([None, *FAULTS])),
        "place": draw(st.sampled_from(["fn", "module", "user", "body", "registration"])),
        "moment": draw(st.integers(0, 8)),
    }


@given(plan=plans())
def test_only_our_own_hooks_go_and_all_of_them(plan):
    model, x = build(plan["net"], plan["dims"]), batch(plan["dims"])
    users, fault, seen = Users(model), plan["fault"] and plan["fault"](), 0
    for user in plan["before"]:
        users.add(*user)

    def fn(name, module, inputs, output):
        nonlocal seen
        seen += 1
        users.tensors.extend(tensors_in(output))
        if fault is not None and plan["place"] == "fn" and seen > plan["moment"]:
            raise fault

    if fault is not None and plan["place"] == "module":
        broken = users.modules[plan["moment"] % len(users.modules)]

        def forward(*args, **kwargs):
            raise fault

        broken.forward = forward
    if fault is not None and plan["place"] == "registration":

        def register(*args, **kwargs):
            raise fault

        refusing = list(select_modules(model, plan["ours"][-1][0]).values())[
            -1
        ]  # after the others have been registered
        refusing.register_forward_hook = refusing.register_forward_pre_hook = register
    if fault is not None and plan["place"] == "user":
        users.raise_in = plan["moment"] % 4, fault

    contexts = [
        capture(model, select) if kind == "capture" else Hooks(model, fn, select, kind, replace=replace)
        for select, kind, replace in plan["ours"]
    ]
    expected, raised, entered = tables_of(model), None, []
    try:
        for context in contexts:
            context.__enter__()
            entered.append(context)
        assert ours_in(model)
        for module in users.modules:
            vars(module).pop("register_forward_hook", None)
            vars(module).pop("register_forward_pre_hook", None)
        for user in plan["during"]:
            users.add(*user)
        for handle in users.handles[plan["taken_away"] : plan["taken_away"] + 1]:
            handle.remove()
            users.removed.append(plan["taken_away"])
        expected = tables_of(model)
        y = model(x)
        users.tensors.extend(tensors_in(y))
        y.sum().backward()
        if fault is not None and plan["place"] == "body":
            raise fault
    except BaseException as error:
        raised = error
    assert raised is None or raised is fault, repr(raised)
    assert {hook.owner for hook in ours_in(model)} == {getattr(context, "_recorder", context) for context in entered}
    handles = [handle for context in contexts for _, handle in getattr(context, "_tensor_handles", ())]
    while entered:
        context = entered.pop() if plan["nested"] else entered.pop(0)
        assert not quiet(context.__exit__, type(raised) if raised else None, raised, None)
        assert {hook.owner for hook in ours_in(model)} == {getattr(other, "_recorder", other) for other in entered}

    assert tables_of(model) == expected
    for tensor in [x, *model.parameters(), *users.tensors]:
        assert all(hook == users.seen for hook in (tensor._backward_hooks or {}).values()), "a hook of ours on a tensor"
    for _, handle in users.tensor_hooks:  # of a tensor that was written into since, the table has stayed with the graph
        assert (table := handle.hooks_dict_ref()) is None or handle.id in table
    for handle in handles:
        assert handle.id not in (handle.hooks_dict_ref() or ())
    for module in users.modules:
        for name in ("forward", "register_forward_hook", "register_forward_pre_hook"):
            vars(module).pop(name, None)
    users.raise_in, before = None, seen
    users.order.clear()
    model(x).sum().backward()
    assert seen == before
    twin = Users(build(plan["net"], plan["dims"]))  # what the same hooks do where ours have never been
    for user in (*plan["before"], *plan["during"]):
        if len(users.handles) > len(twin.handles):
            twin.add(*user)
    for number in users.removed:
        twin.handles[number].remove()
    twin.model(batch(plan["dims"])).sum().backward()
    assert users.order == twin.order


# -- what is seen -----------------------------------------------------------------------------------------------------


@given(data=st.data(), net=nets, dims=st.sampled_from([2, 3]), n_calls=st.integers(0, 3))
def test_every_selected_module_is_counted_at_every_call(data, net, dims, n_calls):
    select = data.draw(selections(net, dims))
    for kind in ("forward", "forward_pre"):
        model = build(net, dims)
        chosen, counts = select_modules(model, select), {}
        for name, module in chosen.items():
            counts[name] = 0

            def count(*args, name=name, counts=counts):
                counts[name] += 1

            module.register_forward_pre_hook(count)

        def use(kind=kind, model=model):
            with Hooks(model, lambda *args: None, select, kind) as hooks:
                for _ in range(n_calls):
                    model(batch(dims)).sum().backward()
            return hooks

        hooks = quiet(use)
        assert hooks.calls == counts
        assert hooks.uncalled == [name for name, count in counts.items() if not count]


@given(data=st.data(), net=nets, dims=st.sampled_from([2, 3]))
def test_gradients_are_those_of_the_same_net_without_anything_in_place(data, net, dims):
    select = data.draw(selections(net, dims))
    seen, wanted = {}, {}

    def note(name, module, inputs, grad):
        seen.setdefault(name, []).append(grad.clone())

    def keep(name):
        def hook(module, inputs, output):
            tensor = next(tensor for tensor in tensors_in(output) if tensor.requires_grad)
            tensor.retain_grad()
            wanted.setdefault(name, []).append(tensor)

        return hook

    def use():
        model = build(net, dims)
        with Hooks(model, note, select, "backward") as hooks:
            model(batch(dims)).pow(2).sum().backward()
        return hooks

    hooks = quiet(use)
    twin = build(net, dims, inplace=False)
    for name, module in select_modules(twin, select).items():
        module.register_forward_hook(keep(name))
    twin(batch(dims)).pow(2).sum().backward()
    assert seen.keys() == wanted.keys()
    assert {name: count for name, count in hooks.calls.items() if count} == {n: len(t) for n, t in wanted.items()}
    for name, tensors in wanted.items():
        for grad, tensor in zip(reversed(seen[name]), tensors, strict=True):
            torch.testing.assert_close(grad, tensor.grad, msg=lambda text, name=name: f"{name}: {text}")


@given(data=st.data(), net=nets, dims=st.sampled_from([2, 3]), seed=st.integers(0, 99))
def test_looking_on_changes_neither_outputs_nor_gradients(data, net, dims, seed):
    select = data.draw(selections(net, dims))

    def results(context_of):
        model, x = build(net, dims, seed=seed).train(), batch(dims, seed)

        def use():
            with context_of(model):
                torch.manual_seed(seed)
                y = model(x)
                y.pow(2).sum().backward()
            return [y.detach(), x.grad, torch.get_rng_state(), *(p.grad for p in model.parameters()), *model.buffers()]

        return quiet(use)

    wanted = results(lambda model: torch.enable_grad())
    contexts = [lambda m, k=kind: Hooks(m, lambda *args: torch.zeros(1), select, k) for kind in KINDS]
    for context_of in (*contexts, lambda model: capture(model, select)):
        for a, b in zip(results(context_of), wanted, strict=True):
            assert (a is b is None) or torch.equal(a, b)


@given(data=st.data(), net=nets, dims=st.sampled_from([2, 3]))
def test_captured_outputs_are_those_of_the_same_net_without_anything_in_place(data, net, dims):
    select, wanted = data.draw(selections(net, dims)), {}

    def use():
        model = build(net, dims)
        with capture(model, select) as outputs:
            for _ in range(2):
                model(batch(dims)).sum().backward()
        return outputs

    outputs = quiet(use)
    twin = build(net, dims, inplace=False)
    for name, module in select_modules(twin, select).items():
        module.register_forward_hook(lambda m, i, output, name=name: wanted.setdefault(name, []).append(output))
    twin(batch(dims))
    assert outputs.calls.keys() == wanted.keys()
    for name, values in wanted.items():
        for copied, value in zip(outputs.calls[name], values, strict=True):
            pairs = list(zip(tensors_in(copied), tensors_in(value), strict=True))
            assert all(torch.equal(a, b) and not a.requires_grad for a, b in pairs)
