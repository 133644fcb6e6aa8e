"""Whatever callbacks do, and whenever they do it: events come in order and in pairs, and nothing is left behind."""

import difflib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties.loops import (
    BATCH_LEVEL,
    CANCELS,
    CONTEXTS,
    FAULTS,
    POINTS,
    Plan,
    Recorder,
    Size,
    assert_clean,
    expected_events,
    make_learner,
    make_recorders,
    plans,
    raiser,
    sizes,
    snapshot,
)

from minitrain import EVENTS, Callback, LoopError
from minitrain.callback import STAGES

cancels = st.sampled_from(CANCELS)
faults = st.sampled_from(FAULTS)
ENDING = {"batch": "batch", "step": "step", "train": "train", "validate": "validate", "epoch": "epoch", "fit": "fit"}


def run(size, plan_list, orders=None, **options):
    """A fit under these plans: the learner, the log of all events, and the error that surfaced (or None)."""
    log, recorders = make_recorders(size, plan_list, orders)
    learn = make_learner(size, recorders, **options)
    before = snapshot(learn.model)
    error = None
    try:
        learn.fit(size.epochs)
    except BaseException as e:
        if not isinstance(e, LoopError) and not hasattr(e, "planned"):
            raise
        error = e
    assert_clean(learn, before["modes"], before["hooks"])
    return learn, log, error


def events_of(log, who):
    return [event for index, event in log if index == who]


def open_stages(log):
    """The stages that are open at the end of one callback's log, by reading its events alone."""
    stages = []
    for event in log:
        kind, _, stage = event.partition("_")
        if event == "after_backward":
            stages.append("step")
        elif kind == "before" and stage in STAGES and stage != "step":
            stages.append(stage)
        elif kind == "after" and stage.removeprefix("cancel_") in STAGES:
            name = stage.removeprefix("cancel_")
            if name in stages:
                assert stages.pop() == name, (event, log)
    return stages


@given(size=sizes)
def test_a_quiet_fit_fires_the_documented_events_in_order(size):
    _, log, error = run(size, [])
    assert error is None
    for who in range(size.callbacks):
        assert events_of(log, who) == expected_events(size)


@given(size=sizes, orders=st.lists(st.integers(-3, 3), min_size=3, max_size=3))
def test_callbacks_run_by_order_and_ties_keep_the_order_of_the_list(size, orders):
    _, log, _ = run(size, [], orders)
    ranked = sorted(range(size.callbacks), key=lambda i: orders[i])
    points = [(who, event) for who, event in log if event in POINTS]
    for i in range(0, len(points), size.callbacks):
        assert [who for who, _ in points[i : i + size.callbacks]] == ranked
        assert len({event for _, event in points[i : i + size.callbacks]}) == 1


@given(data=st.data(), size=sizes)
def test_every_before_is_followed_by_exactly_one_after_or_after_cancel(data, size):
    several = data.draw(st.lists(plans(size, cancels.map(lambda kind: raiser(kind()))), min_size=1, max_size=3))
    _, log, error = run(size, several)
    if error is None:
        for who in range(size.callbacks):
            own = events_of(log, who)
            for stage in ("fit", "epoch", "train", "validate", "batch"):
                begun = own.count(f"before_{stage}")
                ended = own.count(f"after_{stage}") + own.count(f"after_cancel_{stage}")
                # a callback behind the one that cancels in before_X hears of the end of a stage, not of its beginning
                refused = sum(p.done and p.event == f"before_{stage}" for p in several)
                assert begun <= ended <= begun + refused, (stage, own)
            assert own.count("before_step") <= own.count("after_step") + own.count("after_cancel_step")
            assert open_stages(own) == []
    else:
        assert isinstance(error, LoopError)


# What a cancel can end at each event: the stages that are open there (for the callback that raises).
def open_at(event, *, validating):
    passes = ["fit", "epoch", "validate" if validating else "train"]
    return {
        "before_fit": ["fit"],
        "before_epoch": ["fit", "epoch"],
        "before_train": passes,
        "before_validate": passes,
        "after_train": ["fit", "epoch"],
        "after_validate": ["fit", "epoch"],
        "after_epoch": ["fit"],
        "after_fit": [],
        "after_batch": passes,
        "after_backward": [*passes, "batch", "step"],
        "before_step": [*passes, "batch", "step"],
    }.get(event, [*passes, "batch"])


QUIET = [event for event in POINTS if "cancel" not in event]


@given(data=st.data(), size=sizes, kind=cancels)
def test_a_cancel_ends_each_open_stage_up_to_its_own_innermost_first(data, size, kind):
    plan = data.draw(plans(size, st.just(raiser(kind())), QUIET))
    _, log, error = run(size, [plan])
    if not plan.done:
        assert error is None
        return
    own = events_of(log, plan.who)
    nth = [i for i, event in enumerate(own) if event == plan.event][plan.nth]
    validating = "before_validate" in own[:nth] and own[:nth].count("before_validate") > own[:nth].count(
        "after_validate"
    )
    stages = open_at(plan.event, validating=validating or plan.event == "before_validate")
    if kind.stage not in stages:
        assert isinstance(error, LoopError)
        assert kind.__name__ in str(error)
        assert not any("cancel" in event for event in own)
        return
    assert error is None
    ends = stages[stages.index(kind.stage) :][::-1]
    after = [event for event in own[nth + 1 :] if event in POINTS]
    assert after[: len(ends)] == [f"after_cancel_{stage}" for stage in ends]
    assert sum("cancel" in event for event in own) == len(ends)


@given(data=st.data(), size=sizes)
def test_the_loop_goes_on_where_the_cancel_says(data, size):
    kind = data.draw(cancels)
    plan = data.draw(plans(size, st.just(raiser(kind())), QUIET))
    learn, log, error = run(size, [plan])
    if error is not None or not plan.done:
        return
    own = events_of(log, plan.who)
    if kind.stage in ("batch", "step"):
        assert own.count("before_batch") == size.epochs * (size.train + (size.valid or 0))
        assert own.count("before_backward") + 1 >= size.epochs * size.train
    if kind.stage == "train" and size.valid is not None:
        assert own.count("before_validate") == size.epochs
    if kind.stage in ("batch", "step", "train", "validate"):
        assert len(learn.history) == size.epochs
    if kind.stage == "epoch":
        assert len(learn.history) == size.epochs - 1
        assert own.count("before_epoch") == size.epochs
    if kind.stage == "fit":
        assert own[-2:] == ["after_cancel_fit", "close during_fit"]
        assert "after_fit" not in own


@given(data=st.data(), size=sizes, fault=faults)
def test_an_error_surfaces_as_itself_with_a_note_that_says_where(data, size, fault):
    error = fault("boom")
    plan = data.draw(plans(size, st.just(raiser(error)), QUIET))
    _, log, surfaced = run(size, [plan])
    assert (surfaced is error) == plan.done
    if plan.done:
        (note,) = surfaced.__notes__
        assert note.startswith(f"Recorder.{plan.event}")
        own = events_of(log, plan.who)
        if plan.event not in ("before_fit", "after_fit"):
            assert f"epoch {own.count('before_epoch') - 1}" in note
        assert ("batch" in note.split(",", 1)[-1]) == (plan.event in BATCH_LEVEL)


@given(data=st.data(), size=sizes, fault=faults)
def test_after_an_error_no_after_event_runs_and_every_context_is_closed(data, size, fault):
    plan = data.draw(plans(size, st.just(raiser(fault())), QUIET))
    _, log, error = run(size, [plan])
    if not plan.done:
        return
    assert error is not None
    at = max(i for i, (who, event) in enumerate(log) if who == plan.who and event == plan.event)
    assert all(event.startswith("close ") for _, event in log[at + 1 :])
    assert_contexts_are_nested(log)


def assert_contexts_are_nested(log):
    stack = []
    for who, event in log:
        verb, _, name = event.partition(" ")
        if verb == "open":
            stack.append((who, name))
        elif verb == "close":
            assert stack.pop() == (who, name)
    assert stack == []


@given(data=st.data(), size=sizes)
def test_contexts_close_last_in_first_out_under_any_cancel(data, size):
    kind = data.draw(cancels)
    _, log, _ = run(size, [data.draw(plans(size, st.just(raiser(kind()))))])
    assert_contexts_are_nested(log)


class Resource(Callback):
    """A context that may fail when it opens or closes."""

    def __init__(self, name, log, event, fail_open=None, fail_close=None, swallow=False):
        self.state_key, self.log, self.event = name, log, event
        self.fail_open, self.fail_close, self.swallow = fail_open, fail_close, swallow

    def _context(self, event):
        return self if event == self.event else _Nothing()

    def during_fit(self, learn):
        return self._context("during_fit")

    def during_validate(self, learn):
        return self._context("during_validate")

    def during_forward(self, learn):
        return self._context("during_forward")

    def __enter__(self):
        if self.fail_open:
            raise self.fail_open
        self.log.append(("open", self.state_key))

    def __exit__(self, *exc_info):
        self.log.append(("close", self.state_key))
        if self.fail_close:
            raise self.fail_close
        return self.swallow


class _Nothing:
    def __enter__(self):
        pass

    def __exit__(self, *exc_info):
        return False


@given(
    event=st.sampled_from(CONTEXTS),
    bad=st.integers(0, 2),
    when=st.sampled_from(["open", "close", "both"]),
    fault=faults,
)
def test_a_context_that_fails_to_open_or_close_keeps_no_other_open(event, bad, when, fault):
    log, error, other = [], fault("close"), ValueError("another")
    cbs = [
        Resource(
            f"r{i}",
            log,
            event,
            fail_open=error if i == bad and when == "open" else None,
            fail_close=(error if i == bad else other if when == "both" else None) if when != "open" else None,
        )
        for i in range(3)
    ]
    learn = make_learner(Size(1, 1, 1), cbs)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        learn.fit(1)
    opened = [name for verb, name in log if verb == "open"]
    closed = [name for verb, name in log if verb == "close"]
    assert sorted(opened) == sorted(closed)
    if when != "both":
        assert caught.value is error
        assert caught.value.__notes__[0].startswith(f"Resource.{event}")
    learn.cbs = []
    learn.fit(1)  # nothing is stuck


@given(event=st.sampled_from(CONTEXTS), fault=faults, data=st.data())
def test_no_context_can_swallow_an_error(event, fault, data):
    error = fault("boom")
    _, recorders = make_recorders(Size(1, 1, 1), [Plan(0, "after_pred", data.draw(st.integers(0, 1)), raiser(error))])
    learn = make_learner(Size(1, 1, 1), [*recorders, Resource("r", [], event, swallow=True)])
    with pytest.raises(fault) as caught:
        learn.fit(1)
    assert caught.value is error


@given(data=st.data(), size=sizes)
def test_a_fit_inside_a_callback_is_refused_and_so_is_initialize(data, size):
    calls = {"fit": lambda learn: learn.fit(1), "initialize": lambda learn: learn.initialize()}
    name = data.draw(st.sampled_from(sorted(calls)))
    plan = data.draw(plans(size, st.just(calls[name]), QUIET))
    _, _, error = run(size, [plan], init=lambda model, batches: None)
    assert isinstance(error, LoopError) == plan.done


NESTED = {
    "validate": lambda learn: learn.validate(learn.dls.train),
    "predict": lambda learn: learn.predict(torch.ones(2, 3)),
    "get_preds": lambda learn: learn.get_preds(list(learn.dls.train)),
}


@given(data=st.data(), size=sizes, inner=st.sampled_from(sorted(NESTED)))
def test_validation_inside_validation_is_refused(data, size, inner):
    size = Size(size.epochs, size.train, size.valid or 1, size.callbacks)
    plan = data.draw(plans(size, st.just(NESTED[inner]), ["before_validate", "after_validate"]))
    _, _, error = run(size, [plan])
    assert isinstance(error, LoopError) == plan.done


@given(data=st.data(), size=sizes)
def test_stop_ends_gracefully_whenever_it_is_called(data, size):
    plan = data.draw(plans(size, st.just(lambda learn: learn.stop("enough")), QUIET[:-1]))
    learn, log, error = run(size, [plan])
    assert error is None
    own = events_of(log, plan.who)
    assert own[-2:] == ["after_fit", "close during_fit"]
    assert not any("cancel" in event for event in own)
    assert learn.stop_reason == ("enough" if plan.done else None)
    epochs = own.count("before_epoch")
    assert len(learn.history) == epochs == own.count("after_epoch")
    assert own.count("before_train") == own.count("after_train") == epochs
    assert own.count("before_validate") == own.count("after_validate") == (0 if size.valid is None else epochs)
    trained = own.count("before_backward")
    if plan.done:  # no training batch begins after the call
        at = [i for i, event in enumerate(own) if event == plan.event][plan.nth]
        assert own[at + 1 :].count("before_backward") <= (plan.event in POINTS[3:6])
    for i, row in enumerate(learn.history):
        full = i < epochs - 1 or trained == epochs * size.train
        assert row.get("partial", False) == (not full)
    assert trained > 0 or all(row["train_loss"] is None for row in learn.history)


@given(data=st.data(), size=sizes)
def test_a_callback_serves_one_learner_at_a_time(data, size):
    _, recorders = make_recorders(size, [])
    second = make_learner(size, recorders)
    plan = data.draw(plans(size, st.just(lambda learn: second.fit(1)), QUIET))
    recorders[plan.who].plans.append(plan)
    first = make_learner(size, recorders)
    if plan.nth == 0 and (size.valid is not None or plan.event not in ("before_validate", "after_validate")):
        with pytest.raises(LoopError, match="one Learner at a time"):
            first.fit(size.epochs)
        assert plan.done
    recorders[plan.who].plans.clear()
    second.fit(1)  # afterwards the other may have it


@given(data=st.data(), size=sizes, phase=st.sampled_from(sorted(NESTED)))
def test_validate_and_predict_fire_their_own_events_and_never_those_of_a_fit(data, size, phase):
    log, recorders = make_recorders(size, [])
    learn = make_learner(size, recorders)
    phases = []
    recorders[0].plans.append(Plan(0, "before_validate", 0, lambda learn: phases.append(learn.phase)))
    NESTED[phase](learn)
    n = 1 if phase == "predict" else size.train
    loss = [] if phase != "validate" else ["after_loss"]
    batch = ["before_batch", "open during_forward", "after_pred", "close during_forward", *loss, "after_batch"]
    assert events_of(log, 0) == [
        "open during_validate",
        "before_validate",
        *batch * n,
        "after_validate",
        "close during_validate",
    ]
    assert phases == ["validate" if phase == "validate" else "predict"]


@given(data=st.data(), kind=cancels, phase=st.sampled_from(sorted(NESTED)))
def test_outside_a_fit_only_batch_and_validate_can_be_cancelled(data, kind, phase):
    size = Size(1, 2, 1)
    point = data.draw(
        st.sampled_from(["before_validate", "before_batch", "after_pred", "after_batch", "after_validate"])
    )
    log, recorders = make_recorders(size, [Plan(0, point, 0, raiser(kind()))])
    learn = make_learner(size, recorders)
    inside = point in ("before_batch", "after_pred")
    valid = (kind.stage == "batch" and inside) or (kind.stage == "validate" and point != "after_validate")
    error = None
    try:
        NESTED[phase](learn)
    except LoopError as e:
        error = e
    assert (error is None) <= valid
    assert not valid or error is None or "nothing to return" in str(error)
    assert valid == any("cancel" in event for event in events_of(log, 0))
    assert learn.phase is None


near = st.sampled_from(EVENTS).flatmap(
    lambda event: st.tuples(st.just(event), st.integers(len("during_"), len(event) - 1), st.sampled_from("xq_"))
)


@given(near)
def test_a_misspelt_event_is_an_error_when_the_class_is_made(spelling):
    event, at, letter = spelling
    name = event[:at] + letter + event[at + 1 :]
    if name in EVENTS:
        return
    with pytest.raises(TypeError, match=f"Misspelt.{name} is not an event") as caught:
        type("Misspelt", (Callback,), {name: lambda self, learn: None})
    assert any(f"{e!r}" in str(caught.value) for e in difflib.get_close_matches(name, EVENTS, n=1, cutoff=0))


SIGNATURES = [
    lambda: None,
    lambda self: None,
    lambda self, learn, more: None,
    lambda self, learn, **options: None,
    lambda self, *args: None,
    lambda self, learn, *, more=1: None,
]


@given(event=st.sampled_from(EVENTS), bad=st.sampled_from(SIGNATURES))
def test_a_wrong_signature_is_an_error_when_the_class_is_made(event, bad):
    with pytest.raises(TypeError, match=f"Wrong.{event} has the signature"):
        type("Wrong", (Callback,), {event: bad})


@given(data=st.data(), size=sizes)
def test_whatever_happens_the_learner_can_fit_again(data, size):
    act = data.draw(st.one_of(cancels, faults).map(lambda kind: raiser(kind())))
    learn, _, _ = run(size, [data.draw(plans(size, st.just(act)))])
    learn.cbs = []
    learn.history.clear()
    learn.fit(2)
    assert len(learn.history) == 2


@given(data=st.data(), size=sizes)
def test_random_orders_of_random_plans_leave_nothing_behind(data, size):
    """A free mixture: several cancels, faults, stops, nested validations (assert_clean runs inside `run`)."""
    acts = st.one_of(
        cancels.map(lambda kind: raiser(kind())),
        faults.map(lambda kind: raiser(kind())),
        st.just(lambda learn: learn.stop("enough") if learn.phase == "fit" else None),
        st.just(lambda learn: learn.predict(torch.ones(2, 3)) if learn.training else None),
        st.just(lambda learn: learn.model.norm.eval()),
    )
    many = data.draw(st.lists(plans(size, acts), min_size=2, max_size=5))
    _, log, _ = run(size, many)
    assert_contexts_are_nested(log)


@given(data=st.data(), size=sizes)
def test_the_grad_mode_is_as_before_even_if_a_callback_forgets_it(data, size):
    event = data.draw(st.sampled_from(["after_batch", "after_train", "after_epoch", "after_fit"]))
    last = Plan(0, event, 0, lambda learn: torch.set_grad_enabled(False))
    learn, _, _ = run(Size(1, 1, size.valid, 1), [last])  # assert_clean looks at the grad mode
    assert last.done
    with torch.no_grad():
        learn.fit(1)  # the loop sees to it that there are gradients
        assert not torch.is_grad_enabled()


def test_the_recorder_overrides_every_event():
    assert all(getattr(Recorder, event) is not getattr(Callback, event) for event in EVENTS)
