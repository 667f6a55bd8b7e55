"""What tests do with a page of `calibrate report` in a browser, and WCAG's contrast of what they find."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = """
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
  if (!element.getClientRects().length) continue;
  let behind = element;
  while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const color = element instanceof SVGElement ? style.fill : style.color;
  const ground = getComputedStyle(behind || document.body).backgroundColor;
  found.push([walker.currentNode.data.trim().slice(0, 40), color, ground, parseFloat(style.fontSize)]);
}
return found;
"""
"""Of every text that is seen: its beginning, colour, ground and size in pixels."""


def open_page(browser: Any, path: Path, width: int = 1000, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    prefer(browser, scheme)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    wait(lambda: browser.execute_script("return document.documentElement.dataset.drawn"), "the page was not drawn")


def prefer(browser: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(condition: Callable[[], Any], said: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, said
        time.sleep(0.02)
    return found


def told(browser: Any) -> Any:
    """What the bubble says, as a dict; None: it is hidden."""
    return browser.execute_script(
        """const bubble = document.getElementById("bubble"); if (bubble.hidden) return null;
        const words = [...bubble.children].map((each) => each.textContent), found = {};
        for (let at = 0; at < words.length; at += 2) found[words[at]] = words[at + 1];
        return found;"""
    )


def hover(browser: Any, figure: str, mark: str, number: int) -> Any:
    """Move the mouse over a mark: what is told of it."""
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 1, "y": 1})
    wait(lambda: told(browser) is None, "the bubble stays")
    script = """const mark = document.querySelectorAll(`#${arguments[0]} ${arguments[1]}`)[arguments[2]];
        mark.scrollIntoView({block: "center", behavior: "instant"});
        const box = mark.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2];"""
    browser.execute_script(script, figure, mark, number)
    settle(browser)
    x, y = browser.execute_script(script, figure, mark, number)
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    return wait(lambda: told(browser), f"{figure}: nothing is told at {x}, {y}")


def settle(browser: Any) -> None:
    """Two frames, after which the events of a scroll were given out."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def choose(browser: Any, figure: str, quantity: str) -> None:
    browser.execute_script(
        """const choice = document.querySelector(`select[data-figure="${arguments[0]}"]`);
        choice.value = arguments[1]; choice.dispatchEvent(new Event("change"));""",
        figure,
        quantity,
    )
    settle(browser)


def luminance(color: str) -> float:
    channels = np.array([float(number) for number in re.findall(r"[\d.]+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)
