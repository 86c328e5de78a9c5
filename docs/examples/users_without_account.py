"""Print the ids on the lines of ``export`` that the SuperTokens core at SUPERTOKENS_URI lacks.

``usermetadata export | python users_without_account.py > user_ids.txt``
"""

import json
import os
import sys

import supertokens_python
from supertokens_python.recipe import accountlinking
from supertokens_python.syncio import get_user

supertokens_python.init(
    app_info=supertokens_python.InputAppInfo(
        app_name="shop", api_domain="http://localhost", website_domain="http://localhost"
    ),
    supertokens_config=supertokens_python.SupertokensConfig(os.environ["SUPERTOKENS_URI"]),
    framework="fastapi",
    recipe_list=[accountlinking.init()],
)

for line in sys.stdin:
    user_id = json.loads(line)["userId"]
    if get_user(user_id) is None:
        print(user_id)
