from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcnn.config import DataConfig
from hpcnn.data import MemoryDataSet, open_data
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.data.loader import Batch, Loader, Part, evaluation_batches
from hpcnn.data.sampler import epoch_order
from hpcnn.errors import DataError
from hpcnn.geometry import Block, split

AUGMENTED = DataConfig(crop_padding=2, flip=True, shuffle_block=4)


@pytest.fixture
def data() -> MemoryDataSet:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, 6, 5, 3), np.uint8)
    names = tuple("abcd")
    return MemoryDataSet(images, random.integers(0, 4, 50), names, np.full(3, 0.5), np.full(3, 0.25))


def part(num_samples: int, shape: tuple[int, ...], rank: int = 0, size: int = 1) -> Part:
    block = split(num_samples, size, rank)
    return Part.whole(num_samples, shape)._replace(samples=block, labels=block)


def batches(data: Any, config: DataConfig = AUGMENTED, **options: Any) -> list[Batch]:
    settings = {"global_batch": 12, "seed": 1, "first_step": 0, "num_steps": 9} | options
    own = (settings.pop("rank", 0), settings.pop("size", 1))
    settings.setdefault("part", part(settings["global_batch"], data.image_shape, *own))
    with Loader(data, config, **settings) as loader:
        return list(loader)


def assert_equal(expected: list[Batch], actual: list[Batch]) -> None:
    for one, other in zip(expected, actual, strict=True):
        for field in ("images", "labels", "samples"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def join(parts: list[Batch]) -> Batch:
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    for part in parts:
        np.testing.assert_array_equal(parts[0].samples, part.samples)
    return Batch(images, labels, parts[0].samples)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 12])
def test_the_parts_of_all_ranks_make_up_the_global_batch(data: MemoryDataSet, size: int) -> None:
    ranks = [batches(data, rank=rank, size=size) for rank in range(size)]
    assert_equal(batches(data), [join(list(parts)) for parts in zip(*ranks, strict=True)])


def test_a_batch_is_normalised_and_labelled_by_its_samples(data: MemoryDataSet) -> None:
    config = DataConfig(shuffle_block=4)
    for number, batch in enumerate(batches(data, config, num_steps=4)):
        np.testing.assert_array_equal(epoch_order(50, 1, 0, 4)[12 * number : 12 * number + 12], batch.samples)
        expected = (data.images[batch.samples] / 255 - 0.5) / 0.25
        np.testing.assert_allclose(expected, batch.images, atol=1e-5)
        assert batch.images.dtype == np.float32
        np.testing.assert_array_equal(data.labels[batch.samples], batch.labels)
        assert batch.labels.dtype == batch.samples.dtype == np.int64


def test_an_epoch_drops_its_incomplete_last_batch(data: MemoryDataSet) -> None:
    samples = [batch.samples for batch in batches(data, num_steps=8)]
    for epoch in (0, 1):
        seen = np.concatenate(samples[4 * epoch : 4 * epoch + 4])
        assert len(np.unique(seen)) == 48
    assert not np.array_equal(samples[0], samples[4])


def test_a_resumed_run_sees_the_same_batches_on_another_number_of_ranks(data: MemoryDataSet) -> None:
    expected = batches(data)[5:]
    ranks = [batches(data, rank=rank, size=3, first_step=5, num_steps=4) for rank in range(3)]
    assert_equal(expected, [join(list(parts)) for parts in zip(*ranks, strict=True)])


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_preparing_ahead_changes_nothing(data: MemoryDataSet, prefetch: int) -> None:
    config = DataConfig(crop_padding=2, flip=True, shuffle_block=4, prefetch=prefetch)
    assert_equal(batches(data), batches(data, config))
    assert [] == batches(data, config, num_steps=0)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_read_error_reaches_the_step_that_wanted_the_rows(make_file, prefetch: int) -> None:
    path = make_file(count=40)
    config, got = DataConfig(prefetch=prefetch), []
    with Hdf5DataSet(path) as data:
        os.truncate(path, data._offset + 30 * 60)
        with (
            Loader(
                data, config, global_batch=8, seed=1, part=part(8, data.image_shape), first_step=0, num_steps=5
            ) as loader,
            pytest.raises(DataError, match=r"a.h5' ends inside image 3\d"),
        ):
            got.extend(loader)
    assert len(got) < 5


def test_leaving_early_ends_the_thread(data: MemoryDataSet) -> None:
    before = threading.active_count()
    with Loader(
        data, AUGMENTED, global_batch=2, seed=1, part=part(2, data.image_shape), first_step=0, num_steps=10**9
    ) as loader:
        next(iter(loader))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    loader.close()


def test_batches_too_large_are_refused(data: MemoryDataSet) -> None:
    with pytest.raises(DataError, match=r"global_batch .=51. is larger than the training set .=50"):
        batches(data, global_batch=51)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_evaluation_sees_every_image_once_and_in_order(data: MemoryDataSet, size: int, count: int) -> None:
    some = MemoryDataSet(data.images[:count], data.labels[:count], data.class_names, data.mean, data.std)
    ranks = [
        evaluation_batches(some, 7, lambda n, rank=rank: part(n, some.image_shape, rank, size)) for rank in range(size)
    ]
    chunks = [join(list(parts)) for parts in zip(*ranks, strict=True)]
    assert [7] * (len(chunks) - 1) == [len(chunk.samples) for chunk in chunks[:-1]]
    np.testing.assert_array_equal(np.arange(count), np.concatenate([chunk.samples for chunk in chunks]))
    np.testing.assert_array_equal(some.labels, np.concatenate([chunk.labels for chunk in chunks]))
    images = np.concatenate([chunk.images for chunk in chunks])
    np.testing.assert_allclose((some.images / 255 - 0.5) / 0.25, images, atol=1e-5)


def test_a_tile_is_cut_out_after_the_whole_image_was_augmented(data: MemoryDataSet) -> None:
    tile = Part(samples=Block(3, 9), rows=Block(1, 4), columns=Block(2, 5), labels=Block(0, 5))
    for whole, own in zip(batches(data), batches(data, part=tile), strict=True):
        np.testing.assert_array_equal(whole.images[3:9, 1:4, 2:5], own.images)
        np.testing.assert_array_equal(whole.labels[:5], own.labels)
        np.testing.assert_array_equal(whole.samples, own.samples)
    nothing = Part(*[Block(0, 0)] * 3, labels=Block(0, 5))
    assert batches(data, part=nothing)[0].images.shape == (0, 0, 0, 3)


def test_several_ranks_read_one_file_each_with_its_own_handle(make_file, expected_rows, tmp_path: Path) -> None:
    config = DataConfig(source=str(make_file(count=40)), shuffle_block=4)
    handles = [open_data(config, "train") for _ in range(3)]
    parts = [batches(handle, config, rank=rank, size=3, num_steps=2) for rank, handle in enumerate(handles)]
    whole = join([part[0] for part in parts])
    np.testing.assert_allclose((expected_rows(count=40)[whole.samples] / 255 - 0.4) / 0.3, whole.images, atol=1e-5)


def test_shares_of_a_batch_are_what_groups_get_of_it(data: MemoryDataSet) -> None:
    whole = batches(data)
    groups = [
        batches(data, share=Block(4 * index, 4 * index + 4), part=part(4, data.image_shape)) for index in range(3)
    ]
    for step, batch in enumerate(whole):
        for field in ("images", "labels", "samples"):
            found = np.concatenate([getattr(group[step], field) for group in groups])
            np.testing.assert_array_equal(getattr(batch, field), found)


def test_a_loader_of_some_rows_serves_each_once_an_epoch_under_its_number_in_the_set(data: MemoryDataSet) -> None:
    rows = np.arange(3, 50, 2)
    epochs = batches(data, rows=rows, global_batch=8, num_steps=6)
    for epoch in (epochs[:3], epochs[3:]):
        seen = np.concatenate([batch.samples for batch in epoch])
        assert sorted(seen) == list(rows)
        np.testing.assert_array_equal(np.concatenate([batch.labels for batch in epoch]), data.labels[seen])
    assert not np.array_equal(epochs[0].samples, epochs[3].samples)
