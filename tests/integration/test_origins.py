# SPDX-License-Identifier: BSD-3-Clause
"""Isolation between the slots that one browser has open: headers, cookies and URLs of one slot against another.

The attacker here is a slot whose server sends any status, headers and body that the query of a request contains.
To the router it is a slot like any other.
"""

import json
import re
import socket
import subprocess
from urllib.parse import urlencode

import pytest
import websocket

import browser
import product
from notebook import Notebook

DOMAIN = "nb.test"
SUBDOMAINS = f'[router]\nurl_mode = "subdomain"\ndomain = "{DOMAIN}"\n'
UNITS = ("nbagent-api.service", "nbagent-router.service")

ATTACKER = r'''
"""Sends the headers and the body that the query contains; without a body, the path and headers of the request."""
import json, os, socketserver, sys
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, urlsplit

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        query = parse_qsl(urlsplit(self.path).query)
        request = {"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
        body = dict(query).get("body", json.dumps(request)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in query:
            if name == "header":
                self.send_header(*value.split(": ", 1))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass

os.umask(0)
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
Server(sys.argv[1], Handler).serve_forever()
'''


def configure(agent, settings):
    """Applies settings, and waits until the API and the router use them."""
    agent.configure(settings)
    agent.run("systemctl", "reload", *UNITS)
    misplaced = 421 if settings else 404
    agent.wait(lambda: all(agent.router.get("/user/x-000000000000/api").status == misplaced for _ in range(3)),
               "the router's settings")
    key = {"Idempotency-Key": f"settings-{len(settings)}"}
    agent.wait(lambda: (DOMAIN in agent.api.post("/claim", {}, **key).json()["url"]) == bool(settings),
               "the API's settings")


@pytest.fixture
def subdomains(agent):
    """The shared host in subdomain mode."""
    try:
        configure(agent, SUBDOMAINS)
        yield agent
    finally:
        configure(agent, "")


@pytest.fixture(scope="module")
def attacker(shared):
    """The id of the attacker's slot."""
    slot = f"{shared.api.get('/stats').json()['label']}-attacker0000"
    directory = f"/run/nbagent/slots/{slot}"
    shared.run("mkdir", directory)
    shared.host.run(["tee", "/root/attacker.py"], input=ATTACKER)
    shared.run("systemd-run", "--quiet", "--unit=attacker", "--collect",
               "/usr/bin/python3", "/root/attacker.py", f"{directory}/http.sock")
    shared.wait(lambda: shared.router.get(f"/user/{slot}/").status == 200, "a response of the attacker")
    yield slot
    shared.run("systemctl", "stop", "attacker.service")
    shared.run("rm", "-r", directory, "/root/attacker.py")


def curl(agent, path, *arguments, host=None):
    """Sends a request unchanged; returns the status, the lines of the headers, and the body."""
    host_header = ["-H", f"Host: {host}"] if host else []
    response = agent.run(
        "curl", "-sS", "--path-as-is", "--max-time", "120", "-i", *host_header, *arguments,
        f"http://127.0.0.1:8000{path}")
    head, _, body = response.replace("\r\n", "\n").partition("\n\n")
    status, *headers = head.splitlines()
    return int(status.split()[1]), headers, body


def path_for(slot, headers, body=None):
    """The path for which the attacker sends these headers."""
    query = [("header", header) for header in headers] + ([("body", body)] if body else [])
    return f"/user/{slot}/?{urlencode(query)}"


def forwarded_headers(agent, slot, *arguments, host=None):
    """The headers of a request when it reaches the attacker."""
    status, _, body = curl(agent, f"/user/{slot}/", *arguments, host=host)
    assert status == 200
    return json.loads(body)["headers"]


def log_in(agent, claim, host):
    """The Cookie header of a browser that has opened the url of a claim."""
    status, headers, _ = curl(agent, f"{claim['path']}?token={claim['token']}", host=host)
    assert status == 200
    return "; ".join(line.partition(": ")[2].partition(";")[0] for line in headers if line.startswith("Set-Cookie"))


@pytest.mark.parametrize("header", [
    'Alt-Svc: h3="evil.test:443"', 'Clear-Site-Data: "*"', 'NEL: {"report_to":"x","max_age":9}',
    "Origin-Agent-Cluster: ?0", 'Report-To: {"group":"x","max_age":9,"endpoints":[]}', "Service-Worker-Allowed: /",
    "Strict-Transport-Security: max-age=9; includeSubDomains", 'Use-As-Dictionary: match="/*"',
    'Sec-Session-Registration: (ES256);path="/x"', 'Secure-Session-Registration: (ES256);path="/x"',
])
def test_headers_that_apply_to_an_origin_or_a_domain_are_removed(agent, attacker, header):
    status, headers, _ = curl(agent, path_for(attacker, [header, "X-Other: y"]))
    assert status == 200 and "X-Other: y" in headers
    assert header not in headers


ISOLATION_HEADERS = {
    "Cross-Origin-Opener-Policy": ("same-origin-allow-popups", "same-origin"),
    "Cross-Origin-Resource-Policy": ("same-origin", "cross-origin"),
    "Referrer-Policy": ("same-origin", "no-referrer"),
    "X-Frame-Options": ("SAMEORIGIN", "DENY"),
}


@pytest.mark.parametrize("own", [False, True])
def test_isolation_headers_are_added_unless_the_slot_sets_them(agent, attacker, own):
    headers = [f"{name}: {values[1]}" for name, values in ISOLATION_HEADERS.items()] if own else []
    _, response_headers, _ = curl(agent, path_for(attacker, headers))
    found = [line for line in response_headers if line.partition(":")[0] in ISOLATION_HEADERS]
    assert sorted(found) == sorted(f"{name}: {values[own]}" for name, values in ISOLATION_HEADERS.items())
    assert "Origin-Agent-Cluster: ?1" in response_headers


def test_frame_ancestors_of_a_slot_replace_x_frame_options(agent, attacker):
    policy = "Content-Security-Policy: frame-ancestors https://school.example"
    _, response_headers, _ = curl(agent, path_for(attacker, [policy]))
    assert policy in response_headers and not [line for line in response_headers if line.startswith("X-Frame-Options")]


@pytest.mark.parametrize("target", ["/_nbagent/ended.html", "/healthz", "@slot", "@slot_failed", "victim"])
def test_x_accel_headers_of_a_slot_have_no_effect(agent, attacker, target):
    target = f"/user/{agent.claim()['slot']}/api" if target == "victim" else target
    headers = [f"X-Accel-Redirect: {target}", "X-Accel-Limit-Rate: 1", "X-Accel-Charset: koi8-r",
               "X-Accel-Expires: 9", "X-Accel-Buffering: yes", "Content-Type: text/plain"]
    status, response_headers, body = curl(agent, path_for(attacker, headers, "m" * 5000))
    assert (status, body) == (200, "m" * 5000)
    assert "Content-Type: text/plain; charset=utf-8" in response_headers
    assert not [line for line in response_headers if line.lower().startswith("x-accel")]


COOKIES = [
    ("a=b", "a=b; SameSite=Lax"),
    ("a=b; Path=/", "a=b; Path={root}; SameSite=Lax"),
    ("a=b; Path=/user/", "a=b; Path={root}; SameSite=Lax"),
    ("a=b; path=", "a=b; path={root}; SameSite=Lax"),
    ("a=b; Path=/user/x-victim000000/lab", "a=b; Path=/user/{slot}/lab; SameSite=Lax"),
    ("a=b; Path=/user/{slot}/x/; HttpOnly; Max-Age=9", "a=b; Path=/user/{slot}/x/; HttpOnly; Max-Age=9; SameSite=Lax"),
    ("a=b; Domain=nb.test", "a=b; Domain=; SameSite=Lax"),
    ("a=b; domain=.nb.test; DOMAIN=test; Path=/; SameSite=None; Secure",
     "a=b; domain=; DOMAIN=; Path={root}; SameSite=Lax; Secure"),
]


@pytest.mark.parametrize("mode", ["path", "subdomain"])
def test_cookie_is_limited_to_the_slot_that_sets_it(request, agent, attacker, mode):
    if mode == "subdomain":
        request.getfixturevalue("subdomains")
    names = {"slot": attacker, "root": f"/user/{attacker}/" if mode == "path" else "/"}
    original, rewritten = ([cookie[side].format(**names) for cookie in COOKIES] for side in (0, 1))
    path = path_for(attacker, [f"Set-Cookie: {cookie}" for cookie in original])
    _, headers, _ = curl(agent, path, host=f"{attacker}.{DOMAIN}")
    assert [line.removeprefix("Set-Cookie: ") for line in headers if line.startswith("Set-Cookie: ")] == rewritten


def test_cookie_that_is_set_by_tls_is_secure(agent, attacker):
    _, headers, _ = curl(agent, path_for(attacker, ["Set-Cookie: a=b"]), "-H", "X-Forwarded-Proto: https")
    assert "Set-Cookie: a=b; Secure; SameSite=Lax" in headers


def test_slot_receives_only_its_own_cookies(agent, attacker):
    cookies = {
        f"nbagent-{attacker}": "own", f"__Host-nbagent-{attacker}": "own-by-tls", "_xsrf": "2|x",
        "nbagent-x-victim000000": "login", "__Host-nbagent-x-victim000000": "login", "example_session": "sso",
        "username-localhost-8888": "another-jupyter", f"xnbagent-{attacker}": "no", f"nbagent-{attacker}0": "no",
    }
    text = "; ".join(f"{name}={value}" for name, value in cookies.items())
    own = f"__Host-nbagent-{attacker}=own-by-tls; nbagent-{attacker}=own; _xsrf=2|x"
    assert forwarded_headers(agent, attacker, "-H", f"Cookie: {text}")["cookie"] == own
    assert forwarded_headers(agent, attacker, "-H", f"Cookie: {';'.join(text.split('; ')[::-1])}")["cookie"] == own
    split = [argument for cookie in text.split("; ") for argument in ("-H", f"Cookie: {cookie}")]
    assert forwarded_headers(agent, attacker, *split)["cookie"] == own
    assert "cookie" not in forwarded_headers(agent, attacker, "-H", "Cookie: example_session=sso")


def test_cookies_in_the_settings_reach_the_slot(agent, attacker):
    try:
        agent.configure('[router]\ncookies = ["one", "two-*"]\n')
        agent.run("systemctl", "reload", "nbagent-router.service")
        cookies = ["-H", "Cookie: none=0; one=1; two-x.y=2; _xsrf=3; one2=4"]
        agent.wait(lambda: forwarded_headers(agent, attacker, *cookies).get("cookie") == "one=1; two-x.y=2",
                   "the router's settings")
    finally:
        configure(agent, "")


OWN, OTHER = "Origin: http://127.0.0.1:8000", "Origin: http://x-victim000000.nb.test:8000"


def test_headers_of_a_proxy_from_a_client_do_not_reach_a_slot(agent, attacker):
    forged = ["X-Nbagent-Gateway: 1", "Forwarded: for=192.0.2.1;host=evil.example", "X-Forwarded-Host: evil.example",
              "X-Scheme: https", "X-Real-IP: 192.0.2.1", "X-Real-Ip: 192.0.2.2", "X_Real_IP: 192.0.2.3"]
    headers = forwarded_headers(agent, attacker, *(word for header in forged for word in ("-H", header)))
    assert not {"x-nbagent-gateway", "forwarded", "x-forwarded-host", "x-scheme", "x_real_ip"} & set(headers)
    assert headers["x-real-ip"] == "127.0.0.1"


@pytest.mark.parametrize(("headers", "with_cookies"), [
    ([], True), ([OWN], True), ([OWN.upper().replace("ORIGIN", "Origin")], True), ([OTHER], False),
    (["Origin: null"], False), (["Origin: http://127.0.0.1"], False), (["Origin: http://127.0.0.1:80001"], False),
    (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty"], True),
    (["Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], True),
    (["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"], False),
    (["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"], False),
    (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], True),
    ([OTHER, "Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], False),
])
def test_requests_of_other_origins_are_forwarded_without_cookies(agent, attacker, headers, with_cookies):
    cookie = f"nbagent-{attacker}=login"
    lines = [argument for header in (f"Cookie: {cookie}", *headers) for argument in ("-H", header)]
    assert forwarded_headers(agent, attacker, *lines).get("cookie") == (cookie if with_cookies else None)


@pytest.mark.parametrize("mode", ["path", "subdomain"])
def test_other_origin_cannot_write_read_or_connect(request, agent, mode):
    if mode == "subdomain":
        request.getfixturevalue("subdomains")
    one, two = agent.claim(), agent.claim()
    host = f"{one['slot']}.{DOMAIN}:8000" if mode == "subdomain" else "127.0.0.1:8000"
    other = f"http://{two['slot']}.{DOMAIN}:8000"
    cookies, base = log_in(agent, one, host), f"/user/{one['slot']}/"
    xsrf = re.search(r"_xsrf=([^;]*)", cookies)[1]
    own = ["-H", f"Cookie: {cookies}", "-H", f"Origin: http://{host}"]
    foreign = ["-H", f"Cookie: {cookies}", "-H", f"Origin: {other}"]
    kernel = ["-X", "POST", "-H", f"X-XSRFToken: {xsrf}", "-d", "{}"]
    status, _, body = curl(agent, f"{base}api/kernels", *own, *kernel, host=host)
    assert status == 201
    channels = f"{base}api/kernels/{json.loads(body)['id']}/channels"
    for change in (kernel, ["-X", "DELETE"], []):
        status, headers, _ = curl(agent, f"{base}api/kernels", *foreign, *change, host=host)
        assert status in (403, 404), change
        assert not [line for line in headers if line.lower().startswith("access-control-allow-credentials")]
    assert len(json.loads(curl(agent, f"{base}api/kernels", *own, host=host)[2])) == 1
    connect(agent, host, channels, f"http://{host}", cookies).close()
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        connect(agent, host, channels, other, cookies)
    assert refused.value.status_code == 403


@pytest.mark.parametrize("mode", ["path", "subdomain"])
def test_page_of_another_site_with_the_token_can_use_the_slot(request, agent, mode):
    """Thebe and similar libraries run the code in a web page by the token alone, without cookies.

    For requests with a preflight, ServerApp.allow_origin of the image must name such sites.
    """
    if mode == "subdomain":
        request.getfixturevalue("subdomains")
    claim, origin = agent.claim(), "https://textbook.example"
    host, base = f"{claim['slot']}.{DOMAIN}:8000", f"/user/{claim['slot']}/"
    site = ["-H", f"Origin: {origin}", "-H", "Sec-Fetch-Site: cross-site", "-H", "Sec-Fetch-Mode: cors"]
    token = ["-H", f"Authorization: token {claim['token']}"]
    for status, arguments in ((201, [*token, "-d", "{}"]), (200, token)):
        response_status, headers, body = curl(agent, f"{base}api/kernels", *site, *arguments, host=host)
        assert response_status == status
        assert f"Access-Control-Allow-Origin: {origin}" in headers
    channels = f"{base}api/kernels/{json.loads(body)[0]['id']}/channels"
    connect(agent, host, f"{channels}?token={claim['token']}", origin, None).close()
    with pytest.raises(websocket.WebSocketBadStatusException):
        connect(agent, host, channels, origin, None)


def connect(agent, host, path, origin, cookies):
    """Opens a websocket with the headers of a browser."""
    with agent.host.connect(product.ROUTER_PORT) as connection:
        return websocket.create_connection(
            f"ws://{host}{path}", socket=socket.socket(fileno=connection.detach()), origin=origin, cookie=cookies,
            timeout=60)


def test_path_that_browsers_and_nginx_resolve_differently_is_refused(agent, attacker):
    victim = agent.claim()["slot"]
    # For a browser this path is below that of the victim, so it sends the victim's cookies.
    for ambiguous in (f"/user/{victim}/..%2f{attacker}/", f"/user/{victim}%2f..%2f{attacker}/",
                    f"//user/{attacker}/", f"/user/%{ord(attacker[0]):x}{attacker[1:]}/",
                    f"/user/{victim}/..%2f{attacker}/static/x", f"/user/{victim}/..%2f{attacker}"):
        status, _, body = curl(agent, ambiguous, "-H", "Accept: application/json")
        assert status == 421, ambiguous
        assert json.loads(body)["type"] == "urn:nbagent:problem:misdirected"
    assert curl(agent, f"/user/{attacker}/..%2f{attacker}/")[0] == 200


def test_subdomain_mode_serves_a_slot_at_its_own_host_name_only(subdomains, attacker):
    agent, slot = subdomains, subdomains.claim()["slot"]
    base = f"/user/{slot}/"
    for host in (f"{slot}.{DOMAIN}", f"{slot}.{DOMAIN}:8000", f"{slot.upper()}.{DOMAIN}"):
        assert curl(agent, f"{base}api", host=host)[0] == 200, host
    asset = f"{base}static/favicon.ico"
    assert curl(agent, asset, "-o", "/dev/null", "-D", "-", host=f"{slot}.{DOMAIN}")[0] == 200
    for host in (f"{attacker}.{DOMAIN}", DOMAIN, "127.0.0.1:8000", f"x.{slot}.{DOMAIN}", f"{slot}.{DOMAIN}x", slot,
                 f"{slot}.{DOMAIN}.evil.test", f"{slot}.nbxtest"):
        for path in (f"{base}api", asset, base.rstrip("/")):
            status, _, body = curl(agent, path, "-H", "Accept: application/json", host=host)
            assert status == 421, (host, path)
            assert "misdirected" in body
    page = curl(agent, f"{base}lab", "-H", "Accept: text/html", host=DOMAIN)
    assert page[0] == 421 and "This notebook has another address" in page[2]
    assert curl(agent, "/healthz", host=DOMAIN)[0] == 200


def test_reload_with_invalid_settings_changes_nothing(agent):
    agent.expect("Reload failed for nbagent-router.service")
    path = "/etc/nbagent/conf.d/90-one-test.toml"
    slot = agent.claim()["slot"]
    agent.host.run(["tee", path], input='[router]\nurl_mode = "port"\n')
    done = agent.host.run(["systemctl", "reload", "nbagent-router.service"], check=False)
    agent.run("rm", path)
    assert done.returncode != 0
    assert agent.router.get(f"/user/{slot}/api").status == 200
    lines = [str(entry["MESSAGE"]) for entry in agent.journal("-u", "nbagent-router.service")]
    assert [line for line in lines if f'{path}: router.url_mode: expected "path" or "subdomain"' in line]
    agent.run("systemctl", "reload", "nbagent-router.service")


def test_each_slot_has_its_own_token_cookie_secret_and_session_key(agent):
    claims = [agent.claim() for _ in range(2)]
    code = """if True:
        import ipykernel, json
        from pathlib import Path
        print(json.loads(Path(ipykernel.get_connection_file()).read_text())["key"])
    """
    keys = [Notebook(agent.host, claim).run(code).stream.strip() for claim in claims]
    assert all(len(key) > 30 for key in keys)
    assert len({claim["token"] for claim in claims} | set(keys)) == 4
    one, two = claims
    logins = [log_in(agent, claim, "127.0.0.1:8000") for claim in claims]
    for cookies, status in ((logins[0], 200), (logins[1], 403), (logins[1].replace(two["slot"], one["slot"]), 403)):
        assert curl(agent, f"/user/{one['slot']}/api/contents", "-H", f"Cookie: {cookies}")[0] == status
    assert curl(agent, f"/user/{one['slot']}/api/contents?token={two['token']}")[0] == 403


# A proxy that terminates TLS, as operators run one; here it is a server of the router's nginx.
TLS_PROXY = """
server {
    listen 8443 ssl;
    ssl_certificate /etc/nbagent/tls.pem;
    ssl_certificate_key /etc/nbagent/tls.pem;
    location / {
        proxy_pass http://127.0.0.1:8000;
        proxy_http_version 1.1;
        proxy_set_header Connection $connection_upgrade;
        proxy_set_header Host $http_host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header X-Forwarded-Proto https;
    }
}
"""


@pytest.fixture
def tls(agent, tmp_path):
    """The shared host in subdomain mode with TLS; the value is its port on this machine."""
    pem = tmp_path / "tls.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-subj", f"/CN=*.{DOMAIN}", "-days", "2", "-keyout", pem, "-out", f"{pem}.crt"],
                   check=True, capture_output=True)
    agent.host.run(["tee", "/etc/nbagent/tls.pem"], input=pem.read_text() + pem.with_suffix(".pem.crt").read_text())
    agent.host.run(["tee", "/etc/nbagent/router.d/tls.conf"], input=TLS_PROXY)
    port = agent.host.forward(8443, 0)
    try:
        configure(agent, f'{SUBDOMAINS}public_url = "https://{DOMAIN}:{port}"\n')
        yield port
    finally:
        agent.run("rm", "/etc/nbagent/tls.pem", "/etc/nbagent/router.d/tls.conf")
        configure(agent, "")


@pytest.fixture
def page(tmp_path):
    """Chromium, which resolves every name of the domain to this machine and accepts every certificate."""
    with browser.chromium(tmp_path, f"--host-resolver-rules=MAP *.{DOMAIN} 127.0.0.1",
                          "--ignore-certificate-errors") as opened:
        yield opened


def run_notebook(page, url):
    """Opens a notebook and runs its first cell, by which page, static files, websocket and kernel are checked."""
    page.open(url)
    page.read(".jp-Notebook", "Welcome to your notebook")
    page.wait_for_kernel()
    page.select_first_cell()
    page.run_cell()
    page.read(".jp-CodeCell .jp-OutputArea-output", "Hello from Python")


# Attacks of a page on another slot at `base` and `socket`. Each returns what it has read, or throws an error.
ATTEMPTS = {
    "read": "const a = await fetch(base + 'lab', {credentials: 'include'}); return await a.text()",
    "identity": "const a = await fetch(base + 'api/me', {credentials: 'include'}); return await a.text()",
    "frame": """const f = document.createElement('iframe'); f.src = base + 'lab';
        await new Promise(resolve => { f.onload = resolve; document.body.append(f) });
        return f.contentDocument.documentElement.outerHTML""",
    "window": """const w = window.open(base + 'lab');
        let reason = 'timeout';
        for (let i = 0; i < 600; i++) {
            await new Promise(resolve => setTimeout(resolve, 50));
            if (w.closed) return 'cut off';
            try {
                if (w.location.href == 'about:blank' || w.document.readyState != 'complete') continue;
                const text = w.document.documentElement.outerHTML; w.close(); return text;
            } catch (error) { reason = error }
        }
        throw reason""",
    "start": """const x = await fetch(base + 'api/kernels', {method: 'POST', credentials: 'include', mode: 'no-cors',
        body: '{}', headers: {'Content-Type': 'text/plain'}}); return String(x.status)""",
    "connect": """return await new Promise((resolve, reject) => {
        const s = new WebSocket(socket); s.onopen = () => resolve('open'); s.onerror = () => reject('refused') })""",
}


class Attack:
    """The attacker's page in a browser that has opened the victim's notebook before."""

    def __init__(self, page, attacker, attacker_origin, victim, victim_origin, kernel):
        self.page, self.attacker = page, attacker
        self.base = f"{victim_origin}/user/{victim}/"
        self.socket = f"{self.base.replace('http', 'ws', 1)}api/kernels/{kernel}/channels"
        headers = ["Content-Type: text/html", f"Set-Cookie: tossed-by-http=1; Domain={DOMAIN}; Path=/"]
        page.open(attacker_origin + path_for(attacker, headers, "<h1>Look, kittens</h1>"))
        page.read("h1", "Look, kittens")

    def run(self, script):
        """The result of a script of the page."""
        self.page.driver.set_script_timeout(60)
        return self.page.driver.execute_async_script(
            f"const [base, socket, done] = arguments; (async () => {{ {script} }})()"
            ".then(got => done('got ' + got), why => done('failed: ' + why))", self.base, self.socket)


def kernels(agent, claim, host):
    """The ids of the kernels that run in a slot."""
    path = f"/user/{claim['slot']}/api/kernels?token={claim['token']}"
    return [kernel["id"] for kernel in json.loads(curl(agent, path, host=host)[2])]


def test_subdomain_mode_isolates_pages_of_slots(agent, tls, page, attacker):
    victim = agent.claim(path="lab/tree/Welcome.ipynb")
    slot, host = victim["slot"], f"{victim['slot']}.{DOMAIN}"
    origin = f"https://{host}:{tls}"
    assert victim["url"] == f"{origin}{victim['path']}?token={victim['token']}"
    run_notebook(page, victim["url"])
    page.shoot("victim")
    running = kernels(agent, victim, host)
    attack = Attack(page, attacker, f"https://{attacker}.{DOMAIN}:{tls}", slot, origin, running[0])
    page.shoot("attacker")
    failed = {name: attack.run(script) for name, script in ATTEMPTS.items()}
    page.close_others()
    assert failed["read"].startswith("failed: TypeError: Failed to fetch")
    assert failed["identity"].startswith("failed: TypeError: Failed to fetch")
    assert failed["frame"].startswith("failed: TypeError: Cannot read properties of null")
    assert failed["window"] == "got cut off"
    assert failed["start"].startswith("failed: TypeError: Failed to fetch")
    assert failed["connect"] == "failed: refused"
    assert kernels(agent, victim, host) == running
    # A browser accepts cookies for the whole domain from a script, under the names of the victim's cookies too.
    attack.run(f"""for (const cookie of ['nbagent-{slot}', '__Host-nbagent-{slot}', '_xsrf'])
        for (const path of ['/', '/user/{slot}/', '/user/{slot}/lab'])
            document.cookie = `${{cookie}}=2|tossed; Secure; Domain={DOMAIN}; Path=${{path}}`""")
    # The URL has no token, so this succeeds only if the login cookie survived the attack.
    run_notebook(page, f"{origin}/user/{slot}/lab/tree/Welcome.ipynb")
    page.shoot("victim-afterwards")
    cookies = page.driver.get_cookies()
    assert {cookie["name"] for cookie in cookies if "tossed" in cookie["value"]} == {f"nbagent-{slot}", "_xsrf"}
    assert "tossed-by-http" not in {cookie["name"] for cookie in cookies}
    login = [cookie for cookie in cookies if cookie["name"] == f"__Host-nbagent-{slot}"]
    assert [(c["domain"], c["path"], c["secure"], c["httpOnly"]) for c in login] == [(host, "/", True, True)]


def test_path_mode_does_not_isolate_pages_of_slots(agent, page, attacker):
    """A page of one slot has full access to another slot in the same browser, as the README warns."""
    origin = f"http://127.0.0.1:{agent.host.forward(product.ROUTER_PORT, 0)}"
    victim = agent.claim(path="lab/tree/Welcome.ipynb")
    slot = victim["slot"]
    page.open(f"{origin}{victim['path']}?token={victim['token']}")
    page.wait_for_kernel()
    attack = Attack(page, attacker, origin, slot, origin, kernels(agent, victim, None)[0])
    for name in ("read", "frame", "window"):
        assert victim["token"] in attack.run(ATTEMPTS[name]), name
    assert attack.run(ATTEMPTS["connect"]) == "got open"
    # Even in path mode, no service worker for the paths of other slots remains when the page is closed.
    worker = path_for(attacker, ["Content-Type: text/javascript", "Service-Worker-Allowed: /"], "self.x = 1")
    register = "const found = await navigator.serviceWorker.register('{}', {{scope: '{}'}}); return found.scope"
    assert "failed: SecurityError" in attack.run(register.format(worker, "/"))
    assert attack.run(register.format(worker, f"/user/{attacker}/")) == f"got {origin}/user/{attacker}/"
