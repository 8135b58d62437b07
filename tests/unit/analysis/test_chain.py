"""Which layers are measured, and which groups of their maps."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.analysis.chain import MapGroups, measured_layers, passed_through
from hpcnn.config import ModelConfig
from hpcnn.errors import ConfigError
from hpcnn.nn import models
from hpcnn.spec import ModelSpec


def spec(name: str) -> ModelSpec:
    return models.configured(ModelConfig(name=name), (32, 32, 3), 10)


def names(name: str, *chosen: str) -> list[str]:
    return [layer.name for layer in measured_layers(spec(name), chosen)]


def reachable_without(model: ModelSpec, left_out: str) -> bool:
    """Return whether some way from the images to the logits avoids a layer."""
    reached = {"input"} | set(model.layers[0].inputs)
    for layer in model.layers:
        if layer.name != left_out and reached.intersection(layer.inputs):
            reached.add(layer.name)
    return model.layers[-1].name in reached


def test_a_chain_of_layers_is_measured_as_a_whole() -> None:
    assert names("lenet5") == ["conv1", "conv2", "fc1", "fc2", "fc3"]


def test_what_has_a_way_round_is_left_out() -> None:
    model = spec("resnet20")
    found = names("resnet20")
    assert len(found) == 1 + 9 + 1  # the stem, nine sums, the logits
    assert found[-1] == model.layers[-1].name
    assert passed_through(model) == {one.name for one in model.layers if not reachable_without(model, one.name)}


def test_layers_can_be_named_and_come_in_their_order() -> None:
    assert names("lenet5", "fc1", "pool1") == ["pool1", "fc1"]


@pytest.mark.parametrize("chosen", [("conv1", "conv9"), ("conv1",)])
def test_names_that_are_none_or_too_few_are_refused(chosen: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"analysis\.layers"):
        names("lenet5", *chosen)


def test_groups_of_maps() -> None:
    groups = MapGroups.of(channels=12, num_maps=6, num_pairs=4, seed=1)
    assert groups == MapGroups.of(12, 6, 4, 1) != MapGroups.of(12, 6, 4, 2)
    assert groups.maps == (0, 2, 4, 6, 8, 10)
    assert groups.sizes == (2, 4, 6)
    assert len(set(groups.pairs)) == 4
    members = groups.members(12)
    single, pairs, growing, without = groups.split(members)
    assert not members[:, 1::2].any()
    np.testing.assert_array_equal(single[:, ::2], np.eye(6, dtype=bool))
    np.testing.assert_array_equal(without[:, ::2], ~np.eye(6, dtype=bool))
    assert [tuple(np.flatnonzero(pair[::2])) for pair in pairs] == list(groups.pairs)
    assert growing.sum(axis=1).tolist() == [2, 4, 6]


def test_few_maps_are_all_taken() -> None:
    groups = MapGroups.of(channels=2, num_maps=16, num_pairs=8, seed=1)
    assert (groups.maps, groups.pairs, groups.sizes) == ((0, 1), ((0, 1),), (2,))
