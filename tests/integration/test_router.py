# SPDX-License-Identifier: BSD-3-Clause
"""The router: the path of a URL selects the slot, tokens stay out of the journal, sockets are protected."""

import base64
import gzip
import hashlib
import http.client
import os
import re
import signal
import threading
from urllib.parse import urlsplit

import pytest

import product
from notebook import Kernel
from product import Api

UNKNOWN = "{label}-0123456789ab"
ASSET = re.compile(r'/assets/sha256-[0-9a-f]+/lab/[^"\s>]+\.js(?:\?[^"\s>]*)?')


@pytest.fixture
def label(agent):
    return agent.api.get("/stats").json()["label"]


def page_of(agent, claim):
    """The HTML at the url of a claim."""
    response = agent.router.get(f"{claim['path']}?token={claim['token']}")
    assert response.status == 200
    return response.body.decode()


def test_path_selects_the_slot(agent):
    one, two = agent.open(), agent.open()
    assert one.run("import os; os.environ['NBAGENT_SLOT']").text == repr(one.slot)
    assert two.run("import os; os.environ['NBAGENT_SLOT']").text == repr(two.slot)


def test_websocket_survives_a_reload_of_the_router(agent):
    kernel = agent.open().kernel()
    assert kernel.run("x = 21").status == "ok"
    agent.run("systemctl", "reload", "nbagent-router.service")
    agent.wait(lambda: agent.router.get("/healthz").status == 200, "a response of the router")
    assert kernel.run("2 * x").text == "42"
    kernel.end()


def test_a_kernel_is_reached_again_after_a_restart_of_the_router(agent):
    notebook = agent.open()
    kernel = notebook.kernel()
    kernel.run("x = 21")
    kernel.close()
    agent.run("systemctl", "restart", "nbagent-router.service")
    again = Kernel(notebook, kernel.id)
    assert again.run("2 * x").text == "42"
    again.end()


def test_unknown_slot_is_a_page_for_people_and_a_problem_for_programs(agent, label):
    base = "/user/" + UNKNOWN.format(label=label)
    page = agent.router.get(base + "/lab", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert page.status == 404 and page.headers["content-type"].startswith("text/html")
    assert b"<h1>This notebook is no longer running</h1>" in page.body
    assert page.headers["cache-control"] == "no-store"
    for path in ("/api/contents", "/api/kernels/x/channels", "/api"):
        problem = agent.router.get(base + path, Accept="*/*")
        assert problem.status == 404
        assert problem.headers["content-type"].startswith("application/problem+json")
        assert problem.json()["type"] == "urn:nbagent:problem:slot-not-found"


def test_other_paths_are_not_found(agent):
    for path in ("/user/", "/user/x/lab", "/user/UPPER-case/lab", "/user/a-b.c/lab", "/favicon.ico",
                 "/_nbagent/ended.html"):
        response = agent.router.get(path, Accept="text/html")
        assert response.status == 404, path
        assert b"nothing at this address" in response.body


def test_path_without_a_slash_is_redirected_with_method_and_query(agent):
    claim = agent.claim()
    response = agent.router.get(f"/user/{claim['slot']}?token={claim['token']}")
    assert response.status == 308
    assert response.headers["location"] == f"/user/{claim['slot']}/?token={claim['token']}"


def test_static_files_are_served_while_the_slot_is_stopped(agent):
    claim = agent.claim()
    asset = ASSET.search(page_of(agent, claim))
    assert asset, "the page loads no script"
    pids = agent.processes(claim["slot"])
    assert pids
    for pid in pids:
        agent.run("kill", f"-{signal.SIGSTOP.name[3:]}", str(pid))
    try:
        with pytest.raises((TimeoutError, http.client.HTTPException)):
            Api(agent.host, product.ROUTER_PORT, timeout=2).get(f"/user/{claim['slot']}/api")
        plain = agent.router.get(asset[0])
        packed = agent.router.get(asset[0], **{"Accept-Encoding": "gzip"})
    finally:
        for pid in pids:
            agent.run("kill", "-CONT", str(pid))
    assert plain.status == packed.status == 200
    assert plain.headers["content-type"].startswith("text/javascript")
    assert plain.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    assert packed.headers["vary"] == "Accept-Encoding"
    assert gzip.decompress(packed.body) == plain.body
    assert agent.router.get(f"/user/{claim['slot']}/api").status == 200


def test_unchanged_file_is_not_sent_again(agent):
    claim = agent.claim()
    asset = ASSET.search(page_of(agent, claim))[0]
    first = agent.router.get(asset)
    assert agent.router.get(asset, **{"If-None-Match": first.headers["etag"]}).status == 304


@pytest.mark.parametrize("path", ["static/../slot.json", "static/%2e%2e/slot.json", "static/..%2fslot.json",
                                  "static/lab/../../../slot.json", "slot.json", "http.sock"])
def test_path_traversal_from_the_static_files(agent, path):
    claim = agent.claim()
    response = agent.router.get(f"/user/{claim['slot']}/{path}")
    assert response.status in (302, 400, 403, 404)
    assert claim["token"] not in response.body.decode()


@pytest.mark.parametrize("path", ["/claim", "/slots", "/readyz", "/metrics", "/drain", "/images", "/openapi.json"])
def test_control_api_is_not_on_the_users_port(agent, path):
    before = len(agent.slots("claimed"))
    for method in ("GET", "POST", "DELETE"):
        assert agent.router.call(method, path, headers={"Accept": "application/json"}).status == 404
    assert len(agent.slots("claimed")) == before


def test_failed_requests_put_no_token_into_the_journal(agent, label):
    claim = agent.claim()
    token, base = claim["token"], f"/user/{claim['slot']}"
    silent = f"{label}-silent0silent"
    agent.run("mkdir", f"/run/nbagent/slots/{silent}")
    try:
        for path in ("/lab", "", "/no/such/page", "/api/contents", "/static/lab/none.js", "/api/contents/none"):
            agent.router.get(f"{base}{path}?token={token}", Referer=f"http://127.0.0.1:8000{base}/lab?token={token}")
        broken = agent.router.get(f"/user/{silent}/lab?token={token}", Referer=f"http://x/lab?token={token}",
                                  Accept="text/html")
        gone = agent.router.get(f"/user/{UNKNOWN.format(label=label)}/lab?token={token}")
        huge = agent.router.get(f"{base}/lab?token={token}&x={'y' * 40000}")
    finally:
        agent.run("rmdir", f"/run/nbagent/slots/{silent}")
    assert (broken.status, gone.status, huge.status) == (502, 404, 414)
    assert b"does not answer" in broken.body

    def lines():
        return [entry for entry in agent.journal("-t", "nbagent_router") if silent in str(entry["MESSAGE"])]

    agent.wait(lines, "the router's line about the unresponsive slot")
    text = agent.run("journalctl", "--no-pager", "--all", "-o", "json")
    assert token not in text and "token=" not in "".join(str(line) for line in lines())
    assert agent.run("sh", "-c", f"grep -rls {token} /var/log/nginx /run/nbagent-router; true") == ""


@pytest.mark.parametrize(("user", "permitted"), [
    ("root", True), ("nbagent-router", True), ("nbagent", False), ("nobody", False),
])
def test_only_root_and_the_router_reach_a_slots_socket(agent, user, permitted):
    slot = agent.claim()["slot"]
    directory = f"/run/nbagent/slots/{slot}"
    done = agent.host.run(["runuser", "-u", user, "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}",
                           "--unix-socket", f"{directory}/http.sock", f"http://slot/user/{slot}/api"], check=False)
    assert (done.returncode, done.stdout) == ((0, "200") if permitted else (7, "000"))
    if user != "root":
        for command in (["cat", f"{directory}/slot.json"], ["ls", "/run/nbagent/slots"]):
            assert agent.host.run(["runuser", "-u", user, "--", *command], check=False).returncode != 0


@pytest.mark.parametrize(("proto", "secure"), [
    (None, False), ("http", False), ("https", True), ("gopher", False), ("https,http", True), ("http, https", False),
    ("HTTPS", True),
])
def test_scheme_of_a_tls_proxy_reaches_the_slot(agent, proto, secure):
    claim = agent.claim()
    headers = ["-H", f"Host: {claim['slot']}.nb.test"] + (["-H", f"X-Forwarded-Proto: {proto}"] if proto else [])
    url = f"http://127.0.0.1:8000{claim['path']}?token={claim['token']}"
    response = agent.run("curl", "-sS", "-D", "-", "-o", "/dev/null", *headers, url)
    # The slot names its login cookie by the scheme, because browsers accept the prefix __Host- only by TLS.
    name = f"__Host-nbagent-{claim['slot']}=" if secure else f"nbagent-{claim['slot']}="
    login = [line for line in response.splitlines() if line.startswith(f"Set-Cookie: {name}")]
    assert len(login) == 1, response
    assert ("; Secure" in login[0]) is secure


def test_cookies_of_other_services_on_the_domain_do_no_harm(agent):
    notebook = agent.open()
    for sizes, expected in (([9000], 200), ([4000] * 6, 200), ([4000] * 12, 431)):
        cookies = "; ".join(f"service{number}={'x' * size}" for number, size in enumerate(sizes))
        response = notebook.router.get(f"{notebook.base}api/status", Cookie=cookies, **notebook.headers)
        assert response.status == expected
        assert (b"headers-too-large" in response.body) is (expected == 431)


def test_upload_of_100_megabytes_in_chunks_as_by_jupyterlab(agent):
    notebook = agent.open()
    chunk, chunks, total = os.urandom(4 << 20), 25, hashlib.sha256()
    for number in range(1, chunks + 1):
        total.update(chunk)
        body = {"type": "file", "format": "base64", "content": base64.b64encode(chunk).decode(),
                "chunk": -1 if number == chunks else number}
        response = notebook.router.call("PUT", f"{notebook.base}api/contents/big.bin", body, notebook.headers)
        assert response.status in (200, 201), response.body[:500]
    code = "import hashlib; hashlib.file_digest(open('big.bin', 'rb'), 'sha256').hexdigest()"
    assert notebook.run(code).text == repr(total.hexdigest())


def test_upload_and_download_of_100_megabytes_in_one_request(agent):
    notebook = agent.open(memory="2G")
    content = os.urandom(1 << 20) * 100
    body = {"type": "file", "format": "base64", "content": base64.b64encode(content).decode()}
    response = notebook.router.call("PUT", f"{notebook.base}api/contents/big.bin", body, notebook.headers)
    assert response.status == 201, response.body[:500]
    back = notebook.router.call("GET", f"{notebook.base}files/big.bin", headers=notebook.headers)
    assert back.status == 200 and back.body == content


def test_body_above_the_limit_is_refused_before_it_is_sent(agent):
    notebook = agent.open()
    with agent.host.connect(product.ROUTER_PORT) as connection:
        connection.sendall(f"PUT {notebook.base}api/contents/x HTTP/1.1\r\nHost: x\r\n"
                           f"Authorization: token {notebook.token}\r\n"
                           f"Content-Type: application/json\r\nContent-Length: {(512 << 20) + 1}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_restart_of_the_router_loses_no_connection(agent):
    path = f"/user/{agent.claim()['slot']}/api"
    failures, successes, stop = [], [], threading.Event()

    def send():
        while not stop.is_set():
            try:
                status = agent.router.get(path).status
            except (OSError, http.client.HTTPException) as error:
                status = repr(error)
            (successes if status == 200 else failures).append(status)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = len(successes)
            agent.run("systemctl", "restart", "nbagent-router.service")
            agent.wait(lambda before=before: failures or len(successes) > before + 10, "responses after the restart")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_url_of_a_claim_has_the_address_of_the_router(agent):
    parts = urlsplit(agent.claim()["url"])
    assert (parts.hostname, parts.port) == ("127.0.0.1", product.ROUTER_PORT)


def test_listening_sockets_of_the_router_do_not_block(agent):
    """A worker that blocks in accept(2) would serve none of its connections meanwhile."""
    flags = agent.run("sh", "-c", "for pid in $(pgrep -u nbagent-router nginx); do "
                      "grep -h ^flags: /proc/$pid/fdinfo/3; done")
    assert len(flags.splitlines()) >= 2
    assert all(int(line.split()[1], 8) & os.O_NONBLOCK for line in flags.splitlines())


def test_an_error_in_a_file_of_the_operator_changes_nothing_and_is_named(agent):
    agent.expect(r"nbagent-router")
    file = "/etc/nbagent/router.d/bad.conf"
    agent.host.run(["tee", file], input="no_such_directive on;\n")
    try:
        assert agent.host.run(["systemctl", "reload", "nbagent-router.service"], check=False).returncode != 0
        for command in (["nbagent", "config", "check"], ["nbagent", "doctor"]):
            done = agent.host.run(command, check=False)
            assert done.returncode != 0 and "no_such_directive" in done.stdout + done.stderr
        assert agent.router.get("/").status == 200
        # A start uses the files of the last time.
        agent.run("systemctl", "restart", "nbagent-router.service")
        agent.wait(lambda: agent.router.get("/").status == 200, "the router after its restart")
    finally:
        agent.run("rm", file)
    agent.run("systemctl", "reload", "nbagent-router.service")
    assert agent.router.get("/").status == 200
