"""A complete storage: a model of Django's ORM, in the application's own database.

In a project the model belongs to an app of ``INSTALLED_APPS``, and ``migrate`` creates its table.
"""

import copy
import random
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from django.db import DatabaseError, InterfaceError, OperationalError, connections, models
from django.db.transaction import atomic

from usermetadata import (
    DamagedMetadataError,
    StorageError,
    StorageBusyError,
    StorageUnavailableError,
    UsageError,
)
from usermetadata.changes import Change, apply_in_order
from usermetadata.codec import Metadata, decode_metadata, encode_metadata
from usermetadata.validation import check_app_id

ATTEMPTS, CHUNK = 8, 1000


class UserMetadata(models.Model):
    # MySQL and MariaDB need db_collation="utf8mb4_0900_bin", or "utf8mb4_nopad_bin": their defaults
    # ignore case, accents and blanks at the end.
    app_id = models.CharField(max_length=64)
    user_id = models.CharField(max_length=255)
    metadata = models.TextField()

    class Meta:
        app_label = "metadata"
        constraints = [models.UniqueConstraint("app_id", "user_id", name="one_row_per_user")]
