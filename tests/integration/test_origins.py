"""Between the slots that one browser has open: what headers, cookies and addresses of one do to another.

A stranger here is a slot whose server is the worst that a user could run in one: it answers with what the request
asks for. The router takes it for any other slot.
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

STRANGER = r'''
"""Answers with the status, the type, the headers and the body that the query asks for; else says what it was sent."""
import json, os, socketserver, sys
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, urlsplit

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = parse_qsl(urlsplit(self.path).query)
        sent = {"path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}}
        body = dict(asked).get("body", json.dumps(sent)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in asked:
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
    """Other settings of the router, and waits until API and router go by them."""
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
    """The shared host, with an origin for each slot."""
    try:
        configure(agent, SUBDOMAINS)
        yield agent
    finally:
        configure(agent, "")


@pytest.fixture(scope="module")
def stranger(shared):
    """The id of the slot that is not on our side."""
    slot = f"{shared.api.get('/stats').json()['label']}-stranger0000"
    directory = f"/run/nbagent/slots/{slot}"
    shared.run("mkdir", directory)
    shared.host.run(["tee", "/root/stranger.py"], input=STRANGER)
    shared.run("systemd-run", "--quiet", "--unit=stranger", "--collect",
               "/usr/bin/python3", "/root/stranger.py", f"{directory}/http.sock")
    shared.wait(lambda: shared.router.get(f"/user/{slot}/").status == 200, "the stranger to answer")
    yield slot
    shared.run("systemctl", "stop", "stranger.service")
    shared.run("rm", "-r", directory, "/root/stranger.py")


def ask(agent, path, *arguments, host=None):
    """A request as it is, by curl: status, headers as lines in lower case, body."""
    where = ["-H", f"Host: {host}"] if host else []
    answer = agent.run("curl", "-sS", "--path-as-is", "--max-time", "120", "-i", *where, *arguments, f"http://127.0.0.1:8000{path}")
    head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
    status, *headers = head.splitlines()
    return int(status.split()[1]), headers, body


def told(slot, headers, body=None):
    """The path at which the stranger answers with these headers."""
    asked = [("header", header) for header in headers] + ([("body", body)] if body else [])
    return f"/user/{slot}/?{urlencode(asked)}"


def sent(agent, slot, *arguments, host=None):
    """The headers that a request has when it reaches the stranger."""
    status, _, body = ask(agent, f"/user/{slot}/", *arguments, host=host)
    assert status == 200
    return json.loads(body)["headers"]


def log_in(agent, claim, host):
    """The cookies that the claim's url leaves in a browser, as one header has them."""
    status, headers, _ = ask(agent, f"{claim['path']}?token={claim['token']}", host=host)
    assert status == 200
    return "; ".join(line.partition(": ")[2].partition(";")[0] for line in headers if line.startswith("Set-Cookie"))


@pytest.mark.parametrize("header", [
    'Alt-Svc: h3="evil.test:443"', 'Clear-Site-Data: "*"', 'NEL: {"report_to":"x","max_age":9}',
    "Origin-Agent-Cluster: ?0", 'Report-To: {"group":"x","max_age":9,"endpoints":[]}', "Service-Worker-Allowed: /",
    "Strict-Transport-Security: max-age=9; includeSubDomains", 'Use-As-Dictionary: match="/*"',
    'Sec-Session-Registration: (ES256);path="/x"', 'Secure-Session-Registration: (ES256);path="/x"',
])
def test_no_header_of_a_slot_speaks_for_its_origin_or_its_domain(agent, stranger, header):
    status, headers, _ = ask(agent, told(stranger, [header, "X-Other: y"]))
    assert status == 200 and "X-Other: y" in headers
    assert header not in headers


WALLS = {
    "Cross-Origin-Opener-Policy": ("same-origin-allow-popups", "same-origin"),
    "Cross-Origin-Resource-Policy": ("same-origin", "cross-origin"),
    "Referrer-Policy": ("same-origin", "no-referrer"),
    "X-Frame-Options": ("SAMEORIGIN", "DENY"),
}


@pytest.mark.parametrize("own", [False, True])
def test_walls_stand_where_a_slot_has_put_none_of_its_own(agent, stranger, own):
    headers = [f"{name}: {values[1]}" for name, values in WALLS.items()] if own else []
    _, answered, _ = ask(agent, told(stranger, headers))
    found = [line for line in answered if line.partition(":")[0] in WALLS]
    assert sorted(found) == sorted(f"{name}: {values[own]}" for name, values in WALLS.items())
    assert "Origin-Agent-Cluster: ?1" in answered


def test_a_slot_that_says_who_may_frame_it_is_framed_by_those(agent, stranger):
    policy = "Content-Security-Policy: frame-ancestors https://school.example"
    _, answered, _ = ask(agent, told(stranger, [policy]))
    assert policy in answered and not [line for line in answered if line.startswith("X-Frame-Options")]


@pytest.mark.parametrize("target", ["/_nbagent/gone.html", "/healthz", "@slot", "@trouble", "victim"])
def test_a_slot_cannot_make_the_router_fetch_something_else(agent, stranger, target):
    target = f"/user/{agent.claim()['slot']}/api" if target == "victim" else target
    headers = [f"X-Accel-Redirect: {target}", "X-Accel-Limit-Rate: 1", "X-Accel-Charset: koi8-r",
               "X-Accel-Expires: 9", "X-Accel-Buffering: yes", "Content-Type: text/plain"]
    status, answered, body = ask(agent, told(stranger, headers, "m" * 5000))
    assert (status, body) == (200, "m" * 5000)
    assert "Content-Type: text/plain; charset=utf-8" in answered
    assert not [line for line in answered if line.lower().startswith("x-accel")]


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
def test_a_cookie_is_for_the_slot_that_sets_it(request, agent, stranger, mode):
    if mode == "subdomain":
        request.getfixturevalue("subdomains")
    names = {"slot": stranger, "root": f"/user/{stranger}/" if mode == "path" else "/"}
    said, becomes = ([cookie[side].format(**names) for cookie in COOKIES] for side in (0, 1))
    path = told(stranger, [f"Set-Cookie: {cookie}" for cookie in said])
    _, headers, _ = ask(agent, path, host=f"{stranger}.{DOMAIN}")
    assert [line.removeprefix("Set-Cookie: ") for line in headers if line.startswith("Set-Cookie: ")] == becomes


def test_a_cookie_that_came_by_tls_goes_by_tls_only(agent, stranger):
    _, headers, _ = ask(agent, told(stranger, ["Set-Cookie: a=b"]), "-H", "X-Forwarded-Proto: https")
    assert "Set-Cookie: a=b; Secure; SameSite=Lax" in headers


def test_a_slot_gets_no_cookie_but_its_own(agent, stranger):
    cookies = {
        f"nbagent-{stranger}": "own", f"__Host-nbagent-{stranger}": "own-by-tls", "_xsrf": "2|x",
        "nbagent-x-victim000000": "login", "__Host-nbagent-x-victim000000": "login", "example_session": "sso",
        "username-localhost-8888": "another-jupyter", f"xnbagent-{stranger}": "no", f"nbagent-{stranger}0": "no",
    }
    text = "; ".join(f"{name}={value}" for name, value in cookies.items())
    own = f"__Host-nbagent-{stranger}=own-by-tls; nbagent-{stranger}=own; _xsrf=2|x"
    assert sent(agent, stranger, "-H", f"Cookie: {text}")["cookie"] == own
    assert sent(agent, stranger, "-H", f"Cookie: {';'.join(text.split('; ')[::-1])}")["cookie"] == own
    split = [argument for cookie in text.split("; ") for argument in ("-H", f"Cookie: {cookie}")]
    assert sent(agent, stranger, *split)["cookie"] == own
    assert "cookie" not in sent(agent, stranger, "-H", "Cookie: example_session=sso")


def test_an_operator_may_let_other_cookies_through(agent, stranger):
    try:
        agent.configure('[router]\ncookies = ["one", "two-*"]\n')
        agent.run("systemctl", "reload", "nbagent-router.service")
        cookies = ["-H", "Cookie: none=0; one=1; two-x.y=2; _xsrf=3; one2=4"]
        agent.wait(lambda: sent(agent, stranger, *cookies).get("cookie") == "one=1; two-x.y=2", "the router's settings")
    finally:
        configure(agent, "")


OWN, OTHER = "Origin: http://127.0.0.1:8000", "Origin: http://x-victim000000.nb.test:8000"


@pytest.mark.parametrize(("headers", "known"), [
    ([], True), ([OWN], True), ([OWN.upper().replace("ORIGIN", "Origin")], True), ([OTHER], False),
    (["Origin: null"], False), (["Origin: http://127.0.0.1"], False), (["Origin: http://127.0.0.1:80001"], False),
    (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty"], True),
    (["Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], True),
    (["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"], False),
    (["Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"], False),
    (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], True),
    ([OTHER, "Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], False),
])
def test_a_page_of_another_origin_acts_without_cookies(agent, stranger, headers, known):
    cookie = f"nbagent-{stranger}=login"
    lines = [argument for header in (f"Cookie: {cookie}", *headers) for argument in ("-H", header)]
    assert sent(agent, stranger, *lines).get("cookie") == (cookie if known else None)


@pytest.mark.parametrize("mode", ["path", "subdomain"])
def test_another_origin_neither_changes_nor_reads_nor_connects(request, agent, mode):
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
    status, _, body = ask(agent, f"{base}api/kernels", *own, *kernel, host=host)
    assert status == 201
    channels = f"{base}api/kernels/{json.loads(body)['id']}/channels"
    for change in (kernel, ["-X", "DELETE"], []):
        status, headers, _ = ask(agent, f"{base}api/kernels", *foreign, *change, host=host)
        assert status in (403, 404), change
        assert not [line for line in headers if line.lower().startswith("access-control-allow-credentials")]
    assert len(json.loads(ask(agent, f"{base}api/kernels", *own, host=host)[2])) == 1
    connect(agent, host, channels, f"http://{host}", cookies).close()
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        connect(agent, host, channels, other, cookies)
    assert refused.value.status_code == 403


@pytest.mark.parametrize("mode", ["path", "subdomain"])
def test_a_page_of_another_site_that_knows_the_token_works_with_the_slot(request, agent, mode):
    """As Thebe and its like do, which make the code in a web page run: by the token alone, without any cookie.

    (For what a browser asks about beforehand the image has to name such sites, by ServerApp.allow_origin.)
    """
    if mode == "subdomain":
        request.getfixturevalue("subdomains")
    claim, origin = agent.claim(), "https://textbook.example"
    host, base = f"{claim['slot']}.{DOMAIN}:8000", f"/user/{claim['slot']}/"
    site = ["-H", f"Origin: {origin}", "-H", "Sec-Fetch-Site: cross-site", "-H", "Sec-Fetch-Mode: cors"]
    token = ["-H", f"Authorization: token {claim['token']}"]
    for status, arguments in ((201, [*token, "-d", "{}"]), (200, token)):
        answered, headers, body = ask(agent, f"{base}api/kernels", *site, *arguments, host=host)
        assert answered == status
        assert f"Access-Control-Allow-Origin: {origin}" in headers
    channels = f"{base}api/kernels/{json.loads(body)[0]['id']}/channels"
    connect(agent, host, f"{channels}?token={claim['token']}", origin, None).close()
    with pytest.raises(websocket.WebSocketBadStatusException):
        connect(agent, host, channels, origin, None)


def connect(agent, host, path, origin, cookies):
    """A websocket as a browser opens it."""
    with agent.host.connect(product.ROUTER_PORT) as connection:
        return websocket.create_connection(
            f"ws://{host}{path}", socket=socket.socket(fileno=connection.detach()), origin=origin, cookie=cookies,
            timeout=60)


def test_a_path_that_only_nginx_reads_as_a_slots_is_refused(agent, stranger):
    victim = agent.claim()["slot"]
    # To a browser this is below the victim's path, and it would send the victim's cookies with it.
    for crooked in (f"/user/{victim}/..%2f{stranger}/", f"/user/{victim}%2f..%2f{stranger}/",
                    f"//user/{stranger}/", f"/user/%{ord(stranger[0]):x}{stranger[1:]}/",
                    f"/user/{victim}/..%2f{stranger}/static/x", f"/user/{victim}/..%2f{stranger}"):
        status, _, body = ask(agent, crooked, "-H", "Accept: application/json")
        assert status == 421, crooked
        assert json.loads(body)["type"] == "urn:nbagent:problem:misdirected"
    assert ask(agent, f"/user/{stranger}/..%2f{stranger}/")[0] == 200


def test_with_subdomains_a_slot_is_served_at_its_own_name_only(subdomains, stranger):
    agent, slot = subdomains, subdomains.claim()["slot"]
    base = f"/user/{slot}/"
    for host in (f"{slot}.{DOMAIN}", f"{slot}.{DOMAIN}:8000", f"{slot.upper()}.{DOMAIN}"):
        assert ask(agent, f"{base}api", host=host)[0] == 200, host
    asset = f"{base}static/favicon.ico"
    assert ask(agent, asset, "-o", "/dev/null", "-D", "-", host=f"{slot}.{DOMAIN}")[0] == 200
    for host in (f"{stranger}.{DOMAIN}", DOMAIN, "127.0.0.1:8000", f"x.{slot}.{DOMAIN}", f"{slot}.{DOMAIN}x", slot,
                 f"{slot}.{DOMAIN}.evil.test", f"{slot}.nbxtest"):
        for path in (f"{base}api", asset, base.rstrip("/")):
            status, _, body = ask(agent, path, "-H", "Accept: application/json", host=host)
            assert status == 421, (host, path)
            assert "misdirected" in body
    page = ask(agent, f"{base}lab", "-H", "Accept: text/html", host=DOMAIN)
    assert page[0] == 421 and "This notebook has another address" in page[2]
    assert ask(agent, "/healthz", host=DOMAIN)[0] == 200


def test_a_wrong_setting_leaves_the_router_as_it_is(agent):
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


def test_token_cookie_secret_and_session_key_are_each_slots_own(agent):
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
        assert ask(agent, f"/user/{one['slot']}/api/contents", "-H", f"Cookie: {cookies}")[0] == status
    assert ask(agent, f"/user/{one['slot']}/api/contents?token={two['token']}")[0] == 403


# A front that ends the TLS, as an operator's would; here it is the router's nginx itself.
FRONT = """
server {
    listen 8443 ssl;
    ssl_certificate /etc/nbagent/front.pem;
    ssl_certificate_key /etc/nbagent/front.pem;
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
    """The shared host with an origin for each slot, by TLS; the port of this machine that leads there."""
    pem = tmp_path / "front.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-subj", f"/CN=*.{DOMAIN}", "-days", "2", "-keyout", pem, "-out", f"{pem}.crt"],
                   check=True, capture_output=True)
    agent.host.run(["tee", "/etc/nbagent/front.pem"], input=pem.read_text() + pem.with_suffix(".pem.crt").read_text())
    agent.host.run(["tee", "/etc/nbagent/router.d/front.conf"], input=FRONT)
    port = agent.host.forward(8443, 0)
    try:
        configure(agent, f'{SUBDOMAINS}public_url = "https://{DOMAIN}:{port}"\n')
        yield port
    finally:
        agent.run("rm", "/etc/nbagent/front.pem", "/etc/nbagent/router.d/front.conf")
        configure(agent, "")


@pytest.fixture
def page(tmp_path):
    """Chromium, for which every name of the domain is this machine, and every certificate good."""
    with browser.chromium(tmp_path, f"--host-resolver-rules=MAP *.{DOMAIN} 127.0.0.1",
                          "--ignore-certificate-errors") as opened:
        yield opened


def work(page, url):
    """Opens a notebook and runs its first cell: page, static files, websocket and kernel are well."""
    page.open(url)
    page.read(".jp-Notebook", "Welcome to your notebook")
    page.wait_for_kernel()
    page.select_first_cell()
    page.run_cell()
    page.read(".jp-CodeCell .jp-OutputArea-output", "Hello from Python")


# What a page may try on another slot, at `base` and `socket`; each gives what it got, or why not.
ATTEMPTS = {
    "read": "const a = await fetch(base + 'lab', {credentials: 'include'}); return await a.text()",
    "identity": "const a = await fetch(base + 'api/me', {credentials: 'include'}); return await a.text()",
    "frame": """const f = document.createElement('iframe'); f.src = base + 'lab';
        await new Promise(resolve => { f.onload = resolve; document.body.append(f) });
        return f.contentDocument.documentElement.outerHTML""",
    "window": """const w = window.open(base + 'lab');
        let why = 'late';
        for (let i = 0; i < 600; i++) {
            await new Promise(resolve => setTimeout(resolve, 50));
            if (w.closed) return 'cut off';
            try {
                if (w.location.href == 'about:blank' || w.document.readyState != 'complete') continue;
                const text = w.document.documentElement.outerHTML; w.close(); return text;
            } catch (error) { why = error }
        }
        throw why""",
    "start": """const x = await fetch(base + 'api/kernels', {method: 'POST', credentials: 'include', mode: 'no-cors',
        body: '{}', headers: {'Content-Type': 'text/plain'}}); return String(x.status)""",
    "connect": """return await new Promise((resolve, reject) => {
        const s = new WebSocket(socket); s.onopen = () => resolve('open'); s.onerror = () => reject('refused') })""",
}


class Attack:
    """The stranger's page, open in a browser in which the victim's notebook was opened before."""

    def __init__(self, page, stranger, stranger_origin, victim, victim_origin, kernel):
        self.page, self.stranger = page, stranger
        self.base = f"{victim_origin}/user/{victim}/"
        self.socket = f"{self.base.replace('http', 'ws', 1)}api/kernels/{kernel}/channels"
        headers = ["Content-Type: text/html", f"Set-Cookie: tossed-by-http=1; Domain={DOMAIN}; Path=/"]
        page.open(stranger_origin + told(stranger, headers, "<h1>Look, kittens</h1>"))
        page.read("h1", "Look, kittens")

    def run(self, script):
        """What a script of the page comes to."""
        self.page.driver.set_script_timeout(60)
        return self.page.driver.execute_async_script(
            f"const [base, socket, done] = arguments; (async () => {{ {script} }})()"
            ".then(got => done('got ' + got), why => done('failed: ' + why))", self.base, self.socket)


def kernels(agent, claim, host):
    """The ids of the kernels that run in a slot."""
    path = f"/user/{claim['slot']}/api/kernels?token={claim['token']}"
    return [kernel["id"] for kernel in json.loads(ask(agent, path, host=host)[2])]


def test_with_subdomains_no_page_of_a_slot_reaches_another(agent, tls, page, stranger):
    victim = agent.claim(path="lab/tree/Welcome.ipynb")
    slot, host = victim["slot"], f"{victim['slot']}.{DOMAIN}"
    origin = f"https://{host}:{tls}"
    assert victim["url"] == f"{origin}{victim['path']}?token={victim['token']}"
    work(page, victim["url"])
    page.shoot("victim")
    running = kernels(agent, victim, host)
    attack = Attack(page, stranger, f"https://{stranger}.{DOMAIN}:{tls}", slot, origin, running[0])
    page.shoot("stranger")
    failed = {name: attack.run(script) for name, script in ATTEMPTS.items()}
    page.close_others()
    assert failed["read"].startswith("failed: TypeError: Failed to fetch")
    assert failed["identity"].startswith("failed: TypeError: Failed to fetch")
    assert failed["frame"].startswith("failed: TypeError: Cannot read properties of null")
    assert failed["window"] == "got cut off"
    assert failed["start"].startswith("failed: TypeError: Failed to fetch")
    assert failed["connect"] == "failed: refused"
    assert kernels(agent, victim, host) == running
    # Cookies for the whole domain, under the names that the victim's slot goes by: a browser takes them from a script.
    attack.run(f"""for (const cookie of ['nbagent-{slot}', '__Host-nbagent-{slot}', '_xsrf'])
        for (const path of ['/', '/user/{slot}/', '/user/{slot}/lab'])
            document.cookie = `${{cookie}}=2|tossed; Secure; Domain={DOMAIN}; Path=${{path}}`""")
    # Without the token in the address: the login outlives the attack.
    work(page, f"{origin}/user/{slot}/lab/tree/Welcome.ipynb")
    page.shoot("victim-afterwards")
    cookies = page.driver.get_cookies()
    assert {cookie["name"] for cookie in cookies if "tossed" in cookie["value"]} == {f"nbagent-{slot}", "_xsrf"}
    assert "tossed-by-http" not in {cookie["name"] for cookie in cookies}
    login = [cookie for cookie in cookies if cookie["name"] == f"__Host-nbagent-{slot}"]
    assert [(c["domain"], c["path"], c["secure"], c["httpOnly"]) for c in login] == [(host, "/", True, True)]


def test_the_known_weakness_of_paths_is_what_the_readme_says(agent, page, stranger):
    """In path mode a page of one slot can do everything with another that the same browser has open."""
    origin = f"http://127.0.0.1:{agent.host.forward(product.ROUTER_PORT, 0)}"
    victim = agent.claim(path="lab/tree/Welcome.ipynb")
    slot = victim["slot"]
    page.open(f"{origin}{victim['path']}?token={victim['token']}")
    page.wait_for_kernel()
    attack = Attack(page, stranger, origin, slot, origin, kernels(agent, victim, None)[0])
    for name in ("read", "frame", "window"):
        assert victim["token"] in attack.run(ATTEMPTS[name]), name
    assert attack.run(ATTEMPTS["connect"]) == "got open"
    # What even there is refused: to stay, below other slots' paths, when the page is closed.
    worker = told(stranger, ["Content-Type: text/javascript", "Service-Worker-Allowed: /"], "self.x = 1")
    register = "const found = await navigator.serviceWorker.register('{}', {{scope: '{}'}}); return found.scope"
    assert "failed: SecurityError" in attack.run(register.format(worker, "/"))
    assert attack.run(register.format(worker, f"/user/{stranger}/")) == f"got {origin}/user/{stranger}/"
