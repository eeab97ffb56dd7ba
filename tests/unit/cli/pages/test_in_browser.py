"""The pages in a browser: no error, nothing asked of a network, everything can be clicked, nothing sticks out."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PROMPT = "A small robot walks over the green hill"
SIZES = {"phone": (360, 800), "desktop": (1280, 900)}
CONTRAST = """([element]) => {
  const numbers = text => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const brightness = ([r, g, b]) => [r, g, b].map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  let behind = element;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [getComputedStyle(element)[element.closest("svg") ? "fill" : "color"],
    getComputedStyle(behind).backgroundColor].map(text => brightness(numbers(text)));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
"""The contrast of a text with what lies behind it."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(params=[f"{size} {scheme}" for size in SIZES for scheme in ("light", "dark")])
def opened(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A function that opens a page in each size and colour scheme; in the end nothing may have gone wrong in it."""
    size, scheme = request.param.split()
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, reduced_motion="reduce"
    )
    context.set_default_timeout(5_000)
    wrong: list[str] = []

    def open_file(file: Any) -> Any:
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url == file.as_uri() else wrong.append(asked.url))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(file.as_uri())
        return page

    yield open_file
    context.close()
    assert not wrong


@pytest.fixture(scope="module")
def report(folders, converted_to, edited, tmp_path_factory):
    """A report of everything."""
    from typer.testing import CliRunner

    from pliant.cli import main

    file = tmp_path_factory.mktemp("report") / "report.html"
    arguments = [*folders.values(), converted_to("keyed"), edited, "--prompt", PROMPT, "--output", file]
    result = CliRunner().invoke(main, ["report", *map(str, arguments), "--new-tokens", "3"])
    assert result.exit_code == 0, result.stderr
    return file


def fits(page: Any) -> bool:
    """Whether the page is no wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_report(opened, report):
    page = opened(report)
    assert page.locator("h1").inner_text() == "8 runs"
    assert fits(page)
    charts = page.locator("figure.chart")
    assert charts.count() >= 15
    assert page.locator("figure.chart svg").filter(has=page.locator("path, circle")).count() == charts.count()

    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before

    loss = charts.filter(has=page.get_by_role("heading", name="Loss", exact=True))
    lines = loss.locator("svg path")
    assert lines.count() == 3
    key = loss.locator(".keys button").first
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert lines.count() == 2
    key.click()
    assert lines.count() == 3
    loss.locator(".tools button").click()
    assert loss.locator(".tools button").get_attribute("aria-pressed") == "true"
    loss.locator(".plot").hover(position={"x": 150, "y": 80})
    assert "optimizer step" in loss.locator(".tip").inner_text()
    loss.locator(".plot").focus()
    page.keyboard.press("ArrowRight")
    assert loss.locator(".tip").is_visible()
    page.keyboard.press("Escape")
    assert loss.locator(".tip").is_hidden()
    loss.locator("summary").click()
    api.expect(loss.locator(".values tbody tr")).to_have_count(20)  # filled by an event that comes after the click
    assert fits(page)


def test_tables_sort(opened, report):
    page = opened(report)
    table = page.locator("table.sortable").filter(has=page.get_by_role("button", name="× base", exact=True)).first
    heading = table.get_by_role("columnheader", name="× base")
    ratios = table.locator("tbody tr td:nth-child(5)")
    for order, expected in (("descending", ["2.000", "1.250", "1.062"]), ("ascending", ["1.062", "1.250", "2.000"])):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == order
        assert ratios.all_inner_texts() == expected


def test_heat_maps_tell_of_their_cells(opened, report):
    page = opened(report)
    for card in page.locator(".heat").all():
        told = card.locator("output")
        card.locator("td.r").nth(5).click()
        assert "layer" in told.inner_text()
        assert "writes towards" in told.inner_text()
        first = told.inner_text()
        card.locator(".map").focus()
        page.keyboard.press("ArrowDown")
        assert told.inner_text() != first
        assert card.locator("td.at").count() == 1
    assert fits(page)


def test_sections_are_reached_from_the_top(opened, report):
    page = opened(report)
    page.locator("nav button").last.click()
    page.wait_for_function("document.querySelector('main section:last-child').getBoundingClientRect().top < 500")
    assert page.locator("nav").bounding_box()["y"] == 0


def test_texts_can_be_read(opened, report):
    page = opened(report)
    page.locator(".heat td.r").first.click()
    for selector in (
        *(".dim", ".kicker", "dt", "dd b", "dd span", "h4", "thead button", "output .told", "nav button"),
        *("summary", ".keys button", ".tools button", ".prompt", ".note.warning", "figure svg text"),
    ):
        ratio = page.locator(selector).first.evaluate(f"element => ({CONTRAST})([element])")
        assert ratio >= 4.5, selector


def test_an_inspection_and_routes(opened, converted_to, tiny, run, tmp_path):
    import pliant

    run("inspect", converted_to("v2"), "--prompt", PROMPT, "--output", tmp_path / "inspect.html")
    page = opened(tmp_path / "inspect.html")
    page.locator(".map td.r").first.click()
    assert "directions" in page.locator("output").inner_text()
    assert fits(page)
    model = pliant.load(tiny)
    pliant.convert(model, pliant.ModConfig(capacity_gamma=1.0), layers=[1, 3])
    model.save_pretrained(tmp_path / "mod")
    run("routes", tmp_path / "mod", "--prompt", PROMPT, "--output", tmp_path / "routes.html")
    page = opened(tmp_path / "routes.html")
    page.locator(".map td.r").first.click()
    assert "ran" in page.locator("output").inner_text()
    assert fits(page)
