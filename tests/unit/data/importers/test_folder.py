from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcnn.data.importers.collection import BrokenImageError
from hpcnn.data.importers.folder import FolderCollection, decode, read_names
from hpcnn.errors import DataError

Image = pytest.importorskip("PIL.Image")


def save(path: Path, array: np.ndarray, mode: str | None = None) -> str:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return str(path)


def test_classes_are_sorted_folders_with_readable_names(tree: Path) -> None:
    collection = FolderCollection(tree / "train", names=read_names(tree))
    assert collection.classes == ("n1", "n2", "n3")
    assert collection.class_names == ("goldfish", "tabby, cat", "n3")
    np.testing.assert_array_equal(np.repeat(np.arange(3), 7), collection.labels)
    assert collection.image_shape == (8, 8, 3)
    for index in (0, 8, 20):
        path = collection.name(index)
        assert f"/n{index // 7 + 1}/00{index % 7}.png" in path
        np.testing.assert_array_equal(np.asarray(Image.open(path)), collection.image(index))


def test_nested_folders_upper_case_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "c" / "images").mkdir(parents=True)
    for name in ("c/images/a.JPEG", "c/b.jpg", "c/z.PNG"):
        save(tmp_path / name, np.zeros((3, 3, 3), np.uint8))
    for name in ("c/notes.txt", "c/.hidden.jpg", "readme.md"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / ".git").mkdir()
    collection = FolderCollection(tmp_path)
    assert collection.classes == ("c",)
    assert [collection.name(index)[len(str(tmp_path)) :] for index in range(3)] == [
        "/c/b.jpg",
        "/c/images/a.JPEG",
        "/c/z.PNG",
    ]


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.png"), ("RGBA", "a.png"), ("1", "a.png")]
)
def test_every_kind_of_colour_becomes_rgb(tmp_path: Path, mode: str, name: str) -> None:
    grey = np.full((6, 5, 3), {"P": 204, "1": 255}.get(mode, 200), np.uint8)  # which these modes have exactly
    image = decode(save(tmp_path / name, grey, mode), None)
    assert image.dtype == np.uint8
    assert image.shape == (6, 5, 3)
    np.testing.assert_allclose(image, grey, atol=3)


def test_scaling_takes_the_centred_square(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255  # the square in the middle
    for array in (wide, np.ascontiguousarray(wide.transpose(1, 0, 2))):
        image = decode(save(tmp_path / "a.png", array), 5)
        assert image.shape == (5, 5, 3)
        rows, columns = array.shape[:2]
        scaled = np.asarray(Image.fromarray(array).resize((columns // 2, rows // 2), Image.Resampling.BILINEAR))
        top, left = rows // 4 - 2, columns // 4 - 2
        np.testing.assert_array_equal(scaled[top : top + 5, left : left + 5], image)
        assert image.mean() > 230
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 60, 0).repeat(3, 2)
    image = decode(save(tmp_path / "a.png", ramp), 6)
    np.testing.assert_allclose(image[:, :, 0], np.tile(ramp[0, :, 0].reshape(6, 10).mean(1), (6, 1)), atol=6)
    np.testing.assert_array_equal(ramp, decode(str(tmp_path / "a.png"), 60))
    assert decode(str(tmp_path / "a.png"), 100).shape == (100, 100, 3)


def test_images_of_different_sizes_need_a_size(tree: Path) -> None:
    save(tree / "train" / "n2" / "odd.png", np.zeros((8, 9, 3), np.uint8))
    collection = FolderCollection(tree / "train")
    with pytest.raises(DataError, match=r"odd\.png' has 8x9 pixels, others have 8x8.*--size"):
        [collection.image(index) for index in range(22)]
    assert FolderCollection(tree / "train", 4).image(14).shape == (4, 4, 3)


def test_damaged_files_are_told_from_ours(tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    data = Path(good).read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": data[: len(data) // 2], "start": data[:2]}.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        with pytest.raises(BrokenImageError, match=f"{name}.jpg"):
            decode(str(path), 8)


def test_a_picture_that_claims_a_huge_size_is_broken(tmp_path: Path) -> None:
    import struct
    import zlib

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = piece(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + piece(b"IDAT", zlib.compress(bytes(100))))
    with pytest.raises(BrokenImageError, match=r"bomb\.png"):
        decode(str(tmp_path / "bomb.png"), 8)


def test_trees_without_classes_or_images_are_refused(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(DataError, match="no folder that is a class"):
        FolderCollection(tree / "train" / "n1")
    (tmp_path / "empty" / "c").mkdir(parents=True)
    with pytest.raises(DataError, match="no images under"):
        FolderCollection(tmp_path / "empty")
    (tree / "val" / "n9").mkdir()
    with pytest.raises(DataError, match="class folder 'n9' is not among the 3 training classes"):
        FolderCollection(tree / "val", classes=("n1", "n2", "n3"))
    with pytest.raises(DataError, match="cannot list"):
        FolderCollection(tmp_path / "absent")


def test_without_pillow_the_way_to_get_it_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"pip install 'hpcnn\[images\]'"):
        FolderCollection(tree / "train")
