# SPDX-License-Identifier: BSD-3-Clause
"""Several answers of a slot's server in one response are those that the same requests get one by one."""

import json
from urllib.parse import urlencode

WELCOME = "api/contents/Welcome.ipynb?type=notebook&content=1&hash=1"
PATHS = ("api/kernelspecs", "api/nbconvert", "api/sessions", "lab/api/settings", "lab/api/settings?ids_only=true",
         "lab/api/workspaces/default", "lsp/status", "api/contents?content=1&hash=0", WELCOME)


def together(notebook, *paths, **headers):
    query = urlencode([("path", path) for path in paths])
    return notebook.router.call("GET", f"{notebook.base}api/nbagent/answers?{query}",
                                headers={**notebook.headers, **headers})


def test_answers_in_one_response_are_those_of_single_requests(agent):
    notebook = agent.open()
    single = notebook.router.call("GET", f"{notebook.base}api/nbconvert", headers=notebook.headers)
    found = together(notebook, *PATHS, **{"If-None-Match": single.headers["etag"]}).json()
    assert list(found) == list(PATHS)
    for path, (kind, text) in found.items():
        assert kind.partition(";")[0] == "application/json"
        assert json.loads(text) == notebook.get(path), path


def test_a_changed_file_is_in_the_next_response(agent):
    notebook = agent.open()
    assert notebook.run("open('one.txt', 'w').write('größer')").status == "ok"
    path = "api/contents/one.txt?content=1"
    assert json.loads(together(notebook, path).json()[path][1])["content"] == "größer"


def test_what_is_no_answer_of_the_api_is_left_out(agent):
    notebook = agent.open()
    inner = "api/nbagent/answers?path=api/kernels"
    bad = ("api/nothing", "api/contents/none.ipynb", "files/Welcome.ipynb", "lab", "../api/kernels", "/api/kernels",
           "api/kernels/../../lab", inner, "", "api/contents/%ff")
    assert list(together(notebook, *bad, "api/kernels").json()) == ["api/kernels"]
    assert together(notebook).json() == {}
    many = [f"api/kernels?{number}" for number in range(60)]
    assert len(together(notebook, *many).json()) == 40


def test_answers_need_the_slots_token(agent):
    notebook = agent.open()
    for token in ("token wrong", ""):
        assert together(notebook, "api/kernels", Authorization=token).status == 403
