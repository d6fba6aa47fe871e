# SPDX-License-Identifier: BSD-3-Clause
"""`make up` as a new user runs it: two commands, and a notebook in a real browser on this machine.

The host of `make up` is left in the state in which it was found: up, or absent.
"""

import contextlib
import http.client
import json
import re
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import browser
import product
from testhost_driver import Host, state
from testhost_driver.errors import NoSuchHost

NAME = "up"
TOOLBAR = """
    const toolbar = document.querySelector(".jp-NotebookPanel-toolbar"), items = toolbar.focusableElements;
    const reached = items.flatMap((item, place) => item.tabIndex === 0 ? [place] : []);
    items[0].focus();
    const key = {key: "ArrowRight", bubbles: true, composed: true};
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", key));
    return [items.length, reached, items.indexOf(document.activeElement)];
"""
CHECK_SETTINGS = (product.TOP / "tests/settings.js").read_text()


def make(target):
    """Runs `make TARGET`; returns its output."""
    done = subprocess.run(["make", target], cwd=product.TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout
    return done.stdout


def is_up():
    with contextlib.suppress(NoSuchHost):
        return bool(Host.attach(NAME))
    return False


@pytest.fixture(scope="module")
def made_up():
    """The output of `make up`."""
    was_up = is_up()
    yield make("up")
    if was_up:
        make("up")
    else:
        make("down")


@pytest.fixture
def claim(made_up):
    """Claims from this machine, by make up's address; the slots are released afterwards."""
    claimed = []

    def one(query=""):
        claimed.append(json.loads(subprocess.run(["curl", "-sS", f"127.0.0.1:9000/claim{query}"], check=True,
                                                 capture_output=True, text=True).stdout))
        return claimed[-1]

    yield one
    for slot in claimed:
        release(slot)


def release(claimed):
    connection = http.client.HTTPConnection("127.0.0.1", product.API_PORT, timeout=30)
    with contextlib.closing(connection):
        connection.request("DELETE", f"/slots/{claimed['slot']}")
        assert connection.getresponse().status in (200, 404)


@pytest.fixture
def page(tmp_path):
    """Chromium, with a profile of its own."""
    with browser.chromium(tmp_path) as opened:
        yield opened


def foreign(addresses):
    """The URLs that are neither the router's nor internal to Chromium, whose new window shows a page of its own."""
    parts = [urlsplit(address) for address in addresses]
    return [part.geturl() for part in parts
            if part.scheme in ("http", "https", "ws", "wss") and part.netloc != "127.0.0.1:8000"]


def test_the_claims_url_opens_the_welcome_notebook_and_its_cells_run(page, claim):
    page.open(claim("?path=lab/tree/Welcome.ipynb")["url"])
    page.read(".jp-Notebook", "Welcome to your notebook")
    page.wait_for_kernel()
    page.select_first_cell()
    page.run_cell()
    page.read(".jp-CodeCell .jp-OutputArea-output", "Hello from Python 3.13")
    # The next code cell draws a picture; the title above it is a cell that is run first.
    page.run_cell()
    page.run_cell()
    drawing = page.see(".jp-OutputArea-output svg, .jp-OutputArea-output.jp-RenderedSVG img")[0]
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", drawing)
    assert drawing.rect["width"] > 100 and drawing.rect["height"] > 100
    page.shoot("welcome")
    # As in JupyterLab by itself, which opens a launcher in an empty window only.
    assert [label.text for label in page.see("#jp-main-dock-panel .lm-TabBar-tabLabel")] == ["Welcome.ipynb"]
    asked = page.requests()
    assert len(asked) > 20 and any(address.startswith("ws://") for address in asked)
    # The page's own requests, for the answers that JupyterLab requests first.
    assert sum("/api/nbagent/answers?" in address for address in asked) == 2
    assert foreign(asked) == []
    assert page.complaints() == []


def test_a_new_notebook_from_the_launcher_computes_and_shows_a_table(page, claim):
    claimed = claim()
    page.open(claimed["url"])
    page.see('.jp-LauncherCard[data-category="Notebook"]')[0].click()
    page.wait_for_kernel()
    page.select_first_cell()
    page.type("6 * 7")
    page.run_cell()
    page.read(".jp-OutputArea-executeResult .jp-OutputArea-output", "42")
    page.type("from IPython.display import HTML; HTML('<table><tr><th>answer</th><td>forty-two</td></tr></table>')")
    page.run_cell()
    page.read(".jp-OutputArea-output table td", "forty-two")
    # By JupyterLab's shortcuts, and MathJax is not loaded before the first mathematics.
    assert page.driver.find_elements(By.CSS_SELECTOR, "mjx-container") == []
    page.type(Keys.ESCAPE, "m", Keys.ENTER, "$E = mc^2$")
    page.run_cell()
    page.see(".jp-RenderedMarkdown mjx-container")
    # One item of a toolbar is reached by the tabulator, the others by arrows.
    count, reached, moved = page.driver.execute_script(TOOLBAR)
    assert count > 8 and len(reached) == 1 and moved == reached[0] + 1
    page.shoot("launcher")
    assert foreign(page.requests()) == []
    assert page.complaints() == []
    # The token is in the first URL only, so that a URL copied from the window gives no access to others.
    assert "token=" not in page.driver.current_url


def test_only_windows_of_one_slot_have_different_workspaces(page, claim):
    """JupyterLab does not let two windows save into one workspace; it loads the second one again with another name."""
    slots = [claim("?path=lab/tree/Welcome.ipynb") for _ in range(2)]
    opened = []
    for claimed in (slots[0], slots[1], slots[0]):
        page.driver.switch_to.new_window("window")
        page.open(claimed["url"])
        page.read(".jp-Notebook", "Welcome to your notebook")
        page.see(".jp-NotebookPanel-toolbar")
        opened.append(urlsplit(page.driver.current_url).path.replace(claimed["slot"], "SLOT"))
    assert opened[:2] == ["/user/SLOT/lab/tree/Welcome.ipynb"] * 2
    assert re.fullmatch("/user/SLOT/lab/workspaces/auto-[a-zA-Z0-9]/tree/Welcome.ipynb", opened[2])
    # The page's way into JupyterLab is closed again.
    assert page.driver.execute_script("return 'jupyterapp' in window") is False
    assert page.complaints() == []


# Changes a setting to another and to an invalid value; returns what the registry has after each, and before and after
# both the schemas that its validator has compiled.
CHANGE = """
const [id, registry, done] = ["@jupyterlab/apputils-extension:themes", window.registry, arguments[0]];
const { schemas } = registry.validator._composer;
const compiled = () => Object.keys(schemas).filter(name => schemas[name]?.validate).map(decodeURIComponent).join();
const value = async () => String((await registry.get(id, "overrides")).composite["code-font-size"]);
(async () => {
  const found = [compiled()];
  await registry.set(id, "overrides", {"code-font-size": "21px"});
  found.push(await value());
  await registry.set(id, "overrides", {"code-font-size": 21}).catch(error => found.push(error.message));
  done([...found, await value(), compiled()]);
})().catch(error => done([String(error)]));
"""


def test_settings_are_those_of_jupyterlabs_own_validator_without_its_compilation(page, claim):
    page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CHECK_SETTINGS})
    page.open(claim("?path=lab/tree/Welcome.ipynb")["url"])
    page.wait_for_kernel()
    plugins = page.driver.execute_script("return window.compared")
    assert len(set(plugins)) > 50, plugins
    before, changed, error, kept, after = page.driver.execute_async_script(CHANGE)
    assert (changed, kept) == ("21px", "21px") and "failed to validate" in error
    assert "@jupyterlab/" not in before and "@jupyterlab/apputils-extension:themes" in after
    assert page.driver.execute_script("return window.different") == []


def test_an_ended_notebook_is_explained_on_a_page(page, claim):
    claimed = claim()
    release(claimed)
    page.open(claimed["url"])
    page.read("h1", "This notebook is no longer running")
    page.shoot("gone")
    loaded = page.driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    # It needs no file but those of JupyterLab that it loads ahead, and the slot that it borrows.
    assert all("/assets/sha256-" in url or url.endswith("/api/lend") for url in loaded), loaded
    assert claimed["token"] not in page.driver.find_element(By.TAG_NAME, "body").text
    page.see("button")[0].click()
    page.see(".jp-Launcher")
    assert claimed["slot"] not in page.driver.current_url
    assert foreign(page.requests()) == []


def test_the_commands_that_make_up_prints_work(made_up):
    assert "slots are warm" in made_up
    commands = [line.strip().split("  ")[0] for line in made_up.splitlines() if line.startswith("  ")]
    curls = [command for command in commands if command.startswith("curl ")]
    assert [command.split()[1] for command in curls] == ["127.0.0.1:9000/claim", "127.0.0.1:9000/slots"]
    claimed, slots = (json.loads(subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout)
                      for command in curls)
    assert claimed["slot"] in {slot["slot"] for slot in slots}
    release(claimed)
    table = next(command for command in commands if command.endswith("nbagent slots"))
    shown = subprocess.run(table.split(), cwd=product.TOP, check=True, capture_output=True, text=True).stdout
    assert shown.startswith("SLOT ")


def test_a_second_make_up_changes_nothing(made_up):
    host = Host.attach(NAME)
    units = ["nbagent.service", "nbagent-api.service", "nbagent-router.service"]
    before = host.run(["systemctl", "show", "-P", "InvocationID", *units]).stdout
    printed = make("up")
    assert "up is up already" in printed
    assert "is in the cache" in (product.CACHE / "log/build-image-deb.log").read_text()
    assert "installing" not in printed and "booting" not in printed
    assert host.run(["systemctl", "show", "-P", "InvocationID", *units]).stdout == before


def test_make_down_leaves_nothing(made_up):
    make("down")
    assert NAME not in state.names()
    groups = [path.read_text() for path in processes("cgroup")]
    assert not [group for group in groups if re.search(rf"testhost-{NAME}(/|$)", group, re.MULTILINE)]
    assert not list(Path("/sys/fs/cgroup").glob(f"**/testhost-{NAME}"))
    assert not Path(f"/run/netns/testhost-{NAME}").exists()
    assert f"/hosts/{NAME}/" not in Path("/proc/self/mounts").read_text()
    assert not state.host_directory(NAME).exists()
    for port in (product.API_PORT, product.ROUTER_PORT):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert "no host of make up" in make("down")


def processes(file):
    """`file` of every process's directory in /proc.

    A zombie that the machine's PID 1 has not reaped yet is left out.
    """
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            path.read_text()
            if (path.parent / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                yield path
