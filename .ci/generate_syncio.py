"""Generate the blocking files from those for ``asyncio``: the facade, and the functions behind it.

Run it after each change of a source. With ``--check`` nothing is written, and the exit code is 1 if
a generated file is not up to date.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "usermetadata"
FILES = {
    "asyncio/__init__.py": "syncio/__init__.py",
    "_core/asyncio_functions.py": "_core/blocking_functions.py",
}
DOCSTRINGS = {
    "syncio/__init__.py": '''"""The blocking functions, for code without ``async``.

They also work in a thread whose event loop is running, and block that loop. This file is generated
from ``usermetadata/asyncio/__init__.py``; change that one.
"""
''',
    "_core/blocking_functions.py": '''"""The functions without an override, blocking.

This file is generated from ``usermetadata/_core/asyncio_functions.py``; change that one.
"""
''',
}
RULES = [
    (r"Any, Generic, cast", "Any, Generic"),
    (r'cast\("dict\[str, Any\]", (\w+)\)', r"\1"),
    (r" +# Overrides are written .*\n", ""),
    (r"\.asynchronous\b", ".blocking"),
    (r"AsyncioUserMetadata", "SyncioUserMetadata"),
    (
        r"The functions for ``asyncio`` on one store: ``UserMetadata\(\.\.\.\)\.asyncio``",
        "The blocking functions on one store: ``UserMetadata(...).syncio``",
    ),
    (r"class AsyncioFunctions\(RecipeInterface\)", "class BlockingFunctions"),
    (r"    RecipeInterface,\n", ""),
    (r"AsyncioRunner", "BlockingRunner"),
    (r"\((await .*)\)\.(metadata|by_app)", r"\1.\2"),
    (r"\bawait ", ""),
    (r"users\.asyncio\.", "users.syncio."),
    (r"\basync def ", "def "),
]


def generate(source: str, target: str) -> str:
    """Return the text of a blocking file."""
    text = (PACKAGE / source).read_text(encoding="utf-8")
    text = re.sub(r'\A""".*?"""\n', DOCSTRINGS[target], text, flags=re.DOTALL)
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", target, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Write the files, or compare them."""
    code = 0
    for source, target in FILES.items():
        generated, path = generate(source, target), PACKAGE / target
        if sys.argv[1:] != ["--check"]:
            path.write_text(generated, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != generated:
            print(f"{target}: not up to date; run python .ci/generate_syncio.py", file=sys.stderr)
            code = 1
    return code


sys.exit(main())
