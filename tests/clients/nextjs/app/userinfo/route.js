import { forUser, UserMetadata } from "../supertokens";

export const GET = forUser(async (userId) => {
  return (await UserMetadata.getUserMetadata(userId)).metadata;
});

export const DELETE = forUser(async (userId) => {
  await UserMetadata.clearUserMetadata(userId);
  return { message: "successfully cleared user metadata" };
});
