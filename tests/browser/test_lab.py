"""Notebooks as a person uses them: JupyterLab in headless Chromium, Run All, a slider moved by keyboard."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
TOKEN = "for-this-test-only"
SETTINGS = {  # every cell stays in the page, and nothing is fetched from outside
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


@pytest.fixture(scope="module")
def chromium():
    """The browser's executable."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path or not Path(path).exists():
        pytest.fail(
            f"no Chromium (CHROMIUM={os.environ.get('CHROMIUM')!r}): `apt-get install chromium`, or name it in CHROMIUM"
        )
    return path


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on copies of the notebooks, at scale tiny, with runs and settings of its own."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS.glob("*.ipynb"):
        book = nbformat.read(path, as_version=4)
        first = next(cell for cell in book.cells if cell.cell_type == "code")
        assert 'scale = "mini"' in first.source
        first.source = first.source.replace('scale = "mini"', 'scale = "tiny"')
        nbformat.write(book, folder / "notebooks" / path.name)
    for name, text in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "REPRO_RUNS": str(folder / "runs"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    environment.pop("CI", None)  # somebody watches this one
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder / 'notebooks'}"]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, folder / "server.log")
            yield f"http://127.0.0.1:{port}/lab/tree/commatch.ipynb?token={TOKEN}&reset"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(address, server, log, seconds=90):
    """Until the server answers; fails with its log when it stops or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["commatch", "calibratemix", "csl", "pcre", "trust_region"])
def test_run_all_and_move_a_slider(name, chromium, lab, tmp_path):
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        try:
            run_all(page, lab.replace("commatch", name))
            moves = {"commatch": move_thresholds, "calibratemix": move_temperature, "csl": move_weights,
                     "pcre": move_regions, "trust_region": draw_stroke}  # fmt: skip
            moves[name](page)
        except BaseException:
            page.screenshot(path=tmp_path / "failed.png")
            raise
        finally:
            browser.close()


def run_all(page, address):
    """Open a notebook and run all cells, without an error message."""
    page.goto(address)
    expect(page.locator(".jp-Notebook .jp-CodeCell")).not_to_have_count(0, timeout=90_000)
    expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible(timeout=90_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    expect(page.locator(".widget-slider .noUi-handle").first).to_be_attached(timeout=240_000)
    last = page.locator(".jp-Notebook .jp-CodeCell").last
    expect(last.locator(".jp-OutputArea-output")).not_to_have_count(0, timeout=60_000)
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'] pre").count() == 0


def move_temperature(page):
    """Arrow keys on CalibrateMix's temperature change the ECE and the picture, and leave the accuracy."""
    images = page.locator(".jp-RenderedImage img")
    assert images.count() in (7, 8), "six figures, and the loss curves of each run that trains (the base may be done)"
    handle = page.locator(".widget-slider .noUi-handle").first
    readout = page.locator(".widget-slider .widget-readout").first
    table = page.locator(".widget-html table").first
    picture = page.locator(".widget-html img").first
    here = table.locator("tr", has_text="here, T").locator("td")
    accuracy, ece, drawn = here.nth(1).inner_text(), here.nth(2).inner_text(), picture.get_attribute("src")
    assert readout.inner_text() == "1.000" and accuracy.endswith("%") and ece.endswith("%")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("Home")  # the coldest: every prediction is nearly sure
    expect(readout).to_have_text("0.100")
    expect(here.first).to_have_text("here, T = 0.1")
    expect(here.nth(2)).not_to_have_text(ece)
    assert here.nth(1).inner_text() == accuracy
    page.wait_for_function("([old]) => document.querySelector('.widget-html img').src !== old", arg=[drawn])


def move_weights(page):
    """Keys and buttons on CSL's explorer change what is kept and the picture, which words describe."""
    table, picture = page.locator(".widget-html table").first, page.locator(".widget-html img").first
    rows = {name: table.locator("tr", has_text=name).locator("td") for name in ("CSL, Gaussian", "threshold")}
    assert all(row.nth(1).inner_text().endswith("%") for row in rows.values())
    drawn = picture.get_attribute("src")
    assert "confidence plane" in picture.get_attribute("alt")
    before = {name: row.nth(1).inner_text() for name, row in rows.items()}
    slider = page.locator(".widget-slider", has_text="tau").first
    handle = slider.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("Home")  # a threshold of 0 keeps every pixel, and leaves CSL's weights alone
    expect(slider.locator(".widget-readout")).to_have_text("0")
    expect(rows["threshold"].nth(1)).to_contain_text("100")
    assert rows["CSL, Gaussian"].nth(1).inner_text() == before["CSL, Gaussian"]
    page.get_by_role("button", name="threshold", exact=True).click()
    page.wait_for_function("([old]) => document.querySelector('.widget-html img').src !== old", arg=[drawn])


def move_regions(page):
    """The background threshold of PCRE's explorer changes the numbers of the map and the picture."""
    table, picture = page.locator(".widget-html table").first, page.locator(".widget-html img").first
    before, drawn = table.inner_text(), picture.get_attribute("src")
    slider = page.locator(".widget-slider", has_text="beta, background").first
    handle = slider.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("Home")  # at 0 every pixel with any activation belongs to a class
    expect(table).not_to_have_text(before)
    page.wait_for_function("([old]) => document.querySelector('.widget-html img').src !== old", arg=[drawn])


def draw_stroke(page):
    """Lambda and a drawn stroke change the proposal of trust region's explorer, its numbers and the picture."""
    numbers, picture = page.locator(".widget-html", has=page.locator("table")).first, page.locator(".widget-html img")
    energies = numbers.locator("tr", has_text="proposal").locator("td")
    expect(numbers).to_contain_text("none drawn")
    drawn, energy = picture.first.get_attribute("src"), energies.nth(1).inner_text()
    slider = page.locator(".widget-slider", has_text="lambda, of Potts").first
    handle = slider.locator(".noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("Home")  # without edges each pixel takes the network's likeliest label of the scribbles'
    expect(slider.locator(".widget-readout")).to_have_text("0")
    expect(energies.nth(1)).not_to_have_text(energy)
    expect(energies.nth(3)).to_have_text("0.0000")
    page.wait_for_function("([old]) => document.querySelector('.widget-html img').src !== old", arg=[drawn])
    drawn = picture.first.get_attribute("src")
    page.get_by_role("button", name="add stroke", exact=True).click()
    expect(numbers).to_contain_text("1 stroke drawn")
    page.wait_for_function("([old]) => document.querySelector('.widget-html img').src !== old", arg=[drawn])


def move_thresholds(page):
    """Figures are there; arrow keys on a slider of ComMatch's explorer change the numbers and the picture."""
    handle = page.locator(".widget-slider .noUi-handle").first
    images = page.locator(".jp-RenderedImage img")
    assert images.count() == 8, "six figures, and the loss curves of two runs while they train"
    widths = images.evaluate_all("images => images.map(image => image.naturalWidth)")
    assert min(widths) > 600, "every figure has been drawn"

    numbers, picture = page.locator(".widget-html table"), page.locator(".widget-html img")
    expect(numbers).to_contain_text("positives")
    before, drawn = numbers.inner_text(), picture.get_attribute("src")
    readout = page.locator(".widget-slider .widget-readout").first
    assert readout.inner_text() == "0.900"
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("Home")  # the least threshold: every stable image is selected
    expect(readout).to_have_text("0.000")
    expect(numbers).not_to_have_text(before)
    page.wait_for_function("([old]) => document.querySelector('.widget-html img').src !== old", arg=[drawn])
    loose = numbers.inner_text()
    page.keyboard.press("End")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(readout).to_have_text("0.985")
    expect(numbers).not_to_have_text(loose)
    expect(numbers).to_contain_text("0 of 1,000")
