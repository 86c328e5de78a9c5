"""Keep metadata about a user in ``users.db``; every run adds one to the visits."""

import usermetadata
from usermetadata.syncio import (
    clear_user_metadata,
    get_user_metadata,
    modify_user_metadata,
    update_user_metadata,
)

usermetadata.init("sqlite:///users.db")

# Any JSON object for any user id; users need not exist first.
update_user_metadata("alice", {"theme": "dark", "todos": ["use-text-notifs"]})

# An update overwrites root-level properties, and None removes one.
update_user_metadata("alice", {"notifications": {"sms": True}, "todos": None})

# A function reads, changes and writes in one atomic step.
modify_user_metadata(
    "alice", lambda metadata: {**metadata, "visits": metadata.get("visits", 0) + 1}
)

print("alice:", get_user_metadata("alice").metadata)

clear_user_metadata("bob")
print("bob:", get_user_metadata("bob").metadata)
