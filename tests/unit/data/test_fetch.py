from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from hpcnn.data import fetch
from hpcnn.data.fetch import CATALOGUE, File, Published
from hpcnn.data.hdf5 import Hdf5DataSet
from hpcnn.errors import DataError


def idx_file(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a small published set, which the catalogue calls "small"."""
    folder, files = tmp_path / "mirror", []
    folder.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        array = np.arange(6, dtype=np.uint8) % 2 if "labels" in name else np.arange(54, dtype=np.uint8).reshape(6, 3, 3)
        data = idx_file(array)
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(data))
        files.append(File(f"{name}-ubyte.gz", len(data), f"sha256:{hashlib.sha256(data).hexdigest()}"))
    monkeypatch.setitem(CATALOGUE, "small", Published("Small", "http://127.0.0.1:9/", "free", tuple(files), ("a", "b")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(mirror: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(mirror))) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert os.listdir(tmp_path / "temporary") == []
    assert not (tmp_path / "out").exists()


def test_a_set_is_downloaded_checked_and_imported(server: str, tmp_path: Path) -> None:
    lines: list[str] = []
    written = fetch.fetch("small", tmp_path / "out", mirror=server, say=lines.append)
    assert [file.num_images for file in written] == [6, 6]
    assert lines[0] == f"{server}/train-images-idx3-ubyte.gz"
    assert os.listdir(tmp_path / "temporary") == []
    with Hdf5DataSet(tmp_path / "out" / "train.h5") as data:
        assert data.class_names == ("a", "b")
        assert data.about == {"source": "Small, train", "licence": "free"}


def test_a_folder_serves_as_well_and_so_do_files_compressed_anew(mirror: Path, tmp_path: Path) -> None:
    for path in mirror.iterdir():
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=5))
    assert len(fetch.fetch("small", tmp_path / "out", mirror=mirror.as_uri())) == 2


def spoil(data: bytes) -> dict[str, bytes]:
    content = gzip.decompress(data) if data else b""
    return {
        "its sha256 is": gzip.compress(content[:-1] + b"\0"),
        "sends more than": data + bytes(5000),
        "not the published file": gzip.compress(bytes(10**6)),  # a little file that expands without end
        "truncated or damaged": data[:-20],
        "its sha256": b"",
        "published file": b"<html>404</html>",
    }


@pytest.mark.parametrize("words", spoil(b""))
def test_wrong_bytes_are_refused_and_nothing_is_left(mirror: Path, tmp_path: Path, words: str) -> None:
    path = mirror / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes())[words])
    with pytest.raises(DataError, match=f"t10k-labels-idx1-ubyte.gz.*{words}|{words}.*t10k-labels-idx1-ubyte.gz"):
        fetch.fetch("small", tmp_path / "out", mirror=mirror.as_uri())
    assert_nothing_is_left(tmp_path)


def test_a_missing_file_and_a_dead_server_say_what_to_do(server: str, mirror: Path, tmp_path: Path) -> None:
    (mirror / "train-labels-idx1-ubyte.gz").unlink()
    for where, words in (
        (server, "404"),
        (mirror.as_uri(), "No such file"),
        (None, "refused"),
        ("nonsense:", "unknown"),
    ):
        with pytest.raises(DataError, match=f"(?s){words}.*--mirror URL or --from FOLDER"):
            fetch.fetch("small", tmp_path / "out", mirror=where)
    assert_nothing_is_left(tmp_path)


def test_a_connection_that_breaks_off_is_noticed(mirror: Path, tmp_path: Path) -> None:
    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(bytes(100))

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        target = tmp_path / "file"
        with pytest.raises(DataError, match=r"(broke off after|IncompleteRead).*--mirror"):
            fetch.download(f"http://127.0.0.1:{http.server_port}/x", target, File("x", 1000, "md5:0"))
        http.shutdown()
    assert not target.exists()


def test_the_catalogue_names_official_hosts_and_full_checksums() -> None:
    lengths = {"sha256": 64, "md5": 32}
    for published in CATALOGUE.values():
        assert urlsplit(published.url).hostname in {
            "fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            "ossci-datasets.s3.amazonaws.com",
            "www.cs.toronto.edu",
        }
        for file in published.files:
            algorithm, checksum = file.checksum.split(":")
            assert len(bytes.fromhex(checksum)) * 2 == lengths[algorithm]
    assert CATALOGUE["mnist"].files[0].num_bytes == 47_040_016
