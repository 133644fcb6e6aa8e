import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from minitrain.units import Activity, active_units, batch_dim, unit_dims


def dims_of(model):
    return list(unit_dims(model).values())


# -- where the units are ----------------------------------------------------------------------------------------------

CHANNELS_SECOND = [
    lambda: nn.Conv1d(1, 2, 1),
    lambda: nn.Conv2d(1, 2, 1),
    lambda: nn.ConvTranspose3d(1, 2, 1),
    lambda: nn.LazyConv2d(2, 1),
    lambda: nn.BatchNorm1d(2),
    lambda: nn.InstanceNorm2d(2),
    lambda: nn.SyncBatchNorm(2),
    lambda: nn.GroupNorm(1, 2),
    lambda: nn.LocalResponseNorm(2),
]
FEATURES_LAST = [
    lambda: nn.Linear(1, 2),
    lambda: nn.LazyLinear(2),
    lambda: nn.Bilinear(1, 1, 2),
    lambda: nn.Embedding(3, 2),
    lambda: nn.EmbeddingBag(3, 2),
    lambda: nn.LayerNorm(2),
    lambda: nn.RMSNorm(2),
    lambda: nn.LSTM(1, 2),
    lambda: nn.GRUCell(1, 2),
    lambda: nn.MultiheadAttention(2, 1),
    lambda: nn.TransformerEncoderLayer(2, 1, 4),
    lambda: nn.TransformerDecoderLayer(2, 1, 4),
]


class Own(nn.Module):
    """A layer of the user's, with a weight of any shape."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("make", CHANNELS_SECOND)
def test_channels_are_the_second_dimension_and_what_follows_is_alike(make):
    model = nn.Sequential(nn.Linear(1, 1), make(), nn.ReLU())
    assert dims_of(model) == [1, -1, 1, 1]


@pytest.mark.parametrize("make", FEATURES_LAST)
def test_features_are_the_last_dimension_and_what_follows_is_alike(make):
    layer = make()
    dims = unit_dims(nn.Sequential(nn.Conv2d(1, 1, 1), layer, relu := nn.ReLU()))
    assert (dims[layer], dims[relu]) == (-1, -1)


def test_of_a_layer_of_another_type_the_weight_tells():
    assert dims_of(nn.Sequential(Own(3), Own(4, 3), Own(4, 3, 1), nn.PReLU(), Own(4, 3, 1, 1))) == [1, 1, -1, 1, 1, 1]


def test_a_model_without_a_weight_has_channels():
    assert dims_of(nn.ReLU()) == [1]


def test_every_module_is_there_once_and_in_order():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), shared, nn.Sequential(nn.Linear(2, 2), shared))
    assert list(unit_dims(model)) == list(model.modules())


def test_what_is_shared_is_like_what_stands_before_its_first_place():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), shared, nn.Flatten(), nn.Linear(2, 2), shared)
    assert unit_dims(model)[shared] == 1


def test_a_block_is_like_the_last_layer_in_it_and_not_like_what_stands_before_it():
    block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU())
    model = nn.Sequential(nn.Conv2d(3, 4, 4), block, head := nn.Dropout())
    assert (unit_dims(model)[block], unit_dims(model)[head]) == (-1, -1)
    dims = unit_dims(
        nn.Sequential(encoder := nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1))
    )
    assert dims[encoder] == -1


def test_a_known_layer_keeps_its_own_dimension_whatever_it_holds():
    class Patches(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.mix = nn.Conv1d(1, 1, 1)

    dims = unit_dims(nn.Sequential(layer := Patches(), relu := nn.ReLU()))
    assert (dims[layer], dims[layer.mix], dims[relu]) == (-1, 1, -1)


@pytest.mark.parametrize("parametrise", [parametrizations.spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize(("shape", "dim"), [((4, 3), -1), ((4, 3, 2), 1)])
def test_a_parametrised_weight_is_looked_at_without_being_computed(parametrise, shape, dim):
    layer = parametrise(Own(*shape))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert unit_dims(layer)[layer] == dim
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_samples_come_first_but_where_the_time_does():
    assert [batch_dim(m) for m in (nn.Linear(1, 1), nn.LSTMCell(1, 1), nn.GRU(1, 1, batch_first=True))] == [0, 0, 0]
    assert [batch_dim(m) for m in (nn.LSTM(1, 1), nn.RNN(1, 1), nn.MultiheadAttention(2, 1))] == [1, 1, 1]


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_s_samples_are_where_its_attention_has_them(batch_first):
    for make in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        assert batch_dim(make(2, 1, 4, batch_first=batch_first)) == (not batch_first)
    layer = nn.TransformerEncoderLayer(2, 1, 4, batch_first=batch_first)
    assert batch_dim(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)) == (not batch_first)


# -- which of them are active -----------------------------------------------------------------------------------------


def test_a_unit_is_active_if_any_of_its_values_is():
    x = torch.zeros(2, 3, 2, 2)
    x[1, 0, 1, 1], x[0, 1, 0, 0] = 1e-30, -5.0
    assert active_units(x, 1, positive=True).tolist() == [True, False, False]
    assert active_units(x, 1, positive=False).tolist() == [True, True, False]
    assert active_units(x, -1, positive=True).tolist() == [False, True]
    assert active_units(x, 0, positive=True).tolist() == [False, True]


def test_nan_is_active_and_minus_zero_is_not():
    x = torch.tensor([[math.nan, -0.0, 0.0, -math.inf]])
    assert active_units(x, 1, positive=True).tolist() == [True, False, False, False]
    assert active_units(x, 1, positive=False).tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (100, 3, 0), (2, 0, 3)])
def test_of_nothing_no_unit_is_active(shape):
    for dim in (0, 1, -1):
        active = active_units(torch.empty(shape), dim, positive=True)
        at = dim if -len(shape) <= dim < len(shape) else -1
        assert active.tolist() == [False] * shape[at]


def test_of_a_tensor_without_that_dimension_it_is_the_last_one():
    assert active_units(torch.tensor([1.0, 0.0]), 1, positive=True).tolist() == [True, False]
    assert active_units(torch.tensor(1.0), 1, positive=True).tolist() == [True]
    assert active_units(torch.tensor([[1.0, 0.0]]), -3, positive=True).tolist() == [True, False]


def test_a_unit_that_only_the_last_sample_activates_is_active():
    x = torch.zeros(1000, 3)
    x[:, 0], x[-1, 1], x[40, 2] = 1, 1, -1
    assert active_units(x, 1, positive=True).tolist() == [True, True, False]
    assert active_units(x, 1, positive=False).tolist() == [True, True, True]


# -- and which are dead -----------------------------------------------------------------------------------------------


def dead(activity, *row, name="a"):
    return activity.add(name, torch.tensor(row, dtype=torch.bool)).item()


def test_a_unit_is_dead_after_a_whole_window_of_silence_and_alive_at_its_first_sign():
    activity = Activity(3)
    assert dead(activity, True, True) == 0.0
    assert [dead(activity, True, False) for _ in range(4)] == [0.0, 0.0, 0.5, 0.5]
    assert dead(activity, False, True) == 0.0


def test_before_the_window_is_full_all_rows_count():
    activity = Activity(3)
    assert dead(activity, False, True, False, False) == 0.75
    assert dead(activity, False, True, True, False) == 0.5
    assert dead(activity, False, True, True, True) == 0.25
    assert dead(activity, False, False, False, False) == 0.25


def test_layers_do_not_disturb_each_other():
    activity = Activity(2)
    assert dead(activity, False, name="a") == 1.0
    assert dead(activity, True, name="b") == 0.0
    assert dead(activity, False, name="b") == 0.0
    assert dead(activity, False, name="b") == 1.0


def test_a_layer_of_another_width_begins_anew():
    activity = Activity(1)
    dead(activity, False)
    assert dead(activity, True, False) == 0.5


def test_a_layer_without_units_has_no_fraction():
    assert math.isnan(dead(Activity(1)))


def test_the_state_is_a_copy_and_brings_everything_back():
    activity, other = Activity(3), Activity(3)
    dead(activity, True, False)
    dead(activity, False, False)
    state = activity.state_dict()
    assert dead(activity, True, True) == 0.0
    for _ in range(2):
        other.load_state_dict(state)
        assert dead(other, False, False) == 0.5
    assert state["rows"] == {"a": 2}
    assert state["silent"]["a"].tolist() == [1, 2]


def test_a_wrong_state_changes_nothing():
    activity = Activity(3)
    dead(activity, True, False)
    with pytest.raises(KeyError):
        activity.load_state_dict({"silent": {}})
    assert dead(activity, False, False) == 0.5
