from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from hpcnn.config import DataConfig
from hpcnn.data import open_data
from hpcnn.data.sources import check_alike
from hpcnn.errors import DataError


def test_the_built_in_images_are_a_balanced_part_of_fashion_mnist() -> None:
    for split, count in (("train", 5000), ("test", 1000)):
        with open_data(DataConfig(), split) as data:
            images, labels = data.read(np.arange(len(data)))
            assert (len(data), data.image_shape) == (count, (28, 28, 1))
            assert data.class_names[0] == "T-shirt/top"
            assert data.class_names[9] == "Ankle boot"
            np.testing.assert_array_equal(np.full(10, count // 10), np.bincount(labels))
            # The published figures of the whole set; those of a part differ in the third digit.
            assert data.mean == pytest.approx([0.2860], abs=1e-4)
            assert data.std == pytest.approx([0.3530], abs=1e-4)
            assert images.mean() / 255 == pytest.approx(0.2860, abs=0.003)
            assert images.std() / 255 == pytest.approx(0.3530, abs=0.003)


def test_the_built_in_images_come_with_their_licence() -> None:
    text = (resources.files("hpcnn.data") / "builtin" / "LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text


def test_a_folder_a_file_and_a_test_file_are_opened(make_file, tmp_path: Path) -> None:
    train, test = make_file(count=20, name="train.h5"), make_file(count=10, name="test.h5")
    folder, single = DataConfig(source=str(tmp_path)), DataConfig(source=str(train), test=str(test))
    for config in (folder, single):
        assert [20, 10] == [len(open_data(config, split)) for split in ("train", "test")]
    other = make_file(count=5, name="other.h5")
    assert len(open_data(DataConfig(source=str(tmp_path), test=str(other)), "test")) == 5


@pytest.mark.parametrize(
    ("source", "split", "words"),
    [
        ("absent", "train", "'.*absent' does not exist.*hpcnn data import.*hpcnn data fetch"),
        ("", "test", "has no 'test.h5'.*hpcnn data import"),
        ("train.h5", "test", "train.h5' is one file.*data.test"),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(
    make_file, tmp_path: Path, source: str, split: str, words: str
) -> None:
    make_file(name="train.h5")
    with pytest.raises(DataError, match=words):
        open_data(DataConfig(source=str(tmp_path / source)), split)


def test_synthetic_images_follow_the_configuration() -> None:
    config = DataConfig(source="synthetic", image_shape=(7, 9, 2), num_classes=4, num_samples=80)
    with open_data(config, "train") as train, open_data(config, "test") as test:
        assert (len(train), len(test), train.image_shape, train.num_classes) == (80, 10, (7, 9, 2), 4)
        check_alike(train, test)


def test_sets_of_different_kinds_are_told_apart(make_file) -> None:
    train = open_data(DataConfig(source=str(make_file())), "train")
    with pytest.raises(DataError, match=r"images .=.4, 5, 3.. and the test set .=.5, 5, 3"):
        check_alike(train, open_data(DataConfig(source=str(make_file(shape=(5, 5, 3)))), "train"))
    with pytest.raises(DataError, match=r"classes .=3. and the test set .=2"):
        check_alike(train, open_data(DataConfig(source=str(make_file(classes=2))), "train"))
