"""The report in a browser: what a reader does, without an error, a request to elsewhere, or a barrier."""

from __future__ import annotations

import csv
import shutil

import pytest
from small_report import MODULES, SHOWN, data

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
PAGES = ("index.html", "adapters/1.html", "adapters/3.html", "compare.html", "atlas.html", "ablation.html")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, folder):
    """Opens a page of the report; in the end no error was said and nothing asked of another machine."""
    said, asked, contexts = [], [], []

    def open_page(path, *, width=1440, height=900, theme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / path.partition("#")[0]).as_uri() + "".join(path.partition("#")[1:]))
        playwright.expect(page.locator(".waiting")).to_have_count(0)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def drawn(page, count):
    """Wait for so many charts."""
    playwright.expect(page.locator(".chart .main-svg").first).to_be_visible()
    page.wait_for_function("count => document.querySelectorAll('.chart.js-plotly-plot').length === count", arg=count)


def test_first_screen_has_questions_and_map(opened):
    page = opened("adapters/1.html")
    for selector in (".facts", ".questions", ".map-table"):
        box = page.locator(selector).first.bounding_box()
        assert box["y"] < 900, selector
    playwright.expect(page.locator(".map-table .cell")).to_have_count(len(MODULES))
    assert "js-plotly-plot" not in page.content()  # nor is plotly read before a chart is asked for


def test_switching_the_measure_colours_the_map_by_it(opened, folder):
    page = opened("adapters/1.html")
    metrics = {metric["key"]: metric for metric in data(folder, "adapter-1")["metrics"]}
    cell = page.locator(".map-table .cell").first
    before = cell.get_attribute("style")
    page.get_by_text("effective rank", exact=True).first.click()
    value = metrics["effective_rank"]["values"][0]
    playwright.expect(cell).to_contain_text(f"{value:.3g}")
    assert cell.get_attribute("style") != before
    playwright.expect(page.locator("#map .said")).to_contain_text("chance: ")
    assert "consistent with chance" in page.locator("#map").inner_text()


def test_a_cell_opens_its_module_by_mouse_and_by_keyboard(opened):
    page = opened("adapters/1.html")
    page.locator(".map-table .cell").nth(2).click()
    playwright.expect(page.locator("#module h2")).to_have_text(MODULES[2])
    drawn(page, 4)  # spectrum, amplification, φ and its chance
    assert "chance 1" in page.locator("#module .numbers").inner_text()
    page.get_by_role("button", name="Close").click()
    playwright.expect(page.locator("#module")).to_be_hidden()
    playwright.expect(page.locator(".map-table .cell").nth(2)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#module h2")).to_have_text(MODULES[3])


def test_permalink_leads_to_a_module(opened):
    page = opened("adapters/1.html")
    page.locator(".map-table .cell").nth(4).click()
    drawn(page, 4)
    again = opened("adapters/1.html#" + page.url.partition("#")[2])
    playwright.expect(again.locator("#module h2")).to_have_text(MODULES[4])
    table = again.locator("[data-table=rank]")
    table.get_by_role("link", name=MODULES[1]).click()
    playwright.expect(again.locator("#module h2")).to_have_text(MODULES[1])


def test_sliders_read_the_grid(opened, folder):
    page = opened("compare.html#a=1&b=2&module=layers.1.q_proj")
    drawn(page, 2)
    grid = data(folder, f"phi-1-2-{MODULES.index('layers.1.q_proj')}")["sides"]["in"]
    page.get_by_label("i, first directions of r4").fill("3")
    page.get_by_label("j, first directions of r8").fill("7")
    at = 2 * 8 + 6
    readout = page.locator(".readout")
    playwright.expect(readout).to_contain_text(f"φ(3, 7) = {grid['phi'][at]:.3g}, chance {grid['chance'][6]:.3g}")
    verdict = "beyond chance" if grid["q"][at] <= 0.05 else "consistent with chance"
    playwright.expect(readout).to_contain_text(verdict)
    playwright.expect(page.locator("#grid .said")).to_contain_text("chance at (3, 7)")
    page.get_by_text("out (what it writes)").click()
    playwright.expect(readout).to_contain_text("φ(3, 7)")
    assert "i=3" in page.url
    assert "side=out" in page.url


def test_tables_sort_filter_and_download(opened, folder, tmp_path):
    page = opened("adapters/1.html")
    table = page.locator("[data-table=amplification]")
    gains = [row[5] for row in data(folder, "adapter-1")["tables"]["amplification"]["rows"]]
    heading = table.get_by_role("columnheader", name="gain", exact=True)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    first = table.locator("tbody tr").first
    playwright.expect(first.locator("td").nth(5)).to_have_text(f"{max(gains):.3g}")
    table.get_by_label("Filter").fill("layers.1 k=4")
    playwright.expect(table.locator("tbody tr")).to_have_count(2)
    with page.expect_download() as waiting:
        table.get_by_role("button", name="Download CSV").click()
    waiting.value.save_as(tmp_path / "gains.csv")
    rows = list(csv.DictReader((tmp_path / "gains.csv").read_text("utf-8").splitlines()))
    assert waiting.value.suggested_filename == "amplification-adapter-1.csv"
    assert [row["k"] for row in rows] == ["4", "4"]
    assert float(rows[0]["gain"]) >= float(rows[1]["gain"])
    assert {float(row["gain"]) for row in rows} <= set(gains)


def test_what_is_consistent_with_chance_says_so(opened, folder):
    page = opened("adapters/1.html")
    table = data(folder, "adapter-1")["tables"]["amplification"]
    at = [column["key"] for column in table["columns"]].index("q")
    count = sum(row[at] > 0.05 for row in table["rows"])
    cells = page.locator("[data-table=amplification] tbody tr").locator(f"td:nth-child({at + 1}) .plain")
    assert count > 0
    playwright.expect(cells).to_have_count(count)


def test_hostile_names_are_shown_as_text(opened):
    for path in ("index.html", "adapters/3.html", "compare.html#a=1&b=3", "atlas.html"):
        page = opened(path)
        assert SHOWN in page.locator("main").inner_text()
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img").count() == 0
    page = opened("atlas.html")
    drawn(page, 2)
    assert SHOWN[-33:] in page.locator("#matrix .chart").text_content()
    page = opened("adapters/3.html")
    page.locator(".cell").last.click()
    playwright.expect(page.locator("#module h2")).to_have_text(SHOWN)
    drawn(page, 2)  # the other adapters do not have it, so no grid
    assert page.evaluate("window.hacked") is None


def test_theme_is_the_systems_until_it_is_chosen(opened):
    page = opened("index.html", theme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 23, 26)"
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(background) == "rgb(255, 255, 255)"


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_wider_than_a_phone(opened, path):
    page = opened(path, width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_barrier(opened, theme):
    """In the dark theme nothing but colours is different."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    module = f"adapters/1.html#module={MODULES[1]}"
    for path in (*PAGES, module) if theme == "light" else (module, "ablation.html"):
        page = opened(path, theme=theme)
        if "module=" in path:
            drawn(page, 4)
        # Charts are images with a name; axe would read style sheets again, which a page from disk may not.
        options = {"resultTypes": ["violations"], "preload": False}
        options |= {"runOnly": ["color-contrast"]} if theme == "dark" else {}
        found = axe.Axe().run(page, {"exclude": [[".main-svg"]]}, options).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == [], path
