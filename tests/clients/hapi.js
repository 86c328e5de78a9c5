const hapi = require("@hapi/hapi");
const supertokens = require("supertokens-node");
const UserMetadata = require("supertokens-node/recipe/usermetadata");
const { plugin } = require("supertokens-node/framework/hapi");

supertokens.init({
  framework: "hapi",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const currentUser = (request) => request.headers["x-user-id"];

const server = hapi.server({ port: process.env.PORT });

server.ext("onPreHandler", (request, h) =>
  currentUser(request) ? h.continue : h.response().code(401).takeover(),
);

server.route([
  {
    path: "/updateinfo",
    method: "post",
    handler: async (request) => {
      await UserMetadata.updateUserMetadata(currentUser(request), request.payload);
      return { message: "successfully updated user metadata" };
    },
  },
  {
    path: "/userinfo",
    method: "get",
    handler: async (request) => {
      return (await UserMetadata.getUserMetadata(currentUser(request))).metadata;
    },
  },
  {
    path: "/userinfo",
    method: "delete",
    handler: async (request) => {
      await UserMetadata.clearUserMetadata(currentUser(request));
      return { message: "successfully cleared user metadata" };
    },
  },
]);

server.register(plugin).then(() => server.start()).then(() => console.log(server.info.uri));
