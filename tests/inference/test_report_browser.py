"""The page of a report in a browser: opened from disk, used with mouse, touch and keyboard, on all screen sizes."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from fastvit_train.cli.main import main
from fastvit_train.inference.report.page import write_report
from tests.support.browser import check_contrasts, needs_browser, open_browser, requested_urls, set_screen

SMALL = (
    *("--depth", "1", "--embed-dim", "16", "--num-heads", "2", "--patch-size", "8", "--attention", "fused"),
    *("--batch-size", "240", "--no-telemetry", "--epochs", "3"),
)
pytestmark = [needs_browser, pytest.mark.slow]
CHART = 1  # test loss


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    for name, model in (("c", "c_vit_4_4_32"), ("mc", "mc_vit_4_4_32")):
        main(["--runs-dir", str(root), "--exp-name", name, "--model", model, *SMALL])
    both = [str(root / "c"), str(root / "mc")]
    write_report(both, root / "page.html")
    write_report(both * 2, root / "crowded.html")
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(runs: Path, browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The page on a large screen; it must request nothing but itself and log nothing to the console."""
    set_screen(browser, 1280)
    browser.get_log("performance")
    browser.get((runs / "page.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []
    requested = requested_urls(browser)
    assert requested and all(url.startswith((f"{runs.as_uri()}/", "data:")) for url in requested)


def tooltip_text(runs: Path, epoch: int) -> str:
    """The expected tooltip of the chart of the test loss at an epoch, from the runs' metrics."""
    rows = {}
    for name in ("c", "mc"):
        metrics = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        rows[name] = next(row["test_loss"] for row in metrics if row["epoch"] == epoch)
    return "\n".join([f"epoch {epoch}", *(f"{name}: {loss:.4f}" for name, loss in rows.items())])


def chart(page: webdriver.Chrome) -> tuple[WebElement, WebElement]:
    """The slider and the tooltip of the chart of the test loss."""
    plot = page.find_elements(By.CLASS_NAME, "plot")[CHART]
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    return plot.find_element(By.CLASS_NAME, "slider"), plot.find_element(By.CLASS_NAME, "tooltip")


def offset(slider: WebElement, epoch: int) -> int:
    """The horizontal offset of one of the three epochs from the center of the chart, in pixels."""
    return round((epoch - 2) * 0.4 * slider.size["width"])


def test_the_mouse_reads_the_values(runs: Path, page: webdriver.Chrome) -> None:
    slider, tooltip = chart(page)
    for epoch in (1, 2, 3):
        ActionChains(page).move_to_element_with_offset(slider, offset(slider, epoch), 10).perform()
        assert tooltip.text == tooltip_text(runs, epoch)
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert tooltip.text == ""


def test_a_finger_reads_the_values(runs: Path, page: webdriver.Chrome) -> None:
    set_screen(page, 375)
    slider, tooltip = chart(page)
    box: dict[str, Any] = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", slider)
    at = {"x": box["x"] + box["width"] / 2 + offset(slider, 1), "y": box["y"] + 40}
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [at]})
    page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert tooltip.text == tooltip_text(runs, 1)
    frame = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", tooltip)
    assert frame["left"] >= 0 and frame["right"] <= 375


def test_the_keyboard_reaches_the_chart_and_reads_the_values(runs: Path, page: webdriver.Chrome) -> None:
    slider, tooltip = chart(page)
    for _ in range(40):
        ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        assert page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused) == "solid"
        if focused == slider:
            break
    assert page.switch_to.active_element == slider and tooltip.text == tooltip_text(runs, 3)
    for key, epoch in (
        (Keys.ARROW_LEFT, 2),
        (Keys.HOME, 1),
        (Keys.ARROW_LEFT, 1),
        (Keys.ARROW_RIGHT, 2),
        (Keys.END, 3),
    ):
        ActionChains(page).send_keys(key).perform()
        assert tooltip.text == tooltip_text(runs, epoch)
        assert slider.get_attribute("aria-valuetext") == f"epoch {epoch}"
        crosshair = page.find_elements(By.CLASS_NAME, "crosshair")[CHART]
        assert crosshair.value_of_css_property("visibility") == "visible"
    assert tooltip.get_attribute("aria-live") == "polite"
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert tooltip.text == ""


def test_the_first_tab_skips_to_the_content(page: webdriver.Chrome) -> None:
    ActionChains(page).send_keys(Keys.TAB).perform()
    link = page.switch_to.active_element
    assert link.text.startswith("Skip") and link.location["x"] >= 0
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert page.switch_to.active_element.tag_name == "main"


@pytest.mark.parametrize("name", ["page.html", "crowded.html"])
@pytest.mark.parametrize("width", [375, 768, 1280])
def test_nothing_makes_the_page_scroll_sideways(runs: Path, page: webdriver.Chrome, width: int, name: str) -> None:
    set_screen(page, width)
    page.get((runs / name).as_uri())
    page.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert page.execute_script("return innerWidth") == width
    assert (
        page.execute_script("return document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth") == 0
    )
    outside = """return [...document.querySelectorAll("body *")].filter(
        (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll")).map((e) => e.outerHTML)"""
    assert page.execute_script(outside) == []


def test_the_accuracies_are_large_and_both_confusion_matrices_fit(page: webdriver.Chrome) -> None:
    sizes = """return [...document.querySelectorAll(".accuracy")].map(
        (e) => [e.textContent, parseFloat(getComputedStyle(e).fontSize), e.getBoundingClientRect().bottom])"""
    accuracies = page.execute_script(sizes)
    assert len(accuracies) == 2 and all(text.endswith("%") for text, _, _ in accuracies)
    assert all(size >= 32 and bottom < 300 for _, size, bottom in accuracies)
    names = 'document.querySelectorAll(".confusion thead span, .confusion tbody th")'
    page.execute_script(f"{names}.forEach((e) => {{ e.textContent = 'automobile'; }})")
    hidden = """return [...document.querySelectorAll(".confusion")].map(
        (e) => e.scrollWidth - e.closest(".scroll").clientWidth)"""
    widths = page.execute_script(hidden)
    assert len(widths) == 2 and max(widths) <= 0


def test_scrollable_tables_can_be_focused_on_a_small_screen(page: webdriver.Chrome) -> None:
    set_screen(page, 375)
    wide = """return [...document.querySelectorAll(".scroll")]
        .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.tabIndex)"""
    tab_indices = page.execute_async_script(
        f"requestAnimationFrame(() => setTimeout(() => arguments[0]((() => {{ {wide} }})()), 50))"
    )
    assert tab_indices and set(tab_indices) == {0}


def test_dark_and_light_differ_and_both_are_legible(page: webdriver.Chrome) -> None:
    check_contrasts(page)


def test_reduced_motion_is_respected(page: webdriver.Chrome) -> None:
    behaviour = "return getComputedStyle(document.documentElement).scrollBehavior"
    set_screen(page, 1280, prefers_reduced_motion="reduce")
    assert page.execute_script(behaviour) == "auto"


def test_headings_images_and_landmarks_are_in_order(page: webdriver.Chrome) -> None:
    levels = [int(heading.tag_name[1]) for heading in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4, h5, h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    images = page.find_elements(By.TAG_NAME, "img")
    assert images and all(image.get_attribute("alt") for image in images)
    assert page.execute_script("return [...document.images].every((image) => image.naturalWidth >= 128)")
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.find_elements(By.TAG_NAME, landmark)) == 1
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    for drawing in page.find_elements(By.CSS_SELECTOR, "svg[role=img]"):
        assert "by epoch" in drawing.accessible_name
