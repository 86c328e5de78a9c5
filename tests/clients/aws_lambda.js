const supertokens = require("supertokens-node");
const UserMetadata = require("supertokens-node/recipe/usermetadata");
const { middleware } = require("supertokens-node/framework/awsLambda");

supertokens.init({
  framework: "awsLambda",
  isInServerlessEnv: true,
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const currentUser = (event) => event.headers["x-user-id"];

const answer = (content) => ({ statusCode: 200, body: JSON.stringify(content) });

async function answerTo(event) {
  const userId = currentUser(event);
  if (!userId) return { statusCode: 401, body: "" };
  // An HTTP API has the method in one place; a REST API and Netlify in another.
  const method = event.requestContext?.http?.method ?? event.httpMethod;
  if (method === "POST") {
    const body = Buffer.from(event.body, event.isBase64Encoded ? "base64" : "utf8");
    await UserMetadata.updateUserMetadata(userId, JSON.parse(body));
    return answer({ message: "successfully updated user metadata" });
  }
  if (method === "DELETE") {
    await UserMetadata.clearUserMetadata(userId);
    return answer({ message: "successfully cleared user metadata" });
  }
  return answer((await UserMetadata.getUserMetadata(userId)).metadata);
}

module.exports.handler = middleware(answerTo);
