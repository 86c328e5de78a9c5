import "reflect-metadata";
import { Body, Controller, Delete, Get, HttpCode, Module, Post } from "@nestjs/common";
import { UnauthorizedException, createParamDecorator } from "@nestjs/common";
import type { ExecutionContext } from "@nestjs/common";
import { NestFactory } from "@nestjs/core";
import supertokens from "supertokens-node";
import { errorHandler, middleware } from "supertokens-node/framework/express";
import UserMetadata from "supertokens-node/recipe/usermetadata";

supertokens.init({
  framework: "express",
  supertokens: {
    connectionURI: process.env.SUPERTOKENS_URI!, // http://127.0.0.1:3567
    apiKey: process.env.SUPERTOKENS_API_KEY,
  },
  appInfo: { appName: "shop", apiDomain: "http://localhost", websiteDomain: "http://localhost" },
  recipeList: [UserMetadata.init()],
});

// Stands for your own authentication: a client must not choose its user id.
const CurrentUser = createParamDecorator((_: unknown, context: ExecutionContext): string => {
  const userId = context.switchToHttp().getRequest().headers["x-user-id"];
  if (!userId) throw new UnauthorizedException();
  return userId;
});

@Controller()
class UserInfo {
  @Post("updateinfo")
  @HttpCode(200)
  async update(@CurrentUser() userId: string, @Body() update: Record<string, any>) {
    await UserMetadata.updateUserMetadata(userId, update);
    return { message: "successfully updated user metadata" };
  }

  @Get("userinfo")
  async read(@CurrentUser() userId: string) {
    return (await UserMetadata.getUserMetadata(userId)).metadata;
  }

  @Delete("userinfo")
  async clear(@CurrentUser() userId: string) {
    await UserMetadata.clearUserMetadata(userId);
    return { message: "successfully cleared user metadata" };
  }
}

@Module({ controllers: [UserInfo] })
class App {}

async function main() {
  const app = await NestFactory.create(App, { logger: ["error"] });
  app.use(middleware(), errorHandler());
  await app.listen(process.env.PORT!);
  console.log(await app.getUrl());
}

main();
