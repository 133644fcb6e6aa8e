"""Whatever is selected and whatever happens inside: no hook of ours stays, every hook of the user's does, in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minitrain.hooks import KINDS, Hooks

FAULTS = (ValueError, StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit)
NAMES = ["0", "0.0", "0.1", "1", "1.0", "1.1", "2"]
selections = st.one_of(
    st.none(),
    st.sampled_from([nn.Linear, nn.ReLU, nn.Sequential, (nn.Linear, nn.Sequential), "*", "0.*", "?.1"]),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.sets(st.sampled_from(NAMES), min_size=1).map(lambda names: lambda name, module: name in names),
)


def make_net():
    def block():
        return nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))

    return nn.Sequential(block(), block(), nn.Linear(3, 1))


def hooks_of(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [[list(getattr(m, table).items()) for table in tables] for m in model.modules()]


@given(
    several=st.lists(st.tuples(selections, st.sampled_from(KINDS), st.booleans()), min_size=1, max_size=3),
    users=st.lists(st.sampled_from(NAMES), max_size=4),
    fault=st.none() | st.sampled_from(FAULTS),
    moment=st.integers(0, 12),
)
def test_only_our_own_hooks_go_and_all_of_them(several, users, fault, moment):
    model = make_net()
    for name in users:
        model.get_submodule(name).register_forward_hook(lambda *args: None)
    before, count = hooks_of(model), 0

    def fn(name, module, inputs, output):
        nonlocal count
        count += 1
        if fault is not None and count > moment:
            raise fault

    opened = [Hooks(model, fn, select, kind, replace=replace) for select, kind, replace in several]
    raised = None
    try:
        for hooks in opened:
            hooks.__enter__()
        loss = model(torch.ones(2, 3, requires_grad=True)).sum()
        loss.backward()
    except BaseException as error:
        raised = error
    finally:
        for hooks in opened:  # in the order of entry, not the reverse: they do not depend on each other
            hooks.remove()
    assert hooks_of(model) == before
    assert (raised is not None) == (fault is not None and count > moment)
    seen = count
    model(torch.ones(2, 3)).sum().backward()
    assert count == seen


@given(select=selections, n_calls=st.integers(0, 3))
def test_every_selected_module_is_counted_at_every_call(select, n_calls):
    model = make_net()
    for kind in KINDS:
        with Hooks(model, lambda *args: None, select, kind) as hooks:
            for _ in range(n_calls):
                model(torch.ones(2, 3)).sum().backward()
        assert hooks.calls == dict.fromkeys(hooks.names, n_calls)
        assert hooks.uncalled == ([] if n_calls else hooks.names)


@given(select=selections, seed=st.integers(0, 99))
def test_looking_on_changes_neither_outputs_nor_gradients(select, seed):
    torch.manual_seed(seed)
    model, x = make_net(), torch.randn(4, 3)
    y = model(x)
    y.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for kind in KINDS:
        model.zero_grad()
        with Hooks(model, lambda *args: torch.zeros(1), select, kind):
            again = model(x)
            again.sum().backward()
        assert torch.equal(again, y)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
