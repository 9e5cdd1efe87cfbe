"""The command line as a person or a script uses it: a process of its own, its words and its exit code."""

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        return json.loads(self.out)


class Fedbus:
    """`fedbus …` in a process of its own."""

    def __init__(self, home: Path, **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FEDBUS", "OTEL"))}
        self.environment = clean | {"FEDBUS_HOME": str(home), "COLUMNS": "200"} | environment

    async def __call__(self, *words: str, stdin: bytes = b"", **environment: str) -> Said:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fedbus.app.cli",
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment | environment,
        )
        try:
            out, err = await process.communicate(stdin)
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return Said(process.returncode, out.decode(), err.decode())
