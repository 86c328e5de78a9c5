import supertokens from "supertokens-node";
import UserMetadata from "supertokens-node/recipe/usermetadata";

supertokens.init({
  framework: "custom",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const currentUser = (request) => request.headers.get("x-user-id");

export const forUser = (answer) => async (request) => {
  const userId = currentUser(request);
  return userId ? Response.json(await answer(userId, request)) : new Response(null, { status: 401 });
};

export { UserMetadata };
