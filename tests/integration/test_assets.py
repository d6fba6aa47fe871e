# SPDX-License-Identifier: BSD-3-Clause
"""An image's unchanging files at /assets/DIGEST/: one address for all slots, and no right for what is opened there."""

import gzip
import re
from urllib.parse import urlsplit

import brotli
import pytest
from test_origins import DOMAIN, curl, run_notebook, tls  # noqa: F401  a fixture

import browser
import product

PROGRAM = re.compile(r'<script defer="defer" src="([^"?]*/assets/sha256-[0-9a-f]{64}/lab/main\.[^"?]+\.js)')
FOR_EVER = "public, max-age=31536000, immutable"
# An image's page and picture, which show by their title or a cookie that a script of theirs has run.
SCRIPT = "document.title = 'ran'; document.cookie = 'ran=1; path=/'; localStorage.setItem('ran', '1')"
HOSTILE = {
    "hostile.html": f"<!doctype html><title>still</title><p>opened</p><script>{SCRIPT}</script>"
                    "<meta http-equiv='set-cookie' content='ran=2; path=/'><form action='/spawn' method='post'></form>",
    "hostile.svg": f"<svg xmlns='http://www.w3.org/2000/svg'><text y='20'>opened</text><script>{SCRIPT}</script></svg>",
    "hostile.xml": f"<html xmlns='http://www.w3.org/1999/xhtml'><p>opened</p><script>{SCRIPT}</script></html>",
    "hostile.js": SCRIPT,
    "worker.js": "postMessage('worked')",
}


def main_script(agent, host=None):
    """The address of JupyterLab's first script in the page of a new slot."""
    claim = agent.claim()
    status, _, page = curl(agent, f"{claim['path']}?token={claim['token']}",
                           host=f"{claim['slot']}.{host}" if host else None)
    assert status == 200
    return PROGRAM.search(page)[1]


@pytest.fixture
def digest(agent):
    return agent.run("readlink", "/var/lib/nbagent/images/names/minimal").strip().rpartition("/")[2]


@pytest.fixture
def hostile(agent, digest):
    """The address of files that an image could have."""
    directory = f"/var/lib/nbagent/images/{digest}/static/hostile"
    agent.run("install", "-d", "-m", "755", directory)
    for name, content in HOSTILE.items():
        agent.host.run(["tee", f"{directory}/{name}"], input=content)
    for link in ("link.txt", "hostile.xml.br"):
        agent.run("ln", "-s", "/etc/passwd", f"{directory}/{link}")
    yield f"/assets/{digest}/hostile"
    agent.run("rm", "-r", directory)


def test_all_slots_have_one_address_and_its_files_are_cached_for_ever(agent):
    address = main_script(agent)
    assert main_script(agent) == address and address.startswith("/assets/")
    plain = agent.router.get(address)
    packed = agent.router.get(address, **{"Accept-Encoding": "gzip"})
    assert gzip.decompress(packed.body) == plain.body and packed.headers["vary"] == "Accept-Encoding"
    for answer in (plain, packed, agent.router.get(address, Range="bytes=0-9"),
                   agent.router.get(address, **{"If-None-Match": plain.headers["etag"]})):
        assert answer.status in (200, 206, 304)
        assert answer.headers["cache-control"] == FOR_EVER
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", [
    "lab/none.js", "lab", "lab/", "", "../image.json", "lab/../../image.json", "%2e%2e/image.json", "lab%2fmain.js",
    "lab/%2e%2e/favicon.ico", "lab//main.js", "..%5cimage.json", "favicon.ico%00", "hostile/link.txt",
    "../rootfs/etc/passwd",
])
def test_no_cache_keeps_the_error_for_a_wrong_path(agent, digest, hostile, path):
    status, headers, body = curl(agent, f"/assets/{digest}/{path}")
    assert status in (400, 404)
    assert status == 400 or "Cache-Control: no-store" in headers
    assert "root:" not in body and "id_base" not in body


def test_a_browser_that_accepts_brotli_gets_it_where_a_file_has_it(agent, digest, hostile, tmp_path):
    plain = HOSTILE["hostile.js"].encode()
    bodies = {"br": brotli.compress(plain), "gzip": gzip.compress(plain), None: plain}
    for suffix, encoding in ((".br", "br"), (".gz", "gzip")):
        (tmp_path / f"hostile.js{suffix}").write_bytes(bodies[encoding])
        agent.host.copy_in(tmp_path / f"hostile.js{suffix}", f"/var/lib/nbagent/images/{digest}/static/hostile/")
    for accepted, encoding in (("gzip, deflate, br, zstd", "br"), ("br;q=0.5", "br"), ("gzip, br;q=0", "gzip"),
                               ("xbr", None)):
        answer = agent.router.get(f"{hostile}/hostile.js", **{"Accept-Encoding": accepted})
        assert (answer.headers.get("content-encoding"), answer.headers["vary"]) == (encoding, "Accept-Encoding")
        assert answer.body == bodies[encoding] and answer.headers["cache-control"] == FOR_EVER
        assert answer.headers["content-type"].startswith("text/javascript")
    # One has no Brotli copy, and the other a link in its place.
    for name in ("hostile.svg", "hostile.xml"):
        without = agent.router.get(f"{hostile}/{name}", **{"Accept-Encoding": "br"})
        assert (without.status, without.headers.get("content-encoding")) == (200, None)
        assert without.body == HOSTILE[name].encode()


def test_no_cache_keeps_the_error_for_a_wrong_request(agent, digest):
    address = f"/assets/{digest}/favicon.ico"
    for path, arguments, expected in (
        (f"/assets/sha256-{'0' * 64}/favicon.ico", (), 404), ("/assets/sha256-0/favicon.ico", (), 404),
        (f"/assets/{digest.upper()}/favicon.ico", (), 404),
        (address, ("-X", "POST"), 405), (address, ("-H", "Service-Worker: script"), 404),
    ):
        status, headers, _ = curl(agent, path, *arguments)
        assert (status, "Cache-Control: no-store" in headers) == (expected, True), path
    slot = agent.claim()["slot"]
    size = len(agent.router.get(address).body)
    for path in (address, f"/user/{slot}/static/favicon.ico"):
        for first, expected in ((0, 206), (9, 206), (size - 1, 206), (size, 416), (size + 1, 416), (10 * size, 416)):
            only_headers = ("-o", "/dev/null", "-D", "-")
            status, headers, _ = curl(agent, path, *only_headers, "-H", f"Range: bytes={first}-")
            (found,) = [line for line in headers if line.startswith("Cache-Control: ")]
            assert (status, found == "Cache-Control: no-store") == (expected, expected == 416), (path, first)


@pytest.fixture
def page(tmp_path):
    """Chromium, which resolves every name of the domain to this machine and accepts every certificate."""
    with browser.chromium(tmp_path, f"--host-resolver-rules=MAP *.{DOMAIN} 127.0.0.1",
                          "--ignore-certificate-errors") as opened:
        yield opened


def test_an_images_page_runs_nothing_at_the_landing_pages_origin(agent, page, hostile):
    origin = f"http://127.0.0.1:{agent.host.forward(product.ROUTER_PORT, 0)}"
    for name in HOSTILE:
        page.open(f"{origin}{hostile}/{name}")
        expected = HOSTILE[name][:15] if name.endswith(".js") else "opened"
        page.wait(lambda driver, expected=expected: expected in driver.page_source, f"{name} in the window")
        assert page.driver.title != "ran", name
        assert page.driver.get_cookies() == [], name
    page.open(f"{origin}/")
    page.see("button")
    assert page.driver.execute_script("return document.cookie + localStorage.length") == "0"


def transferred(page):
    """Bytes of the assets that the page has fetched, by path; 0 is from the cache."""
    entries = page.driver.execute_script(
        "return performance.getEntriesByType('resource').map(entry => [entry.name, entry.transferSize])")
    return {urlsplit(name).path: size for name, size in entries if "/assets/sha256-" in name}


LOADED = "return performance.getEntriesByType('resource').filter(one => one.responseEnd > 0).map(one => one.name)"


def test_the_landing_page_and_the_slot_before_leave_the_assets_in_the_browsers_cache(agent, page, digest):
    origin = f"http://127.0.0.1:{agent.host.forward(product.ROUTER_PORT, 0)}"
    ahead = [f"/assets/{digest}/{path}" for path in agent.router.get(f"/assets/{digest}/ahead.json").json()]
    assert len(ahead) > 20 and any("lab-extensions" in path for path in ahead)
    page.without_prerendering()
    page.open(f"{origin}/")
    page.wait(lambda driver: {origin + path for path in ahead} <= set(driver.execute_script(LOADED)), "the files ahead")
    page.see("button")[0].click()
    found = []
    for _ in range(2):
        page.see(".jp-Launcher")
        # The sign of progress ends with the start of JupyterLab.
        sign = page.see("#nbagent-sign")[0]
        assert sign.get_attribute("textContent").startswith("Your notebook is opening") and not sign.is_displayed()
        found.append(transferred(page))
        assert page.complaints() == []
        claim = agent.claim()
        page.open(f"{origin}{claim['path']}?token={claim['token']}")
    first, second = found
    listed = {path.partition("?")[0] for path in ahead}
    assert [path for path in first if path in listed and first[path]] == []
    # All that JupyterLab loads before it shows the launcher, except what plug-ins request later.
    assert len(listed & first.keys()) > 0.9 * len(listed) and len(first.keys() - listed) < 0.2 * len(first)
    assert [path for path in second if path in first and second[path]] == []


USES = """
const [script, font, worker, done] = arguments;
const event = (target, name) => new Promise((resolve, reject) => {
    target.addEventListener(name, resolve);
    target.addEventListener('error', () => reject(`${name}: error`));
});
(async () => {
    const text = await (await fetch(script)).text();
    await new FontFace('x', `url(${font})`).load();
    const preload = Object.assign(document.createElement('link'), { rel: 'modulepreload', href: script });
    document.head.append(preload);
    await event(preload, 'load');
    const code = new Blob([`importScripts('${worker}')`]);
    const message = await event(new Worker(URL.createObjectURL(code)), 'message');
    return [text.length > 10000, message.data];
})().then(done, why => done('failed: ' + why))
"""


def test_assets_have_an_origin_of_their_own_in_subdomain_mode(agent, tls, page, hostile):  # noqa: F811
    claim = agent.claim(path="lab/tree/Welcome.ipynb")
    run_notebook(page, claim["url"])
    script = page.driver.execute_script("return document.querySelector('script[src]').src")
    origin = f"https://assets.{DOMAIN}:{tls}"
    assert script.startswith(f"{origin}/assets/sha256-")
    fonts = agent.run("sh", "-c", "cd /var/lib/nbagent/images/names/minimal/static/lab && ls *.woff*").split()
    page.driver.set_script_timeout(60)
    font, worker = f"{script.rpartition('/')[0]}/{fonts[0]}", f"{origin}{hostile}/worker.js"
    assert page.driver.execute_async_script(USES, script, font, worker) == [True, "worked"]
    assert page.complaints() == []


def encoding(agent, claim, path, **headers):
    """The Content-Encoding of a slot's response."""
    answer = agent.router.get(f"/user/{claim['slot']}/{path}", Authorization=f"token {claim['token']}",
                              **{"Accept-Encoding": "gzip"}, **headers)
    assert answer.status == 200
    body = answer.body
    if (found := answer.headers.get("content-encoding", "")) == "gzip":
        body = gzip.decompress(body)
        assert len(answer.body) < len(body) / 2 and answer.headers["vary"] == "Accept-Encoding"
    assert len(body) > 1000
    return found


def test_answers_that_the_zygote_computed_have_the_slots_own_address(agent):
    claim = agent.claim()
    answer = agent.router.get(f"/user/{claim['slot']}/api/kernelspecs", Authorization=f"token {claim['token']}")
    resources = answer.json()["kernelspecs"]["python3"]["resources"]
    assert set(resources) == {"logo-32x32", "logo-64x64", "logo-svg"}
    assert all(path.startswith(f"/user/{claim['slot']}/kernelspecs/") for path in resources.values())


def test_a_changed_setting_and_a_new_kernel_are_in_the_next_answer(agent):
    notebook = agent.open()
    page = "lab/api/settings/@jupyterlab/notebook-extension:tracker"
    assert notebook.get(page)["settings"] == {}
    changed = agent.router.call("PUT", notebook.base + page, {"raw": '{"recordTiming": true}'}, notebook.headers)
    assert changed.status == 204
    assert notebook.get(page)["settings"] == {"recordTiming": True}
    assert set(notebook.get("api/kernelspecs")["kernelspecs"]) == {"python3"}
    assert notebook.run("!python3 -m ipykernel install --user --name other").status == "ok"
    assert set(notebook.get("api/kernelspecs")["kernelspecs"]) == {"python3", "other"}


def test_answers_of_the_api_are_compressed_and_pages_with_the_token_are_not(agent):
    claim = agent.claim()
    fetched = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
    followed = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    style = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "style"}
    image = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    theme = "lab/api/themes/@jupyterlab/theme-light-extension/index.css"
    assert encoding(agent, claim, "lab/api/settings", **fetched) == "gzip"
    assert encoding(agent, claim, "lab/api/settings") == "gzip"
    assert encoding(agent, claim, theme, **style) == "gzip"
    assert encoding(agent, claim, "kernelspecs/python3/logo-svg.svg", **image) == "gzip"
    assert encoding(agent, claim, "lab", **image) == ""
    assert encoding(agent, claim, "lab/api/settings", **followed) == ""
    for headers in ({}, fetched, followed):
        assert encoding(agent, claim, "lab", **headers) == ""
        assert encoding(agent, claim, "files/Welcome.ipynb", **headers) == ""
