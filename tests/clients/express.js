const express = require("express");
const supertokens = require("supertokens-node");
const UserMetadata = require("supertokens-node/recipe/usermetadata");
const { errorHandler, middleware } = require("supertokens-node/framework/express");

supertokens.init({
  framework: "express",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const currentUser = (request) => request.headers["x-user-id"];

const app = express();
app.use(middleware(), express.json());
app.use((request, response, next) => (currentUser(request) ? next() : response.sendStatus(401)));

app.post("/updateinfo", async (request, response) => {
  await UserMetadata.updateUserMetadata(currentUser(request), request.body);
  response.json({ message: "successfully updated user metadata" });
});

app.get("/userinfo", async (request, response) => {
  response.json((await UserMetadata.getUserMetadata(currentUser(request))).metadata);
});

app.delete("/userinfo", async (request, response) => {
  await UserMetadata.clearUserMetadata(currentUser(request));
  response.json({ message: "successfully cleared user metadata" });
});

app.use(errorHandler());
const server = app.listen(process.env.PORT, () => console.log(`http://localhost:${server.address().port}`));
