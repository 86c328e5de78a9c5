"""The checks of each write before it is stored: an override's hook, and a model."""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usermetadata._core.reentry import ChangeError, call_guarded, is_awaitable
from usermetadata.changes import BLIND
from usermetadata.codec import decode_metadata, encode_metadata
from usermetadata.exceptions import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

    Hook = Callable[[str, Metadata | None, Metadata | None, dict[str, Any]], object]
    Validate = Callable[[Metadata], object]


def validator_of(model: object) -> Validate:
    """Return the function with which a model validates metadata.

    Raises:
        InvalidInputError: it is not a model.
    """
    # pydantic's TypeAdapter has the first, its models have the second.
    for name in ("validate_python", "model_validate"):
        validate: Validate | None = getattr(model, name, None)
        if validate is not None:
            return validate
    if isinstance(model, type) or not callable(model):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise InvalidInputError(
            f"model: {name} cannot validate metadata; pass a function that takes the metadata and"
            " raises an exception if it is not valid, or for example pydantic.TypeAdapter(...)"
        )
    return model


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of one application.

    Args:
        store: the store that is locked while they run.
        hook: an override's ``check_change``.
        validate: takes the metadata that would be stored, and raises if it is not valid.
    """

    store: object
    hook: Hook | None
    validate: Validate | None

    def of_changes(
        self, changes: Sequence[tuple[str, Change]], user_context: dict[str, Any]
    ) -> Sequence[tuple[str, Change]]:
        """Return changes that raise an exception if a check does."""
        checked: list[tuple[str, Change]] = []
        for user_id, change in changes:
            if self.hook is None and isinstance(change, BLIND):
                # The new change does not read the row either, so it repairs a damaged row.
                new = change(None)
                if new is not None:
                    self._validate(user_id, new)
                checked.append((user_id, change))
            else:
                checked.append(
                    (user_id, _CheckedChange(change, self.of_user(user_id, user_context)))
                )
        return checked

    def of_user(
        self, user_id: str, user_context: dict[str, Any]
    ) -> Callable[[Metadata | None, Metadata | None], None]:
        """Return a function that takes the old and the new metadata and raises if a check does."""
        in_context = copy_context().run  # a storage may call it in another thread

        def check(old: Metadata | None, new: Metadata | None) -> None:
            if new is not None:
                self._validate(user_id, new)
            if self.hook is not None:
                before, after = _copy(old), _copy(new)
                returned = in_context(
                    call_guarded, self.store, self.hook, user_id, before, after, user_context
                )
                _refuse_awaitable(returned, "check_change")

        return check

    def _validate(self, user_id: str, new: Metadata) -> None:
        if self.validate is None:
            return
        try:
            returned = self.validate(decode_metadata(encode_metadata(new)))
            if returned is False:
                raise ValueError("it returned False")
        except Exception as error:
            # The exception's text may quote the metadata.
            refusal = InvalidInputError(
                f"metadata of user {user_id!r}: the model refused it with {type(error).__name__},"
                " which is the cause of this error; pass metadata that the model accepts"
            )
            refusal.__cause__ = error
            raise ChangeError(refusal) from error
        _refuse_awaitable(returned, "model")


@dataclass(frozen=True, slots=True)
class _CheckedChange:
    change: Change
    check: Callable[[Metadata | None, Metadata | None], None]

    def __call__(self, old: Metadata | None) -> Metadata | None:
        before = _copy(old)  # the change may change its argument
        new = self.change(old)
        self.check(before, new)
        return new


def _refuse_awaitable(returned: object, name: str) -> None:
    if is_awaitable(returned):
        refusal = InvalidInputError(
            f"{name}: it returned something to await, and nothing can be awaited inside the"
            " storage's lock; make it a function without `async`"
        )
        raise ChangeError(refusal)


def _copy(metadata: Metadata | None) -> Metadata | None:
    return None if metadata is None else decode_metadata(encode_metadata(metadata))
