// A program without a web framework: a script or a job.
const supertokens = require("supertokens-node");
const UserMetadata = require("supertokens-node/recipe/usermetadata");

supertokens.init({
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

async function main() {
  await UserMetadata.updateUserMetadata("alice", { theme: "dark", todos: ["use-text-notifs"] });
  await UserMetadata.updateUserMetadata("alice", { notifications: { sms: true }, todos: null });
  await UserMetadata.clearUserMetadata("bob");
  const { metadata } = await UserMetadata.getUserMetadata("alice");
  console.log(JSON.stringify(metadata));
}

main();
