from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.data.importers import import_data
from hpcnn.data.importers.collection import ArrayCollection, BrokenImageError
from hpcnn.data.importers.team import Alone, check_same
from hpcnn.data.importers.write import write
from hpcnn.errors import DataError
from tests.teams import run_team


def content(path: Path) -> tuple[np.ndarray, np.ndarray, Hdf5DataSet]:
    with Hdf5DataSet(path) as data:
        return (*data.read(np.arange(len(data))), data)


def assert_same_files(one: Path, other: Path) -> None:
    assert one.read_bytes() == other.read_bytes()


class Breaking(ArrayCollection):
    """Images of which some cannot be decoded."""

    broken: frozenset[int] = frozenset()

    def image(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise BrokenImageError(f"image {index} is broken.")
        return super().image(index)


def breaking(count: int, broken: set[int]) -> Breaking:
    random = np.random.default_rng(3)
    made = Breaking(
        images=random.integers(0, 256, (count, 3, 4, 2), np.uint8),
        labels=np.sort(random.integers(0, 3, count)),
        class_names=("a", "b", "c"),
        source="tests",
        sorted_by_class=True,
    )
    made.broken = frozenset(broken)
    return made


def test_every_format_becomes_train_and_test_files(make_idx, cifar, tree: Path, tmp_path: Path, to_tar) -> None:
    (tmp_path / "c.tar.gz").write_bytes(to_tar(cifar))
    cases = {make_idx(): (12, 5, (4, 3, 1)), tmp_path / "c.tar.gz": (20, 4, (32, 32, 3)), tree: (21, 6, (8, 8, 3))}
    for number, (source, (num_train, num_test, shape)) in enumerate(cases.items()):
        out = tmp_path / f"out{number}"
        written = import_data(source, out)
        assert [file.path for file in written] == [out / "train.h5", out / "test.h5"]
        assert sorted(os.listdir(out)) == ["test.h5", "train.h5"]
        images, _, train = content(out / "train.h5")
        _, _, test = content(out / "test.h5")
        assert (len(train), len(test)) == (num_train, num_test)
        assert train.image_shape == test.image_shape == shape
        assert train.contiguous
        assert train.class_names == test.class_names
        np.testing.assert_allclose(images.mean((0, 1, 2)) / 255, train.mean, rtol=1e-6)
        np.testing.assert_allclose(images.std((0, 1, 2)) / 255, train.std, rtol=1e-6)
        np.testing.assert_array_equal(train.mean, test.mean)
        np.testing.assert_array_equal(train.std, test.std)


def test_the_rows_of_a_tree_are_shuffled_by_seed_and_keep_their_labels(tree: Path, tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    known = {}
    for label, name in enumerate(("n1", "n2", "n3")):
        for path in (tree / "train" / name).iterdir():
            known[np.asarray(images.open(path)).tobytes()] = label
    orders = []
    for seed in (1, 2):
        import_data(tree, tmp_path / str(seed), seed=seed)
        rows, labels, _ = content(tmp_path / str(seed) / "train.h5")
        assert [known[row.tobytes()] for row in rows] == labels.tolist()
        assert len({row.tobytes() for row in rows}) == 21
        assert (np.diff(labels) != 0).sum() > 4  # sorted there would be two changes of class
        orders.append(rows)
    assert not np.array_equal(*orders)


def test_idx_rows_keep_their_order(make_idx, tmp_path: Path) -> None:
    import_data(make_idx(), tmp_path / "out")
    rows, labels, _ = content(tmp_path / "out" / "train.h5")
    np.testing.assert_array_equal(np.random.default_rng(0).integers(0, 256, (12, 4, 3), np.uint8)[..., None], rows)
    np.testing.assert_array_equal(np.arange(12) % 3, labels)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_several_ranks_write_the_same_files_as_one(tree: Path, tmp_path: Path, size: int) -> None:
    import_data(tree, tmp_path / "alone", size=5)
    results = run_team(size, lambda team: import_data(tree, tmp_path / "team", size=5, team=team))
    assert all(isinstance(result, list) for result in results), results
    for name in ("train.h5", "test.h5"):
        assert_same_files(tmp_path / "alone" / name, tmp_path / "team" / name)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("broken", [{0}, {3, 4, 11}, set(range(19))])
def test_broken_images_are_left_out_when_told_to(tmp_path: Path, size: int, broken: set[int]) -> None:
    collection = breaking(20, broken)
    results = run_team(size, lambda team: write(collection, tmp_path / "a.h5", team, skip_broken=True))
    rows, labels, data = content(tmp_path / "a.h5")
    kept = sorted(set(range(20)) - broken)
    assert len(rows) == results[0].num_images == len(kept)
    key = lambda row: row.tobytes()  # noqa: E731
    assert sorted(map(key, rows)) == sorted(map(key, collection.images[kept]))
    by_row = dict(zip(map(key, collection.images), collection.labels.tolist(), strict=True))
    assert [by_row[key(row)] for row in rows] == labels.tolist()
    np.testing.assert_allclose(rows.mean((0, 1, 2)) / 255, data.mean, rtol=1e-6)
    assert {f"image {index} of tests" for index in broken} == set(results[-1].broken)
    assert os.listdir(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("size", [1, 3])
def test_broken_images_are_refused_and_listed_otherwise(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.h5").write_text("an older file")
    for result in run_team(size, lambda team: write(breaking(20, {3, 17}), tmp_path / "a.h5", team)):
        assert isinstance(result, DataError)
        for words in ("2 of 20 images", "image 3 of tests, image 17 of tests", "image 3 is broken", "--skip-broken"):
            assert words in str(result)
    assert (tmp_path / "a.h5").read_text() == "an older file"
    assert os.listdir(tmp_path) == ["a.h5"]


def test_a_set_of_broken_images_only_is_refused_even_then(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12 of 12 images.* and 2 more.*at least one image must remain"):
        write(breaking(12, set(range(12))), tmp_path / "a.h5", Alone(), skip_broken=True)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_on_one_rank_stops_all_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    pwrite = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if offset > 2048 + 30:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    for result in run_team(3, lambda team: write(breaking(20, set()), tmp_path / "a.h5", team)):
        assert isinstance(result, DataError)
        assert "No space left" in str(result)
    assert os.listdir(tmp_path) == []


def test_a_write_that_the_system_cuts_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(breaking(20, set()), tmp_path / "a.h5", Alone())
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    write(breaking(20, set()), tmp_path / "b.h5", Alone())
    assert_same_files(tmp_path / "a.h5", tmp_path / "b.h5")


def test_ranks_that_see_different_files_are_stopped(tmp_path: Path) -> None:
    for result in run_team(3, lambda team: write(breaking(20 + (team.rank == 1), set()), tmp_path / "a.h5", team)):
        assert isinstance(result, DataError)
        assert "do not see the same images" in str(result)
    check_same(Alone(), 3, "number")


def test_a_constant_channel_has_a_deviation_that_can_divide(tmp_path: Path) -> None:
    images = np.full((4, 2, 2, 1), 255, np.uint8)
    collection = ArrayCollection(images=images, labels=np.zeros(4, np.int64), class_names=("a",), source="white")
    write(collection, tmp_path / "a.h5", Alone())
    _, _, data = content(tmp_path / "a.h5")
    assert (data.mean[0], data.std[0]) == pytest.approx((1.0, 1 / 255))


def test_progress_counts_every_row_once(tree: Path, tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {}
    import_data(tree, tmp_path / "out", progress=lambda split, count: seen.setdefault(f"{split} {count}", []).append)
    assert {name: sum(rows) for name, rows in seen.items()} == {"train 21": 21, "test 6": 6}


def test_class_folders_themselves_become_one_file(tree: Path, tmp_path: Path) -> None:
    written = import_data(tree / "train", tmp_path / "one.h5")
    assert [(file.path, file.num_images) for file in written] == [(tmp_path / "one.h5", 21)]
    with pytest.raises(DataError, match="--out must be a folder"):
        import_data(tree, tmp_path / "two.h5")


def test_sources_that_are_nothing_known_are_refused(tmp_path: Path, tree: Path, make_idx) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    for source, kind, words in (
        (tmp_path / "absent", "auto", "does not exist.*hpcnn data fetch"),
        (tmp_path / "a.zip", "auto", "cannot tell what"),
        (tree, "idx", "has no train-images-idx3-ubyte"),
        (tree, "cifar", "holds none of the files of CIFAR"),
        (make_idx(), "folder", "no folder that is a class"),
    ):
        with pytest.raises(DataError, match=words):
            import_data(source, tmp_path / "out", kind=kind)
    assert not (tmp_path / "out").exists()


def test_test_images_of_another_size_need_a_size(tree: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for path in (tree / "val").rglob("*.png"):
        image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"\(8, 8, 3\) under .*train' and \(9, 8, 3\) under .*val'.*--size"):
        import_data(tree, tmp_path / "out")
