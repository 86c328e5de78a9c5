"""The command line: ``python -m usermetadata``, and ``sqlite-utils usermetadata``."""

from __future__ import annotations

from usermetadata.cli.finding import count, find, index, list_
from usermetadata.cli.group import main
from usermetadata.cli.serving import serve
from usermetadata.cli.tables import create_table
from usermetadata.cli.transfer import export, import_, import_supertokens
from usermetadata.cli.users import clear, erase, get, set_, update

__all__ = ["main"]

for command in (
    *(get, set_, update, clear, erase),
    *(list_, count, find, index, create_table),
    *(export, import_, import_supertokens, serve),
):
    main.add_command(command)
