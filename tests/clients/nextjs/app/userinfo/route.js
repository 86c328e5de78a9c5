import { currentUser, UserMetadata } from "../supertokens";

export async function GET(request) {
  return Response.json((await UserMetadata.getUserMetadata(currentUser(request))).metadata);
}

export async function DELETE(request) {
  await UserMetadata.clearUserMetadata(currentUser(request));
  return Response.json({ message: "successfully cleared user metadata" });
}
