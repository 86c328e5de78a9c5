const fastify = require("fastify");
const supertokens = require("supertokens-node");
const UserMetadata = require("supertokens-node/recipe/usermetadata");
const { errorHandler, plugin } = require("supertokens-node/framework/fastify");

supertokens.init({
  framework: "fastify",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const currentUser = (request) => request.headers["x-user-id"];

const app = fastify();
app.register(plugin);
app.setErrorHandler(errorHandler());
app.addHook("onRequest", async (request, reply) => {
  if (!currentUser(request)) return reply.code(401).send();
});

app.post("/updateinfo", async (request) => {
  await UserMetadata.updateUserMetadata(currentUser(request), request.body);
  return { message: "successfully updated user metadata" };
});

app.get("/userinfo", async (request) => {
  return (await UserMetadata.getUserMetadata(currentUser(request))).metadata;
});

app.delete("/userinfo", async (request) => {
  await UserMetadata.clearUserMetadata(currentUser(request));
  return { message: "successfully cleared user metadata" };
});

app.listen({ port: process.env.PORT }).then((url) => console.log(url));
