"""``python -m usermetadata``."""

from usermetadata.command_line import main

main(prog_name="python -m usermetadata")
