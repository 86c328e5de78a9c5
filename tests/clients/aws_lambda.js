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
  if (event.httpMethod === "POST") {
    await UserMetadata.updateUserMetadata(currentUser(event), JSON.parse(event.body));
    return answer({ message: "successfully updated user metadata" });
  }
  if (event.httpMethod === "DELETE") {
    await UserMetadata.clearUserMetadata(currentUser(event));
    return answer({ message: "successfully cleared user metadata" });
  }
  return answer((await UserMetadata.getUserMetadata(currentUser(event))).metadata);
}

module.exports.handler = middleware(answerTo);
