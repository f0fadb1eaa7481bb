"""The report's pages in headless Chromium: from a file, at desktop and phone widths, on paper, without a network."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from repro.batch import report
from repro.grid import PAPERS
from tests.batch.test_report import notebook

FLAGS = ["--no-sandbox", "--disable-gpu"]
# Elements that reach beyond the window and lie in no box that scrolls.
BEYOND = """() => [...document.querySelectorAll('body *')].filter(one =>
    one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('pre, .output_subarea, math'))
    .map(one => one.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Pages of notebooks that stand for executed ones."""
    folder = tmp_path_factory.mktemp("runs") / "report-mini"
    folder.mkdir()
    for name in ("index", *PAPERS, *(f"{paper}-tables" for paper in PAPERS)):
        notebook(name, folder / f"{name}.ipynb", {"runs_root": str(folder.parent)})
    report._convert_all(folder.parent, folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_open_from_a_file_and_fit(browser, built, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    paths = sorted(built.glob("*.html"))
    for path in paths:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width, path
        assert page.evaluate(BEYOND) == [], path
        assert page.locator("math").first.bounding_box()["width"] > 10
    assert len(paths) == 1 + len(PAPERS) and messages == []
    assert all(address.startswith(("file:", "data:")) for address in requests)
    page.close()


def test_links_lead_from_the_overview_to_a_paper_its_parts_and_back(browser, built):
    page = browser.new_page()
    page.goto((built / "index.html").as_uri())
    page.click("main >> text=CSL")
    assert page.title() == "CSL" and page.locator("nav [aria-current]").inner_text() == "CSL"
    page.click("ul.contents >> text=Part of csl-tables")
    assert page.url.endswith("csl.html#Part-of-csl-tables")
    page.click("nav >> text=Overview")
    assert page.title() == "Overview"
    page.close()


def test_a_page_prints_as_a_pdf(browser, built):
    page = browser.new_page()
    page.goto((built / "csl.html").as_uri())
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator("h1").first.is_visible()
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.close()
