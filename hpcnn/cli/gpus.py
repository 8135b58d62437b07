"""What `hpcnn doctor` says of GPUs: driver, CuPy, devices and the compiler of their kernels, and what is in the way."""

from __future__ import annotations

import re
import shutil
from typing import Any, NamedTuple

from hpcnn.cli.environment import Facts, output
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import ConfigError, DeviceError

NO_ARCHITECTURE = "gpu: which architecture to compile for is not known without a GPU. Name it: --arch 80,90."


class Trouble(NamedTuple):
    """Why GPUs are not used although something here is meant for them, and what to do about it."""

    what: str
    fix: str


def facts() -> Facts:
    """Return the GPUs of this host, the software for them, and under "troubles" what is in the way of using them."""
    nvidia_smi = shutil.which("nvidia-smi")
    said = output([nvidia_smi, "-L"]).splitlines() if nvidia_smi else []
    found = [line.strip() for line in said if line.startswith("GPU")]
    report: Facts = {"found": found, **_software()}
    troubles: list[Trouble] = []
    try:
        report["devices"] = devices()
    except DeviceError as error:
        trouble, expected = _trouble(error), found or report["cupy"]
        troubles += [trouble] if expected else []
        report["used"] = f"no: {trouble.what.removeprefix('gpu: ') if expected else 'no GPU and no CuPy here'}"
    else:
        report["used"] = "yes, where device is cuda"
    if report["cupy"]:
        try:
            report["compiler"] = _compiler()
        except DeviceError as error:
            troubles.append(_trouble(error))
    report["troubles"] = [trouble._asdict() for trouble in troubles]
    return report


def devices() -> list[str]:
    """Return a line for each GPU that CUDA offers to this process.

    Raises
    ------
    DeviceError
        If there is none, or no CuPy to ask.
    """
    return [
        f"{index}: {bytes(each['name']).decode()}, sm_{_architecture(each)}, {quantity(each['totalGlobalMem'], 'B')}, "
        f"{each['multiProcessorCount']} processors"
        for index, each in enumerate(_properties())
    ]


def compile_kernels(architectures: str | None) -> list[Facts]:
    """Compile all kernels for the architectures that were named, as in "80,90a", or for the GPUs of this host.

    Raises
    ------
    DeviceError
        If none are named and there is no GPU.
    ConfigError
        If a name is no architecture.
    """
    from hpcnn.ops.cuda import compile

    if architectures is None:
        try:
            names = sorted({_architecture(each) for each in _properties()})
        except DeviceError as error:
            raise DeviceError(f"{NO_ARCHITECTURE} ({error})") from None
    else:
        names = [name.strip().removeprefix("sm_") for name in architectures.split(",")]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise ConfigError(f"doctor: --arch: {name!r} is no architecture; they are numbers such as 80 or 90a.")
    return [line._asdict() for line in compile.compile_all(names)]


def compiled_table(lines: list[Facts]) -> str:
    """Return what `compile_kernels` reports as a table, and why some have failed."""
    header = ("kernels", "architecture", "seconds", "bytes", "")
    outcome = ("compiled", "cached", "FAILED")
    rows = [
        (
            line["source"],
            f"sm_{line['target']}",
            f"{line['seconds']:.1f}",
            str(line["num_bytes"]),
            outcome[2 if line["problem"] else int(line["cached"])],
        )
        for line in lines
    ]
    return "\n".join([format_table(header, rows, left=2), *dict.fromkeys(filter(None, (x["problem"] for x in lines)))])


def _software() -> Facts:
    """Return the versions of driver and CuPy, None for what is not here."""
    try:
        import cupy
    except ImportError:
        return {"cupy": None}
    from hpcnn.ops.cuda.gpu import version

    driver = cupy.cuda.runtime.driverGetVersion()
    return {"cupy": str(cupy.__version__), "driver": f"for CUDA {version(driver)}" if driver else "none"}


def _compiler() -> str:
    from hpcnn.ops.cuda import cache, compile

    return f"{compile.compiler().name}, machine code is kept in {cache.folders()[0]}"


def _properties() -> list[dict[str, Any]]:
    from hpcnn.ops.cuda.gpu import load

    runtime = load().cuda.runtime
    return [runtime.getDeviceProperties(index) for index in range(runtime.getDeviceCount())]


def _architecture(properties: dict[str, Any]) -> str:
    return f"{properties['major']}{properties['minor']}"


def _trouble(error: DeviceError) -> Trouble:
    what, _, fix = str(error).partition(". ")
    return Trouble(what, fix or "See the message.")
