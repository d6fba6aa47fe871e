# SPDX-License-Identifier: BSD-3-Clause
"""A real browser for tests: Chromium by chromedriver, with the actions of a person in its window."""

import contextlib
import json

from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

# A first load compiles five megabytes of JavaScript, on a machine that may be busy.
PATIENCE_S = 120
# Exceptions of a click on a page that is still being built.
MOVING = (ElementClickInterceptedException, ElementNotInteractableException, StaleElementReferenceException)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server", "--window-size=1400,1000")


@contextlib.contextmanager
def chromium(directory, *flags):
    """A Page in a browser with a new profile in `directory`, which also gets its screenshots."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, *flags, f"--user-data-dir={directory}/profile"):
        options.add_argument(flag)
    options.page_load_strategy = "none"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(service=Service("/usr/bin/chromedriver"), options=options)
    try:
        yield Page(driver, directory)
    finally:
        driver.quit()


class Page:
    """A window, with the actions of a person."""

    def __init__(self, driver, shots):
        self.driver, self.shots = driver, shots

    def open(self, url):
        """Opens `url` without waiting for the end of loading, because a test waits for visible elements."""
        self.driver.get(url)

    def leave(self):
        """Shows an empty page, and waits for it: Chromium may drop the next navigation while the page is unloaded."""
        self.driver.get("about:blank")
        self.wait(lambda driver: driver.execute_script("return location.href") == "about:blank", "an empty page")

    def without_prerendering(self):
        """Makes pages find a browser without Speculation Rules, as Firefox and Safari are."""
        script = "HTMLScriptElement.supports = undefined"
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})

    def close_others(self):
        """Closes every other window, because Chromium suspends pages in the background."""
        own = self.driver.current_window_handle
        for other in set(self.driver.window_handles) - {own}:
            self.driver.switch_to.window(other)
            self.driver.close()
        self.driver.switch_to.window(own)

    def see(self, selector, count=1):
        """Waits until at least `count` elements exist, and returns them."""
        def found(driver):
            elements = driver.find_elements(By.CSS_SELECTOR, selector)
            return len(elements) >= count and elements

        return self.wait(found, f"{count} of {selector}")

    def wait(self, what, for_what):
        """Waits for a true result of `what` and returns it; on a timeout takes a screenshot and raises."""
        try:
            return WebDriverWait(self.driver, PATIENCE_S).until(what, for_what)
        except TimeoutException:
            self.shoot("in-vain")
            raise

    def read(self, selector, text):
        """Waits until an element contains a text."""
        self.wait(
            lambda driver: any(text in element.text for element in driver.find_elements(By.CSS_SELECTOR, selector)),
            f"{text!r} in {selector}")

    def wait_for_kernel(self):
        # Not by the toolbar's circle, which is idle while there is no kernel: JupyterLab starts another kernel
        # for a cell that is run then, and drops the cell.
        # The status bar describes the last clicked widget, and on a slow machine nothing before a click.
        self.select_first_cell()
        self.read("#jp-main-statusbar", "(ipykernel) | Idle")

    def select_first_cell(self):
        """Clicks into the first code cell until it has the focus, because a page that is being built may move it."""
        def selected(driver):
            with contextlib.suppress(*MOVING):
                self.see(".jp-CodeCell .cm-content")[0].click()
            return driver.find_elements(By.CSS_SELECTOR, ".jp-CodeCell.jp-mod-active .cm-content:focus")

        self.wait(selected, "a selected code cell")

    def type(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def run_cell(self):
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()

    def shoot(self, name):
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def requests(self):
        """Every URL that the browser requested since the last call."""
        addresses = []
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                addresses.append(message["params"]["url"])
        return addresses

    def complaints(self):
        """The messages of the console at level SEVERE."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
