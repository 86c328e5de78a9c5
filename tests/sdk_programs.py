"""Programs that use SuperTokens' SDK, each in a new process that has the SDK's modules already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import gc, json, os, signal, sys
import fastapi.testclient, httpcore, usermetadata.storage.sqlite, usermetadata.supertokens
from supertokens_python import asyncio, syncio
from supertokens_python.framework import fastapi
from supertokens_python.recipe import accountlinking, dashboard, session
from supertokens_python.recipe.usermetadata import asyncio, syncio

gc.freeze()  # a child does not look through all modules when it ends
for line in sys.stdin:
    program, arguments, environment, folder, outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm(60)
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, output in enumerate(outputs, 1):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
sys.argv[1:] = arguments
exec(program, {"__name__": "__main__"})
"""


class SDKPrograms:
    """A process that imports the SDK, which takes 1.5 s, and is forked for each program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, program: str, *arguments: object) -> str:
        """Run a program in a new process, because the SDK can be initialised only once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / "stdout", Path(folder) / "stderr"]
            job = [
                program,
                [*map(str, arguments)],
                {**os.environ},
                os.getcwd(),
                [*map(str, outputs)],
            ]
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            code = self._process.stdout.readline()
            shown, errors = (output.read_text(encoding="utf-8") for output in outputs)
        assert code == "0\n", errors
        return shown

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
