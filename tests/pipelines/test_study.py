"""Laws of pipelines.study and pipelines.answers: a page that asks fairly and sends nothing, and rates that add up."""

import base64
import io
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import bootstrap, norm

from pipelines import storage
from pipelines.answers import Collected, fool_rates, read_answers, to_json, to_markdown
from pipelines.study import Trial, write_study

HOSTILE = 'in"b\'ox/</script><script>document.title="owned"</script>\n&amp;\u202egnp\ud800__proto__.png'
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine's PATH")
GREEN, RED, BLUE = (0, 160, 0), (160, 0, 0), (0, 0, 160)  # a reference, a model's image, an LR


def picture(colour, size=64, *, format="PNG", seed=0):
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = colour
    pixels[0] = np.random.default_rng(seed).integers(0, 256, (size, 3))  # no two are the same file
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def trial(number=0, method="model", *, key=None, size=64, format="PNG"):
    made = f"{number}{method}".encode(errors="replace")
    return Trial(
        key=key or f"{number:02}.png", method=method, lr=picture(BLUE, size // 4, seed=number),
        sr=picture(RED, size, seed=[*made], format=format), hr=picture(GREEN, size, seed=number + 1000),
    )  # fmt: skip


def page(trials=8, methods=("model",), **changes):
    made = [trial(number, method) for number in range(trials) for method in methods]
    return write_study(made, **{"title": "Faces", "seed": 0, "digest": "d1", "seconds": 60} | changes)


def payload(html):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', html, re.DOTALL)[1])


# The page as text


def test_the_page_is_the_same_for_the_same_study_and_holds_each_picture_once():
    assert page() == page()
    found = payload(page(3, ["a", "b"], show_lr="both"))
    unused = 1  # the practice is of one method
    assert len(found["pictures"]) == len(set(found["pictures"])) == 3 * (1 + 1 + 2) - unused
    first = trial(0, "a")
    assert base64.b64decode(found["pictures"][0]) in {first.hr, first.sr, first.lr, trial(1, "a").lr, trial(2, "a").lr}


def test_the_page_may_ask_for_nothing():
    html = page()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "script-src": "'unsafe-inline'",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert not re.search(r"https?:|@import|url\(|\bsrc=|\bfetch\(|XMLHttp|sendBeacon|WebSocket|localStorage", html)


def test_one_photograph_is_practice_alone_and_the_seed_chooses_it():
    chosen = set()
    for seed in range(6):
        found = payload(page(3, ["a", "b"], seed=seed))
        chosen.add(found["practice"]["key"])
        asked = {(one["key"], one["method"]) for one in found["trials"]}
        assert len(asked) == 4 and found["practice"]["key"] not in {key for key, _ in asked}
        shown = {found["practice"][name] for name in ("sr", "hr")}
        assert not shown & {one[name] for one in found["trials"] for name in ("sr", "hr")}
    assert len(chosen) > 1


@pytest.mark.parametrize("show_lr, tasks", [(True, [1]), (False, [2]), ("both", [1, 2])])
def test_the_lr_is_in_the_page_only_where_a_task_shows_it(show_lr, tasks):
    found = payload(page(show_lr=show_lr))
    assert found["tasks"] == tasks
    assert all(("lr" in one) == (1 in tasks) for one in [found["practice"], *found["trials"]])


LR, HR = picture(BLUE, 16), picture(GREEN)
BAD = {
    "no trials": ([], {}, "trials .*must be one for practice"),
    "one photograph": ([trial()], {}, "trials .*'1 photographs'"),
    "too few for two tasks": ([trial(), trial(1)], {"show_lr": "both"}, "trials"),
    "twice": ([trial(), trial(), trial(1)], {}, "one image of 'model', not 2"),
    "no name": ([trial(), trial(1, "")], {}, "must be named"),
    "other reference": ([trial(), Trial(key="00.png", method="b", lr=LR, sr=HR, hr=HR)], {}, "one reference"),
    "other size": ([trial(), Trial(key="k", method="b", lr=LR, sr=picture(RED, 60), hr=HR)], {}, "sr of 'k' .*64 x 64"),
    "odd LR": ([trial(), Trial(key="k", method="b", lr=picture(RED, 60), sr=HR, hr=HR)], {"show_lr": True}, "lr of"),
    "cut": ([trial(), Trial(key="k", method="b", lr=LR, sr=HR[:99], hr=HR)], {}, "sr of 'k' must be an image"),
    "WebP": ([trial(), Trial(key="k", method="b", lr=LR, sr=picture(RED, format="WEBP"), hr=HR)], {}, "PNG or JPEG"),
    "no time": ([trial(), trial(1)], {"seconds": 0}, "seconds"),
    "not a time": ([trial(), trial(1)], {"seconds": float("nan")}, "seconds"),
    "no digest": ([trial(), trial(1)], {"digest": ""}, "digest"),
}


@pytest.mark.parametrize("made, changes, message", BAD.values(), ids=BAD)
def test_what_cannot_be_shown_fairly_is_refused(made, changes, message):
    with pytest.raises(ValueError, match=message):
        write_study(made, **{"title": "t", "seed": 0, "digest": "d"} | changes)


def test_an_image_that_browsers_turn_is_refused():
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 64)).save(out, "JPEG", exif=exif)
    turned = Trial(key="k", method="b", lr=LR, sr=out.getvalue(), hr=HR)
    with pytest.raises(ValueError, match="sr of 'k' .*upright"):
        write_study([trial(), turned], title="t", seed=0, digest="d")


# The page in a browser, driven over a pipe: https://chromedevtools.github.io/devtools-protocol/


class Browser:
    """A headless Chromium with a profile and a folder for downloads of its own; events are kept by their method."""

    def __init__(self, folder):
        self.folder, self.number, self.buffer = folder, 0, b""
        (to_read, write), (self.read, to_write) = os.pipe(), os.pipe()
        self.write = write
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command],
            pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read), os.close(to_write)
        os.set_blocking(self.read, False)
        self.events, self.session = [], None
        downloads = {"behavior": "allow", "downloadPath": str(folder), "eventsEnabled": True}
        self.send("Browser.setDownloadBehavior", **downloads)

    def message(self, until):
        while b"\0" not in self.buffer:
            assert time.monotonic() < until and self.process.poll() is None, "chromium does not answer"
            try:
                self.buffer += os.read(self.read, 2**20)
            except BlockingIOError:
                time.sleep(0.002)
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def send(self, method, **params):
        self.number += 1
        sent = {"id": self.number, "method": method, "params": params}
        sent |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(sent).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            got = self.message(until)
            if got.get("id") == self.number:
                assert "error" not in got, got["error"]
                return got["result"]
            if "method" in got:
                self.events.append((got["method"], got["params"]))

    def run(self, script):
        """Return the value of an expression, or of what it promises."""
        got = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, script, wanted=True):
        end = time.monotonic() + 60
        while (got := self.run(script)) != wanted:
            assert time.monotonic() < end, f"{script} is {got!r}"
            time.sleep(0.005)

    def open(self, html, *, speed=100, width=1200, height=900):
        """Show the page in a new tab, whose crosses are this much shorter; the images stay for their time."""
        path = self.folder / f"study-{self.number}.html"
        path.write_text(html, encoding="utf-8")
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events = []
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        faster = (
            f"{{ const plain = setTimeout; window.setTimeout = (f, ms) => plain(f, ms === 500 ? ms / {speed} : ms); }}"
        )
        self.send("Page.addScriptToEvaluateOnNewDocument", source=faster)
        self.send("Page.navigate", url=path.as_uri())
        self.until("document.readyState == 'complete' && !!document.querySelector('main:not([hidden])')")
        return self

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name)

    def click(self, selector):
        box = self.run(
            f"(node => {{ node.scrollIntoView({{block: 'nearest'}}); return node.getBoundingClientRect().toJSON(); }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **middle, button="left", clickCount=1)

    def screen(self):
        return self.run("document.querySelector('main:not([hidden])').id")

    def requests(self):
        self.run("0")
        found = [params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"]
        return [url for url in found if not url.startswith("blob:")]


EYES = """
function seen(id) {  // the colour in the middle of what is shown there, or null
  const canvas = document.querySelector(`#${id} canvas`), {width, height} = canvas;
  if (!width || canvas.closest("[hidden]")) return null;
  const [r, g, b, a] = canvas.getContext("2d").getImageData(width / 2, height / 2, 1, 1).data;
  return a === 0 ? null : g > r && g > b ? "reference" : r > b ? "model" : "lr";
}
"""
RESPONDENT = """(async choose => {
  const tick = () => new Promise(done => { const {port1, port2} = new MessageChannel();
                                           port2.onmessage = done; port1.postMessage(0); });
  const seen_all = [];
  for (;;) {
    await tick();
    const shown = document.querySelector("main:not([hidden])");
    if (shown.id === "end") return seen_all;
    if (shown.id !== "stage") { shown.querySelector(".first").click(); continue; }
    if (document.getElementById("left").disabled) continue;
    const sides = {left: seen("left"), right: seen("right"), middle: seen("middle")};
    const elements = ["left", "right"].map(id => document.querySelector(`#${id} canvas`).outerHTML);
    seen_all.push({...sides, elements, practice: document.getElementById("count").textContent === "Practice"});
    const side = choose(sides, seen_all.length);
    if (seen_all.length % 2) document.getElementById(side).click();
    else dispatchEvent(new KeyboardEvent("keydown", {key: {left: "f", right: "ArrowRight"}[side]}));
  }
})"""
REFERENCE = 'sides => sides.left === "reference" ? "left" : "right"'
MODEL = 'sides => sides.left === "model" ? "left" : "right"'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine's PATH")
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.session = None
    found.send("Browser.close")
    found.process.wait(20)
    os.close(found.read), os.close(found.write)


def respond(browser, html, choose):
    """Return what a scripted respondent saw, and the document that the page would save."""
    browser.open(html)
    browser.run(EYES)
    seen = browser.run(f"{RESPONDENT}({choose})")
    return seen, json.loads(browser.run("document.getElementById('answers').value"))


def counted(tmp_path, *documents, digest=None):
    """Return the rates of these documents."""
    for number, document in enumerate(documents):
        (tmp_path / f"{number}.json").write_text(json.dumps(document))
    return fool_rates(read_answers(sorted(tmp_path.glob("*.json")), digest=digest))


@needs_chromium
@pytest.mark.parametrize("choose, rate", [(REFERENCE, 0), (MODEL, 1)], ids=["who always knows", "who never does"])
def test_the_rate_is_0_for_a_respondent_who_sees_and_100_for_one_who_is_always_fooled(browser, tmp_path, choose, rate):
    seen, document = respond(browser, page(9, show_lr=False), choose)
    assert [(one["left"], one["right"]) for one in seen] == [
        ("reference", "model") if one["left"] == "reference" else ("model", "reference") for one in seen
    ]
    assert len(document["trials"]) == 8 and document["complete"] and document["planned"] == 8
    for one, eyes in zip(document["trials"], [one for one in seen if not one["practice"]], strict=True):
        assert eyes[one["side_of_reference"]] == "reference" and one["fooled"] == bool(rate)
        assert 0 <= one["response_ms"] <= one["shown_ms"] < 60_000  # answered while they were there
    found = counted(tmp_path, document, digest="d1")
    assert [(one.by_trials.mean, one.trials, one.task) for one in found.rates] == [(rate, 8, 2)]
    assert browser.requests() == [url for url in browser.requests() if url.startswith("file:") and "study" in url][:1]


@needs_chromium
def test_one_who_always_presses_left_is_fooled_half_of_the_time_and_no_order_is_like_another(browser):
    html = page(41)
    runs = [respond(browser, html, '() => "left"')[1] for _ in range(2)]
    fooled = [sum(one["fooled"] for one in run["trials"]) for run in runs]
    assert all(4 <= count <= 36 for count in fooled)  # 5 standard deviations: fails once in a million runs
    assert all({one["chosen_side"] for one in run["trials"]} == {"left"} for run in runs)
    orders = [[one["key"] for one in run["trials"]] for run in runs]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) and len(set(orders[0])) == 40
    sides = [{one["key"]: one["side_of_reference"] for one in run["trials"]} for run in runs]
    assert sides[0] != sides[1]
    assert runs[0]["respondent"] != runs[1]["respondent"]


@needs_chromium
def test_of_several_methods_and_tasks_nobody_sees_a_photograph_twice_and_each_has_its_share(browser, tmp_path):
    seen, document = respond(browser, page(13, ["a", "b", "c"], show_lr="both"), REFERENCE)
    trials = document["trials"]
    assert len({one["key"] for one in trials}) == len(trials) == 12
    assert Counter((one["task"], one["method"]) for one in trials) == {(t, m): 2 for t in (1, 2) for m in "abc"}
    assert [one["task"] for one in trials] == [1] * 6 + [2] * 6 and document["task"] == "both"
    assert [one["middle"] for one in seen] == ["lr"] * 7 + [None] * 6  # the practice is of the first task
    found = counted(tmp_path, document)
    assert [(one.task, one.method) for one in found.rates] == [(t, m) for t in (1, 2) for m in "abc"]


@needs_chromium
def test_the_images_are_hidden_after_their_time_and_an_answer_is_still_taken(browser):
    browser.open(page(3, show_lr=True, seconds=0.4))
    browser.run(EYES)
    look = "['left', 'right', 'middle'].map(seen).sort().join()"
    browser.run(
        f"looks = []; setInterval(() => {{ const now = {look}; if (now !== looks.at(-1)) looks.push(now); }}, 10)"
    )
    browser.click("#intro .first")
    browser.key("f")  # too early: counts for nothing
    for answer, after in [("#right", "ready"), ("ArrowLeft", "stage"), ("#right", "end")]:
        browser.until("looks.includes('lr,model,reference') && looks.at(-1) === ',,'")
        assert browser.run("[looks.slice(-3), looks = []][0]") == [",,", "lr,model,reference", ",,"]
        assert browser.run("document.getElementById('cross').hidden") and browser.screen() == "stage"
        browser.click(answer) if answer.startswith("#") else browser.key(answer)
        browser.until("document.querySelector('main:not([hidden])').id", after)
        if after == "ready":
            browser.click("#ready .first")
    trials = json.loads(browser.run("document.getElementById('answers').value"))["trials"]
    assert [one["chosen_side"] for one in trials] == ["left", "right"]
    assert all(390 <= one["shown_ms"] < one["response_ms"] for one in trials)


@needs_chromium
def test_a_respondent_pauses_saves_goes_on_and_is_warned_before_what_is_not_saved_is_lost(browser):
    browser.open(page(4))
    browser.click("#intro .first")
    for key, screen in [("j", "ready"), ("ArrowRight", "paused")]:
        browser.until("document.getElementById('left').disabled", False)
        if screen == "paused":
            at = "document.getElementById('left').getBoundingClientRect().toJSON()"
            before = browser.run(at)
            browser.key("p")
            assert browser.run("document.getElementById('pause').ariaPressed") == "true" and browser.run(at) == before
        browser.key(key)
        browser.until("document.querySelector('main:not([hidden])').id", screen)
        if screen == "ready":
            browser.click("#ready .first")
    assert "answered 1 of 3" in browser.run("document.getElementById('paused').textContent")
    unsaved = "dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    assert browser.run(unsaved) is False
    browser.click("#paused .save")
    part = saved(browser)
    assert browser.run(unsaved) is True
    browser.click("#paused .first")
    for number in (2, 3):
        browser.until("document.getElementById('count').textContent", f"Pair {number} of 3")
        browser.until("document.getElementById('left').disabled", False)
        browser.click("#left")
    browser.until("document.querySelector('main:not([hidden])').id", "end")
    assert browser.run(unsaved) is False
    browser.click("#end .save")
    whole = saved(browser)
    assert (part["complete"], len(part["trials"])) == (False, 1) and (whole["complete"], len(whole["trials"])) == (
        True,
        3,
    )
    assert whole["trials"][:1] == part["trials"] and whole["respondent"] == part["respondent"]
    assert whole == json.loads(browser.run("document.getElementById('answers').value"))
    assert whole["viewport"] == [1200, 900] and whole["device_pixel_ratio"] == 1


def saved(browser):
    """Return the document in the file that was just downloaded, under the name that the page promises."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for path in browser.folder.glob("answers-*.json"):
            try:
                document = json.loads(path.read_text())
            except ValueError:  # not whole yet
                continue
            assert path.name == f"answers-{document['respondent']}.json"
            path.unlink()
            return document
        browser.run("0")
        time.sleep(0.02)
    raise AssertionError("nothing was downloaded")


@needs_chromium
def test_no_attribute_says_which_side_is_which(browser):
    seen, _ = respond(browser, page(9), REFERENCE)
    texts = {text for one in seen for text in one["elements"]}
    assert len(seen) == 9 and len(texts) == 1 and "src" not in texts.pop()


@needs_chromium
def test_hostile_names_stay_text_and_come_back_as_they_were(browser, tmp_path):
    made = [trial(n, HOSTILE, key=f"{n}{HOSTILE}") for n in range(3)]
    html = write_study(made, title=HOSTILE, seed=0, digest="d</script>", seconds=60)
    assert html.encode() and "\u202e" not in html
    _, document = respond(browser, html, REFERENCE)
    assert browser.run("document.title") != "owned" and "owned" in browser.run("document.title")
    assert {one["method"] for one in document["trials"]} == {HOSTILE}
    assert {one["key"] for one in document["trials"]} < {one.key for one in made}
    found = counted(tmp_path, document)
    text = to_markdown(found)
    assert (
        text.encode() and "<script>" not in text and len(text.splitlines()) == len(to_markdown(found).split("\n")) - 1
    )
    json.loads(to_json(found))


@needs_chromium
@pytest.mark.parametrize("width, show_lr", [(390, False), (390, True), (1200, True)])
def test_large_images_shrink_to_the_window_which_says_so_and_records_it(browser, width, show_lr):
    made = [trial(n, size=512) for n in range(2)]
    browser.open(write_study(made, title="t", seed=0, digest="d", show_lr=show_lr, seconds=60), width=width, height=800)
    assert "% of their size" in browser.run("document.getElementById('small').textContent")
    assert browser.run("document.getElementById('small').hidden") is False
    browser.run(EYES)
    for screen in ("intro", "ready"):
        browser.click(f"#{screen} .first")
        browser.until("document.getElementById('left').disabled", False)
        boxes = browser.run("[...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect().toJSON())")
        assert browser.run("document.documentElement.scrollWidth") <= width
        shown = [box for box in boxes if box["width"]]
        assert len(shown) == 2 + show_lr
        assert all(box["left"] >= 0 and box["right"] <= width and box["bottom"] <= 800 for box in shown)
        browser.click("#left")
    browser.until("document.querySelector('main:not([hidden])').id", "end")
    (one,) = json.loads(browser.run("document.getElementById('answers').value"))["trials"]
    assert one["shown_scale"] == pytest.approx(shown[0]["width"] / 512, abs=1e-3) and one["shown_scale"] < 1


@needs_chromium
def test_in_a_large_window_a_pixel_is_a_pixel(browser):
    _, document = respond(browser, page(3), REFERENCE)
    assert [one["shown_scale"] for one in document["trials"]] == [1, 1]


# The answers


def answers(respondent="0123456789abcdef", *, fooled=(True, False, True), method="model", **changes):
    trials = [
        {
            "task": 2, "key": f"{n}.png", "method": method, "side_of_reference": "left",
            "chosen_side": "right" if was else "left", "fooled": was, "response_ms": 1000.0 + 100 * n,
            "shown_ms": 900, "shown_scale": 1,
        }
        for n, was in enumerate(fooled)
    ]  # fmt: skip
    document = {
        "format": 1, "study": "d1", "title": "Faces", "task": 2, "seconds": 3, "fixation_s": 0.5,
        "respondent": respondent, "started": "2026-01-01T00:00:00.000Z", "viewport": [1200, 900],
        "device_pixel_ratio": 1.5, "planned": len(trials), "complete": True, "trials": trials,
    }  # fmt: skip
    return document | changes


def people(count, *, rate=0.3, trials=20, spread=0.0, seed=0):
    draw = np.random.default_rng(seed)
    rates = np.clip(rate + spread * draw.standard_normal(count), 0, 1)
    return [answers(f"{n:016x}", fooled=(draw.random(trials) < own).tolist()) for n, own in enumerate(rates)]


def wilson(fooled, trials):
    z, p = norm.ppf(0.975), fooled / trials
    middle, half = p + z * z / (2 * trials), z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return (p, (middle - half) / (1 + z * z / trials), (middle + half) / (1 + z * z / trials))


def test_the_interval_over_trials_is_wilsons_closed_form(tmp_path):
    found = counted(tmp_path, answers(fooled=[True] * 12 + [False] * 38))
    (rate,) = found.rates
    assert rate.by_trials == pytest.approx(wilson(12, 50), abs=1e-9)
    assert (rate.trials, rate.fooled, rate.respondents, rate.by_respondents) == (50, 12, 1, None)
    assert rate.response_ms == 1000 + 100 * 24.5 and not rate.confused


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_interval_over_respondents_is_that_of_a_bootstrap_of_whole_people(tmp_path, spread):
    documents = people(12, spread=spread)
    documents[0] |= {"trials": documents[0]["trials"][:5], "complete": False}
    found = counted(tmp_path, *documents)
    (rate,) = found.rates
    fooled = np.array([sum(one["fooled"] for one in document["trials"]) for document in documents])
    counts = np.array([len(document["trials"]) for document in documents])
    oracle = bootstrap(
        (fooled, counts), lambda f, n, axis: f.sum(axis) / n.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert rate.by_respondents == pytest.approx((fooled.sum() / counts.sum(), oracle.low, oracle.high), abs=0.012)
    width = rate.by_respondents.high - rate.by_respondents.low
    assert (width > 1.5 * (rate.by_trials.high - rate.by_trials.low)) == (spread > 0)  # people who differ say less


def test_fewer_than_three_respondents_have_no_spread(tmp_path):
    for count in (2, 3):
        found = counted(tmp_path, *people(count))
        assert (found.rates[0].by_respondents is None) == (count < 3)


def test_the_rates_do_not_depend_on_the_order_of_the_files(tmp_path):
    for number, document in enumerate(people(5, spread=0.3)):
        (tmp_path / f"{number}.json").write_text(json.dumps(document))
    paths = sorted(tmp_path.glob("*.json"))
    assert fool_rates(read_answers(paths)) == fool_rates(read_answers(paths[::-1]))
    found = read_answers(paths)
    shuffled = tuple(random.Random(0).sample(found.rows, len(found.rows)))
    assert fool_rates(replace(found, rows=shuffled)) == fool_rates(found)


@pytest.mark.parametrize("fooled, inside", [(25, True), (19, True), (12, False), (40, False)])
def test_half_is_inside_where_an_interval_holds_it(tmp_path, fooled, inside):
    found = counted(tmp_path, answers(fooled=[True] * fooled + [False] * (50 - fooled)))
    assert found.rates[0].confused == inside
    assert json.loads(to_json(found))["rates"][0]["contains_half"] == inside
    assert f"| {'inside' if inside else 'outside'} |" in to_markdown(found)


def test_three_who_agree_do_not_outvote_the_interval_over_trials(tmp_path):
    documents = [answers(f"{n:016x}", fooled=[True] * 4 + [False] * 6) for n in range(3)]
    found = counted(tmp_path, *documents)
    (rate,) = found.rates
    assert rate.by_respondents == (0.4, 0.4, 0.4) and rate.confused


def test_a_respondent_with_two_files_counts_once_as_the_longer_one(tmp_path, capsys):
    whole = answers()
    part = whole | {"trials": whole["trials"][:1], "complete": False}
    for documents in ([part, whole], [whole, part], [whole, whole, part]):
        found = counted(tmp_path, *documents)
        assert (found.rates[0].trials, found.rates[0].respondents) == (3, 1)
        text = capsys.readouterr().err
        assert f"0123456789abcdef is in {len(documents)} files, counted once" in text and "stopped" not in text
        for path in tmp_path.glob("*.json"):
            path.unlink()
    found = counted(tmp_path, part)
    assert found.rates[0].trials == 1
    assert "1 of 1 respondents stopped before the end" in capsys.readouterr().err


def test_files_of_one_respondent_that_disagree_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1\.json.* must say the same as in .*0\.json"):
        counted(tmp_path, answers(), answers(fooled=[False] * 3))


def test_a_file_of_another_study_is_refused_by_both_names(tmp_path):
    other = answers("f" * 16, study="d2")
    with pytest.raises(ValueError, match=r"1\.json.*'d2'.*'d1', as in .*0\.json"):
        counted(tmp_path, answers(), other)
    with pytest.raises(ValueError, match=r"0\.json.*'d1'.*'d3'"):
        counted(tmp_path, answers(), digest="d3")


@pytest.mark.parametrize("name", ["seconds", "fixation_s"])
def test_files_whose_images_were_shown_for_another_time_are_not_counted_together(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} of .*1\.json.*\(2\.0\).*as in .*0\.json"):
        counted(tmp_path, answers(), answers("f" * 16, **{name: 2.0}))


def changed(**changes):
    document = answers()
    document["trials"][0] |= changes
    return document


WRONG = {
    "nothing": (b"", "whole JSON"),
    "truncated": (json.dumps(answers()).encode()[:-20], "whole JSON"),
    "not text": (b"\xff\xfe\x00\xd8", "whole JSON"),
    "deep": (b"[" * 100_000, "whole JSON"),
    "a list": (b"[]", "the whole"),
    "another format": (answers(format=2), "format"),
    "no respondent": ({name: value for name, value in answers().items() if name != "respondent"}, "respondent"),
    "a named respondent": (answers("Ada"), "respondent"),
    "more than the page says": (answers(email="a@b"), "email"),
    "text for a number": (changed(response_ms="12"), "trials.0.response_ms"),
    "not a number": (changed(response_ms=float("nan")), "trials.0.response_ms"),
    "before it was shown": (changed(response_ms=-1), "trials.0.response_ms"),
    "a number for a truth": (changed(fooled=1), "trials.0.fooled"),
    "no side": (changed(chosen_side="up"), "trials.0.chosen_side"),
    "another task": (changed(task=1), "task in"),
    "fooled and not": (changed(fooled=False), "fooled in .*must be True"),
    "asked twice": (changed(key="1.png"), "asked once"),
    "complete with less": (answers(planned=4), "complete in .*must be False"),
    "not complete with all": (answers(complete=False), "complete in .*must be True"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_a_file_that_the_page_did_not_save_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "odd\u202e.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_answers([path])
    assert "odd\\u202e.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [0, 1])  # whichever comes first
def test_a_file_that_cannot_be_read_is_left_out_named_and_counted(tmp_path, capsys, bad):
    paths = [tmp_path / f"{n}.json" for n in range(3)]
    paths[bad].write_text(json.dumps(answers())[:-20])
    paths[1 - bad].write_text(json.dumps(answers("f" * 16)))
    found = fool_rates(read_answers(paths))  # the third is missing
    alone = fool_rates(read_answers(paths[1 - bad : 2 - bad]))
    assert (found.rates, found.images) == (alone.rates, alone.images) and not alone.left_out
    assert [one.file for one in found.left_out] == [str(paths[bad]), str(paths[2])] and found.num_files == 3
    said = capsys.readouterr().err
    document, text = json.loads(to_json(found)), to_markdown(found)
    assert [one["file"] for one in document["left_out"]] == [str(paths[bad]), str(paths[2])] and document["files"] == 3
    for one in found.left_out:
        assert f"left out: {one.reason}\n" in said and one.reason in [each["reason"] for each in document["left_out"]]
    assert "2 of 3 files were left out" in said and "**2 of 3 files were left out:**" in text
    assert "whole JSON" in text and "No such file" in text and "left out" not in to_markdown(alone)


def test_a_missing_file_alone_is_an_error_with_its_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json\) must be .* can be read: No such file.*; give") as caught:
        read_answers([tmp_path / "gone.json"])
    assert "Errno" not in str(caught.value)


def test_a_store_that_does_not_answer_is_an_error_and_not_a_file_to_leave_out(tmp_path, monkeypatch):
    (tmp_path / "0.json").write_text(json.dumps(answers()))
    whole = storage.read_bytes

    def read(uri):
        if "1" in os.path.basename(uri):
            raise storage.TransientError(3, 1.0, "503", "read")
        return whole(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    with pytest.raises(storage.TransientError):
        read_answers([tmp_path / "0.json", tmp_path / "1.json"])


def test_no_answers_have_no_rate():
    with pytest.raises(ValueError, match="answers"):
        fool_rates(Collected(rows=(), num_files=0, left_out=()))
    with pytest.raises(ValueError, match=r"answers .*0 files"):
        read_answers([])


def test_images_are_listed_by_how_often_they_fool_and_the_tables_are_exactly_this(tmp_path):
    documents = [answers(f"{n:016x}", fooled=[n < 3, n < 2, n < 1, False], method="a|b") for n in range(3)]
    found = counted(tmp_path, *documents)
    assert [(one.key, one.fooled, one.trials) for one in found.images] == [
        ("0.png", 3, 3), ("1.png", 2, 3), ("2.png", 1, 3), ("3.png", 0, 3)
    ]  # fmt: skip
    lines = to_markdown(found).splitlines()
    document = json.loads(to_json(found))
    low, high = wilson(6, 12)[1:]
    assert lines[2].startswith(
        f"| task 2, LR not shown | a\\|b | 12 | 3 | 50.0% | {low:.1%} to {high:.1%} | 25.0% to 75.0% |"
    )
    assert lines[2].endswith("| inside | 1.15 s |") and all(line.count(" | ") == 8 for line in lines[:1])
    assert "* 0\\.png (a\\|b): 3 of 3" in lines or "* 0.png (a\\|b): 3 of 3" in lines
    (rate,) = document["rates"]
    assert rate["fool_rate"] == 0.5 and rate["by_trials"] == pytest.approx([low, high]) and rate["fooled"] == 6
    assert document["images"][0] == {"key": "0.png", "method": "a|b", "task": 2, "trials": 3, "fooled": 3}
