"""A compiler that makes nothing and notes everything."""

from __future__ import annotations

import os
import time
from pathlib import Path

from hpcnn.ops.cuda.compile import CompileError


class Counting:
    """A compiler that takes its time and notes each call."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        self.log = log
        self.seconds = seconds

    def __call__(self, source: Path, target: str) -> bytes:
        with self.log.open("a") as file:
            file.write(f"{source.stem} {target} {os.getpid()}\n")
        time.sleep(self.seconds)
        if "broken" in source.read_text():
            raise CompileError(f'{source}(1): warning: hm\n{source}(2): error: identifier "broken" is undefined\n')
        return f"code of {source.stem} for {target}".encode()

    def calls(self) -> list[list[str]]:
        """Return (source, target, process) of each call."""
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
