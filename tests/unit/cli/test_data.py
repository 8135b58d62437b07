from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcnn.cli.main import main
from hpcnn.data import hdf5
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.errors import DataError
from tests import launch


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 9), ("t10k", 4)):
        for kind, array in (
            ("images-idx3", np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 2),
        ):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


def test_import_writes_both_files_and_says_so(idx_folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["data", "import", str(idx_folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "train.h5: 9 images, mean" in printed
    assert "test.h5: 4 images" in printed


def test_info_describes_a_folder_and_reads_it_all(idx_folder: Path, tmp_path: Path, capsys) -> None:
    main(["data", "import", str(idx_folder), "--out", str(tmp_path / "out")])
    capsys.readouterr()
    assert main(["data", "info", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in ("9 of 2x3x1", "4 of 2x3x1", "2, 4 to 5 images each", "contiguous", "all of it, in", "fingerprint"):
        assert words in printed
    assert [["0", "5"], ["1", "4"]] == [line.split() for line in printed.splitlines() if line[:2] in ("0 ", "1 ")][:2]


def test_info_knows_the_built_in_images_and_a_single_file(tmp_path: Path, capsys) -> None:
    assert main(["data", "info", "builtin"]) == 0
    assert capsys.readouterr().out.count("Ankle boot") == 2
    path = tmp_path / "a.h5"
    hdf5.create(path, 2, (1, 1, 1), ("a", "b"), np.arange(2))
    assert main(["data", "info", str(path)]) == 0
    assert "2 of 1x1x1" in capsys.readouterr().out


def test_info_finds_damage_behind_the_header(tmp_path: Path) -> None:
    (tmp_path / "train.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    with pytest.raises(DataError, match=r"train\.h5"):
        main(["data", "info", str(tmp_path)])
    (tmp_path / "train.h5").unlink()
    with pytest.raises(DataError, match=r"neither train\.h5 nor test\.h5"):
        main(["data", "info", str(tmp_path)])


def test_fetch_names_the_file_that_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz.*No such file.*--from"):
        main(["data", "fetch", "mnist", "--from", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.skipif(bool(launch.reason_to_skip()), reason=launch.reason_to_skip() or "-")
def test_two_ranks_import_the_same_rows_as_one(idx_folder: Path, tmp_path: Path) -> None:
    main(["data", "import", str(idx_folder), "--out", str(tmp_path / "one")])
    result = launch.launch(2, "hpcnn", ("data", "import", str(idx_folder), "--out", str(tmp_path / "two")))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("train.h5: 9 images") == 1
    for name in ("train.h5", "test.h5"):
        with Hdf5DataSet(tmp_path / "one" / name) as one, Hdf5DataSet(tmp_path / "two" / name) as two:
            assert one.fingerprint() == two.fingerprint()
            np.testing.assert_array_equal(one.read(np.arange(len(one)))[0], two.read(np.arange(len(two)))[0])
