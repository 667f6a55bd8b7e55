"""The page in a real browser: it draws, tells what is under the mouse, can be read on a phone and in the dark, asks
nobody for anything, and runs nothing that a stranger wrote."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from browsing import TEXTS, choose, contrast, hover, luminance, open_page, prefer, settle, told
from report_samples import artifact, results

from kvcal.calibrate.reports import report

MARKS = {"rank-map": ".mark-rect path", "spectra": ".mark-symbol.role-mark path"}
INJECTIONS = (
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 1</script>",
    '"><img src=x onerror="window.ran = 1">',
    "' onmouseover='window.ran = 1' autofocus onfocus='window.ran = 1",
    "<svg onload=window.ran=1><a href=javascript:window.ran=1>x</a></svg>",
    "</style><script>window.ran = 1</script>",
    "<!--<script>",
    "javascript:window.ran=1",
    "\u2028window.ran = 1\u2029//",
    "${window.ran = 1} {{ 7 * 7 }} {% raw %} datum.x #{signal}",
    "]]></title><iframe srcdoc='<script>parent.ran = 1</script>'>",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(artifact, its page)"""
    folder = tmp_path_factory.mktemp("page")
    found = artifact(folder / "a")
    (folder / "report.html").write_text(report(found, [results(folder / "r.json", found)]), encoding="utf-8")
    return found, folder / "report.html"


def test_it_draws_without_an_error_and_asks_nobody(browser, made):
    open_page(browser, made[1])
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"}
    assert asked <= {made[1].as_uri()}
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map((e) => e.querySelectorAll('svg').length)"
    )
    assert drawn and set(drawn) == {1}


@pytest.mark.parametrize("quantity", ["key_pre", "value"])
def test_the_heat_map_tells_the_rank_under_the_mouse(browser, made, quantity):
    found, page = made
    open_page(browser, page)
    choose(browser, "rank-map", quantity)
    seen = {}
    for number in range(4):
        words = hover(browser, "rank-map", MARKS["rank-map"], number)
        seen[int(words["layer"]), int(words["KV head"])] = int(words["dimensions for 90 %"])
    for (layer, head), rank in seen.items():
        values = found.tensor("pca", layer, f"{quantity}.eigenvalues")[head].numpy()
        assert rank == 1 + int((np.cumsum(values) < 0.9 * values.sum()).sum())
    assert set(seen) == {(layer, head) for layer in range(2) for head in range(2)}


def test_a_spectrum_tells_the_share_under_the_mouse(browser, made):
    found, page = made
    open_page(browser, page)
    words = hover(browser, "spectra", MARKS["spectra"], 3)
    values = found.tensor("pca", int(words["layer"]), "key_pre.eigenvalues").numpy()
    share = (np.cumsum(values, 1) / values.sum(1, keepdims=True)).mean(0)[int(words["dimensions kept"]) - 1]
    assert float(words["share of the variance"].rstrip("%")) == pytest.approx(100 * share, abs=0.06)


def test_a_point_tells_all_its_settings(browser, made):
    open_page(browser, made[1])
    marks = "#quality-0-read-ratio .mark-symbol.role-mark path"
    count = browser.execute_script(f"return document.querySelectorAll('{marks}').length")
    seen = [hover(browser, "quality-0-read-ratio", ".mark-symbol.role-mark path", number) for number in range(count)]
    assert {(words["method"], words["settings"], words["perplexity / full's"]) for words in seen} == {
        ("full", "–", "1.000"),
        ("loki", "keep 0.25", "1.030 ± 0.010"),
        ("loki", "keep 0.125", "1.050 ± 0.020"),
        ("loki", "keep 0.5", "1.010 ± 0.030"),
        ("h2o", "keep 0.25", "40.000 ± 0.040"),
    }


def test_a_finger_that_was_lifted_leaves_what_was_told(browser, made):
    """Of one mark after the other: browsers make mouse events of a touch, which leave the mark before."""
    open_page(browser, made[1], width=360)
    script = """const mark = document.querySelectorAll(`#${arguments[0]} ${arguments[1]}`)[2];
        mark.scrollIntoView({block: "center", behavior: "instant"});
        const box = mark.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2];"""
    for figure, name in (("rank-map", "dimensions for 90 %"), ("spectra", "dimensions kept"), ("rank-map", "of")):
        browser.execute_script(script, figure, MARKS[figure])
        settle(browser)
        x, y = browser.execute_script(script, figure, MARKS[figure])
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        time.sleep(0.4)  # the mouse events come when it is sure that the touch was no other gesture
        assert name in (told(browser) or {}), figure


def test_it_can_be_read_on_a_phone(browser, made):
    open_page(browser, made[1], width=360)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    small = [(text, size) for text, _, _, size in browser.execute_script(TEXTS) if size < 12]
    assert small == []


def test_contrast_is_sufficient_in_light_and_dark_and_changes_at_once(browser, made):
    open_page(browser, made[1])
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    grounds = []
    for scheme in ("light", "dark", "light"):
        prefer(browser, scheme)
        settle(browser)
        texts = browser.execute_script(TEXTS)
        assert len(texts) > 100
        weak = [(text, color, ground) for text, color, ground, _ in texts if contrast(color, ground) < 4.5]
        assert weak == [], scheme
        grounds.append(luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor")))
    assert grounds[0] == grounds[2] > 0.9 and grounds[1] < 0.05


def test_nothing_of_a_strangers_runs(browser, tmp_path):
    name = " ".join(INJECTIONS)
    found = artifact(tmp_path / "a", name, warnings=[name], budget={name: name})
    path = results(tmp_path / "'><img src=x onerror='window.ran=1'>.json", found, name, model=name)
    body, lines = json.loads(path.read_text()), []
    for text in INJECTIONS:  # each by itself, since long names are cut short: as a method, a setting and a task
        one = results(tmp_path / "one.json", found, text, samples=1)
        lines.append((tmp_path / "one.predictions.jsonl").read_text())
        body["results"].append({**json.loads(one.read_text())["results"][1], "method": text, "basis": text, text: text})
        body["results"][0]["scores"][text] = 0.5
    path.write_text(json.dumps(body))
    path.with_name(path.name.removesuffix(".json") + ".predictions.jsonl").write_text("".join(lines))
    page = tmp_path / "report.html"
    page.write_text(report(found, [path]), encoding="utf-8")
    open_page(browser, page)
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    marks = "#quality-0-read-ratio .mark-symbol.role-mark path"
    for number in range(browser.execute_script(f"return document.querySelectorAll('{marks}').length")):
        hover(browser, "quality-0-read-ratio", ".mark-symbol.role-mark path", number)
    assert browser.execute_script("return window.ran") is None
    strange = "img, iframe, a:not([href^='#']), [onload], [onerror], [onfocus], [onmouseover]"
    assert browser.execute_script("return document.querySelectorAll(arguments[0]).length", strange) == 0
    assert browser.execute_script("return document.scripts.length") == 2  # the data and ours
    assert browser.get_log("browser") == []
    for text in INJECTIONS[:8]:  # shown as it was written
        assert text in browser.execute_script("return document.querySelector('main').textContent")


def test_the_policy_would_stop_what_escaping_missed(browser, made):
    open_page(browser, made[1])
    browser.execute_script(
        """const script = document.createElement("script"); script.textContent = "window.ran = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", '<img src="data:," onerror="window.ran = 1">');"""
    )
    settle(browser)
    assert browser.execute_script("return window.ran") is None
    assert (
        browser.execute_async_script("fetch('https://example.org').then(() => arguments[0](1), () => arguments[0](0))")
        == 0
    )
    assert "Content Security Policy" in str(browser.get_log("browser"))
