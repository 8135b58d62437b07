from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hpcnn.data.importers import cifar as importer
from hpcnn.errors import DataError


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("archive", [False, True])
def test_planes_become_pixels_and_files_follow_each_other(tmp_path: Path, cifar, to_tar, archive: bool) -> None:
    if archive:
        source = tmp_path / "cifar-10-binary.tar.gz"
        source.write_bytes(to_tar({f"cifar-10-batches-bin/{name}": cifar[name] for name in reversed(cifar)}))
    else:
        source = write(tmp_path / "bin", cifar)
    assert importer.is_cifar(source)
    splits = importer.load(source)
    assert list(splits) == ["train", "test"]
    assert splits["train"].class_names == tuple(f"kind{index}" for index in range(10))
    assert splits["train"].images.shape == (20, 32, 32, 3)
    assert splits["test"].images.shape == (4, 32, 32, 3)
    rows = np.frombuffer(cifar["data_batch_3.bin"], np.uint8).reshape(4, 3073)
    for row, column, channel in ((0, 0, 0), (5, 31, 1), (31, 2, 2)):
        pixels = splits["train"].images[8:12, row, column, channel]
        np.testing.assert_array_equal(rows[:, 1 + channel * 1024 + row * 32 + column], pixels)
    np.testing.assert_array_equal(np.tile(np.arange(4), 5), splits["train"].labels)


def test_cifar_100_has_fine_labels_behind_the_coarse(tmp_path: Path) -> None:
    rows = np.zeros((3, 3074), np.uint8)
    rows[:, 0], rows[:, 1] = 19, [99, 0, 42]
    source = write(tmp_path / "bin", {"train.bin": rows.tobytes(), "test.bin": rows[:1].tobytes()})
    splits = importer.load(source)
    assert [99, 0, 42] == splits["train"].labels.tolist()
    assert splits["test"].class_names == tuple(map(str, range(100)))


def test_missing_cut_and_strange_files_are_refused(tmp_path: Path, cifar) -> None:
    cases = {
        "lacks data_batch_2.bin": {name: data for name, data in cifar.items() if name != "data_batch_2.bin"},
        "test_batch.bin .*has 12291 bytes": cifar | {"test_batch.bin": cifar["test_batch.bin"][:-1]},
        "test_batch.bin .*has 0 bytes": cifar | {"test_batch.bin": b""},
        "names 9 classes": cifar | {"batches.meta.txt": b"a\n" * 9},
        "Python and Matlab versions are not read": {"data_batch_1": b"\x80\x02pickle", "batches.meta": b"\x80"},
    }
    for number, (words, files) in enumerate(cases.items()):
        with pytest.raises(DataError, match=words):
            importer.load(write(tmp_path / str(number), files))


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, cifar, to_tar) -> None:
    whole, path = to_tar(cifar), tmp_path / "c.tar.gz"
    for length in (0, 1, 20, len(whole) // 3, len(whole) - 20_000, len(whole) - 9):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"c\.tar\.gz"):
            importer.load(path)
    with pytest.raises(DataError, match="does not exist"):
        importer.load(tmp_path / "absent.tar.gz")


def test_nothing_of_an_archive_reaches_the_disk_and_links_are_not_followed(tmp_path: Path, cifar) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in {f"../../{name}": data for name, data in cifar.items() if name != "test_batch.bin"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    source = tmp_path / "in" / "c.tar"
    source.parent.mkdir()
    source.write_bytes(buffer.getvalue())
    before = sorted(os.listdir(tmp_path))
    assert list(importer.load(source)) == ["train"]
    assert before == sorted(os.listdir(tmp_path))


def test_a_member_that_claims_terabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("data_batch_1.bin")
    member.size = 1 << 40
    path = tmp_path / "c.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match="claims 1099511627776 bytes"):
        importer.load(path)
