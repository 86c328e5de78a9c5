import java.io.IOException;
import java.net.URI;
import java.net.URLEncoder;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;

public class Metadata {
    private static final String USERS =
            System.getenv("SUPERTOKENS_URI") + "/recipe/user/metadata";
    private static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] arguments) throws IOException, InterruptedException {
        // Use a JSON library to build the bodies from other values.
        send("PUT", "", "{\"userId\": \"al ice\", \"metadataUpdate\": {\"theme\": \"dark\"}}");
        send("PUT", "", "{\"userId\": \"al ice\", \"metadataUpdate\": {\"visits\": 1}}");
        String userId = URLEncoder.encode("al ice", StandardCharsets.UTF_8);
        System.out.println(send("GET", "?userId=" + userId, ""));
        send("POST", "/remove", "{\"userId\": \"al ice\"}");
        System.out.println(send("GET", "?userId=" + userId, ""));
    }

    private static String send(String method, String path, String body)
            throws IOException, InterruptedException {
        HttpRequest request = HttpRequest.newBuilder(URI.create(USERS + path))
                .header("api-key", System.getenv("SUPERTOKENS_API_KEY"))
                .header("content-type", "application/json")
                .method(method, body.isEmpty()
                        ? BodyPublishers.noBody()
                        : BodyPublishers.ofString(body))
                .build();
        var response = CLIENT.send(request, BodyHandlers.ofString());
        if (response.statusCode() != 200) {
            throw new IOException(response.statusCode() + " " + response.body());
        }
        return response.body();
    }
}
