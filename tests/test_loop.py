"""The loop at its edges: what is freed, what is rolled back, what is told to whom. Each of these has been broken once."""

import copy
import functools
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, TensorDataset

from minitrain import (
    LSUV,
    BatchLoader,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
    CancelValidate,
    DataLoaders,
    InitError,
    Learner,
    LoopError,
    errors,
)
from minitrain.batch import to_device
from minitrain.callbacks import OneCycle
from minitrain.metrics import Mean, accuracy

X, Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


def loaders():
    return DataLoaders(BatchLoader(X, Y, batch_size=4), BatchLoader(X, Y, batch_size=4))


def make(model=None, dls=None, loss_func=F.cross_entropy, cls=Learner, **options):
    return cls(model or nn.Linear(3, 2), dls or loaders(), loss_func, **{"progress": False} | options)


def on(event, act, **more):
    """A callback that calls `act(learn)` at each `event`."""
    return type("On", (Callback,), {event: lambda self, learn: act(learn)} | more)()


@pytest.fixture
def no_collection():
    """Without the cyclic garbage collector: what is freed is freed because nobody holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# -- released on every exit -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("kind", [CancelBatch, CancelStep, CancelTrain, CancelEpoch, CancelFit])
def test_a_cancelled_batch_is_freed_at_once(kind):
    refs = []

    def cancel(learn):
        loss = learn.loss  # a local of the frame that the exception's traceback holds
        refs.append(weakref.ref(loss))
        raise kind

    make(cbs=[on("after_backward", cancel)]).fit(2)
    assert refs
    assert all(ref() is None for ref in refs)


@pytest.mark.usefixtures("no_collection")
def test_a_cancel_in_an_ending_event_is_freed_at_once():
    refs = []

    def cancel(learn):
        loss = learn.loss
        if learn.training:
            refs.append(weakref.ref(loss))
            raise CancelTrain

    make(cbs=[on("after_batch", cancel)]).fit(2)
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model", "callback"])
def test_what_an_error_has_passed_is_freed_when_it_is_caught(error, where):
    refs = []

    def fail(*_):
        activation = torch.ones(3)
        refs.append(weakref.ref(activation))
        raise error

    model = nn.Linear(3, 2)
    if where == "model":
        model.register_forward_hook(fail)
    learn = make(model, cbs=[on("after_loss", fail)] if where == "callback" else [])
    with pytest.raises(error) as caught:
        learn.fit(1)
    del caught
    assert [ref() for ref in refs] == [None]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    "call", [lambda learn: learn.fit(2), lambda learn: learn.validate(), lambda learn: learn.predict(X)]
)
def test_a_batch_is_gone_before_the_next_one_is_made(call):
    class Fresh:
        made = ()

        def __iter__(self):
            for _ in range(4):
                assert all(ref() is None for ref in self.made)
                x = torch.randn(4, 3)
                self.made = (*self.made, weakref.ref(x))
                batch = x, torch.zeros(4, dtype=torch.int64)
                del x
                yield batch
                del batch

    fresh = Fresh()
    call(make(dls=DataLoaders(fresh, fresh)))
    assert all(ref() is None for ref in fresh.made)


# -- the seed, and a first fit that fails -----------------------------------------------------------------------------


def failing_once(event="after_pred"):
    failed = []

    def fail(learn):
        if not failed:
            failed.append(True)
            raise ValueError("boom")

    return on(event, fail)


@pytest.mark.parametrize("stage", [None, LSUV(), lambda model, batches: nn.init.normal_(model[0].weight)])
def test_a_failed_first_fit_gives_the_random_states_back_and_the_next_one_is_seeded_alike(stage):
    def net():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    quiet, failed = make(net(), init=stage, seed=42), make(net(), init=stage, seed=42, cbs=[failing_once()])
    quiet.fit(2)
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ValueError, match="boom"):
        failed.fit(2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(123)  # whatever happens between the two
    failed.fit(2)
    assert [row["train_loss"] for row in failed.history] == [row["train_loss"] for row in quiet.history]


def test_a_stage_that_fails_gives_the_random_states_back():
    def fail(model, batches):
        torch.rand(3)
        raise InitError("no")

    learn = make(init=fail, seed=3)
    before = torch.get_rng_state()
    for call in (learn.initialize, lambda: learn.fit(1), lambda: learn.opt):
        with pytest.raises(InitError):
            call()
        assert torch.equal(torch.get_rng_state(), before)


def test_a_fit_that_fails_after_a_row_was_written_keeps_its_number():
    class Fail(Callback):
        def before_batch(self, learn):
            if learn.training:
                raise CancelBatch if learn.epoch == 0 else ValueError("boom")

    learn = make()
    with pytest.raises(ValueError, match="boom"):
        learn.fit(2, cbs=[Fail()])
    learn.fit(1)
    assert [(row["fit"], row["epoch"]) for row in learn.history] == [(0, 0), (1, 0)]


# -- validation and prediction touch nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda learn: learn.validate(), lambda learn: learn.predict(X)])
def test_the_optimiser_is_not_built_in_the_midst_of_a_validation(call):
    learn = make(init=LSUV(), seed=1, cbs=[on("before_validate", lambda learn: learn.opt)])
    with pytest.raises(LoopError, match="opt during a"):
        call(learn)
    assert not learn.initialized
    learn.fit(1)


def test_a_pending_graph_does_not_notice_that_a_buffer_was_written_to():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.ones(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.linear(x) * self.calls

    plain, nosy = Counts(), Counts()
    nosy.load_state_dict(plain.state_dict())
    make(plain).fit(1)
    make(nosy, cbs=[on("after_loss", lambda learn: learn.predict(X) if learn.training else None)]).fit(1)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), nosy.state_dict().values(), strict=True))


def test_a_batch_norm_on_the_meta_device_can_predict():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("meta")
    assert make(model).predict(X).shape == (16, 4)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # workers are forked; torch has threads
@pytest.mark.parametrize("persistent", [False, True])
def test_the_training_loader_may_be_validated_on_in_mid_epoch_with_workers_too(persistent):
    dl = DataLoader(TensorDataset(X, Y), batch_size=4, num_workers=1, persistent_workers=persistent)
    seen = []

    def nosy(learn):
        if learn.training and learn.batch_idx == 1:
            seen.append(learn.validate(learn.dls.train))

    learn = make(dls=DataLoaders(dl))
    learn.fit(2, cbs=[on("after_batch", nosy)])
    assert learn.step_idx == 8
    assert len(seen) == 2
    assert "partial" not in learn.history.columns


def test_generators_of_any_kind_in_a_sampler_are_put_back():
    class Own(Sampler):
        def __init__(self):
            self.numpy, self.python, self.torch = np.random.default_rng(0), random.Random(0), torch.Generator()

        def __iter__(self):
            torch.rand(1, generator=self.torch)
            self.python.random()
            yield from self.numpy.permutation(16).tolist()

        def __len__(self):
            return 16

    sampler = Own()
    dl = DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(sampler, 4, False))
    before = sampler.numpy.bit_generator.state, sampler.python.getstate(), sampler.torch.get_state()
    make(dls=DataLoaders(dl)).validate(dl)
    assert sampler.numpy.bit_generator.state == before[0]
    assert sampler.python.getstate() == before[1]
    assert torch.equal(sampler.torch.get_state(), before[2])


# -- who is told what -------------------------------------------------------------------------------------------------


def test_set_epoch_reaches_the_sampler_of_a_batch_sampler_and_a_batch_sampler_itself():
    class Told(BatchSampler):
        told = ()

        def set_epoch(self, epoch):
            self.told = (*self.told, epoch)

    sampler = DistributedSampler(TensorDataset(X, Y), num_replicas=2, rank=0)
    batches = Told(sampler, 4, False)
    make(dls=DataLoaders(DataLoader(TensorDataset(X, Y), batch_sampler=batches))).fit(3)
    assert sampler.epoch == 2
    assert batches.told == (0, 1, 2)


def test_training_is_false_after_a_cancel_too():
    seen = []
    note = type("Note", (Callback,), {})
    for event in ("after_cancel_epoch", "before_epoch", "after_cancel_fit"):
        setattr(note, event, lambda self, learn: seen.append(learn.training))
    stop = on("after_loss", lambda learn: (_ for _ in ()).throw(CancelEpoch) if learn.training else None)
    make(cbs=[stop, note()]).fit(2)
    assert seen == [False] * 4


@pytest.mark.parametrize("kind", [CancelTrain, CancelValidate])
def test_a_row_over_a_part_of_the_data_is_marked_partial(kind):
    def cancel(learn):
        if learn.training == (kind is CancelTrain) and learn.batch_idx == 3:  # the last one
            raise kind

    learn = make(metrics=[accuracy])
    learn.fit(1, cbs=[on("before_batch", cancel)])
    learn.fit(1)
    assert [row.get("partial", False) for row in learn.history] == [True, False]


def test_describe_within_a_fit_shows_the_callbacks_of_that_fit(capsys):
    make().fit(1, cbs=[on("after_fit", lambda learn: learn.describe())])
    assert "after_fit              On" in capsys.readouterr().out


ENDINGS = {
    "after_batch": CancelTrain,
    "after_step": CancelBatch,
    "after_cancel_step": CancelTrain,
    "after_train": CancelEpoch,
    "after_epoch": CancelFit,
}


@pytest.mark.parametrize("event", ENDINGS)
def test_a_cancel_in_an_ending_event_takes_it_from_nobody_else(event):
    """Who had the beginning is owed the end, wherever it stands in the list."""

    def throw(kind):
        return lambda learn: (_ for _ in ()).throw(kind)

    heard = []
    cbs = [on(event, throw(ENDINGS[event])), on(event, lambda learn: heard.append(event), state_key="second")]
    if event == "after_cancel_step":
        cbs.append(on("before_step", throw(CancelStep), state_key="skip"))
    make(dls=DataLoaders([(X, Y)]), cbs=cbs).fit(1)
    assert heard == [event]


# -- a callback serves one Learner at a time --------------------------------------------------------------------------


def test_a_copy_of_a_callback_that_is_made_in_the_midst_of_a_fit_is_free():
    class Keep(Callback):
        saved = None

        def after_epoch(self, learn):
            self.saved = copy.deepcopy(self)

    keep = Keep()
    make(cbs=[keep]).fit(1)
    make(cbs=[keep.saved]).fit(1)


def test_a_copy_of_a_learner_that_is_made_in_the_midst_of_a_fit_can_fit():
    class Keep(Callback):
        saved = None

        def after_batch(self, learn):
            self.saved = self.saved or copy.deepcopy(learn)

    keep = Keep()
    make(cbs=[keep]).fit(1)
    twin = keep.saved
    assert twin.phase is None
    assert twin.batch is None
    assert isinstance(twin.cbs, list)
    twin.fit(1)


def test_a_callback_keeps_no_mark_of_the_loop():
    callback, seen = Callback(), []
    make(cbs=[callback, on("after_batch", lambda learn: seen.append(dict(vars(callback))))]).fit(1)
    assert seen
    assert not any(seen)


# -- an overridden train_batch ----------------------------------------------------------------------------------------


class ByHand(Learner):
    """What GANs do: everything at once, and no event in between."""

    def train_batch(self):
        assert self.model.weight.grad is None
        self.loss = self.compute_loss(self.forward(self.xb), self.yb)
        self.loss.backward()
        self.meddle()
        self.opt.step()
        self.opt.zero_grad()

    def meddle(self):
        if self.batch_idx == 0:
            raise CancelBatch


def test_a_cancel_in_an_overridden_train_batch_leaves_no_gradient():
    learn = make(cls=ByHand)
    learn.fit(1)
    assert learn.running_loss.count == 16  # of the validation
    assert learn.history[0]["train_loss"] > 0


def test_an_error_in_an_overridden_train_batch_rolls_nothing_back_that_may_have_been_trained_on():
    class Late(ByHand):
        def meddle(self):
            self.opt.step()
            raise ValueError("boom")

    model = nn.Linear(3, 2)
    learn = make(model, cls=Late, seed=1)
    with pytest.raises(ValueError, match="boom"):
        learn.fit(1)
    assert learn._seeded
    assert learn._epochs_begun == 1


def test_unscaled_gradients_of_a_cancelled_batch_do_not_disturb_the_next_one():
    def unscale(learn):
        learn.scaler.unscale_(learn.opt)
        if learn.batch_idx == 1:
            raise CancelBatch

    learn = make(opt_func=torch.optim.SGD, lr=0.1, cbs=[on("before_step", unscale)])
    learn.scaler = torch.amp.GradScaler("cpu")
    learn.fit(1)
    assert learn.step_idx == 3
    assert learn.scaler.get_scale() == 65536


# -- optimisers -------------------------------------------------------------------------------------------------------


class OwnRate(torch.optim.SGD):
    """An optimiser that finds its own learning rate, as transformers' Adafactor does."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure=None):
        return None


def test_an_optimiser_without_a_learning_rate_can_train():
    learn = make(opt_func=OwnRate)
    learn.fit(1)
    assert learn.history[0]["lr"] is None
    with pytest.raises(ValueError, match=r"lr=0.5, but OwnRate has a parameter group without a learning rate"):
        learn.fit(1, lr=0.5)
    with pytest.raises(ValueError, match="lr_max=None, but a parameter group has no learning rate"):
        learn.fit_one_cycle(1)
    assert len(learn.history) == 1


def test_a_model_that_was_replaced_is_refused_rather_than_not_trained():
    learn = make(opt_func=torch.optim.SGD, lr=0.1)
    learn.fit(1)
    learn.model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="2 parameters that are not the model's"):
        learn.fit(1)


def test_a_group_that_is_added_within_a_cycle_is_explained():
    more = nn.Parameter(torch.zeros(1))
    learn = make(
        cbs=[OneCycle(), on("after_epoch", lambda learn: learn.opt.add_param_group({"params": [more]}))], lr=0.1
    )
    with pytest.raises(ValueError, match="a parameter group was added within a cycle"):
        learn.fit(2)


# -- data, history, small things --------------------------------------------------------------------------------------


def test_a_sampler_orders_the_training_samples_only():
    train, valid = TensorDataset(X[:10], Y[:10]), TensorDataset(X, Y)
    dls = DataLoaders.from_dataset(train, valid, batch_size=4, sampler=RandomSampler(train))
    assert torch.equal(torch.cat([x for x, _ in dls.valid]), X)
    assert sorted(torch.cat([x for x, _ in dls.train])[:, 0].tolist()) == sorted(X[:10, 0].tolist())
    dls = DataLoaders.from_dataset(train, valid, batch_sampler=BatchSampler(range(10), 5, False), valid_batch_size=8)
    assert (len(dls.train), len(dls.valid)) == (2, 2)
    generator = torch.Generator().manual_seed(1)
    assert DataLoaders.from_dataset(train, generator=generator).train.generator is generator


def test_a_dataset_in_place_of_a_loader_is_refused_by_the_name_of_the_argument():
    with pytest.raises(TypeError, match=r"^dl=TensorDataset"):
        make().validate(TensorDataset(X, Y))


def test_numbers_of_numpy_are_numbers():
    learn = make(lr=np.float32(0.1), seed=np.int64(3), opt_func=torch.optim.SGD)
    learn.fit(np.int64(1))
    assert len(learn.history) == 1


def test_a_loader_that_refuses_to_tell_its_length_is_a_loader():
    class NoLength:
        def __iter__(self):
            yield X, Y

        def __len__(self):
            raise NotImplementedError

    make(dls=DataLoaders(NoLength())).fit(1)


def test_a_bare_cancel_is_refused():
    with pytest.raises(TypeError, match="raise CancelBatch, CancelTrain"):
        make(cbs=[on("after_batch", lambda learn: (_ for _ in ()).throw(errors.Cancel()))]).fit(1)


def test_a_csv_follows_a_link_and_writes_tensors_as_numbers(tmp_path):
    (tmp_path / "run.csv").symlink_to(tmp_path / "there.csv")
    learn = make()
    learn.fit(1, cbs=[on("after_epoch", lambda learn: learn.history[-1].update(norm=torch.tensor(0.5)))])
    learn.history.to_csv(tmp_path / "run.csv")
    assert (tmp_path / "run.csv").is_symlink()
    assert ",0.5," in (tmp_path / "there.csv").read_text()


def test_an_event_of_a_mixin_behind_callback_is_refused_since_it_would_never_run():
    class Mixin:
        def after_batch(self, learn): ...

    with pytest.raises(TypeError, match=r"Mixin.after_batch would never run.*class Late\(Mixin, Callback\)"):
        type("Late", (Callback, Mixin), {})


def test_partial_methods_are_methods_and_what_does_not_bind_gets_no_self():
    heard = []

    class Named(Callback):
        def _hear(self, learn, name):
            heard.append(name)

        before_fit = functools.partialmethod(_hear, name="begin")
        after_fit = functools.partial(lambda name, learn: heard.append(name), "end")

    with pytest.raises(TypeError, match="before_fitt is not an event"):
        type("Misspelt", (Callback,), {"before_fitt": functools.partialmethod(Named._hear, name="x")})
    with pytest.raises(TypeError, match="has the signature"):
        type("Wrong", (Callback,), {"before_fit": functools.partial(lambda a, b, c: None, 1)})
    make(cbs=[Named()]).fit(1)
    assert heard == ["begin", "end"]


def test_autocast_around_each_forward_trains():
    class Autocast(Callback):
        def during_forward(self, learn):
            return torch.autocast("cpu", torch.bfloat16)

    kinds = []
    learn = make(cbs=[Autocast(), on("after_pred", lambda learn: kinds.append(learn.preds.dtype))])
    learn.fit(3, lr=0.1)
    assert set(kinds) == {torch.bfloat16}
    assert learn.history[2]["train_loss"] < learn.history[0]["train_loss"]


# -- found by a second look -------------------------------------------------------------------------------------------


def test_what_comes_to_the_cpu_is_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: asked.append((device, options)) or self)
    there = torch.zeros(2, device="meta")
    to_device([there], torch.device("cpu")), to_device([torch.zeros(2)], "meta")
    assert [options["non_blocking"] for _, options in asked] == [False, True]


def test_learners_that_share_a_loader_are_initialised_alike():
    dls = DataLoaders(BatchLoader(X, Y, batch_size=4, shuffle=True))

    def train():
        torch.manual_seed(0)
        learn = make(nn.Linear(3, 2), dls, init=LSUV(), seed=1)
        learn.fit(2)
        return learn.model.weight

    assert torch.equal(train(), train())


def test_a_fit_that_is_refused_is_not_counted_and_keeps_the_gradients():
    learn = make(opt_func=torch.optim.SGD, lr=0.1)
    learn.fit(1)
    model, grad = learn.model, torch.ones(2, 3)
    model.weight.grad = grad
    learn.model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="not the model's"):
        learn.fit(1)
    learn.model = model
    with pytest.raises(ValueError, match="boom"):
        learn.fit(1, cbs=[failing_once()])
    assert model.weight.grad is grad
    learn.fit(1)
    assert [row["fit"] for row in learn.history] == [0, 1]


def test_a_cancel_before_anything_was_scaled_is_a_cancel():
    class Early(Learner):
        def train_batch(self):
            raise CancelBatch

    learn = make(cls=Early, dls=DataLoaders(BatchLoader(X, Y, batch_size=4)))
    learn.scaler = torch.amp.GradScaler("cpu")
    learn.fit(1)
    assert learn.history[0]["train_loss"] is None


@pytest.mark.parametrize("event", ["after_epoch", "after_cancel_epoch"])
def test_the_note_of_an_error_at_the_end_of_an_epoch_names_the_epoch(event):
    cancel = on("before_train", lambda learn: (_ for _ in ()).throw(CancelEpoch), state_key="cancel")
    fail = on(event, lambda learn: (_ for _ in ()).throw(ValueError("boom")))
    with pytest.raises(ValueError, match="boom") as caught:
        make(cbs=[fail, *([cancel] if event == "after_cancel_epoch" else [])]).fit(1)
    assert caught.value.__notes__ == [f"On.{event}, epoch 0"]


def test_the_snapshot_of_the_buffers_is_let_go_once_there_is_training():
    learn = make(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    kept = []
    learn.fit(1, cbs=[on("before_batch", lambda learn: kept.append(learn._before is not None))])
    assert kept == [True] + [False] * 7


def test_gradients_of_a_loss_with_parameters_are_none_when_a_batch_begins():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds, yb):
            return F.cross_entropy(preds * self.scale, yb)

    loss, grads = Scaled(), []
    make(loss_func=loss, cbs=[on("before_batch", lambda learn: grads.append(loss.scale.grad))]).fit(1)
    assert grads == [None] * 8


def test_a_stage_that_reads_the_optimiser_is_told_that_it_comes_later():
    learn = make(init=lambda model, batches: learn.opt)
    with pytest.raises(LoopError, match="the optimiser is built after the stages"):
        learn.fit(1)


def test_a_mean_with_an_update_of_its_own_is_a_metric_like_any_other():
    class Hits(Mean):
        def update(self, preds, targets):
            self.add((preds.argmax(1) == targets).float().mean(), len(targets))

    assert make(metrics={"hits": Hits(), "accuracy": accuracy}).validate()["valid_hits"] <= 1


def test_a_backward_loss_that_is_no_tensor_is_explained():
    class Half(Callback):
        def after_loss(self, learn):
            learn.backward_loss = 0.5

    with pytest.raises(TypeError, match=r"the loss is 0.5 \(type=float\), wanted a scalar tensor"):
        make(cbs=[Half()]).fit(1)


def test_an_expanded_buffer_that_can_be_written_to_is_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(5).expand(3, 5)[:1])

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    learn = make(Counts())
    learn.validate()
    assert learn.model.calls.eq(0).all()


@pytest.mark.parametrize(
    ("cls", "cbs", "match"),
    [
        (ByHand, [], r"has made 0 of its 8 steps \(train_batch is overridden"),
        (Learner, [("before_step", CancelStep)], r"has made 4 of its 8 steps \(updates or batches were cancelled"),
    ],
)
def test_a_cycle_that_was_not_gone_through_warns(cls, cbs, match):
    def skip(learn):
        if learn.batch_idx % 2:
            raise CancelStep

    learn = make(cls=cls, dls=DataLoaders(BatchLoader(X, Y, batch_size=4)), cbs=[on(event, skip) for event, _ in cbs])
    with pytest.warns(UserWarning, match=match):
        learn.fit_one_cycle(2, 0.1)


def test_two_cycles_at_once_are_refused():
    with pytest.raises(ValueError, match="there is a OneCycle among the callbacks already"):
        make(cbs=[OneCycle(0.1)]).fit_one_cycle(1)


def test_one_callback_twice_is_refused_as_such():
    callback = Callback()
    with pytest.raises(ValueError, match=r"cbs\[0\] and cbs\[1\] are the same Callback: remove one"):
        make(cbs=[callback, callback])


def test_an_error_in_a_stage_says_in_which_one():
    with pytest.raises(TypeError, match=r"(?s)positional argument.*in init\[1\]: <lambda>\(model, batches\)"):
        make(init=[LSUV(), lambda model: None]).fit(1)
    with pytest.raises(TypeError, match=r"init='lsuv' .*wanted a stage: init=LSUV\(\)"):
        make(init="lsuv")


def test_the_init_report_is_the_last_one_that_there_is():
    learn = make(init=[LSUV(), lambda model, batches: None])
    assert learn.initialize() is learn.init_report is learn.init_reports[0]


FOREIGN = [
    "befor_fit",
    "aftr_fit",
    "afterbatch",
    "After_batch",
    "on_epoch_end",
    "on_train_batch_start",
    "begin_fit",
    "before__fit",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_looks_like_an_event_is_not_let_pass_in_silence(name):
    with pytest.raises(TypeError, match=f"Wrong.{name} is not an event. Did you mean"):
        type("Wrong", (Callback,), {name: lambda self, learn: None})


@pytest.mark.parametrize("name", ["fit_batch", "steps", "on_off", "beginning", "afterwards", "foresee", "reset"])
def test_methods_of_ones_own_may_have_any_other_name(name):
    type("Right", (Callback,), {name: lambda self: None})
