"""The tutorial, followed from an empty folder: its files, its commands and their output."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from postgres_server import server_url, with_parameters

if TYPE_CHECKING:
    from collections.abc import Generator

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# The text before a block, the language, the block.
BLOCKS: list[tuple[str, str, str]] = re.findall(
    r"(.*?)^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
)
EXAMPLES = ROOT / "docs" / "examples"
PROGRAM, TESTS = "tutorial_app.py", "test_tutorial_app.py"


def read(path: Path) -> str:
    """Return the text of a file, ``""`` if there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


class Server:
    """The command of the page that serves the program, in a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """Return the next line of the log with this text."""
        while text not in (line := self._lines.get(timeout=timeout)):
            pass
        return line

    def wait_for_reload(self, program: Path) -> None:
        """Wait until the program that was just saved is served."""
        while True:
            try:
                self.wait_for("Reloading...", timeout=1)
                break
            except queue.Empty:  # it was saved before uvicorn's first look at the files
                assert self.process.poll() is None, self.log
                os.utime(program)
        self.wait_for("Application startup complete")

    def stop(self) -> None:
        self.process.terminate()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)


class Newcomer:
    """Does what the page asks for, in a folder.

    Args:
        folder: where the files are saved.
        url: the storage; ``""`` is the one that the page chooses.
        stack: closes what was started.
    """

    def __init__(self, folder: Path, url: str, stack: contextlib.ExitStack) -> None:
        self.folder, self.url, self.stack = folder, url, stack
        self.program = folder / PROGRAM
        self.edited = ""  # the program in the editor
        self.server: Server | None = None
        kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
        kept.pop("USERMETADATA_URL", None)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Any free port; .curlrc makes it the one that the page names.
        self.environment = kept | {"PATH": path, "UVICORN_PORT": "0", "CURL_HOME": str(folder)}
        self.environment["COLUMNS"] = "80"  # pytest prints lines of this width
        # Hypothesis would be imported at pytest's end, which takes 0.5 s.
        self.environment["PYTEST_ADDOPTS"] = "-p no:hypothesispytest"
        if url:
            self.environment["USERMETADATA_URL"] = url

    def follow(self, text: str, language: str, block: str) -> None:
        """Do what one block, and the text before it, ask for."""
        if block.startswith(">>> "):
            self.type_into_python(block)
        elif language == "python":
            self.edit(" ".join(text.split()), block)
        elif block.startswith("uvicorn "):
            self.save()
            self.serve(block)
        elif block.startswith("$ "):
            self.save()
            for command, shown in re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
                output, expected = self.output(command), shown.strip()
                if self.url and expected.startswith("{"):  # the order of properties may differ
                    output, expected = json.loads(output), json.loads(expected)
                assert output == expected, command
        else:
            assert "pip install" in block  # it has run: these tests import what it installs

    def type_into_python(self, block: str) -> None:
        if self.url:
            block = block.replace("sqlite:///users.db", self.url)
        (self.folder / "typed.txt").write_text(block, encoding="utf-8")
        assert self.output(f"{sys.executable} -m doctest typed.txt") == ""

    def edit(self, text: str, block: str) -> None:
        if f"Save this as `{TESTS}`" in text:
            (self.folder / TESTS).write_text(block, encoding="utf-8")
        elif f"Save this as `{PROGRAM}`" in text:
            self.edited = block
        elif "eplace the line" in text:
            [line] = re.findall(r"^usermetadata\.init\(.*\n", self.edited, re.MULTILINE)
            self.edited = self.edited.replace(line, block)
        else:
            assert "Append" in text
            self.edited += f"\n\n{block}"

    def save(self) -> None:
        """Save the program if it was edited; then the server serves what was saved."""
        if self.edited and self.edited != read(self.program):
            self.program.write_text(self.edited, encoding="utf-8")
            if self.server is not None:
                self.server.wait_for_reload(self.program)

    def serve(self, command: str) -> None:
        process = subprocess.Popen(
            command.split(),
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stack.enter_context(process)
        self.server = Server(process)
        self.stack.callback(self.server.stop)
        line = self.server.wait_for("Uvicorn running on http://")
        address = line.partition("http://")[2].split()[0]
        (self.folder / ".curlrc").write_text(
            f'silent\nshow-error\nnoproxy = "*"\nconnect-to = "localhost:8000:{address}"\n'
        )
        self.server.wait_for("Application startup complete")

    def output(self, command: str) -> str:
        """Return what a command prints; all durations are those of the page."""
        finished = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return re.sub(r"in \d+\.\d\ds( \(.*\))?", "in 0.75s", finished.stdout.strip())


@pytest.fixture
def stack() -> Generator[contextlib.ExitStack, None, None]:
    """Closes what a test starts."""
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_newcomer_gets_what_the_tutorial_shows(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    """Each step works as it is shown, and the last one leaves the files of ``docs/examples``."""
    newcomer = Newcomer(tmp_path, "", stack)
    for text, language, block in BLOCKS:
        newcomer.follow(text, language, block)
    for name in (PROGRAM, TESTS):
        assert read(tmp_path / name) == read(EXAMPLES / name)
    assert newcomer.server is not None
    newcomer.server.stop()
    words = ("Traceback", "ERROR", "Exception")
    assert not [line for line in newcomer.server.log if any(word in line for word in words)]


def test_the_finished_program_runs_on_postgresql(
    tmp_path: Path, schema: str, stack: contextlib.ExitStack
) -> None:
    """With the URL in the environment, all commands of the page print what it shows."""
    newcomer = Newcomer(tmp_path, with_parameters(server_url(), schema=schema), stack)
    for name in (PROGRAM, TESTS):
        shutil.copy(EXAMPLES / name, tmp_path)
    for text, language, block in BLOCKS:
        if language == "console" or block.startswith(">>> "):
            newcomer.follow(text, language, block)
    assert not (tmp_path / "users.db").exists()
