"""The base class is the manual: what is an event, what is none, and what is refused when the class is made."""

import contextlib
import functools
import inspect

import pytest
import torch
from torch import nn

import minitrain
from minitrain import EVENTS, BatchLoader, Callback, DataLoaders, Learner
from minitrain.callback import STAGES


def fit(*cbs, **options):
    x = torch.randn(8, 3)
    learn = Learner(
        nn.Linear(3, 3), DataLoaders(BatchLoader(x, x, batch_size=4)), nn.MSELoss(), cbs=cbs, progress=False
    )
    learn.fit(1, **options)
    return learn


def test_events_are_sixteen_six_and_three():
    assert len(EVENTS) == len(set(EVENTS)) == 16 + 6 + 3
    assert [event for event in EVENTS if event.startswith("after_cancel_")] == [f"after_cancel_{s}" for s in STAGES]
    assert [event for event in EVENTS if event.startswith("during_")] == [
        "during_fit",
        "during_validate",
        "during_forward",
    ]


def test_the_base_class_documents_every_event_and_nothing_else():
    named = {name for name in vars(Callback) if name.startswith(("before_", "after_", "during_"))}
    assert named == set(EVENTS)
    for event in EVENTS:
        method = getattr(Callback, event)
        assert method.__doc__, event
        assert list(inspect.signature(method).parameters) == ["self", "learn"]
        assert inspect.signature(method).return_annotation


def test_each_cancel_has_its_exception():
    for stage in STAGES:
        assert getattr(minitrain, f"Cancel{stage.title()}").stage == stage


def test_an_event_may_come_from_a_mixin_that_is_no_callback():
    class Counts:
        def after_batch(self, learn):
            self.n = getattr(self, "n", 0) + 1

    class Counter(Counts, Callback):
        pass

    counter = Counter()
    fit(counter)
    assert counter.n == 2


def test_a_misspelt_event_of_a_mixin_is_refused_too():
    class Mixin:
        def after_batches(self, learn): ...

    with pytest.raises(TypeError, match=r"Child.after_batches is not an event. Did you mean 'after_batch'\?"):
        type("Child", (Mixin, Callback), {})


def test_static_class_and_wrapped_methods_serve_as_events():
    heard = []

    def logged(function):
        @functools.wraps(function)
        def wrapper(*args):
            heard.append(function.__name__)
            return function(*args)

        return wrapper

    class Several(Callback):
        @staticmethod
        def before_fit(learn):
            heard.append("static")

        @classmethod
        def after_fit(cls, learn):
            heard.append("class")

        @logged
        def after_epoch(self, learn): ...

    fit(Several())
    assert heard == ["static", "after_epoch", "class"]


def test_data_and_private_names_may_be_called_as_they_like():
    class Free(Callback):
        after_steps = 100
        before: int = 3

        def _after_batches(self):
            return self.after_steps

    assert Free()._after_batches() == 100


@contextlib.contextmanager
def refused(match):
    with pytest.raises(TypeError, match=match):
        yield


async def coroutine(self, learn): ...


def generator(self, learn):
    yield


async def async_generator(self, learn):
    yield


WRONG = {
    "a number in place of a method": ("after_batch", 3, r"Wrong.after_batch must be a method \(self, learn\), got 3"),
    "a property": ("after_batch", property(lambda self: 1), "must be a method"),
    "a coroutine": ("after_batch", coroutine, "is a coroutine"),
    "an asynchronous generator": ("after_batch", async_generator, "is a coroutine"),
    "a generator": ("after_batch", generator, "is a bare generator.*remove the yield"),
    "a generator in place of a context": ("during_fit", generator, "is a bare generator.*@contextlib.contextmanager"),
    "no learn": (
        "after_batch",
        lambda self: None,
        r"Wrong.after_batch has the signature \(self\), wanted \(self, learn\)",
    ),
    "no learn in a static method": (
        "after_batch",
        staticmethod(lambda: None),
        r"has the signature \(\), wanted \(learn\)",
    ),
    "learn by keyword only": ("after_batch", lambda self, *, learn: None, "has the signature"),
    "fastai's spelling": ("before_batch_", lambda self, learn: None, "is not an event. Did you mean 'before_batch'"),
    "Lightning's spelling": ("after_train_batch", lambda self, learn: None, "is not an event. Did you mean"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_when_the_class_is_made(name):
    event, value, match = WRONG[name]
    with refused(match):
        type("Wrong", (Callback,), {event: value})


def test_a_context_that_is_none_says_what_was_wanted():
    class NoContext(Callback):
        def during_fit(self, learn):
            return None

    with pytest.raises(TypeError, match=r"NoContext.during_fit returned None, wanted a context manager"):
        fit(NoContext())


def test_the_base_class_by_itself_does_nothing_and_keeps_nothing():
    callback = Callback()
    fit(callback)
    assert vars(callback) == {}
    assert callback.state_dict() == {}


def test_an_event_that_nobody_overrides_has_an_empty_place_in_the_table():
    class One(Callback):
        def after_epoch(self, learn):
            self.table = learn._stages._table

    one = One()
    fit(one)
    assert {event: len(functions) for event, functions in one.table.items() if functions} == {"after_epoch": 1}


def test_a_method_that_is_set_on_the_instance_counts():
    callback, heard = Callback(), []
    callback.after_epoch = heard.append
    learn = fit(callback)
    assert heard == [learn]


@pytest.mark.parametrize(("has", "lacks"), [("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")])
def test_a_state_that_is_given_and_not_taken_is_an_error_when_the_class_is_made(has, lacks):
    with pytest.raises(TypeError, match=f"Half has a {has} and no {lacks}: its state would be lost"):
        type("Half", (Callback,), {has: lambda self, *state: {}})
    both = {"state_dict": lambda self: {}, "load_state_dict": lambda self, state: None}
    whole = type("Whole", (Callback,), both)
    type("Below", (whole,), {has: both[has]})  # it has the other one from its base
