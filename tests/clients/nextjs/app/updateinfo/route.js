import { forUser, UserMetadata } from "../supertokens";

export const POST = forUser(async (userId, request) => {
  await UserMetadata.updateUserMetadata(userId, await request.json());
  return { message: "successfully updated user metadata" };
});
