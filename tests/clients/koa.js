const Koa = require("koa");
const Router = require("@koa/router");
const bodyParser = require("koa-bodyparser");
const supertokens = require("supertokens-node");
const UserMetadata = require("supertokens-node/recipe/usermetadata");
const { middleware } = require("supertokens-node/framework/koa");

supertokens.init({
  framework: "koa",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const currentUser = (context) => context.get("x-user-id");

const router = new Router();

router.use((context, next) => (currentUser(context) ? next() : context.throw(401)));

router.post("/updateinfo", async (context) => {
  await UserMetadata.updateUserMetadata(currentUser(context), context.request.body);
  context.body = { message: "successfully updated user metadata" };
});

router.get("/userinfo", async (context) => {
  context.body = (await UserMetadata.getUserMetadata(currentUser(context))).metadata;
});

router.delete("/userinfo", async (context) => {
  await UserMetadata.clearUserMetadata(currentUser(context));
  context.body = { message: "successfully cleared user metadata" };
});

const app = new Koa().use(middleware()).use(bodyParser()).use(router.routes());
const server = app.listen(process.env.PORT, () => console.log(`http://localhost:${server.address().port}`));
