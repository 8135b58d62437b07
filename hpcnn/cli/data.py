"""`hpcnn data import|fetch|info`: make HDF5 image files, download well-known sets, look into a file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcnn.cli.manual import Manual, explain
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import DataError, HpcnnError
from hpcnn.geometry import split as split_evenly

if TYPE_CHECKING:
    from hpcnn.comm.world import World
    from hpcnn.data.dataset import DataSet
    from hpcnn.data.importers import Written

READ_AT_ONCE = 256
LINE_EVERY_S = 10.0

MANUAL = Manual(
    "Makes data sets of images in HDF5 out of what they come in, downloads well-known ones, and looks into them.",
    examples=(
        ("hpcnn data fetch cifar10", "download, check and import"),
        ("hpcnn data import photos --out data/photos --size 64", "a tree of image files"),
        ("hpcnn data info data/photos", "what is in it"),
    ),
    see_also=("hpcnn data import --help", "hpcnn data fetch --help", "hpcnn data info --help"),
)
IMPORT = Manual(
    """Makes train.h5 and test.h5 out of a folder of IDX files, CIFAR's binary files or a tree of image files
    (SOURCE/train/CLASS/*.jpg). Images become fixed-size bytes in one contiguous block, the layout that ranks read
    fastest. Under mpirun or srun the ranks share the work.""",
    examples=(
        ("hpcnn data import photos --out data/photos --size 64", "photos/train/CLASS/*.jpg, photos/test/CLASS/*.jpg"),
        ("hpcnn data import cifar-10-binary.tar.gz --out data/cifar", "CIFAR as it is downloaded"),
        ("mpiexec -n 8 hpcnn data import photos --out data/photos --size 224 --skip-broken", "eight ranks decode"),
    ),
    files=(("train.h5, test.h5", "in --out; or the one .h5 file that it names"),),
    see_also=("hpcnn data info", "hpcnn train"),
)
FETCH = Manual(
    """Downloads a well-known data set, compares checksums, and imports it. On clusters whose nodes have no network,
    run it on a login node, or copy the files there and use --from.""",
    examples=(
        ("hpcnn data fetch cifar10", "into data/cifar10"),
        ("hpcnn data fetch fashion-mnist --from downloads --out data/fashion", "from files that are here already"),
    ),
    files=(("train.h5, test.h5", "in --out"),),
    see_also=("hpcnn data import",),
)
INFO = Manual(
    """Describes a data set: images, classes, statistics, fingerprint. Reads every image once, so that a file that was
    cut off is noticed here.""",
    examples=(
        ("hpcnn data info data/cifar", "both files of a folder"),
        ("hpcnn data info data/cifar/train.h5", "one file"),
        ("hpcnn data info builtin", "the images that come with hpcnn"),
    ),
    exit_codes=((0, "readable"), (1, "missing or damaged"), (2, "wrong usage")),
    see_also=("hpcnn data import",),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    from hpcnn.data import fetch, importers

    parser = subparsers.add_parser("data", help="import, inspect or fetch data sets")
    explain(parser, MANUAL)
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|fetch|info")

    make = actions.add_parser("import", help="make HDF5 image files (start with mpirun or srun to share the work)")
    explain(make, IMPORT)
    make.add_argument("source", type=Path, help="folder of IDX files, CIFAR binary folder or tar.gz, or image tree")
    make.add_argument(
        "--out", type=Path, required=True, help="folder for train.h5 and test.h5, or one .h5 file (required)"
    )
    make.add_argument("--size", type=_positive, metavar="N", help="scale image files to N x N (default: as they are)")
    make.add_argument("--kind", choices=importers.KINDS, default="auto", help="format of SOURCE (default: look)")
    make.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
    make.add_argument(
        "--seed", type=int, default=1, metavar="N", help="key of the order of an image tree's rows (default: 1)"
    )
    make.set_defaults(run=_import)

    get = actions.add_parser("fetch", help="download a well-known set, check it, and import it")
    explain(get, FETCH)
    get.add_argument("name", choices=sorted(fetch.CATALOGUE), help="which set")
    get.add_argument("--out", type=Path, metavar="FOLDER", help="folder for train.h5 and test.h5 (default: data/NAME)")
    place = get.add_mutually_exclusive_group()
    place.add_argument("--mirror", metavar="URL", help="download from here (default: the official host)")
    place.add_argument(
        "--from", dest="folder", type=Path, metavar="FOLDER", help="take the files from here (default: download)"
    )
    get.set_defaults(run=_fetch)

    info = actions.add_parser("info", help="describe a data set and read all of it once")
    explain(info, INFO)
    info.add_argument("source", help='an .h5 file, a folder with train.h5 and test.h5, or "builtin"')
    info.set_defaults(run=_info)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for; `import` is collective where a launcher started several ranks."""
    return int(args.run(args))


def _import(args: argparse.Namespace) -> int:
    from hpcnn.cli.main import launched
    from hpcnn.data import importers

    team: importers.Team = importers.Alone()
    if launched():
        from hpcnn.comm.world import start

        team = _WorldTeam(start())
    begin = time.perf_counter()
    written = importers.import_data(
        args.source,
        args.out,
        kind=args.kind,
        size=args.size,
        skip_broken=args.skip_broken,
        seed=args.seed,
        team=team,
        progress=_Progress(team.size) if team.rank == 0 else None,
    )
    if team.rank == 0:
        _report(written, time.perf_counter() - begin)
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from hpcnn.cli.main import launched_rank
    from hpcnn.data import fetch

    if launched_rank():
        return 0
    begin = time.perf_counter()
    out = args.out or Path("data") / args.name
    where = args.folder.resolve().as_uri() if args.folder else args.mirror
    written = fetch.fetch(args.name, out, mirror=where, say=lambda line: print(line, flush=True), progress=_Progress(1))
    _report(written, time.perf_counter() - begin)
    return 0


def _info(args: argparse.Namespace) -> int:
    from hpcnn.cli.main import launched_rank
    from hpcnn.config import DataConfig
    from hpcnn.data import open_data

    if launched_rank():
        return 0
    source = Path(args.source)
    single = not source.is_dir() and args.source != "builtin"
    found = 0
    for split in ("train",) if single else ("train", "test"):
        if source.is_dir() and not (source / f"{split}.h5").exists():
            continue
        with open_data(DataConfig(source=args.source), split) as data:  # type: ignore[arg-type]
            print(f"{args.source if single else f'{args.source} {split}'}\n{describe(data)}\n")
        found += 1
    if not found:
        raise DataError(f"data: '{source}' has neither train.h5 nor test.h5. Make them with `hpcnn data import`.")
    return 0


def describe(data: DataSet) -> str:
    """Return what is known of a data set, after reading every image of it; raises DataError."""
    begin, counts = time.perf_counter(), np.zeros(data.num_classes, np.int64)
    for start in range(0, len(data), READ_AT_ONCE):
        _, labels = data.read(np.arange(start, min(start + READ_AT_ONCE, len(data))))
        counts += np.bincount(labels, minlength=data.num_classes)
    seconds = time.perf_counter() - begin
    num_bytes = len(data) * int(np.prod(data.image_shape))
    contiguous = getattr(data, "contiguous", None)
    layout = {None: "none", True: "contiguous", False: "chunked, held in memory"}[contiguous]
    about: dict[str, str] = getattr(data, "about", {})
    rows = [
        ("images", f"{len(data)} of {'x'.join(map(str, data.image_shape))}, {quantity(num_bytes, 'B')}"),
        ("classes", f"{data.num_classes}, {int(counts.min())} to {int(counts.max())} images each"),
        ("mean", " ".join(f"{value:.4f}" for value in data.mean)),
        ("std", " ".join(f"{value:.4f}" for value in data.std)),
        ("layout", layout),
        ("fingerprint", data.fingerprint()),
        *((name, about[name]) for name in ("source", "licence") if about.get(name)),
        ("readable", f"all of it, in {seconds:.2f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    facts = "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
    per_class = [(name, str(count)) for name, count in zip(data.class_names, counts.tolist(), strict=True)]
    return f"{facts}\n\n{format_table(('class', 'images'), per_class)}"


def _report(written: list[Written], seconds: float) -> None:
    for file in written:
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in file.statistics)
        print(f"{file.path}: {file.num_images} images, mean {mean}, std {std}")
        if file.broken:
            print(f"{len(file.broken)} broken images left out:", *file.broken, sep="\n  ")
    print(f"{seconds:.1f} s")


class _Progress:
    """A bar on a terminal, a plain line now and then in a log. Shows rank 0's rows, which stand for everyone's."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks

    def __call__(self, split: str, num_images: int) -> Callable[[int], None]:
        if sys.stderr.isatty():
            return self._bar(split, num_images)
        begin = last = time.perf_counter()
        done = 0

        def line(rows: int) -> None:
            nonlocal done, last
            done += rows
            now = time.perf_counter()
            if now - last >= LINE_EVERY_S:
                last = now
                print(f"{split}: rank 0 has written {done} images, {done / (now - begin):.0f} a second", flush=True)

        return line

    def _bar(self, split: str, num_images: int) -> Callable[[int], None]:
        from tqdm import tqdm

        bar: Any = tqdm(
            desc=split, total=split_evenly(num_images, self._num_ranks, 0).size, unit=" images", disable=None
        )

        def advance(rows: int) -> None:
            bar.update(rows)
            if bar.n >= bar.total:
                bar.close()

        return advance


class _WorldTeam:
    """The ranks of an MPI job as the team of an import."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rank, self.size = world.rank, world.size

    def agree(self, error: HpcnnError | None) -> None:
        self._world.agree(error)

    def sum(self, array: np.ndarray) -> None:
        from hpcnn.comm import allreduce

        allreduce(self._world.comm, array)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value
