"""What is particular to the oneDNN implementation; that its values are right is checked with the other one's, too."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from hpcnn import ops
from hpcnn.errors import ConfigError
from hpcnn.ops import cpu, onednn
from hpcnn.ops.onednn import conv2d, library, primitive, products

pytestmark = pytest.mark.skipif(not onednn.available(), reason="the oneDNN library is not installed")

DENSE = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def double(*arrays):
    return [None if array is None else array.astype(np.float64) for array in arrays]


def assert_close(expected, actual, tolerance=2e-5):
    expected, actual = np.asarray(expected), np.asarray(actual)
    assert expected.shape == actual.shape
    assert np.abs(expected - actual).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


@pytest.fixture
def made(monkeypatch):
    """Names of the primitives that are created while the test runs."""
    names = []
    original = primitive.Primitive.__init__

    def record(self, description, *args, **kwargs):
        names.append(description.who)
        original(self, description, *args, **kwargs)

    monkeypatch.setattr(primitive.Primitive, "__init__", record)
    return names


def test_describe_names_the_version_and_the_file():
    assert onednn.describe().startswith("onednn 3.")
    assert "libdnnl" in onednn.describe()


@pytest.mark.parametrize(
    ("size", "filters", "parameters"),
    [
        ((9, 7, 3), (5, 3, 3, 3), DENSE),
        ((12, 11, 8), (12, 3, 2, 8), DENSE | {"stride": (2, 1), "padding": ((0, 1), (2, 0))}),
        ((12, 12, 8), (12, 3, 3, 8), DENSE | {"dilation": (2, 3), "padding": ((2, 2), (3, 3))}),
        ((10, 10, 8), (12, 3, 3, 2), DENSE | {"groups": 4}),
        ((10, 9, 16), (16, 3, 3, 1), DENSE | {"groups": 16, "stride": (2, 2)}),
        ((8, 8, 16), (32, 1, 1, 16), DENSE | {"padding": ((0, 0), (0, 0))}),
        ((9, 8, 16), (8, 1, 1, 16), DENSE | {"padding": ((0, 0), (0, 0)), "stride": (2, 2)}),
        ((4, 4, 8), (8, 3, 3, 8), DENSE | {"padding": ((5, 5), (4, 6))}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_every_geometry_equal_double_precision(size, filters, parameters, bias):
    x, weight = draw(2, *size), draw(*filters, seed=1)
    offset = draw(filters[0], seed=2) if bias else None
    y = onednn.conv2d_forward(x, weight, offset, activation="leaky_relu", **parameters)
    assert_close(cpu.conv2d_forward(*double(x, weight, offset), activation="leaky_relu", **parameters), y)

    error = draw(*y.shape, seed=3)
    expected = cpu.conv2d_backward_input(*double(error, weight), size[:2], **parameters)
    assert_close(expected, onednn.conv2d_backward_input(error, weight, size[:2], **parameters))
    expected = cpu.conv2d_backward_weight(*double(x, error), filters[1:3], bias=bias, **parameters)
    actual = onednn.conv2d_backward_weight(x, error, filters[1:3], bias=bias, **parameters)
    assert_close(expected[0], actual[0])
    if bias:
        assert_close(expected[1], actual[1])
    else:
        assert actual[1] is None
    assert not onednn.fallbacks()


WIDE = [
    ((5, 150, 3), 64, (3, 3), DENSE),  # columns
    ((9, 301, 2), 64, (2, 3), DENSE | {"stride": (2, 1), "dilation": (1, 2), "padding": ((0, 1), (2, 1))}),
    ((40, 90, 24), 96, (3, 3), DENSE),  # shifts
    ((7, 140, 33), 65, (2, 3), DENSE | {"dilation": (2, 3), "padding": ((3, 0), (1, 2))}),
    ((2, 140, 40), 64, (3, 3), DENSE | {"padding": ((4, 5), (0, 0))}),  # rows that read nothing but padding
]


@pytest.mark.parametrize(("size", "filters", "kernel_size", "parameters"), WIDE)
@pytest.mark.parametrize("strip_bytes", [1, 150000, products.STRIP_BYTES])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_weight_gradients_of_wide_images_are_products_of_strips(
    size, filters, kernel_size, parameters, strip_bytes, threads, monkeypatch
):
    monkeypatch.setattr(products, "STRIP_BYTES", strip_bytes)
    window = products.Window(kernel_size, *(parameters[key] for key in ("stride", "padding", "dilation")))
    x, weight = draw(3, *size), draw(filters, *kernel_size, size[2], seed=1)
    error = draw(*onednn.conv2d_forward(x, weight, **parameters).shape, seed=2)
    assert window.pays(size[2], *error.shape[2:])
    with threadpool_limits(threads):
        actual = onednn.conv2d_backward_weight(x, error, kernel_size, **parameters)
        again = onednn.conv2d_backward_weight(x, error, kernel_size, **parameters)
        assert threads == library.num_threads()
    expected = cpu.conv2d_backward_weight(*double(x, error), kernel_size, **parameters)
    for position in (0, 1):
        assert_close(expected[position], actual[position])
        np.testing.assert_array_equal(actual[position], again[position])


def test_products_are_for_rows_that_leave_the_first_level_cache_and_for_few_channels():
    dense = products.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert dense.pays(3, 224, 64)
    assert dense.pays(64, 224, 64)
    assert not dense.pays(64, 56, 64)
    assert not dense.pays(256, 56, 256)
    assert not dense._replace(stride=(2, 2)).pays(64, 224, 64)
    assert dense._replace(stride=(2, 2)).pays(3, 224, 64)
    assert not dense._replace(kernel_size=(1, 1)).pays(64, 224, 64)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("channels", "filters"), [(16, 48), (48, 16), (130, 140)])
def test_weight_gradients_of_one_pixel_filters_are_right_whichever_code_serves_them(threads, channels, filters):
    x, error = draw(3, 9, 11, channels), draw(3, 9, 11, filters, seed=1)
    flat = error.reshape(-1, filters).astype(np.float64)
    with threadpool_limits(threads):
        weight, bias = onednn.conv2d_backward_weight(x, error, (1, 1))
    assert_close(flat.T @ x.reshape(-1, channels), weight.reshape(filters, channels))
    assert_close(flat.sum(axis=0), bias)


def test_gradients_of_weights_overwrite_out_and_nothing_beside_it():
    x, error = draw(2, 6, 6, 20), draw(2, 6, 6, 30, seed=1)
    flat = np.full(30 * 9 * 20 + 30 + 2, 7, np.float32)
    out = flat[1 : 30 * 9 * 20 + 1].reshape(30, 3, 3, 20), flat[30 * 9 * 20 + 1 : -1]
    actual = onednn.conv2d_backward_weight(x, error, (3, 3), out=out, **DENSE)
    expected = onednn.conv2d_backward_weight(x, error, (3, 3), **DENSE)
    assert actual[0] is out[0]
    assert actual[1] is out[1]
    np.testing.assert_array_equal(expected[0], out[0])
    np.testing.assert_array_equal(expected[1], out[1])
    assert (7, 7) == (flat[0], flat[-1])


def test_arrays_that_are_not_contiguous_give_the_same_bits():
    x, weight, error = draw(2, 6, 8, 5), draw(4, 3, 3, 5, seed=1), draw(2, 6, 8, 4, seed=2)
    strided = [np.asfortranarray(array) for array in (x, weight, error)]
    pairs = [
        (onednn.conv2d_forward(x, weight, **DENSE), onednn.conv2d_forward(*strided[:2], **DENSE)),
        (
            onednn.conv2d_backward_input(error, weight, (6, 8), **DENSE),
            onednn.conv2d_backward_input(strided[2], strided[1], (6, 8), **DENSE),
        ),
        (onednn.activation_forward(x, "relu"), onednn.activation_forward(strided[0], "relu")),
        (onednn.global_avgpool_forward(x), onednn.global_avgpool_forward(strided[0])),
    ]
    for expected, actual in pairs:
        np.testing.assert_array_equal(expected, actual)


def test_inputs_are_left_as_they_were():
    x, y, gamma = draw(3, 4, 4, 8), draw(3, 4, 4, 8, seed=1), draw(8, seed=2)
    before = [array.copy() for array in (x, y, gamma)]
    onednn.add_forward(x, y, "relu")
    onednn.activation_backward(x, y, "leaky_relu")
    _, mean, var, mask = onednn.batchnorm_forward(x, gamma, gamma, epsilon=1e-5, activation="leaky_relu")
    onednn.batchnorm_backward(y, x, gamma, mean, var, mask, epsilon=1e-5, activation="leaky_relu")
    for expected, actual in zip(before, (x, y, gamma), strict=True):
        np.testing.assert_array_equal(expected, actual)


def test_a_second_call_of_the_same_shape_creates_nothing_and_gives_the_same_bits(made):
    x, weight, error = draw(2, 11, 13, 24), draw(40, 3, 3, 24, seed=1), draw(2, 11, 13, 40, seed=2)

    def run():
        return [
            onednn.conv2d_forward(x, weight, **DENSE),
            onednn.conv2d_backward_input(error, weight, (11, 13), **DENSE),
            *onednn.conv2d_backward_weight(x, error, (3, 3), **DENSE),
        ]

    first, created = run(), len(made)
    assert created >= 3
    for expected, actual in zip(first, run(), strict=True):
        np.testing.assert_array_equal(expected, actual)
    assert created == len(made)


def test_another_number_of_threads_has_primitives_of_its_own(made):
    x, weight = draw(4, 10, 9, 16), draw(24, 3, 3, 16, seed=1)
    expected = onednn.conv2d_forward(x, weight, **DENSE)
    created, threads = len(made), library.num_threads()
    with threadpool_limits(1 if threads > 1 else 2):
        assert threads != library.num_threads()
        assert_close(expected, onednn.conv2d_forward(x, weight, **DENSE), 1e-6)
    assert len(made) > created
    created = len(made)
    np.testing.assert_array_equal(expected, onednn.conv2d_forward(x, weight, **DENSE))
    assert created == len(made)


def test_calls_from_several_python_threads_do_not_disturb_each_other():
    weight = draw(16, 3, 3, 8)
    images = [draw(2, 12, 12, 8, seed=seed) for seed in range(8)]
    expected = [onednn.conv2d_forward(x, weight, **DENSE) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda x: onednn.conv2d_forward(x, weight, **DENSE), images))
            for left, right in zip(expected, actual, strict=True):
                assert_close(left, right, 1e-6)


@pytest.mark.parametrize(
    ("window", "dtype"), [((2, 2), np.uint8), ((15, 17), np.uint8), ((16, 16), np.int32), ((3, 100), np.int32)]
)
def test_workspace_of_max_pooling_is_the_place_of_the_first_maximum(window, dtype):
    x = np.round(draw(2, 19, 103, 21))  # full of ties
    y, argmax = onednn.maxpool2d_forward(x, window, stride=(2, 3), padding=((1, 0), (0, 1)))
    expected = cpu.maxpool2d_forward(x.astype(np.float64), window, stride=(2, 3), padding=((1, 0), (0, 1)))
    assert dtype == argmax.dtype
    np.testing.assert_array_equal(expected[0], y)
    np.testing.assert_array_equal(expected[1], argmax)


def test_what_the_library_cannot_do_is_done_by_numpy_and_recorded(monkeypatch):
    def refuse(*_):
        raise library.UnimplementedError("oneDNN: no such thing.")

    monkeypatch.setattr(conv2d, "Description", refuse)
    monkeypatch.setattr(primitive, "_fallbacks", {})
    x, weight, error = draw(2, 5, 6, 3), draw(7, 3, 3, 3, seed=1), draw(2, 5, 6, 7, seed=2)
    np.testing.assert_array_equal(
        cpu.conv2d_forward(x, weight, activation=None, **DENSE), onednn.conv2d_forward(x, weight, **DENSE)
    )
    np.testing.assert_array_equal(
        cpu.conv2d_backward_input(error, weight, (5, 6), **DENSE),
        onednn.conv2d_backward_input(error, weight, (5, 6), **DENSE),
    )
    np.testing.assert_array_equal(
        cpu.conv2d_backward_weight(x, error, (3, 3), **DENSE)[0],
        onednn.conv2d_backward_weight(x, error, (3, 3), **DENSE)[0],
    )
    assert ("oneDNN: no such thing.",) == onednn.fallbacks()


def test_reference_code_of_the_library_is_refused_because_numpy_outruns_it():
    layout = primitive.matrix(7, 5)
    row = primitive.matrix(1, 5)
    description = primitive.Description(
        "sum", "reduction", 196596, layout, row, 0.0, 0.0, primitive.attributes()
    )  # dnnl_reduction_sum
    with pytest.raises(library.UnimplementedError, match=r"sum has only the implementation 'ref"):
        primitive.Primitive(description, (library.SRC, library.DST))


def test_a_failure_names_the_operation_and_the_status():
    with pytest.raises(RuntimeError, match=r"oneDNN: memory descriptor of \(2, -3\).* 'invalid arguments' \(=2\)"):
        primitive.descriptor((2, -3), (1, 1))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(6, 5, 4, 17), (8, 12), (6, 40, 40, 256)])
def test_batchnorm_over_two_parts_equals_batchnorm_of_the_whole(shape, activation):
    x, error = draw(*shape) * 2 + 3, draw(*shape, seed=1)
    gamma, beta = draw(shape[-1], seed=2), draw(shape[-1], seed=3) + 0.5
    count, options = x.size // shape[-1], {"epsilon": 1e-5, "activation": activation}
    _, mean, var, mask = onednn.batchnorm_forward(x, gamma, beta, **options)
    whole = onednn.batchnorm_backward(error, x, gamma, mean, var, mask, **options)

    parts, middle, sums = [], shape[0] // 3, []
    for part in (slice(middle), slice(middle, None)):
        _, _, _, mask = onednn.batchnorm_forward(x[part], gamma, beta, statistics=(mean, var), **options)
        arguments = (error[part], x[part], gamma, mean, var, mask)
        onednn.batchnorm_backward(*arguments, count=count, reduce_sum=lambda s: sums.append(s.copy()), **options)
        parts.append(arguments)
    total = sum(sums)
    results = [
        onednn.batchnorm_backward(*arguments, count=count, reduce_sum=lambda s: np.copyto(s, total), **options)
        for arguments in parts
    ]
    assert_close(whole[0], np.concatenate([result[0] for result in results]), 1e-5)
    for position in (1, 2):
        assert_close(whole[position], sum(result[position] for result in results), 1e-5)


def test_statistics_survive_a_mean_far_from_zero():
    x = draw(4, 9, 9, 20) + 1000
    mean, var = onednn.batchnorm_statistics(x)
    assert (np.float64, np.float64) == (mean.dtype, var.dtype)
    np.testing.assert_allclose(x.mean((0, 1, 2), dtype=np.float64), mean, rtol=1e-6)
    np.testing.assert_allclose(x.var((0, 1, 2), dtype=np.float64), var, rtol=1e-3)


def test_the_weight_of_a_few_samples_is_the_left_factor_of_its_input_gradient(made):
    weight = draw(1024, 1032)
    for samples in (7, 8, 128, 129):
        for lying in (weight, np.asfortranarray(weight)):
            grad = draw(samples, 1024, seed=samples)
            assert_close(grad.astype(np.float64) @ weight, onednn.linear_backward_input(grad, lying))
    small = np.asfortranarray(draw(1023, 1024))
    assert_close(draw(16, 1023).astype(np.float64) @ small, onednn.linear_backward_input(draw(16, 1023), small))
    flipped = [who for who in made if who.startswith("transposed linear")]
    assert flipped == [f"transposed linear input gradient of ({samples}, 1024) to 1032" for samples in (8, 128)]


def test_products_with_weights_of_either_order_reorder_nothing():
    code = """
import numpy as np
from hpcnn import ops
for samples, inputs, outputs in ((3, 37, 19), (16, 1031, 1021), (70, 1024, 1024)):
    x, grad = np.ones((samples, inputs), np.float32), np.ones((samples, outputs), np.float32)
    for order in "CF":
        weight, bias = np.ones((outputs, inputs), np.float32, order), np.ones(outputs, np.float32)
        ops.linear_forward(x, weight, bias, activation="leaky_relu")
        ops.linear_backward_input(grad, weight)
        ops.linear_backward_weight(x, grad, out=(weight, bias))
"""
    environment = os.environ | {"ONEDNN_VERBOSE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = [line.split(",") for line in result.stdout.splitlines() if line.startswith("onednn_verbose,exec")]
    assert {"matmul", "inner_product"} == {line[3] for line in lines}
    assert 18 == len(lines)


def run_python(code, value):
    environment = os.environ | {library.VARIABLE: value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_can_name_the_library():
    _, path = library.find()
    result = run_python("from hpcnn.ops import onednn; print(onednn.describe())", path)
    assert f"({path})" in result.stdout, result.stderr


def test_the_environment_can_switch_the_library_off():
    result = run_python("from hpcnn.ops import onednn; print(onednn.available())", library.OFF)
    assert "False" == result.stdout.strip(), result.stderr


@pytest.mark.parametrize("path", ["/nowhere/libdnnl.so.3", "libm.so.6"])
def test_a_named_library_that_is_not_onednn_3_is_an_error(path, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, path)
    with pytest.raises(ConfigError, match=rf"cannot load {library.VARIABLE} \(={path}\).*must be the shared library"):
        library.find.__wrapped__()


def test_float64_is_not_for_onednn():
    assert ops.backend.implementation(np.zeros(1)) is cpu
    assert ops.backend.implementation(np.zeros(1, np.float32)) is onednn
