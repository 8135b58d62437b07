import itertools

import numpy as np
import pytest

from hpcnn.config import TrainConfig
from hpcnn.errors import NumericsError
from hpcnn.nn.parameter import ParameterSet
from hpcnn.train import optimizers

ENTRIES = [
    ("conv1/weight", (5, 3, 3, 2), True),
    ("conv1/bias", (5,), False),
    ("conv2/weight", (7, 3, 3, 5), True),
    ("fc/weight", (11, 13), True),
    ("fc/bias", (11,), False),
    ("norm/gamma", (3,), False),
]
RECIPES = [
    {"optimizer": "sgd", "momentum": 0.0},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"optimizer": "adam", "weight_decay": 0.01},
    {"optimizer": "adamw", "weight_decay": 0.1, "epsilon": 1e-4},
    {"optimizer": "lars", "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02},
]


def make(seed=0, **recipe):
    parameters = ParameterSet(ENTRIES)
    parameters.values[:] = np.random.default_rng(seed).standard_normal(parameters.values.size)
    return parameters, optimizers.build(TrainConfig(**recipe), parameters)


def set_gradient(parameters, step):
    parameters.grads[:] = np.random.default_rng(100 + step).standard_normal(parameters.grads.size)


def run(parameters, optimizer, steps=20, cuts=(), scale=1.0):
    edges = [0, *cuts, parameters.values.size]
    for step in range(steps):
        set_gradient(parameters, step)
        for start, stop in itertools.pairwise(edges):
            optimizer.update(0.1 / (1 + step), step, start, stop, scale=scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stretches_give_the_bits_of_one_call(recipe):
    whole, whole_optimizer = make(**recipe)
    run(whole, whole_optimizer)
    parts, parts_optimizer = make(**recipe)
    if recipe["optimizer"] == "lars":
        cuts = [parts.offsets[name][0] for name in ("conv1/bias", "fc/weight")]
    else:
        cuts = [1, 90, 93, 200, 411]
    run(parts, parts_optimizer, cuts=cuts)
    assert np.array_equal(whole.values, parts.values)
    for slot in whole_optimizer.slots:
        assert np.array_equal(whole_optimizer.state[slot], parts_optimizer.state[slot])


def test_an_update_leaves_everything_outside_its_stretch_alone():
    for recipe in RECIPES:
        parameters, optimizer = make(**recipe)
        before = parameters.values.copy()
        set_gradient(parameters, 0)
        optimizer.update(0.1, 0, 40, 97)
        changed = np.flatnonzero(before != parameters.values)
        assert changed.min() == 40
        assert changed.max() == 96
        assert changed.size == 57


def test_neighbours_of_one_decay_setting_are_updated_together():
    parameters, optimizer = make(optimizer="sgd")
    bounds = [(segment.start, segment.stop, segment.decay) for segment in optimizer.segments]
    weights = parameters.offsets
    assert bounds == [
        (0, 90, True),
        (90, 95, False),
        (95, weights["fc/weight"][1], True),
        (weights["fc/bias"][0], parameters.values.size, False),
    ]


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_weight_decay_moves_weights_and_nothing_else(recipe):
    decayed, optimizer = make(**recipe)
    run(decayed, optimizer, 1)
    plain, optimizer = make(**{**recipe, "weight_decay": 0.0})
    run(plain, optimizer, 1)
    for ours, theirs in zip(decayed.parameters, plain.parameters, strict=True):
        assert np.array_equal(ours.value, theirs.value) != ours.decay


def reference_lars(parameters, config, steps):
    """The paper's algorithm in float64, tensor by tensor."""
    weights = {p.name: p.value.astype(np.float64) for p in parameters.parameters}
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        set_gradient(parameters, step)
        for p in parameters.parameters:
            w, g, lr = weights[p.name], p.grad.astype(np.float64), 0.1 / (1 + step)
            decay = config["weight_decay"] if p.decay else 0.0
            local = 1.0
            if p.decay:
                local = config["trust_coefficient"] * np.linalg.norm(w)
                local /= np.linalg.norm(g) + decay * np.linalg.norm(w) + 1e-8
            velocity[p.name] = config["momentum"] * velocity[p.name] + lr * local * (g + decay * w)
            weights[p.name] = w - velocity[p.name]
    return weights


def test_lars_follows_the_paper_over_twenty_steps():
    parameters, optimizer = make(**RECIPES[-1])
    expected = reference_lars(make()[0], RECIPES[-1], 20)
    run(parameters, optimizer)
    for parameter in parameters.parameters:
        np.testing.assert_allclose(parameter.value, expected[parameter.name], rtol=1e-5, atol=1e-6)


def test_lars_takes_norms_that_shards_have_summed():
    whole, optimizer = make(**RECIPES[-1])
    set_gradient(whole, 0)
    optimizer.update(0.1, 0)
    shards, optimizer = make(**RECIPES[-1])
    set_gradient(shards, 0)
    middle = 300  # inside conv2/weight
    norms = optimizer.squared_norms(0, middle) + optimizer.squared_norms(middle, None)
    optimizer.update(0.1, 0, 0, middle, norms=norms)
    optimizer.update(0.1, 0, middle, None, norms=norms)
    np.testing.assert_allclose(shards.values, whole.values, rtol=1e-6)
    assert optimizer.squared_norms(0, 90)[0, 0] > 0
    assert optimizer.squared_norms(0, 90)[1:].sum() == 0


def torch_optimizer(torch, parameters, recipe):
    tensors = {p.name: torch.nn.Parameter(torch.from_numpy(p.value.copy())) for p in parameters.parameters}
    decay = recipe.get("weight_decay", 0.0)
    groups = [
        {"params": [tensors[p.name] for p in parameters.parameters if p.decay], "weight_decay": decay},
        {"params": [tensors[p.name] for p in parameters.parameters if not p.decay], "weight_decay": 0.0},
    ]
    if recipe["optimizer"] == "sgd":
        kwargs = {"momentum": recipe["momentum"], "nesterov": recipe.get("nesterov", False)}
        return tensors, torch.optim.SGD(groups, lr=0.1, **kwargs)
    kind = torch.optim.Adam if recipe["optimizer"] == "adam" else torch.optim.AdamW
    return tensors, kind(groups, lr=0.1, eps=recipe.get("epsilon", 1e-8))


@pytest.mark.parametrize("recipe", RECIPES[:-1])
def test_twenty_steps_equal_those_of_torch(recipe):
    torch = pytest.importorskip("torch")
    parameters, optimizer = make(**recipe)
    tensors, theirs = torch_optimizer(torch, parameters, recipe)
    for step in range(20):
        set_gradient(parameters, step)
        for parameter in parameters.parameters:
            tensors[parameter.name].grad = torch.from_numpy(parameter.grad.copy())
        for group in theirs.param_groups:
            group["lr"] = 0.1 / (1 + step)
        theirs.step()
        optimizer.update(0.1 / (1 + step), step)
    for parameter in parameters.parameters:
        expected = tensors[parameter.name].detach().numpy()
        np.testing.assert_allclose(parameter.value, expected, rtol=2e-5, atol=2e-6)


def test_clipping_shortens_the_gradient_to_the_limit_as_torch_does():
    torch = pytest.importorskip("torch")
    parameters, optimizer = make(optimizer="sgd", momentum=0.0)
    set_gradient(parameters, 0)
    expected = torch.from_numpy(parameters.grads.copy())
    holder = torch.nn.Parameter(torch.zeros_like(expected))
    holder.grad = expected
    norm = float(torch.nn.utils.clip_grad_norm_([holder], 0.5))
    scale, ours = optimizers.clip_scale(parameters, 0.5)
    assert ours == pytest.approx(norm, rel=1e-5)
    before = parameters.values.copy()
    optimizer.update(1.0, 0, scale=scale)
    np.testing.assert_allclose(before - parameters.values, expected.numpy(), rtol=1e-3, atol=1e-6)


def test_short_gradients_and_limit_zero_are_not_clipped():
    parameters, _ = make()
    parameters.grads[:] = 0.0
    parameters.grads[:2] = 3.0, 4.0
    assert optimizers.clip_scale(parameters, 5.0) == (1.0, 5.0)
    assert optimizers.clip_scale(parameters, 0.0) == (1.0, 5.0)
    assert optimizers.clip_scale(parameters, 2.5) == (0.5, 5.0)


def test_a_gradient_that_is_not_finite_is_refused():
    parameters, _ = make()
    parameters.grads[3] = np.nan
    with pytest.raises(NumericsError, match=r"clip: the norm of the gradient is nan"):
        optimizers.clip_scale(parameters, 1.0)


def test_state_starts_at_zero_under_the_names_of_checkpoints():
    expected = {"sgd": ("velocity",), "lars": ("velocity",), "adam": ("first_moment", "second_moment")}
    for name, slots in {**expected, "adamw": expected["adam"]}.items():
        parameters, optimizer = make(optimizer=name)
        assert tuple(optimizer.state) == slots
        assert all(not array.any() and array.shape == parameters.values.shape for array in optimizer.state.values())
