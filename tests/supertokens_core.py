"""A stand-in of a SuperTokens core: linked accounts, user id mappings, and how it deletes users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class Core:
    """What a core knows of its users, and the ids whose metadata it has.

    The methods that find and delete users do what those of ``StorageLayer`` and ``AuthRecipe`` do
    in the core of August 2026, statement by statement.

    Attributes:
        ids: all SuperTokens ids; that of a primary user stays when its own account was deleted.
        primary: the primary user of each account; an account that is alone is its own.
        external: the external ids of the user id mapping, by SuperTokens id.
        metadata: the ids for which the recipe of user metadata has a row.
        refused: the ids that it fails to delete.
    """

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.primary: dict[str, str] = {}
        self.external: dict[str, str] = {}
        self.metadata: set[str] = set()
        self.refused: set[str] = set()

    def add(self, *accounts: str) -> None:
        """Add a user; the accounts after the first are linked to it."""
        for account in accounts:
            self.ids.add(account)
            self.primary[account] = accounts[0]

    def mapping(self, user_id: str) -> tuple[str, str] | None:
        """``UserIdMapping.getUserIdMapping`` for an id of any type."""
        if user_id in self.external:
            return user_id, self.external[user_id]
        found = [pair for pair in self.external.items() if pair[1] == user_id]
        return found[0] if found else None

    def is_known(self, user_id: str) -> bool:
        """``StorageLayer.findStorageAndUserIdMappingForUser`` for an id of any type."""
        return user_id in self.ids or self.mapping(user_id) is not None or user_id in self.metadata

    def accounts(self, user_id: str) -> tuple[str, list[str]] | None:
        """``getPrimaryUserById_Transaction``: the primary user's id and its accounts."""
        primary = self.primary.get(user_id, user_id)
        accounts = [account for account, owner in self.primary.items() if owner == primary]
        return (primary, accounts) if accounts else None

    def user(self, user_id: str) -> dict[str, Any] | None:
        """``GetUserByIdAPI``."""
        mapping = self.mapping(user_id)
        found = self.accounts(mapping[0] if mapping else user_id)
        if found is None:
            return None
        primary, accounts = found
        methods = [
            {
                "recipeId": "emailpassword",
                "recipeUserId": self.external.get(account, account),
                "tenantIds": ["public"],
                "timeJoined": 1,
                "verified": True,
            }
            for account in accounts
        ]
        return {
            "id": self.external.get(primary, primary),
            "isPrimaryUser": True,
            "tenantIds": ["public"],
            "emails": [],
            "phoneNumbers": [],
            "thirdParty": [],
            "loginMethods": methods,
            "timeJoined": 1,
        }

    def delete(  # noqa: C901, PLR0912 - one method in the core
        self, user_id: str, mapping: tuple[str, str] | None, *, with_linked: bool
    ) -> None:
        """``AuthRecipe.deleteUserHelper``."""
        own: str | None
        if mapping is None:
            account, own = user_id, user_id
        elif mapping[1] in self.ids:
            account, own = user_id, None
        else:
            account, own = mapping
        found = self.accounts(account)
        if account not in self.ids or found is None:
            return
        primary, accounts = found
        primary_row: str | None = None
        if with_linked or len(accounts) == 1:
            if primary == account:
                primary_row = own
                if primary_row is None:
                    self._delete_account(primary, id_too=True)
                    return
            else:
                primary_row = self.external.get(primary, primary)
        elif primary == account:
            own = None
        if with_linked:
            for other in accounts:
                its_mapping = (other, self.external[other]) if other in self.external else None
                its_mapping = mapping if other == account else its_mapping
                self.delete(other, its_mapping, with_linked=False)
            return
        self._delete_account(account, id_too=account != primary)
        if own is not None:
            self.metadata.discard(own)
        if primary_row is not None:
            self.metadata.discard(primary_row)
            self._delete_account(primary, id_too=True)

    def _delete_account(self, account: str, *, id_too: bool) -> None:
        """``deleteAuthRecipeUser``; the foreign keys of the id remove the rest."""
        self.primary.pop(account, None)
        if id_too:
            gone = {account, *(other for other, owner in self.primary.items() if owner == account)}
            self.ids -= gone
            for other in gone:
                self.primary.pop(other, None)
                self.external.pop(other, None)

    def app(self) -> Starlette:
        """Return the application that answers the SDK."""
        return Starlette(
            routes=[
                Route("/apiversion", self._versions),
                Route("/user/id", self._get_user),
                Route("/user/remove", self._remove_user, methods=["POST"]),
                Route("/recipe/userid/map", self._get_mapping),
                Route("/recipe/userid/map", self._create_mapping, methods=["POST"]),
                Route("/recipe/accountlinking/user/link", self._link, methods=["POST"]),
            ]
        )

    async def _versions(self, _: Request) -> Response:
        # Versions 0.30 and 0.31 of the SDK need different ones.
        return JSONResponse({"versions": ["5.2", "5.3", "5.4"]})

    async def _get_user(self, request: Request) -> Response:
        user = self.user(request.query_params["userId"])
        if user is None:
            return JSONResponse({"status": "UNKNOWN_USER_ID_ERROR"})
        return JSONResponse({"status": "OK", "user": user})

    async def _remove_user(self, request: Request) -> Response:
        body = await request.json()
        user_id = body["userId"]
        if user_id in self.refused:
            return PlainTextResponse("Internal Error", 500)
        if self.is_known(user_id):
            mapping = self.mapping(user_id)
            self.delete(user_id, mapping, with_linked=body["removeAllLinkedAccounts"])
        return JSONResponse({"status": "OK"})

    async def _get_mapping(self, request: Request) -> Response:
        mapping = self.mapping(request.query_params["userId"])
        if mapping is None:
            return JSONResponse({"status": "UNKNOWN_MAPPING_ERROR"})
        found = {"superTokensUserId": mapping[0], "externalUserId": mapping[1]}
        return JSONResponse({"status": "OK", **found})

    async def _create_mapping(self, request: Request) -> Response:
        body = await request.json()
        if body["superTokensUserId"] in self.metadata and not body.get("force"):
            return PlainTextResponse("UserId is already in use in UserMetadata recipe", 400)
        self.external[body["superTokensUserId"]] = body["externalUserId"]
        return JSONResponse({"status": "OK"})

    async def _link(self, request: Request) -> Response:
        body = await request.json()
        self.primary[body["recipeUserId"]] = body["primaryUserId"]
        return JSONResponse({"status": "OK"})
