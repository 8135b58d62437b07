from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcnn.data import hdf5
from hpcnn.data.augment import Augmentation
from hpcnn.data.dataset import Windows
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.errors import DataError
from hpcnn.geometry import Block


def test_a_file_is_read_back_as_it_was_written(make_file, expected_rows) -> None:
    with Hdf5DataSet(make_file()) as data:
        images, labels = data.read(np.arange(20))
        assert len(data) == 20
        assert data.image_shape == (4, 5, 3)
        assert data.class_names == ("kind 0", "kind 1", "kind 2")
        assert data.num_classes == 3
        assert data.about == {"source": "tests", "licence": "none"}
        assert data.contiguous
    np.testing.assert_array_equal(expected_rows(), images)
    np.testing.assert_array_equal(np.arange(20) % 3, labels)
    np.testing.assert_allclose(data.mean, 0.4)
    np.testing.assert_allclose(data.std, 0.3)


def test_the_library_itself_reads_the_same_pixels(make_file, expected_rows) -> None:
    with h5py.File(make_file()) as file:
        assert file["images"].chunks is None
        np.testing.assert_array_equal(expected_rows(), file["images"][...])
        assert file.attrs["format"] == b"hpcnn-images"


@pytest.mark.parametrize(
    "indices", [[], [0], [19, 0], [3, 4, 5, 9, 10, 2], [7, 7, 8], [19, 18, 17], list(range(20))[::-1]]
)
def test_any_order_of_rows_is_read_in_that_order(make_file, expected_rows, indices: list[int]) -> None:
    with Hdf5DataSet(make_file()) as data:
        images, labels = data.read(np.array(indices, np.int64))
    np.testing.assert_array_equal(expected_rows()[indices], images)
    np.testing.assert_array_equal(np.array(indices, int) % 3, labels)


def test_consecutive_rows_take_one_system_call(make_file, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    with Hdf5DataSet(make_file()) as data:
        data.read(np.array([8, 9, 10, 11, 2, 3]))
    assert [4 * 60, 2 * 60] == [len(args[1][0]) for args in calls][::-1]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list to which every read of a file adds its offset and the bytes it got."""
    made: list[tuple[int, int]] = []
    preadv: Callable[..., int] = os.preadv

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        got = preadv(file, buffers, offset)
        made.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", counting)
    return made


@pytest.mark.parametrize("rows", [Block(0, 1), Block(1, 3), Block(3, 4), Block(2, 2), Block(0, 4)])
@pytest.mark.parametrize("columns", [Block(0, 5), Block(1, 3)])
def test_of_a_window_only_its_rows_are_read(make_file, expected_rows, reads, rows: Block, columns: Block) -> None:
    indices = np.array([7, 3, 12, 3])
    windows = Windows(np.full(4, rows.start), np.full(4, columns.start), (rows.size, columns.size))
    with Hdf5DataSet(make_file()) as data:
        images, labels = data.read(indices, windows)
        first = data._offset
    expected = expected_rows()[indices, rows.start : rows.stop, columns.start : columns.stop]
    np.testing.assert_array_equal(expected, images)
    np.testing.assert_array_equal(indices % 3, labels)
    sizes = [(first + 60 * image + 15 * rows.start, 15 * rows.size) for image in (3, 3, 7, 12)]
    assert (sizes if rows.size else []) == reads


def test_the_tiles_of_cropped_images_together_read_no_pixel_twice(make_file, reads) -> None:
    samples, augmentation = np.arange(20), Augmentation(seed=1, crop_padding=2, flip=True)
    with Hdf5DataSet(make_file(shape=(9, 5, 3))) as data:
        for rows in (Block(0, 4), Block(4, 9)):
            augmentation.read(data, samples, 0, rows, Block(0, 5))
    down, _, _ = augmentation.draw(samples, 0)
    seen = [min(9, start + 9) - max(0, start) for start in (down - 2).tolist()]
    assert min(seen) < 9
    assert 15 * sum(seen) == sum(got for _, got in reads)


def test_windows_beside_the_image_are_black_and_read_nothing(make_file, reads) -> None:
    with Hdf5DataSet(make_file()) as data:
        for top, left in ((-2, 0), (4, 0), (0, -3), (0, 5), (-10, 10)):
            images, _ = data.read(np.array([3]), Windows(np.array([top]), np.array([left]), (2, 3)))
            assert not images.any()
            assert images.shape == (1, 2, 3, 3)
    assert [] == reads


def test_a_window_of_a_file_that_was_cut_or_closed_is_told(make_file) -> None:
    path, windows = make_file(), Windows(np.array([1, 1]), np.array([0, 0]), (2, 5))
    with Hdf5DataSet(path) as data:
        os.truncate(path, data._offset + 4 * 60 + 30)
        data.read(np.array([2, 3]), windows)
        with pytest.raises(DataError, match=r"a\.h5' ends inside image 4; it was cut short after it was opened"):
            data.read(np.array([2, 4]), windows)
    with pytest.raises(DataError, match="closed"):
        data.read(np.array([2, 3]), windows)


def test_a_read_that_the_system_cuts_short_is_continued(make_file, expected_rows, monkeypatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    with Hdf5DataSet(make_file()) as data:
        np.testing.assert_array_equal(expected_rows(), data.read(np.arange(20))[0])
        part, _ = data.read(np.arange(20), Windows(np.full(20, 1), np.full(20, 2), (3, 3)))
        np.testing.assert_array_equal(expected_rows()[:, 1:4, 2:5], part)


def test_an_index_outside_is_our_mistake_and_no_row_of_another_kind(make_file) -> None:
    with Hdf5DataSet(make_file()) as data:
        for index in (-1, 20):
            with pytest.raises(IndexError):
                data.read(np.array([index]))


def test_a_closed_set_says_so(make_file) -> None:
    data = Hdf5DataSet(make_file())
    data.close()
    data.close()
    with pytest.raises(DataError, match="closed"):
        data.read(np.arange(2))


def test_compressed_files_of_others_are_read_into_memory(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 3, 1), np.uint8)
    with h5py.File(tmp_path / "z.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(2, 3, 3, 1), compression="gzip")
        file["labels"] = np.arange(9, dtype=np.uint8)
    with Hdf5DataSet(tmp_path / "z.h5") as data:
        assert not data.contiguous
        np.testing.assert_array_equal(images[[4, 1]], data.read(np.array([4, 1]))[0])
        assert data.class_names == tuple("012345678")


def test_names_may_be_an_array_of_texts(make_file) -> None:
    path = make_file()
    with h5py.File(path, "r+") as file:
        file.attrs["class_names"] = ["a", "b", "ü"]
    assert Hdf5DataSet(path).class_names == ("a", "b", "ü")


def test_twenty_thousand_classes_fit(tmp_path: Path) -> None:
    names = tuple(f"n{index:08d} some class with a long name" for index in range(20_000))
    hdf5.create(tmp_path / "a.h5", 2, (1, 1, 1), names, np.array([0, 19_999]))
    assert Hdf5DataSet(tmp_path / "a.h5").class_names == names


def test_the_fingerprint_depends_on_labels_and_shape_only(make_file) -> None:
    one, same = Hdf5DataSet(make_file(name="a.h5")), Hdf5DataSet(make_file(name="b.h5"))
    others = [
        Hdf5DataSet(make_file(count=21)),
        Hdf5DataSet(make_file(classes=2)),
        Hdf5DataSet(make_file(shape=(5, 4, 3))),
    ]
    assert one.fingerprint() == same.fingerprint()
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 4


# Each takes an open, good file and spoils it; the words must appear in the error.
SPOILED = {
    "no dataset '/images'": lambda file: file.__delitem__("images"),
    "no dataset '/labels'": lambda file: file.__delitem__("labels"),
    "/images is float32": lambda file: replace(file, "images", np.zeros((20, 4, 5, 3), np.float32)),
    "/images is uint8 .*must be uint8": lambda file: replace(file, "images", np.zeros((20, 60), np.uint8)),
    "/labels is float64": lambda file: replace(file, "labels", np.zeros(20)),
    r"must be integers \(20,\)": lambda file: replace(file, "labels", np.zeros(19, np.int64)),
    "label of image 7 .=3. is out of range": lambda file: file["labels"].__setitem__(7, 3),
    "label of image 2 .=-1. is out of range": lambda file: file["labels"].__setitem__(2, -1),
    "needs images": lambda file: (
        replace(file, "images", np.zeros((0, 4, 5, 3), np.uint8)),
        replace(file, "labels", np.zeros(0, np.int64)),
    ),
    "chunked or compressed and 95367 MiB": lambda file: (
        replace(file, "images", shape=(10**9, 10, 10, 1), chunks=(1, 10, 10, 1)),
        replace(file, "labels", shape=(10**9,), chunks=(10,)),
    ),
    "pixels high": lambda file: replace(file, "images", shape=(20, 1 << 20, 1, 1), chunks=(1, 1, 1, 1)),
    "has no values": lambda file: replace(file, "images", shape=(20, 4, 5, 3)),
    "'std'": lambda file: file.attrs.__setitem__("std", [0.1, 0.0, 0.1]),
    "'mean'": lambda file: file.attrs.__setitem__("mean", [0.1, np.nan, 0.1]),
    "must be 3 finite numbers": lambda file: file.attrs.__setitem__("mean", [0.1]),
    "version 2 of its format": lambda file: file.attrs.__setitem__("version", 2),
    "'/images' of its own": lambda file: (
        file.__delitem__("images"),
        file.__setitem__("images", h5py.ExternalLink("/etc/passwd", "/images")),
    ),
}


def replace(file: h5py.File, name: str, data: np.ndarray | None = None, **options: object) -> None:
    del file[name]
    if data is None:
        options.setdefault("dtype", "u1" if name == "images" else "i8")
    file.create_dataset(name, data=data, **options)


@pytest.mark.parametrize("words", SPOILED)
def test_a_spoiled_file_is_refused_with_its_name_and_the_reason(make_file, words: str) -> None:
    path = make_file()
    with h5py.File(path, "r+") as file:
        SPOILED[words](file)
    with pytest.raises(DataError, match=words) as caught:
        Hdf5DataSet(path)
    assert str(path) in str(caught.value)


def test_a_huge_label_without_names_takes_no_memory(make_file) -> None:
    path = make_file()
    with h5py.File(path, "r+") as file:
        file["labels"][3] = 1 << 62
        del file.attrs["class_names"]
    with pytest.raises(DataError, match="out of range"):
        Hdf5DataSet(path)


def test_values_in_another_file_are_refused(make_file, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1200))
    path = make_file()
    with h5py.File(path, "r+") as file:
        replace(file, "images", shape=(20, 4, 5, 3), external=[(str(tmp_path / "raw"), 0, 1200)])
    with pytest.raises(DataError, match="no values in this file"):
        Hdf5DataSet(path)


def test_missing_and_unreadable_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*absent.h5' does not exist. .*hpcnn data import.*hpcnn data fetch"):
        Hdf5DataSet(tmp_path / "absent.h5")
    with pytest.raises(DataError, match=str(tmp_path)):
        Hdf5DataSet(tmp_path)


def test_a_file_cut_anywhere_is_refused_or_whole(make_file, expected_rows) -> None:
    path = make_file()
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.h5"):
            Hdf5DataSet(path)


def test_a_file_cut_while_it_is_open_is_noticed(make_file) -> None:
    path = make_file()
    with Hdf5DataSet(path) as data:
        os.truncate(path, 100)
        with pytest.raises(DataError, match="ends inside image"):
            data.read(np.arange(20))


def test_random_damage_raises_a_data_error_or_nothing(make_file) -> None:
    path = make_file()
    whole, random = path.read_bytes(), np.random.default_rng(5)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            with Hdf5DataSet(path) as data:
                data.read(np.arange(len(data)))
        except DataError:
            refused += 1
    assert refused > 50


def test_a_read_only_folder_without_locks_is_no_obstacle(make_file, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_file()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    try:
        assert len(Hdf5DataSet(path)) == 20
    finally:
        path.parent.chmod(0o755)


def test_files_carry_no_time_so_that_equal_imports_are_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        hdf5.create(tmp_path / "a.h5", 2, (1, 1, 1), ("a", "b"), np.arange(2))
        hdf5.finish(tmp_path / "a.h5", np.ones(1), np.ones(1))
        contents.append((tmp_path / "a.h5").read_bytes())
        time.sleep(1.1)  # the library counts seconds
    assert contents[0] == contents[1]


@pytest.mark.parametrize("claimed", [78, 10**12])
def test_a_file_that_claims_more_rows_than_it_has_is_refused_before_memory_is_taken(
    tmp_path: Path, claimed: int
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:  # of the oldest structures, which have no checksums
        file["images"], file["labels"] = np.zeros((77, 4, 5, 3), np.uint8), np.zeros(77, np.int64)
    path.write_bytes(path.read_bytes().replace((77).to_bytes(8, "little"), claimed.to_bytes(8, "little")))
    with pytest.raises(DataError, match=r"a\.h5"):
        Hdf5DataSet(path)
