package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"

	"github.com/supertokens/supertokens-golang/recipe/usermetadata"
	"github.com/supertokens/supertokens-golang/supertokens"
)

// Stands for your own authentication: a client must not choose its user id.
func currentUser(request *http.Request) string {
	return request.Header.Get("x-user-id")
}

func updateInfo(writer http.ResponseWriter, request *http.Request) {
	var update map[string]interface{}
	if err := json.NewDecoder(request.Body).Decode(&update); err != nil {
		http.Error(writer, err.Error(), http.StatusBadRequest)
		return
	}
	_, err := usermetadata.UpdateUserMetadata(currentUser(request), update)
	answer(writer, map[string]string{"message": "successfully updated user metadata"}, err)
}

func userInfo(writer http.ResponseWriter, request *http.Request) {
	if request.Method == http.MethodDelete {
		err := usermetadata.ClearUserMetadata(currentUser(request))
		answer(writer, map[string]string{"message": "successfully cleared user metadata"}, err)
		return
	}
	metadata, err := usermetadata.GetUserMetadata(currentUser(request))
	answer(writer, metadata, err)
}

func answer(writer http.ResponseWriter, content interface{}, err error) {
	if err != nil {
		http.Error(writer, err.Error(), http.StatusInternalServerError)
		return
	}
	json.NewEncoder(writer).Encode(content)
}

func main() {
	err := supertokens.Init(supertokens.TypeInput{
		Supertokens: &supertokens.ConnectionInfo{
			ConnectionURI: os.Getenv("SUPERTOKENS_URI"), // http://127.0.0.1:3567
			APIKey:        os.Getenv("SUPERTOKENS_API_KEY"),
		},
		AppInfo: supertokens.AppInfo{
			AppName: "shop", APIDomain: "http://localhost", WebsiteDomain: "http://localhost",
		},
		RecipeList: []supertokens.Recipe{usermetadata.Init(nil)},
	})
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/updateinfo", updateInfo)
	http.HandleFunc("/userinfo", userInfo)
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), supertokens.Middleware(http.DefaultServeMux)))
}
