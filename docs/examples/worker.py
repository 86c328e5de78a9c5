"""Count a visit for each user id on a line of standard input.

``python worker.py < user_ids.txt``
"""

import sys
from typing import Any

import usermetadata
from usermetadata.syncio import modify_user_metadata


def one_more(metadata: dict[str, Any]) -> dict[str, Any]:
    visits = metadata.get("visits")
    return {**metadata, "visits": visits + 1 if isinstance(visits, int) else 1}


def count_visit(user_id: str) -> int:
    """Count a visit in one atomic step, and return the number of visits."""
    visits: int = modify_user_metadata(user_id, one_more).metadata["visits"]
    return visits


def main() -> int:
    usermetadata.init()  # the storage that USERMETADATA_URL names
    status = 0
    for line in sys.stdin:
        try:
            print(line.strip(), count_visit(line.strip()))
        except usermetadata.InvalidInputError as error:
            print(error, file=sys.stderr)
            status = 1
    usermetadata.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
