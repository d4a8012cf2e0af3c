"""The site in a browser: every page, wide and narrow, light and dark. `.ci/run site` builds it."""

import contextlib
import functools
import http.server
import pathlib
import shutil
import threading

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SITE = pathlib.Path(__file__).parents[2] / "site"
PAGES = sorted(str(page.parent.relative_to(SITE)) for page in SITE.rglob("index.html"))
BROWSER = next(filter(None, map(shutil.which, ["chromium", "google-chrome"])), None)

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the site is not built: mkdocs build"),
    pytest.mark.skipif(not BROWSER, reason="Chromium is not installed"),
]


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Prints no requests."""


@pytest.fixture(scope="module")
def address():
    """Where the site is served."""
    handler = functools.partial(Silent, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=BROWSER) as chromium,
        chromium.new_context() as browser,
    ):
        yield browser


@contextlib.contextmanager
def opened(browser, address, path):
    """A page that is loaded and used without a message, a failure or a request elsewhere."""
    faults = []

    def watch_answer(answer):
        if answer.status >= 400 or not answer.url.startswith((address, "data:")):
            faults.append(f"{answer.status} {answer.url}")

    with browser.new_page() as page:
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda failed: faults.append(f"{failed.failure} {failed.url}"))
        page.on("response", watch_answer)
        page.goto(f"{address}/{path}/")
        yield page
        assert faults == []


@pytest.mark.parametrize("path", PAGES)
def test_page(browser, address, path):
    missing = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
    wider = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
    with opened(browser, address, path) as page:
        for system, scheme in (("light", "default"), ("dark", "slate")):
            page.emulate_media(color_scheme=system)
            page.locator(f"body[data-md-color-scheme={scheme}]").wait_for()
            for width in (1440, 390):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("innerWidth") == width
                assert page.evaluate(missing) == []
                assert page.evaluate(wider) == 0


def test_search(browser, address):
    with opened(browser, address, "") as page:
        page.get_by_role("textbox", name="Search").click()
        page.keyboard.type("batch_norm")
        found = "a[href*='/api/functions/'][href$='#jaxbn.batch_norm']"
        playwright.expect(page.locator(found)).to_be_attached(timeout=30_000)
