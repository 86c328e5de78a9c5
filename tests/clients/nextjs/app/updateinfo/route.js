import { currentUser, UserMetadata } from "../supertokens";

export async function POST(request) {
  await UserMetadata.updateUserMetadata(currentUser(request), await request.json());
  return Response.json({ message: "successfully updated user metadata" });
}
