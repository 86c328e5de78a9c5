import { inject } from "@loopback/core";
import { HttpErrors, RestApplication, RestBindings, del, get, post, requestBody } from "@loopback/rest";
import type { MiddlewareContext } from "@loopback/rest";
import supertokens from "supertokens-node";
import { middleware } from "supertokens-node/framework/loopback";
import UserMetadata from "supertokens-node/recipe/usermetadata";

supertokens.init({
  framework: "loopback",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI!, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
function currentUser(context: MiddlewareContext): string {
  const userId = context.request.header("x-user-id");
  if (!userId) throw new HttpErrors.Unauthorized();
  return userId;
}

class UserInfo {
  constructor(@inject(RestBindings.Http.CONTEXT) private context: MiddlewareContext) {}

  @post("/updateinfo")
  async update(@requestBody() update: Record<string, any>) {
    await UserMetadata.updateUserMetadata(currentUser(this.context), update);
    return { message: "successfully updated user metadata" };
  }

  @get("/userinfo")
  async read() {
    return (await UserMetadata.getUserMetadata(currentUser(this.context))).metadata;
  }

  @del("/userinfo")
  async clear() {
    await UserMetadata.clearUserMetadata(currentUser(this.context));
    return { message: "successfully cleared user metadata" };
  }
}

async function main() {
  const app = new RestApplication({ rest: { port: Number(process.env.PORT) } });
  app.middleware(middleware);
  app.controller(UserInfo);
  await app.start();
  console.log(app.restServer.url);
}

main();
