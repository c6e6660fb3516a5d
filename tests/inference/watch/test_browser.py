"""The page of `watch` in a browser: curves that grow while a run trains, ticked runs, keyboard, screens, safety."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
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
from fastvit_train.inference.watch.server import WatchServer
from fastvit_train.runs.comparison import comparison_rows
from fastvit_train.runs.lock import RunLock
from fastvit_train.runs.results import read_runs
from fastvit_train.runs.run_folder import RunFolder, read_jsonl
from tests.support import ROOT, environment, launch_command, wait_until
from tests.support.browser import check_contrasts, needs_browser, open_browser, requested_urls, set_screen
from tests.support.watching import serving

SMALL = (
    *("--depth", "1", "--embed-dim", "16", "--num-heads", "2", "--patch-size", "8", "--attention", "fused"),
    *("--batch-size", "240", "--no-telemetry"),
)
HOSTILE = "<img src=x onerror=document.title='hacked'>"
HIDDEN = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
WITHOUT_MOTION = {"prefers_reduced_motion": "reduce"}  # what scrolls smoothly is not where it is clicked
READ = """
fetch(arguments[0], {mode: arguments[1]}).then((answer) => answer.text()).then(arguments[2], () => arguments[2]("not"))
"""
TRAIN_LOSS, TEST_LOSS, ACCURACY = range(3)
CHARTS = "document.querySelectorAll('#charts figure')"
pytestmark = [needs_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, `a` and `b`; to be read only."""
    root = tmp_path_factory.mktemp("trained")
    for name, lr, epochs in (("a", "0.01", "3"), ("b", "0.02", "5")):
        main(["--runs-dir", str(root), "--exp-name", name, "--lr", lr, "--epochs", epochs, *SMALL])
    return root


@pytest.fixture
def runs(trained_runs: Path, tmp_path: Path) -> Path:
    """The two runs, and copies of them: one with a hostile name, a damaged one, and one that has stopped."""
    root = tmp_path / "runs"
    shutil.copytree(trained_runs, root, symlinks=True)
    for number, name in enumerate(("a", HOSTILE, "damaged", "stopped")):
        if number:
            shutil.copytree(root / "a", root / name, symlinks=True)
        os.utime(root / name / "config.yaml", (1e9 - number, 1e9 - number))
    (root / "damaged" / "summary.json").write_text("{")
    (root / "stopped" / "summary.json").unlink()
    return root


@pytest.fixture
def server(runs: Path) -> Iterator[WatchServer]:
    with serving(runs) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(server: WatchServer, browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The page on a large screen; it must ask its server for everything and log nothing to the console."""
    set_screen(browser, 1280, **WITHOUT_MOTION)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(server.url)
    wait_for_rows(browser, server)
    yield browser
    assert browser.get_log("browser") == []
    requested = requested_urls(browser)
    assert requested and all(url.startswith((server.url, "data:")) for url in requested)
    browser.get("about:blank")


def wait_for_rows(page: webdriver.Chrome, server: WatchServer) -> None:
    wait_until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#rows tr")) == len(server.runs.read()))
    wait_until(lambda: lines(page, TEST_LOSS) > 0)


def row(page: webdriver.Chrome, name: str) -> WebElement:
    """The row of a run in the list."""
    names = "[...document.querySelectorAll('#rows strong')]"
    find = f"return {names}.find((e) => e.textContent === arguments[0])?.closest('tr')"
    found = page.execute_script(find, name)
    assert found is not None, f"{name} is not listed"
    return found


def cell(page: webdriver.Chrome, name: str, column: str) -> str:
    """The text of a run's cell."""
    return row(page, name).find_element(By.CSS_SELECTOR, f"[data-label='{column}']").text


def tick(page: webdriver.Chrome, *names: str) -> None:
    for name in names:
        row(page, name).find_element(By.TAG_NAME, "input").click()


def chart(page: webdriver.Chrome, number: int) -> WebElement:
    return page.find_elements(By.CSS_SELECTOR, "#charts figure")[number]


def lines(page: webdriver.Chrome, number: int) -> int:
    """How many curves a chart has."""
    return page.execute_script(f"return {CHARTS}[arguments[0]].querySelectorAll('.plot .line').length", number)


def points(page: webdriver.Chrome, number: int) -> int:
    """How many points the first curve of a chart has."""
    line = f"{CHARTS}[arguments[0]].querySelector('.plot > svg > .line')"
    return page.execute_script(f"return {line}?.getAttribute('d').split(/[ML]/).length - 1", number) or 0


def legend(page: webdriver.Chrome) -> list[str]:
    """The names in the legend, read at once: the page may draw it anew at any time."""
    return page.execute_script("return [...document.querySelectorAll('#legend li')].map((e) => e.innerText.trim())")


def values(folder: Path, key: str) -> list[Any]:
    return [row[key] for row in read_jsonl(RunFolder(folder).metrics)]


def test_the_curve_of_a_run_in_training_grows(page: webdriver.Chrome, runs: Path) -> None:
    command = launch_command("--runs-dir", runs, "--exp-name", "live", "--epochs", 100_000, *SMALL)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with subprocess.Popen(command, env=environment(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="")) as process:
        try:
            wait_until(lambda: len(page.find_elements(By.CSS_SELECTOR, ".state.training")) == 1)
            assert page.find_element(By.CSS_SELECTOR, "#rows tr strong").text == "live"
            wait_until(lambda: legend(page) == ["live"] and points(page, ACCURACY) >= 1)
            drawn = points(page, ACCURACY)
            wait_until(lambda: points(page, ACCURACY) >= drawn + 3)
            known = len(values(runs / "live", "epoch"))
            done, _, planned = cell(page, "live", "epochs").partition(" of ")
            assert planned == "100000" and drawn + 3 <= int(done) <= known
            assert page.title.startswith("1 in training") and "1 in training" in page.find_element(By.ID, "status").text
            assert float(cell(page, "live", "images/s").replace(",", "")) > 0
        finally:
            process.send_signal(signal.SIGTERM)
    wait_until(lambda: cell(page, "live", "state") == "stopped")
    wait_until(lambda: points(page, TRAIN_LOSS) == len(values(runs / "live", "epoch")))
    assert page.get_log("browser") == []


def test_the_list_names_the_states(page: webdriver.Chrome) -> None:
    states = {name: cell(page, name, "state") for name in ("a", "b", "damaged", "stopped", HOSTILE)}
    assert states == {"a": "finished", "b": "finished", "damaged": "damaged", "stopped": "stopped", HOSTILE: "finished"}
    assert cell(page, "b", "accuracy").endswith("%") and cell(page, "stopped", "epochs") == "3 of 3"
    assert "cannot be read" in row(page, "damaged").find_element(By.TAG_NAME, "small").text
    assert not row(page, "damaged").find_element(By.TAG_NAME, "input").is_enabled()
    assert legend(page) == ["b"], "with no run in training and none ticked, the newest one is drawn"


def test_names_are_text(page: webdriver.Chrome) -> None:
    tick(page, HOSTILE, "a")
    wait_until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#comparison-table thead th")) == 2)
    page.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert HOSTILE in legend(page)
    assert page.find_elements(By.TAG_NAME, "img") == [] and page.title == "fastvit watch"


def test_ticked_runs_are_drawn_together_and_compared(page: webdriver.Chrome, runs: Path, server: WatchServer) -> None:
    tick(page, "a")
    wait_until(lambda: legend(page) == ["a"])
    assert not page.find_element(By.ID, "comparison").is_displayed()
    tick(page, "b")
    wait_until(lambda: page.find_element(By.ID, "comparison").is_displayed())
    wait_until(lambda: legend(page) == ["b", "a"])
    assert [lines(page, number) for number in range(3)] == [2, 2, 2]
    styles = page.execute_script(
        "return [...document.querySelectorAll('#charts figure:first-child .plot .line')].map((e) => e.classList.value)"
    )
    assert len(set(styles)) == 2
    cells = "[...r.cells].map((c) => c.textContent)"
    table = f"return [...document.querySelectorAll('#comparison-table tr')].map((r) => {cells})"
    wait_until(lambda: page.execute_script(table))  # the server answers later than the legend is drawn
    shown = page.execute_script(table)
    _, *expected = comparison_rows(read_runs([runs / "b", runs / "a"]))
    assert shown[0] == ["", "b", "a"]
    assert [cells for cells in shown[1:] if len(cells) == 3] == expected
    assert ["Settings that differ"] in shown and ["--lr", "0.02", "0.01"] in shown
    page.get(page.current_url)  # which names the runs
    wait_for_rows(page, server)
    wait_until(lambda: legend(page) == ["b", "a"])
    page.find_element(By.ID, "untick").click()
    wait_until(lambda: legend(page) == ["b"])
    assert not page.find_element(By.ID, "comparison").is_displayed() and page.current_url == server.url


def test_the_keyboard_reads_the_values(page: webdriver.Chrome, runs: Path) -> None:
    tick(page, "a", "b")
    wait_until(lambda: legend(page) == ["b", "a"])
    slider = chart(page, TEST_LOSS).find_element(By.CLASS_NAME, "slider")
    tooltip = chart(page, TEST_LOSS).find_element(By.CLASS_NAME, "tooltip")
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        assert page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused) != "none"
        if focused == slider:
            break
    assert page.switch_to.active_element == slider
    a, b = values(runs / "a", "test_loss"), values(runs / "b", "test_loss")
    for key, epoch in ((Keys.HOME, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, 5)):
        ActionChains(page).send_keys(key).perform()
        of_a = f"{a[epoch - 1]:.4f}" if epoch <= len(a) else "—"
        assert tooltip.text == f"epoch {epoch}\nb: {b[epoch - 1]:.4f}\na: {of_a}"
        assert slider.get_attribute("aria-valuetext") == f"epoch {epoch}"
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert tooltip.text == ""


def test_the_table_of_a_chart_has_all_values(page: webdriver.Chrome, runs: Path) -> None:
    figure = chart(page, ACCURACY)
    figure.find_element(By.TAG_NAME, "summary").click()
    wait_until(lambda: len(figure.find_elements(By.CSS_SELECTOR, "tbody tr")) == 5)
    shown = [one.text for one in figure.find_elements(By.TAG_NAME, "td")]
    assert shown == [f"{100 * value:.2f}%" for value in values(runs / "b", "test_accuracy")]
    drawing = figure.find_element(By.CSS_SELECTOR, "svg[role=img]").accessible_name
    assert drawing.startswith("Line chart of accuracy, % by epoch. b: from ") and "in epoch" not in drawing


def test_curves_by_time_and_by_step(page: webdriver.Chrome, runs: Path) -> None:
    slider = chart(page, TRAIN_LOSS).find_element(By.CLASS_NAME, "slider")
    page.find_element(By.CSS_SELECTOR, "[value=seconds]").click()
    total = sum(values(runs / "b", "seconds"))
    wait_until(lambda: float(str(slider.get_attribute("aria-valuenow"))) == pytest.approx(total))
    assert points(page, TRAIN_LOSS) == 5 and "training time" in chart(page, TRAIN_LOSS).text
    page.find_element(By.CSS_SELECTOR, "[value=step]").click()
    steps = len(read_jsonl(RunFolder(runs / "b").steps))
    wait_until(lambda: points(page, TRAIN_LOSS) == steps)
    assert steps > 5 and points(page, TEST_LOSS) == 5 and slider.get_attribute("aria-valuetext") == f"step {steps}"


def test_rows_move_without_losing_the_focus(page: webdriver.Chrome, runs: Path) -> None:
    box = row(page, "stopped").find_element(By.TAG_NAME, "input")
    page.execute_script("arguments[0].focus()", box)
    lock = RunLock(runs / "stopped")
    lock.acquire()
    wait_until(lambda: page.find_element(By.CSS_SELECTOR, "#rows tr strong").text == "stopped")
    lock.release()
    assert page.switch_to.active_element == box and legend(page) == ["stopped"]


def test_the_filter_shows_runs_by_name(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "filter").send_keys("STOP")
    names = page.find_elements(By.CSS_SELECTOR, "#rows strong")
    assert [name.text for name in names if name.is_displayed()] == ["stopped"]


def test_runs_appear_and_disappear(page: webdriver.Chrome, runs: Path) -> None:
    shutil.copytree(runs / "a", runs / "new")
    wait_until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#rows tr")) == 6)
    row(page, "new")
    for folder in runs.iterdir():
        shutil.rmtree(folder)
    wait_until(lambda: page.find_element(By.ID, "empty").is_displayed())
    assert (
        page.find_elements(By.CSS_SELECTOR, "#rows tr") == [] and not page.find_element(By.ID, "curves").is_displayed()
    )


def test_a_report_opens_in_a_sandbox(page: webdriver.Chrome, server: WatchServer) -> None:
    link = row(page, "a").find_element(By.LINK_TEXT, "report")
    assert link.accessible_name == "report of a" and link.get_attribute("rel") == "noopener"
    page.get(str(link.get_attribute("href")))
    assert page.find_element(By.TAG_NAME, "h1").text == "Report on a"
    slider = page.find_element(By.CLASS_NAME, "slider")
    page.execute_script("arguments[0].focus()", slider)
    wait_until(lambda: "epoch 3" in page.find_element(By.CLASS_NAME, "tooltip").text)  # its script runs
    assert page.execute_script("return origin") == "null"
    assert page.execute_async_script(READ, f"{server.url}api/runs", "no-cors") == "not"
    assert "violates" in page.get_log("browser")[0]["message"]


def test_another_site_can_neither_read_the_runs_nor_show_the_page(
    server: WatchServer, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.html"
    evil.write_text(f"<iframe src='{server.url}'></iframe><script src='{server.url}watch.js'></script>")
    browser.get(evil.as_uri())
    for mode in ("cors", "no-cors"):
        assert browser.execute_async_script(READ, f"{server.url}api/runs", mode) in ("not", "")
    browser.switch_to.frame(0)
    assert browser.find_elements(By.ID, "rows") == []
    browser.switch_to.default_content()
    browser.get("about:blank")


def test_a_server_that_does_not_answer_is_reported_until_it_does(page: webdriver.Chrome) -> None:
    status, speed = page.find_element(By.ID, "status"), {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.execute_cdp_cmd("Network.enable", {})
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **speed})
    wait_until(lambda: "does not answer" in status.text)
    assert cell(page, "a", "state") == "finished"
    page.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **speed})
    wait_until(lambda: status.text == "5 runs, 0 in training.")
    assert all("ERR_INTERNET_DISCONNECTED" in entry["message"] for entry in page.get_log("browser"))


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_makes_the_page_scroll_sideways(page: webdriver.Chrome, width: int, runs: Path) -> None:
    set_screen(page, width, **WITHOUT_MOTION)
    (runs / "a").rename(runs / ("long-" * 40))
    wait_until(lambda: "long-long" in page.find_element(By.ID, "rows").text)
    tick(page, "b", "long-" * 40)
    wait_until(lambda: page.find_element(By.ID, "comparison").is_displayed())
    page.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    wait_until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#charts tbody")) == 3)
    assert page.execute_script("return innerWidth") == width
    overflow = "return document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
    assert page.execute_script(overflow) == 0
    assert page.execute_script(f"return {HIDDEN} && !e.closest('.scroll')).map((e) => e.outerHTML)") == []
    if width == 390:  # rows are cards, and nothing of them is hidden
        assert page.execute_script(f"return {HIDDEN} && e.closest('.runs')).map((e) => e.outerHTML)") == []


def test_dark_and_light_differ_and_both_are_legible(page: webdriver.Chrome) -> None:
    tick(page, "a", "b")
    wait_until(lambda: page.find_element(By.ID, "comparison").is_displayed())
    check_contrasts(page)


def test_headings_labels_and_landmarks_are_in_order(page: webdriver.Chrome) -> None:
    levels = [int(heading.tag_name[1]) for heading in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3") if heading.text]
    assert levels == [1, 2, 3, 3, 3]
    for field in page.find_elements(By.TAG_NAME, "input"):
        assert field.accessible_name
    assert row(page, "b").find_element(By.TAG_NAME, "input").accessible_name == "b"
    for landmark in ("header", "main", "footer"):
        assert len(page.find_elements(By.TAG_NAME, landmark)) == 1
    ActionChains(page).send_keys(Keys.TAB).perform()
    link = page.switch_to.active_element
    assert link.text.startswith("Skip") and link.location["x"] >= 0
