"""Generate the facade ``usermetadata.syncio`` from ``usermetadata.asyncio``.

Run it after each change of the ``asyncio`` facade. With ``--check`` nothing is written, and the
exit code is 1 if the generated file is not up to date.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "usermetadata"
SOURCE, TARGET = PACKAGE / "asyncio/__init__.py", PACKAGE / "syncio/__init__.py"

DOCSTRING = '''"""The functions for code without ``async``: they block until they are done.

They also work in a thread whose event loop is running, and block that loop meanwhile. This file is
generated from ``usermetadata/asyncio/__init__.py``; change that one.
"""
'''
RULES = [
    (r'\A""".*?"""\n', DOCSTRING),
    (r"from typing import Any, cast", "from typing import Any"),
    (r'cast\("dict\[str, Any\]", (\w+)\)', r"\1"),
    (r"    # Overrides are written .*\n", ""),
    (r"recipe_implementation", "blocking_implementation"),
    (r"\((await .*)\)\.metadata", r"\1.metadata"),
    (r"\bawait ", ""),
    (r"\basync def ", "def "),
]


def generate() -> str:
    """Return the text of the blocking facade."""
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL if pattern[:2] == r"\A" else 0)
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TARGET), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Write the file, or compare it."""
    generated = generate()
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(generated, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != generated:
        print(f"{TARGET.name}: not up to date; run python .ci/generate_syncio.py", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
