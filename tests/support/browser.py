"""Open pages in headless Chromium, without a network, and collect what the browser complains about.

The Chromium is the machine's own (on Debian or Ubuntu: apt-get install chromium); Playwright (requirements/dev.in) drives it.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ["chromium", "chromium-browser", "google-chrome-stable", "google-chrome"]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextmanager
def launch() -> Iterator[Any]:
    """Yield a headless Chromium (a Playwright Browser). Skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: requirements/dev.in")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    browser: Any, path: Path, width: int = 1280, responses: Mapping[str, str] | None = None, **options: Any
) -> Iterator[tuple[Any, list[str]]]:
    """Yield a local HTML file, loaded (a Playwright Page), and the list of complaints, to which later ones are added.

    width: of the window, in CSS pixels. responses: start of a URL -> the script to answer with; any other request that leaves
    the machine is refused, and a complaint. So is every message on the console, uncaught error and failed request. options: of
    Playwright's `new_context`, such as color_scheme="dark".
    """
    complaints: list[str] = []

    def answer(route: Any) -> None:
        url = route.request.url
        script = next((text for start, text in (responses or {}).items() if url.startswith(start)), None)
        if script is not None:
            route.fulfill(body=script, content_type="text/javascript")
        elif url.startswith(("http:", "https:")):
            complaints.append(f"request: {url}")
            route.abort()
        else:
            route.continue_()

    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    try:
        context.route("**/*", answer)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.goto(path.resolve().as_uri(), wait_until="load")
        yield page, complaints
    finally:
        context.close()


def find_violations(page: Any) -> list[str]:
    """Return the page's violations of accessibility rules according to axe-core: rule, what it asks for, and the elements."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{rule['id']}: {rule['help']}: {[node['target'] for node in rule['nodes']]}"
        for rule in Axe().run(page).response["violations"]
    ]
