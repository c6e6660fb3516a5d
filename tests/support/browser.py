"""A real browser without a window, for the tests of pages; import it after pytest.importorskip("selenium")."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
needs_browser = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium or chromedriver isn't installed")
FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"),
    *("disable-sync", "no-first-run"),
)


@contextmanager
def open_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty page and with logs of its console and of its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get("about:blank")  # instead of the new-tab page, which requests resources of its own
    yield driver
    driver.quit()


def set_screen(browser: webdriver.Chrome, width: int, **features: str) -> None:
    """Set the width of the screen in pixels, and CSS media features such as the color scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})


def requested_urls(browser: webdriver.Chrome) -> set[str]:
    """What the browser has requested since its log was read last."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


def check_contrasts(page: webdriver.Chrome) -> None:
    """Fail unless the page has another background in the dark than in the light, and legible text on both."""
    contrasts = {}
    for scheme in ("light", "dark"):
        set_screen(page, 1280, prefers_color_scheme=scheme)
        contrasts[scheme] = page.execute_script(CONTRASTS)
    assert contrasts["light"]["page"] != contrasts["dark"]["page"]
    for scheme, result in contrasts.items():
        assert result["texts"] > 100 and result["lowest"] >= 4.5, (scheme, result)


# The lowest contrast (WCAG 2.2) of any text on its background.
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(color) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data;
}
function luminance(color) {
  const [r, g, b] = [...rgb(color)].map((v) => (v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  const color = getComputedStyle(element).backgroundColor;
  return rgb(color)[3] === 0 ? background(element.parentElement) : color;
}
let lowest = 21, texts = 0, worst = "";
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || element.closest("script, svg title, svg desc") || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const drawn = element.closest("svg") ? style.fill : style.color;
  const [light, dark] = [luminance(drawn), luminance(background(element))].sort((a, b) => b - a);
  const contrast = (light + 0.05) / (dark + 0.05);
  texts++;
  if (contrast < lowest) [lowest, worst] = [contrast, element.outerHTML.slice(0, 100)];
}
return { page: getComputedStyle(document.body).backgroundColor, lowest, texts, worst };
"""
