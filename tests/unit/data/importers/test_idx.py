from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from hpcnn.data.importers import idx
from hpcnn.errors import DataError


@pytest.mark.parametrize("zipped", [True, False])
def test_images_and_labels_are_found_and_read(make_idx, zipped: bool) -> None:
    folder = make_idx(zipped)
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        collection = idx.load(*idx.find(folder, split))
        np.testing.assert_array_equal(random.integers(0, 256, (count, 4, 3), np.uint8)[..., None], collection.images)
        np.testing.assert_array_equal(np.arange(count) % 3, collection.labels)
        assert collection.class_names == ("0", "1", "2")
        assert not collection.sorted_by_class


def test_names_with_a_dot_are_found_and_missing_ones_are_not(make_idx) -> None:
    folder = make_idx(False)
    (folder / "train-images-idx3-ubyte").rename(folder / "train-images.idx3-ubyte")
    assert idx.find(folder, "train") == (folder / "train-images.idx3-ubyte", folder / "train-labels-idx1-ubyte")
    (folder / "train-labels-idx1-ubyte").unlink()
    assert idx.find(folder, "train") is None


def spoil(data: bytes) -> dict[str, bytes]:
    """Return damaged versions of an IDX file of images by the words that the error must have."""
    return {
        "begins with nothing": b"",
        "begins with 00000801": b"\0\0\x08\x01" + data[4:],
        "begins with 00000d03": b"\0\0\x0d\x03" + data[4:],
        "no IDX file": data[:10],
        "fewer bytes": data[:-1],
        "more bytes": data + b"\0",
        "more than it can hold": data[:4] + struct.pack(">3I", 0xFFFFFFFF, 4000, 4000) + data[16:],
        r"claims \(12, 65536, 0\)": data[:4] + struct.pack(">3I", 12, 65536, 0) + data[16:],
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("words", spoil(b""))
def test_damage_is_refused_with_the_name_of_the_file(tmp_path: Path, to_idx, words: str, zipped: bool) -> None:
    data = spoil(to_idx(np.zeros((12, 40, 30), np.uint8)))[words]
    path = tmp_path / "images"
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(DataError, match=f"{path}.*{words}"):
        idx.read(path, 3)


def test_a_compressed_file_cut_or_changed_anywhere_is_refused(tmp_path: Path, to_idx) -> None:
    random = np.random.default_rng(0)
    whole = gzip.compress(to_idx(random.integers(0, 9, (6, 4, 3), np.uint8)), mtime=0)
    path = tmp_path / "images.gz"
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"images\.gz"):
            idx.read(path, 3)
    for place in range(10, len(whole)):  # behind the header of the compression, which may vary
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images\.gz"):
            idx.read(path, 3)


def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path: Path, to_idx) -> None:
    (tmp_path / "images").write_bytes(to_idx(np.zeros((3, 2, 2), np.uint8)))
    (tmp_path / "labels").write_bytes(to_idx(np.zeros(4, np.uint8)))
    with pytest.raises(DataError, match=r"3 images and .* 4 labels"):
        idx.load(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(DataError, match="absent' does not exist"):
        idx.load(tmp_path / "absent", tmp_path / "labels")
