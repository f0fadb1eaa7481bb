"""The report's pages in headless Chromium: at desktop and phone widths, on paper, without a network."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.figures.report.test_report import built  # noqa: F401

FLAGS = ["--no-sandbox", "--disable-gpu"]
# Elements that reach beyond the window and lie in no box that scrolls.
BEYOND = """() => [...document.querySelectorAll('body *')].filter(one =>
    one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.wide, pre, .output_subarea, .equation'))
    .map(one => one.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_open_from_a_file_and_fit(browser, built, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    paths = sorted(built.rglob("*.html"))
    for path in paths:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width, path
        assert page.evaluate(BEYOND) == [], path
        broken = "[...document.images].filter(one => !one.naturalWidth && !one.src.includes('iVBORw0KGgo/AAA')).length"
        assert page.evaluate(broken) == 0, path
    assert len(paths) == 8 and said == []
    assert all(address.startswith(("file:", "data:")) for address in asked)
    page.close()


def test_links_lead_from_the_overview_to_a_run_and_back(browser, built):  # noqa: F811
    page = browser.new_page()
    page.goto((built / "index.html").as_uri())
    page.click("nav >> text=ComMatch")
    page.click("#commands ~ details summary")
    page.click("#commands ~ details a >> nth=0")
    assert page.title().startswith("supervised on fashion")
    page.click("nav >> text=Overview")
    assert page.title() == "Learning from few or weak labels: measured beside published"
    page.close()


def test_a_page_prints_as_a_pdf(browser, built, tmp_path):  # noqa: F811
    page = browser.new_page()
    page.goto((built / "csl.html").as_uri())
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator("h1").is_visible()
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.close()
