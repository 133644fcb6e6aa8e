import contextlib
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minitrain import LSUV, BatchLoader, Callback, DataLoaders, KaimingNormal, Learner, Zero
from minitrain.callbacks import ActivationStats, Diagnose, GradientStats, OneCycle, ParameterStats
from minitrain.errors import CancelBatch, CancelEpoch, CancelFit, CancelStep, CancelTrain

G = torch.Generator().manual_seed(0)
X = torch.randn(640, 16, generator=G)
Y = (X[:, :4].sum(1) * X[:, 4] > 0).long()
IMAGES = torch.randn(320, 1, 6, 6, generator=G)
OF_IMAGES = (IMAGES[:, 0, 1:4, 1:4].sum((1, 2)) > 0).long()
WORDS = torch.randint(0, 20, (320, 8), generator=G)
OF_WORDS = (WORDS[:, :4].float().mean(1) > 9.5).long()
SERIES = torch.randn(320, 8, 8, generator=G)
OF_SERIES = (SERIES.mean((1, 2)) > 0).long()


def mlp(*widths, act=nn.ReLU, norm=False):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act()]
    return nn.Sequential(*layers[: -1 - norm])


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def make_learner(model, *cbs, data=(X, Y), batch_size=32, loss_func=F.cross_entropy, cls=Learner, **options):
    options = {"opt_func": torch.optim.AdamW, "lr": 1e-3, "seed": 0, "progress": False} | options
    dls = DataLoaders(BatchLoader(*data, batch_size=batch_size, shuffle=True, seed=0))
    return cls(model, dls, loss_func, cbs=cbs, **options)


def diagnose(make, *cbs, n_epochs=1, thresholds=None, every=None, **options):
    """Fit, and return the callback and all that it has shown."""
    torch.manual_seed(0)
    shown = []
    diagnosis = Diagnose(show=shown.append, every=every, **(thresholds or {}))
    make_learner(make(), diagnosis, *cbs, **options).fit(n_epochs)
    return diagnosis, shown


def kinds(diagnosis):
    return [finding.kind for finding in diagnosis.findings]


def the(diagnosis, kind):
    return next(finding for finding in diagnosis.findings if finding.kind == kind)


def edited(make, edit):
    def make_sick():
        model = make()
        with torch.no_grad():
            edit(model)
        return model

    return make_sick


# -- healthy ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.place = nn.Embedding(20, 32), nn.Parameter(torch.zeros(1, 8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.encoder(self.emb(x) + self.place).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn, self.head = kind(8, 64, batch_first=True), nn.Linear(64, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.last(F.relu(self.body(x)))


def residual():
    return nn.Sequential(nn.Linear(16, 32), *[Block() for _ in range(4)], nn.Linear(32, 2))


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def with_frozen_backbone():
    model = conv()
    model[:6].requires_grad_(False)
    return model


class Bag(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.emb, self.head = nn.Embedding(2000, 16, sparse=sparse), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.emb(97 * x).mean(1))


ADAM = {}
SLOW = {"opt_func": torch.optim.SGD, "lr": 0.01}
SGD = {"opt_func": torch.optim.SGD, "lr": 0.1}
HEALTHY = {
    "mlp": (lambda: mlp(16, 64, 64, 2), {"init": LSUV()}),
    "conv": (conv, {"init": KaimingNormal(), "data": (IMAGES, OF_IMAGES)}),
    "attention": (Attention, {"data": (WORDS, OF_WORDS)}),
    "lstm": (Recurrent, {"data": (SERIES, OF_SERIES)}),
    "gru": (lambda: Recurrent(nn.GRU), {"data": (SERIES, OF_SERIES)}),
    "frozen": (with_frozen_backbone, {"init": KaimingNormal(), "data": (IMAGES, OF_IMAGES)}),
    "residual": (residual, {"init": Zero("*.last")}),
    "words": (Bag, {"data": (WORDS, OF_WORDS)}),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("how", [ADAM, SLOW, SGD], ids=["adam", "slow", "sgd"])
def test_of_a_healthy_run_it_says_nothing_but_no_findings(name, how):
    make, options = HEALTHY[name]
    diagnosis, shown = diagnose(make, n_epochs=2, **options, **how)
    assert shown == ["Diagnose, epoch 1: no findings", "Diagnose, epoch 2: no findings"]
    assert diagnosis.findings == []


def test_a_model_with_sparse_gradients_is_healthy():
    _, shown = diagnose(lambda: Bag(sparse=True), data=(WORDS, OF_WORDS), **SGD)
    assert shown == ["Diagnose, epoch 1: no findings"]


@pytest.mark.parametrize("batch_size", [1, 7, 640])
def test_few_or_small_batches_are_no_finding(batch_size):
    few = (X[:5], Y[:5]) if batch_size == 1 else (X, Y)
    _, shown = diagnose(residual, data=few, batch_size=batch_size, init=[LSUV(data=X), Zero("*.last")])
    assert shown == ["Diagnose, epoch 1: no findings"]


def test_units_are_dead_only_after_enough_samples():
    make = edited(lambda: mlp(16, 64, 2), lambda model: model[0].bias.fill_(-0.7))
    few, shown = diagnose(make, data=(X[:2], Y[:2]), batch_size=1)
    assert few.gradients.dead[-1, 0] > 0.5
    assert shown == ["Diagnose, epoch 1: no findings"]
    many, _ = diagnose(make)
    assert many.gradients.dead[-1, 0] < 0.5


def test_a_schedule_that_ends_in_tiny_steps_is_healthy():
    _, shown = diagnose(lambda: mlp(16, 64, 64, 2), OneCycle(1e-2), init=LSUV(), n_epochs=3, lr=None)
    assert shown[-1] == "Diagnose, epoch 3: no findings"


@pytest.mark.parametrize("n_epochs", [2, 20])
def test_a_problem_that_is_solved_has_no_dead_units_and_no_slow_ones(n_epochs):
    """The loss is exactly 0 in the end, or close to it; no unit gets a gradient then."""

    def hinge(preds, y):
        return F.relu(1 - (preds[:, 1] - preds[:, 0]) * (2 * y - 1)).mean()

    easy = (3 * X[:, :1]).sign().long().squeeze().add(1) // 2
    options = {"data": (X[:160, :1].sign().expand(-1, 16) * 2, easy[:160]), "init": LSUV(), "loss_func": hinge}
    for how in (SGD, {"lr": 1e-2}):
        _, shown = diagnose(lambda: mlp(16, 64, 2), n_epochs=n_epochs, **options, **how)
        assert shown[-1] == f"Diagnose, epoch {n_epochs}: no findings"


def test_a_problem_that_is_nearly_solved_is_not_slow():
    target = X[:, :2] @ torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    options = {"data": (X[:160], target[:160]), "loss_func": nn.MSELoss(), "opt_func": torch.optim.SGD, "lr": 0.1}
    diagnosis, shown = diagnose(lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), n_epochs=60, **options)
    assert diagnosis.parameters.update_ratio[-1].max() < 1e-5
    assert shown[-1] == "Diagnose, epoch 60: no findings"


class Scaled(Callback):
    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def before_fit(self, learn):
        learn.scaler = self.scaler


@pytest.mark.parametrize("scale", [2.0**16, 2.0**127])
def test_a_scaler_that_looks_for_its_scale_is_healthy(scale):
    make = edited(lambda: mlp(16, 64, 64, 2), lambda model: None)
    diagnosis, shown = diagnose(
        make, Scaled(scale), init=LSUV(), loss_func=lambda p, y: 50 * F.cross_entropy(p, y), n_epochs=2
    )
    assert shown == ["Diagnose, epoch 1: no findings", "Diagnose, epoch 2: no findings"]
    skipped = len(diagnosis.activations.steps) - len(diagnosis.parameters.steps)
    assert (skipped > 0) == (scale > 2.0**100)
    assert len(diagnosis.gradients.steps) == len(diagnosis.parameters.steps)


def test_accumulated_batches_are_healthy():
    class Accumulate(Callback):
        def after_backward(self, learn):
            if learn.batch_idx % 4 != 3:
                raise CancelStep

    _, shown = diagnose(residual, Accumulate(), init=[LSUV(), Zero("*.last")], n_epochs=2)
    assert shown == ["Diagnose, epoch 1: no findings", "Diagnose, epoch 2: no findings"]


def test_a_net_whose_layers_take_turns_is_healthy():
    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.ways, self.head = (
                nn.Linear(16, 32),
                nn.ModuleList(nn.Linear(32, 32) for _ in range(3)),
                nn.Linear(32, 2),
            )
            self.n = 0

        def forward(self, x):
            self.n += 1
            return self.head(F.relu(self.ways[self.n % 3](F.relu(self.first(x)))))

    diagnosis, shown = diagnose(Turns)
    assert diagnosis.activations.mean.isnan().any()
    assert shown == ["Diagnose, epoch 1: no findings"]


class Adversary(Learner):
    """Two nets against one another, in a loop of its own."""

    def train_batch(self):
        make, judge = self.model["make"], self.model["judge"]
        fake = make(torch.randn(len(self.xb), 4))
        second = self.opts["judge"]
        loss = F.softplus(-judge(self.xb)).mean() + F.softplus(judge(fake.detach())).mean()
        second.zero_grad()
        loss.backward()
        second.step()
        self.loss = F.softplus(-judge(fake)).mean()
        self.opt.zero_grad()
        self.loss.backward()
        self.opt.step()


def adversary(*cbs, edit=lambda model: None):
    torch.manual_seed(0)
    model = nn.ModuleDict({"make": mlp(4, 32, 16), "judge": mlp(16, 32, 1)})
    with torch.no_grad():
        edit(model)
    learn = make_learner(model, *cbs, data=(X,), cls=Adversary, splitter=lambda m: list(m["make"].parameters()))
    learn.opts["judge"] = torch.optim.AdamW(model["judge"].parameters(), lr=1e-3)
    return learn


def test_a_loop_of_ones_own_is_judged_by_outputs_and_gradients():
    shown = []
    diagnosis = Diagnose(show=shown.append)
    adversary(diagnosis).fit(2)
    assert shown == ["Diagnose, epoch 1: no findings", "Diagnose, epoch 2: no findings"]
    adversary(diagnosis, edit=lambda model: model["judge"][0].bias.fill_(-100)).fit(1)
    assert "judge.0" in the(diagnosis, "dead").layers


# -- sick: each kind is found, at the right layers, with the right numbers ----------------------------------------------


def kill(name, n):
    return lambda model: model.get_submodule(name).bias[:n].fill_(-20)


@pytest.mark.parametrize(
    ("make", "name"),
    [(Functional, "b"), (lambda: mlp(16, 32, 32, 2), "2"), (lambda: mlp(16, 32, 32, 2, norm=True), "4")],
    ids=["functional", "module", "norm"],
)
@pytest.mark.parametrize("select", [None, [nn.Linear, nn.BatchNorm1d]])
def test_dead_units_are_found(make, name, select):
    diagnosis, shown = diagnose(edited(make, kill(name, 24)), thresholds={"select": select, "std": (0, math.inf)})
    # behind a norm the layer is dead that the norm follows: no gradient comes to its units
    layer = "3" if name == "4" else name
    assert the(diagnosis, "dead").layers[layer] == 0.75
    assert set(the(diagnosis, "dead").layers) <= {layer, name}
    assert kinds(diagnosis) == ["dead"]
    assert re.search(
        rf"More than 50% of the units are dead \(no gradient\) in \d layers?: .*'{layer}' \(75%\)", shown[0]
    )
    assert "LeakyReLU" in shown[0]


def test_a_norm_that_is_selected_is_named_too():
    make = edited(lambda: mlp(16, 32, 32, 2, norm=True), kill("4", 24))
    diagnosis, _ = diagnose(make, thresholds={"select": [nn.BatchNorm1d, nn.Linear]})
    assert set(the(diagnosis, "dead").layers) == {"3", "4"}


def test_half_of_the_units_may_be_dead():
    def kill_exactly(n):
        return lambda model: model.b.bias.fill_(5)[:n].fill_(-20)

    found = {}
    for n, limit in ((16, 0.5), (17, 0.5), (4, 0.1)):
        thresholds = {"std": (0, math.inf), "dead": limit}
        diagnosis, _ = diagnose(edited(Functional, kill_exactly(n)), thresholds=thresholds)
        found[n] = [finding.layers for finding in diagnosis.findings]
    assert found == {16: [], 17: [{"b": 17 / 32}], 4: [{"b": 4 / 32}]}


def test_a_layer_that_is_all_dead_is_named_before_those_that_hear_nothing_through_it():
    diagnosis, shown = diagnose(edited(Functional, kill("b", 32)), thresholds={"std": (0, math.inf)})
    assert list(the(diagnosis, "dead").layers.items()) == [("b", 1.0), ("a", 1.0)]  # not c, whose bias learns
    assert kinds(diagnosis) == ["dead"]  # that nothing is learned below is no finding of its own
    assert "2 layers: 'b' (100%), 'a' (100%)" in shown[0]


def test_a_layer_of_which_the_first_call_goes_unused_is_not_dead():
    class Unused(Functional):
        def forward(self, x):
            unused = self.a(x)
            return super().forward(x) + 0 * unused.sum()

    diagnosis, _ = diagnose(Unused)
    assert (diagnosis.gradients.dead[-1, 0], kinds(diagnosis)) == (1.0, [])


def test_a_net_that_is_a_single_layer_goes_by_its_class():
    class Blind(Callback):
        def before_step(self, learn):
            learn.model.weight.grad.zero_()

    model = edited(lambda: nn.Linear(16, 8), lambda model: model.bias[:6].fill_(-20))
    options = {"data": (X, X[:, :8]), "loss_func": lambda preds, y: (F.relu(preds) - y).square().mean()}
    diagnosis, _ = diagnose(model, thresholds={"std": (0, math.inf)}, **options)
    assert the(diagnosis, "dead").layers == {"Linear": 0.75}


def scale(name, by):
    def edit(model):
        for p in model.get_submodule(name).parameters():
            p.mul_(by)

    return edit


def test_a_small_and_a_large_deviation_at_the_start_are_found():
    make = lambda: mlp(16, 32, 32, 32, 2)  # noqa: E731
    small, shown = diagnose(edited(make, scale("2", 1e-2)))
    assert kinds(small) == ["small_std"]
    first = small.activations.std[0].tolist()
    assert the(small, "small_std").layers["2"] == pytest.approx(first[1])
    assert next(iter(the(small, "small_std").layers)) == "2"
    assert set(the(small, "small_std").layers) == {n for n, std in zip("0246", first, strict=True) if std < 0.1} - {"6"}
    assert "standard deviation below 0.1 at the first step" in shown[0]
    assert "LSUV()" in shown[0]
    large, shown = diagnose(edited(make, scale("4", 100)))
    assert kinds(large) == ["large_std"]
    assert set(the(large, "large_std").layers) == {"4"}
    assert "standard deviation above 10 at the first step" in shown[0]


def test_the_last_layer_may_begin_small_and_not_large():
    make = lambda: mlp(16, 32, 2)  # noqa: E731
    small, _ = diagnose(edited(make, scale("2", 1e-3)), lr=1e-4)
    large, _ = diagnose(edited(make, scale("2", 1e3)), lr=1e-4)
    assert kinds(small) == []
    assert set(the(large, "large_std").layers) == {"2"}


def test_a_deviation_that_training_makes_is_found_by_wider_limits():
    class Grow(Callback):
        def __init__(self, by):
            self.by = by

        def after_step(self, learn):
            if learn.step_idx == 11:
                with torch.no_grad():
                    learn.model[2].weight.mul_(self.by)
                    learn.model[2].bias.mul_(self.by)

    make = lambda: mlp(16, 32, 32, 32, 2, act=nn.LeakyReLU)  # noqa: E731
    only, found = {"gradient": (0, math.inf), "update_ratio": (0, math.inf)}, {}
    for by in (1e4, 50, 1 / 50, 1e-5):
        diagnosis, shown = diagnose(make, Grow(by), init=LSUV(), lr=1e-9, thresholds=only)
        found[by] = kinds(diagnosis), {layer for f in diagnosis.findings for layer in f.layers}, shown[0]
    assert found[1e4][:2] == (["large_std"], {"2", "4", "6"})
    assert "Outputs have a standard deviation above 1000" in found[1e4][2]
    assert found[50][0] == found[1 / 50][0] == []
    assert found[1e-5][0][0] == "small_std"
    assert "2" in found[1e-5][1]
    assert "Outputs have a standard deviation below 0.001" in found[1e-5][2]


@pytest.mark.parametrize("how", [ADAM, SLOW])
def test_vanishing_gradients_are_found(how):
    diagnosis, shown = diagnose(lambda: mlp(16, *[16] * 19, 2, act=nn.Sigmoid), **how)
    assert set(kinds(diagnosis)) - {"slow"} == {"vanishing"}
    finding = the(diagnosis, "vanishing")
    slow = {name.removesuffix(".weight") for other in diagnosis.findings if other != finding for name in other.layers}
    assert not slow & set(finding.layers)  # that these layers are slow is no finding of its own
    norms = diagnosis.gradients.norm[-10:].median(0).values
    expected = {
        n: (v / norms[-1]).item() for n, v in zip(diagnosis.gradients.names, norms, strict=True) if v < 1e-3 * norms[-1]
    }
    assert finding.layers == pytest.approx(expected)
    assert next(iter(finding.layers)) == "0"
    assert list(finding.layers.values()) == sorted(finding.layers.values())
    assert "Gradients vanish: their norm is below 0.001 of that at the last one" in shown[0]


def test_exploding_gradients_are_found():
    def edit(model):
        for layer in model[::2]:
            layer.weight.normal_()

    diagnosis, shown = diagnose(edited(lambda: mlp(16, *[32] * 8, 2), edit), thresholds={"std": (0, math.inf)})
    assert kinds(diagnosis) == ["exploding"]
    assert next(iter(the(diagnosis, "exploding").layers)) == "0"
    assert min(the(diagnosis, "exploding").layers.values()) > 1e3
    assert "Gradients explode: their norm is above 1000 times that at the last one" in shown[0]
    assert "clip" in shown[0]


def test_slow_and_fast_updates_are_found():
    make = lambda: mlp(16, 32, 32, 2)  # noqa: E731
    slow, shown = diagnose(make, init=LSUV(), lr=1e-8)
    assert kinds(slow) == ["slow"]
    expected = dict(zip(slow.parameters.names, slow.parameters.update_ratio.median(0).values.tolist(), strict=True))
    assert the(slow, "slow").layers == pytest.approx(expected)
    assert "Updates are smaller than 1e-05 of the weights in 3 parameters" in shown[0]
    assert "Raise the learning rate" in shown[0]
    options = {"opt_func": torch.optim.SGD, "lr": 1.0, "loss_func": lambda p, y: p.sum()}
    fast, shown = diagnose(
        lambda: mlp(16, 32, 2), init=LSUV(), **options, thresholds={"std": (0, math.inf), "gradient": (0, math.inf)}
    )
    assert "fast" in kinds(fast)
    assert "Updates are larger than 0.1 of the weights" in shown[0]
    assert "Lower the learning rate" in shown[0]


def test_a_part_that_is_cut_off_from_the_loss_is_slow_or_without_gradient():
    class Off(Callback):
        def before_step(self, learn):
            for p in learn.model[0].parameters():
                p.grad.mul_(1e-9)

    diagnosis, _ = diagnose(lambda: mlp(16, 32, 32, 2), Off(), init=LSUV(), **SGD)
    assert kinds(diagnosis) == ["slow"]
    assert set(the(diagnosis, "slow").layers) == {"0.weight"}


def test_updates_are_judged_by_the_median_over_the_epoch():
    class Rest(Callback):
        def __init__(self, share):
            self.share = share

        def before_step(self, learn):
            for group in learn.opt.param_groups:
                group["lr"] = 1e-12 if learn.batch_idx < 20 * self.share else 1e-3

    rare, _ = diagnose(lambda: mlp(16, 32, 2), Rest(0.4), init=LSUV())
    often, _ = diagnose(lambda: mlp(16, 32, 2), Rest(0.6), init=LSUV())
    assert (kinds(rare), kinds(often)) == ([], ["slow"])


def test_what_an_earlier_epoch_did_is_not_held_against_the_last_one():
    class Warm(Callback):
        def before_step(self, learn):
            for group in learn.opt.param_groups:
                group["lr"] = 1e-12 if learn.epoch < self.until else 1e-3

    warm = Warm()
    warm.until = 3
    _, shown = diagnose(lambda: mlp(16, 32, 2), warm, init=LSUV(), n_epochs=4)
    assert [text.splitlines()[0] for text in shown] == [
        "Diagnose, epoch 1: 1 finding",
        "Diagnose, epoch 4: no findings",
    ]


def test_where_memory_is_short_the_last_epoch_is_still_told_apart():
    class Rest(Callback):
        def before_step(self, learn):
            for group in learn.opt.param_groups:
                group["lr"] = 1e-12 if learn.epoch == 7 else 1e-3

    torch.manual_seed(0)
    diagnosis = Diagnose(show=len, every=1)
    for part in diagnosis._parts:
        part.max_memory = 4_000
    make_learner(mlp(16, 32, 2), diagnosis, Rest(), init=LSUV()).fit(8)
    assert diagnosis.parameters.recordings["train"].stride > 1
    assert kinds(diagnosis) == ["slow"]


def test_a_step_that_is_rarely_looked_at_is_judged_by_the_last_look():
    diagnosis, shown = diagnose(lambda: mlp(16, 32, 2), init=LSUV(), lr=1e-8, n_epochs=4, every=50)
    assert diagnosis.parameters.steps == [0, 50]  # none of the last epoch, which begins with step 60
    assert kinds(diagnosis) == ["slow"]
    assert len(shown) == 2


# -- values that are not finite -----------------------------------------------------------------------------------------


def test_a_layer_that_makes_nan_is_named_first():
    class Log(Functional):
        def forward(self, x):
            return self.c((self.b(F.relu(self.a(x))) - 100).log())

    diagnosis, shown = diagnose(Log)
    assert kinds(diagnosis) == ["nonfinite"]
    assert "Values are NaN or infinite since step 0: first in the outputs of 1 layer: 'c' (64)" in shown[0]
    assert next(iter(the(diagnosis, "nonfinite").layers)) == "c"
    assert "3 layers in all" in shown[0]


class Spoil(Callback):
    def __init__(self, at, last=True):
        self.at, self.last = at, last

    def after_backward(self, learn):
        if (learn.epoch, learn.batch_idx) == self.at:
            learn.model[2].weight.grad[0, :3] = math.inf

    def before_step(self, learn):
        if not self.last:
            learn.model[2].weight.grad.nan_to_num_(0, 0, 0)


def test_nan_in_gradients_of_weights_is_found_and_where_it_leads():
    diagnosis, shown = diagnose(lambda: mlp(16, 32, 32, 2), Spoil((0, 5)), init=LSUV())
    assert kinds(diagnosis) == ["nonfinite"]
    assert "since step 5: first in the gradients of the weights of 1 layer: '2' (3), 3 layers in all." in shown[0]


def test_nan_in_gradients_only_is_found():
    class Root(Callback):
        """The gradient of sqrt at zero; and the optimiser never gets to see it."""

        def after_loss(self, learn):
            if learn.batch_idx == 7:
                learn.backward_loss = learn.loss + 0 * (0 * learn.model[4].weight).sum().sqrt()

        def after_backward(self, learn):
            if learn.batch_idx == 7:
                raise CancelStep

    class Clean(Root):
        def after_backward(self, learn):
            pass

    diagnosis, _ = diagnose(lambda: mlp(16, 32, 32, 2), Root(), init=LSUV())
    assert kinds(diagnosis) == ["nonfinite"]  # the gradient stays, as in accumulation, and so comes to the next step
    diagnosis, shown = diagnose(lambda: mlp(16, 32, 32, 2), Clean(), init=LSUV())
    assert "since step 7: first in the gradients of the weights of 1 layer: '4' (64)" in shown[0]


def test_nan_weights_are_found():
    make = edited(lambda: mlp(16, 32, 32, 2), lambda model: model[2].weight[3, 3].fill_(math.nan))
    diagnosis, shown = diagnose(make)
    assert kinds(diagnosis) == ["nonfinite"]
    assert "since step 0: first in the weights of 1 layer: '2' (1), 3 layers in all." in shown[0]


def test_infinite_outputs_that_go_away_are_told_in_the_past_tense():
    class Shock(Callback):
        def before_batch(self, learn):
            if learn.epoch == 0 and learn.batch_idx in (4, 6):
                learn.xb = learn.xb.clone()
                learn.xb[0] = 1e38

        def after_pred(self, learn):
            if learn.epoch == 0 and learn.batch_idx in (4, 6):
                learn.preds = 0 * learn.model(torch.zeros(len(learn.yb), 16))

    make = lambda: mlp(16, 32, 32, 2)  # noqa: E731
    diagnosis, shown = diagnose(edited(make, scale("0", 10)), Shock(), n_epochs=2, thresholds={"std": (0, math.inf)})
    text = "Values were NaN or infinite in steps 4 to 6: first in the outputs of"
    assert kinds(diagnosis) == ["nonfinite"]
    assert all(text in report for report in shown)


def test_under_accumulation_steps_are_told_in_batches():
    class Accumulate(Callback):
        def after_backward(self, learn):
            if learn.batch_idx % 4 != 3:
                raise CancelStep

    class Spoil(Callback):
        def before_batch(self, learn):
            if learn.batch_idx == 9:
                learn.xb = learn.xb.clone()
                learn.xb[0, 0] = math.inf

    diagnosis, shown = diagnose(lambda: mlp(16, 32, 32, 2), Spoil(), Accumulate(), init=LSUV())
    assert diagnosis.parameters.grad_nonfinite.sum(1).bool().tolist() == [False, False, True, True, True]
    assert "since step 9: first in the outputs of" in shown[0]


# -- when -------------------------------------------------------------------------------------------------------------


def report_of(error, event, when, n_epochs=4, order=0):
    def act(self, learn):
        if (learn.epoch, learn.batch_idx) == when and learn.training == (event != "after_epoch"):
            if error == "stop":
                learn.stop("enough")
            else:
                raise error

    shown = []
    other = type("Act", (Callback,), {event: act, "order": order})()
    torch.manual_seed(0)
    learn = make_learner(
        mlp(16, 32, 2), Diagnose(show=shown.append), other, data=(X[:320], Y[:320]), init=LSUV(), lr=1e-9
    )
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        learn.fit(n_epochs)
    return [text.splitlines()[0] for text in shown]


FIRST = "Diagnose, epoch 1: 1 finding"


def test_it_reports_after_the_first_epoch_and_after_the_last():
    assert report_of("stop", "after_batch", (9, 9)) == [FIRST, "Diagnose, epoch 4: 1 finding"]
    assert report_of("stop", "after_batch", (9, 9), n_epochs=1) == [FIRST]
    assert report_of("stop", "after_batch", (9, 9), n_epochs=2) == [FIRST, "Diagnose, epoch 2: 1 finding"]


@pytest.mark.parametrize("order", [0, 200])
def test_it_reports_when_somebody_stops_the_fit(order):
    assert report_of("stop", "after_batch", (2, 3), order=order) == [FIRST, "Diagnose, epoch 3: 1 finding"]
    assert report_of("stop", "after_epoch", (1, 9), order=order) == [FIRST, "Diagnose, epoch 2: 1 finding"]
    assert report_of("stop", "after_batch", (0, 3), order=order) == [FIRST]
    assert report_of("stop", "after_epoch", (0, 9), order=order) == [FIRST]


@pytest.mark.parametrize("order", [0, 200])
@pytest.mark.parametrize("error", [CancelFit, ValueError, KeyboardInterrupt])
def test_it_reports_when_the_fit_is_cut_short(error, order):
    for event in ("after_batch", "after_pred", "before_step", "after_step"):
        assert report_of(error, event, (2, 5), order=order) == [FIRST, "Diagnose, epoch 3, cut short: 1 finding"]
        assert report_of(error, event, (0, 5), order=order) == ["Diagnose, epoch 1, cut short: 1 finding"]


def test_it_reports_when_the_first_or_the_last_epoch_is_cancelled():
    cut = ", cut short: 1 finding"
    assert report_of(CancelEpoch, "after_batch", (0, 5)) == [f"Diagnose, epoch 1{cut}", "Diagnose, epoch 4: 1 finding"]
    assert report_of(CancelEpoch, "after_batch", (3, 5)) == [FIRST, f"Diagnose, epoch 4{cut}"]
    assert report_of(CancelEpoch, "after_batch", (2, 5)) == [FIRST, "Diagnose, epoch 4: 1 finding"]
    assert report_of(CancelTrain, "after_batch", (3, 5)) == [FIRST, "Diagnose, epoch 4: 1 finding"]
    assert report_of(CancelBatch, "after_pred", (3, 5)) == [FIRST, "Diagnose, epoch 4: 1 finding"]


def test_a_fit_that_fails_in_health_or_before_it_begins_is_not_commented():
    class Fail(Callback):
        def before_fit(self, learn):
            if learn.n_epochs == 2:
                raise ValueError("mine")

        def after_batch(self, learn):
            if learn.batch_idx == 12:
                raise ValueError("mine")

    for n_epochs in (1, 2):
        shown = []
        learn = make_learner(mlp(16, 32, 2), Diagnose(show=shown.append), Fail(), init=LSUV())
        with pytest.raises(ValueError, match="mine"):
            learn.fit(n_epochs)
        assert shown == []


def test_an_error_goes_on_even_if_the_report_fails():
    class Fail(Callback):
        def after_batch(self, learn):
            if learn.batch_idx == 12:
                raise KeyError("mine")

    def show(text):
        raise OSError("no screen")

    learn = make_learner(mlp(16, 32, 2), Diagnose(show=show), Fail(), lr=1e-9)
    with pytest.raises(KeyError, match="mine"):
        learn.fit(1)
    learn = make_learner(mlp(16, 32, 2), Diagnose(show=show), lr=1e-9)
    with pytest.raises(OSError, match="no screen"):  # a report that is due says so
        learn.fit(1)


@pytest.mark.parametrize(("rates", "found"), [([1e-3], []), ([1e-12], ["slow"]), ([1e-12, 1e-12, 1e-3], [])])
def test_a_fit_that_goes_on_is_judged_as_a_whole(rates, found):
    class Rates(Callback):
        def __init__(self, rates):
            self.rates = rates

        def before_step(self, learn):
            for group in learn.opt.param_groups:
                group["lr"] = self.rates[learn.epoch]

    class Resume(Callback):
        order = 1000

        def before_train(self, learn):  # this is where a resumed fit stands when it loads
            second.load_state_dict(first.state_dict())

    torch.manual_seed(0)
    model, options = residual(), {"progress": False, "opt_func": torch.optim.AdamW}
    shown, batches = [], list(zip(X.split(32), Y.split(32), strict=True))
    first, second = Diagnose(show=len, every=1), Diagnose(show=shown.append, every=1)
    cbs = [first, Rates(rates)]
    learn = Learner(model, DataLoaders(batches[:12]), F.cross_entropy, init=Zero("*.last"), cbs=cbs, **options)
    learn.fit(len(rates))  # of the last epoch, 8 steps are missing
    cbs = [second, Resume(), Rates([1e-3])]
    Learner(model, DataLoaders(batches[12:]), F.cross_entropy, cbs=cbs, **options).fit(1)
    assert second.activations.steps == list(range(12 * len(rates) + 8))
    assert kinds(second) == found


def test_a_second_fit_is_judged_by_itself():
    torch.manual_seed(0)
    shown = []
    learn = make_learner(mlp(16, 32, 2), Diagnose(show=shown.append), init=LSUV())
    learn.fit(1, lr=1e-9)
    learn.fit(1, lr=1e-3)
    assert [text.splitlines()[0] for text in shown] == [FIRST, "Diagnose, epoch 1: no findings"]


# -- how --------------------------------------------------------------------------------------------------------------


def test_without_a_show_it_prints(capsys):
    make_learner(mlp(16, 32, 2), Diagnose(), init=LSUV()).fit(1)
    assert capsys.readouterr().out == "Diagnose, epoch 1: no findings\n"


def test_a_report_is_one_line_a_finding_and_reads_as_sentences():
    make = edited(lambda: mlp(16, *[16] * 12, 2, act=nn.Sigmoid), scale("0", 300))
    diagnosis, shown = diagnose(make, lr=1e-8)
    head, *lines = shown[0].splitlines()
    assert head == f"Diagnose, epoch 1: {len(lines)} findings"
    assert kinds(diagnosis) == ["large_std", "vanishing", "slow"]
    for line, finding in zip(lines, diagnosis.findings, strict=True):
        assert line == f"- {finding}" == f"- {finding.what} {finding.advice}"
        assert re.fullmatch(r"- [A-Z].*\d (layers?|parameters?): '.*' \(.*\)( and \d+ more)?\. [A-Z].*\.", line), line


def test_a_long_list_of_layers_is_cut():
    diagnosis, shown = diagnose(
        lambda: mlp(16, *[8] * 100, 2, act=nn.Tanh), init=LSUV(), lr=1e-9, data=(X[:64], Y[:64])
    )
    assert max(len(line) for line in shown[0].splitlines()) < 350
    assert len(the(diagnosis, "slow").layers) > 50
    assert re.search(r"\d\d+ parameters: '[^']*' \([^)]*\), .* and \d\d+ more\. Raise", shown[0])
    assert shown[0].count("'") % 2 == 0


def test_it_looks_about_fifty_times_an_epoch():
    for n, every in ((640, 1), (64, 1), (6400, 4)):
        data = X.repeat(n // 640 or 1, 1)[:n], Y.repeat(n // 640 or 1)[:n]
        diagnosis, _ = diagnose(lambda: mlp(16, 8, 2), data=data)
        assert diagnosis.activations.every == diagnosis.gradients.every == diagnosis.parameters.every == every


def test_where_the_length_of_an_epoch_is_unknown_it_looks_at_every_tenth_batch():
    class Stream:
        def __iter__(self):
            return iter([(X[:32], Y[:32])] * 25)

    diagnosis = Diagnose(show=len)
    Learner(mlp(16, 8, 2), DataLoaders(Stream()), F.cross_entropy, cbs=[diagnosis], progress=False).fit(1)
    assert diagnosis.activations.steps == [0, 10, 20]


def test_its_statistics_are_those_of_the_callbacks_alone():
    diagnosis = Diagnose(every=3, show=len)
    alone = [ActivationStats(every=3), GradientStats(every=3), ParameterStats(every=3)]
    torch.manual_seed(0)
    make_learner(mlp(16, 8, 2), diagnosis, *alone).fit(2)
    for part, one in zip((diagnosis.activations, diagnosis.gradients, diagnosis.parameters), alone, strict=True):
        assert part.steps == one.steps
        for field in part.fields:
            assert torch.equal(part[field].nan_to_num(), one[field].nan_to_num())


def test_select_is_that_of_hooks_and_biases_are_not_judged():
    make = edited(lambda: mlp(16, 32, 32, 2), lambda model: model[0].bias.zero_())
    diagnosis, shown = diagnose(make, data=(X[:160], Y[:160]), thresholds={"select": "0"})
    assert diagnosis.parameters.names == ["0.weight", "0.bias"]
    assert diagnosis.parameters.update_ratio[:, 1].median() > 0.1  # it grows from zero
    assert shown == ["Diagnose, epoch 1: no findings"]
    with pytest.raises(ValueError, match="no module 'head'"):
        diagnose(make, thresholds={"select": "head"})


def test_a_net_without_matrices_is_diagnosed():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return x * self.by

    _, shown = diagnose(Scale, data=(X, 2 * X), loss_func=nn.MSELoss())
    assert shown == ["Diagnose, epoch 1: no findings"]


# -- arguments --------------------------------------------------------------------------------------------------------

BAD = [
    *[("every", value, ValueError) for value in (0, -1)],
    *[("every", value, TypeError) for value in (1.5, True, "2")],
    *[("dead", value, ValueError) for value in (-0.1, 1.5, 50, math.nan, "0.5", None, True)],
    *[
        (name, value, ValueError)
        for name in ("std", "gradient", "update_ratio")
        for value in (None, 1, (1,), (1, 2, 3), (2, 1), (-1, 1), (0, math.nan), ("0", "1"), "ab", (True, 2))
    ],
    *[("show", value, TypeError) for value in (None, 1, "print")],
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_wrong_arguments_are_refused_at_construction(name, value, error):
    with pytest.raises(error, match=rf"^{name}=") as caught:
        Diagnose(**{name: value})
    assert repr(value) in str(caught.value)


# -- what never gets a gradient ---------------------------------------------------------------------------------------


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.idle = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(3, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).detach())


def test_weights_that_are_cut_off_from_the_loss_are_found_unless_they_are_frozen():
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    shown, model = [], Detached()
    model.idle.requires_grad_(False)
    diagnosis = Diagnose(show=shown.append)
    dls = DataLoaders(BatchLoader(x, y, batch_size=8))
    Learner(model, dls, nn.CrossEntropyLoss(), lr=1e-3, init=LSUV(), cbs=[diagnosis], progress=False).fit(2)
    (finding,) = (finding for finding in diagnosis.findings if finding.kind == "cut_off")
    assert list(finding.layers) == ["a.weight", "b.weight"]
    assert "No gradient has come in any step to 2 parameters: 'a.weight' (0), 'b.weight' (0)." in shown[-1]
    assert "detach" in finding.advice


def test_a_sparse_gradient_is_one():
    torch.manual_seed(0)
    x, y = torch.randint(0, 5, (64,)), torch.randint(0, 2, (64,))
    diagnosis = Diagnose(show=len)
    model = nn.Sequential(nn.Embedding(5, 8, sparse=True), nn.Linear(8, 2))
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "progress": False}
    Learner(model, DataLoaders(BatchLoader(x, y, batch_size=8)), nn.CrossEntropyLoss(), cbs=[diagnosis], **options).fit(
        1
    )
    assert "cut_off" not in [finding.kind for finding in diagnosis.findings]


def test_a_layer_that_is_dead_is_not_called_slow_as_well():
    torch.manual_seed(0)
    x, y = torch.randn(256, 4), torch.randint(0, 2, (256,))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(model[2].bias, -100)
    diagnosis = Diagnose(show=len)
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "progress": False}
    Learner(model, DataLoaders(BatchLoader(x, y, batch_size=8)), nn.CrossEntropyLoss(), cbs=[diagnosis], **options).fit(
        2
    )
    kinds = [finding.kind for finding in diagnosis.findings]
    assert "dead" in kinds
    assert "slow" not in kinds
