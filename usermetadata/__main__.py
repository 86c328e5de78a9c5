"""``python -m usermetadata``."""

from usermetadata.cli import main

main(prog_name="python -m usermetadata")
