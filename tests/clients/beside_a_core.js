// Beside a core: deleting a user also clears the metadata that the server has.
const supertokens = require("supertokens-node");
const AccountLinking = require("supertokens-node/recipe/accountlinking");
const UserMetadata = require("supertokens-node/recipe/usermetadata");

// The core's rule. The metadata of a primary user stays as long as an account is linked to it.
function erasedIds(user, ownId, removeAllLinkedAccounts) {
  const accounts = user.loginMethods.map((method) => method.recipeUserId.getAsString());
  if (removeAllLinkedAccounts) return [...new Set([user.id, ...accounts])];
  if (accounts.length === 1) return [...new Set([user.id, ownId])];
  return ownId === user.id ? [] : [ownId];
}

const eraseDeletedUsers = (original) => {
  // With an empty context, the SDK asks the core and not its cache.
  const getUser = (userId) => original.getUser({ userId, userContext: {} });

  const deleteUser = async (input) => {
    const { userId, removeAllLinkedAccounts } = input;
    const user = await getUser(userId);
    const mapping = await supertokens.getUserIdMapping({ userId });
    const ownId = mapping.status === "OK" ? mapping.externalUserId : userId;
    const erased = user ? erasedIds(user, ownId, removeAllLinkedAccounts) : [];
    const result = await original.deleteUser(input);
    const clear = async (id) => {
      // An external id can be the id of another user, who keeps the metadata.
      if (!(await getUser(id))) await UserMetadata.clearUserMetadata(id);
    };
    const outcomes = await Promise.allSettled(erased.map(clear));
    const failed = erased.filter((_, index) => outcomes[index].status === "rejected");
    if (failed.length) throw new Error(`the metadata of ${JSON.stringify(failed)} was not cleared`);
    return result;
  };

  return { ...original, deleteUser };
};

supertokens.init({
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // the reverse proxy
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [
    UserMetadata.init(),
    AccountLinking.init({ override: { functions: eraseDeletedUsers } }),
  ],
});
