"""Only administrators may change a user's role, whichever function is called."""

from typing import Any

from usermetadata.interfaces import RecipeInterface


def protect_roles(original: RecipeInterface) -> RecipeInterface:
    def check_change(
        user_id: str,
        old: dict[str, Any] | None,
        new: dict[str, Any] | None,
        user_context: dict[str, Any],
    ) -> None:
        before, after = (old or {}).get("role"), (new or {}).get("role")
        if after != before and not user_context.get("is_admin"):
            raise PermissionError("only administrators may change a role")

    original.check_change = check_change  # type: ignore[method-assign]
    return original
