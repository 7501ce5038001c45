"The explorer in a real JupyterLab: what is on the page, how long it takes to get there, and a small film of it."
import io
import json
from pathlib import Path

import pytest

from conftest import PATIENCE, PICTURES, wait_for

REPEATS = 15
ROOT = ".vpenc-explorer"
PIXELS = """name => { const canvas = document.querySelector(`[data-panel=${name}] canvas`);
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let hash = 0; for (const byte of data) hash = (hash * 31 + byte) | 0; return `${canvas.width}x${canvas.height}:${hash}`; }"""
# from the first input event after `begin()` to the frame in which the state that it asked for is painted
CLOCK = """() => { const root = document.querySelector('.vpenc-explorer'), clock = window.clock = {times: [], started: null};
    const start = event => { if (clock.started === null && root.contains(event.target)) clock.started = performance.now(); };
    for (const name of ['input', 'change', 'pointerup', 'click']) document.addEventListener(name, start, true);
    new MutationObserver(() => requestAnimationFrame(() => requestAnimationFrame(() => {
        if (clock.started !== null && +root.dataset.drawn >= +root.dataset.asked) { clock.times.push(performance.now() - clock.started); clock.started = null; }
    }))).observe(root, {attributes: true, attributeFilter: ['data-drawn']}); }"""


class Page:
    "The widget on the page of a notebook."

    def __init__(self, notebook):
        self.notebook, self.page, self.root = notebook, notebook.page, notebook.page.locator(ROOT).first
        self.root.wait_for()

    def settled(self):
        "Wait until what was asked for is drawn and nothing is being computed."
        self.page.wait_for_function("""() => { const d = document.querySelector('.vpenc-explorer').dataset;
            return d.complete == 'true' && +d.drawn >= +(d.asked || 0) && d.busy == 'false'; }""", timeout=PATIENCE * 1000)

    def pixels(self): return {name: self.page.evaluate(PIXELS, name) for name in self.panels()}
    def panels(self): return self.page.evaluate(f"() => [...document.querySelectorAll('{ROOT} figure:not([hidden])')].map(f => f.dataset.panel)")
    def title(self, name): return self.root.locator(f"[data-panel={name}] figcaption").inner_text()
    def words(self): return self.root.locator(".words").inner_text()

    def set(self, name, value):
        "Move a control, as a user does: its value and the event."
        self.root.locator(f"[name={name}]").evaluate("""(node, value) => { node.value = value;
            node.dispatchEvent(new Event(node.type == 'range' ? 'input' : 'change', {bubbles: true})); }""", str(value))

    def click(self, name, y, x):
        "Click a position (shares of height and width) in a panel."
        window = self.root.locator(f"[data-panel={name}] .window")
        window.scroll_into_view_if_needed()
        box = window.bounding_box()
        self.page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])

    def changed(self, act):
        "Names of the panels whose picture is another after `act()`."
        before = self.pixels()
        act()
        self.settled()
        after = self.pixels()
        return {name for name in after if after[name] != before.get(name)}

    def timed(self, moves):
        "Milliseconds from event to paint of each of the moves (functions)."
        times = []
        for move in moves:
            count = self.page.evaluate("() => clock.times.length")
            move()
            wait_for(lambda: self.page.evaluate("() => clock.times.length") > count, "the widget redraws")
            times.append(self.page.evaluate("() => clock.times.at(-1)"))
        return times


@pytest.fixture
def explorer(lab, open_notebook):
    "explore.ipynb, run, with everything of its first trajectory loaded."
    notebook = open_notebook(lab.put("analysis/explore.ipynb"), width=1280, height=1100)
    notebook.run_all()
    widget = Page(notebook)
    widget.settled()
    return widget


def test_every_control_changes_what_it_should(explorer):
    e = explorer
    assert e.panels() == ["frame", "pca", "similarity", "channel", "codes", "usage", "entropy", "mask", "semantic", "depth"]
    assert "abs_rel" in e.title("depth") and "miou" in e.title("semantic")
    assert "IoU" in e.title("mask") and "frame 9 of 16" in e.title("frame")
    e.notebook.screenshot("explore_begin", e.root)

    assert e.changed(lambda: e.set("frame", 11)) >= {"frame", "pca", "similarity", "channel", "codes", "entropy", "mask", "semantic", "depth"}
    assert "frame 12 of 16" in e.title("frame")
    assert "similarity" in (changed := e.changed(lambda: e.click("frame", .3, .6))) and changed <= {"similarity", "usage"}
    assert "y 19, x 38" in e.title("similarity")
    assert "similarity" in e.changed(lambda: e.click("pca", .8, .2))  # any panel is as good
    assert e.changed(lambda: e.set("channel", 5)) == {"channel"} and "6th" in e.title("channel")
    assert e.changed(lambda: e.set("threshold", .95)) == {"mask"} and "0.95" in e.title("mask")
    assert e.changed(lambda: e.set("tap", "vqvae:pre")) >= {"pca", "similarity", "channel"} and "vqvae:pre" in e.title("pca")
    assert e.changed(lambda: e.set("time", 1)) >= {"pca", "codes", "entropy"}
    assert e.changed(lambda: e.set("tap", "hidden")) >= {"pca", "similarity"} and "PCA of hidden[" in e.title("pca")
    assert "hidden[1]" not in e.title("pca")  # the last layer comes first
    assert e.changed(lambda: e.set("layer", 1)) >= {"pca", "similarity", "channel"} and "hidden[1]" in e.title("pca")
    e.notebook.screenshot("explore_hidden", e.root)
    assert e.notebook.console_errors() == []


def test_cursor_and_zoom_are_shared(explorer):
    e, box = explorer, explorer.root.locator("[data-panel=pca] .window").bounding_box()
    middle = box["x"] + .31 * box["width"], box["y"] + .63 * box["height"]
    e.page.mouse.move(*middle)
    readout = e.root.locator(".readout").inner_text()
    assert "y 40, x 19" in readout and "entropy" in readout and "codes" in readout
    shown = e.page.evaluate(f"() => [...document.querySelectorAll('{ROOT} .linked .cell')].filter(c => c.offsetWidth > 0).length")
    assert shown == 9  # all but the usage
    e.page.keyboard.down("Shift")
    e.page.mouse.wheel(0, -300)
    e.page.keyboard.up("Shift")
    transforms = e.page.evaluate(f"() => [...document.querySelectorAll('{ROOT} figure:not([hidden]) .stage')].map(s => s.style.transform)")
    assert len(set(transforms)) == 2 and sum("scale" in t for t in transforms) == 9
    e.page.mouse.move(middle[0] + 1, middle[1] + 1)
    assert "y 40, x 19" in e.root.locator(".readout").inner_text()  # the position under the pointer has not moved
    before = e.root.locator(".readout").inner_text()
    e.set("frame", 9), e.settled()
    assert e.root.locator(".readout").inner_text() != before  # the cursor reads the new frame
    e.set("frame", 8), e.settled()
    e.notebook.screenshot("explore_zoom", e.root)
    e.root.get_by_text("unzoom").click()
    assert "scale(1)" in e.root.locator("[data-panel=pca] .stage").get_attribute("style")
    e.click("pca", .63, .31)  # a click on the button above may have scrolled the page
    e.settled()
    e.page.keyboard.press("ArrowRight")
    wait_for(lambda: "frame 10 of 16" in e.title("frame"), "the next frame")
    e.page.keyboard.press(" ")  # plays
    wait_for(lambda: "frame 14 of 16" in e.title("frame"), "it plays")
    e.page.keyboard.press(" ")
    e.settled()
    still = e.title("frame")
    e.set("channel", 3)
    e.settled()
    assert e.title("frame") == still and e.notebook.console_errors() == []


def test_expensive_work_shows_progress_and_can_be_cancelled(explorer):
    e = explorer
    waited = e.page.evaluate("""async () => {
        const root = document.querySelector('.vpenc-explorer'), words = () => root.querySelector('.words').innerText, begun = performance.now();
        const until = done => new Promise(resolve => { const look = () => done() ? resolve(performance.now()) : requestAnimationFrame(look); look(); });
        root.querySelector('[name=futures]').click();
        const seen = await until(() => words().includes('drawing 3 futures'));  // progress is shown
        root.querySelector('[name=frame]').value = 4;
        root.querySelector('[name=frame]').dispatchEvent(new Event('input'));
        const moved = await until(() => root.querySelector('[data-panel=frame] figcaption').innerText.includes('frame 5 of 16'));
        const busy = root.dataset.busy;
        root.querySelector('[name=cancel]').click();
        return {busy, progress: seen - begun, frame: moved - seen, cancel: await until(() => words() == 'cancelled' || root.dataset.busy == 'false') - moved}; }""")
    print({name: value if name == "busy" else f"{value:.0f} ms" for name, value in waited.items()})
    assert waited["busy"] == "true" and e.words() == "cancelled"  # the slider works while futures are drawn, and so does cancel
    e.settled()
    assert "futures" not in e.panels()
    e.root.locator("[name=futures]").click()
    e.page.wait_for_selector("[data-panel=futures]:not([hidden])")
    e.settled()
    e.notebook.screenshot("explore_futures", e.root)
    assert "3 sampled futures" in e.title("futures")

    before = e.pixels()
    e.set("trajectory", 3)  # another trajectory: the frame at once, the rest when it is there
    e.page.wait_for_function("() => document.querySelector('.vpenc-explorer').dataset.complete == 'false'")
    assert e.page.evaluate(PIXELS, "frame") != before["frame"]
    e.root.locator("[name=cancel]").click()
    wait_for(lambda: e.words() == "cancelled", "cancelled")
    e.settled()
    assert {name: e.page.evaluate(PIXELS, name) for name in before} == before  # back to where we were
    assert e.root.locator("[name=trajectory]").input_value() == "0" and e.notebook.console_errors() == []


def test_exports(explorer, lab):
    e = explorer
    e.set("frame", 6)
    e.click("frame", .4, .5)
    e.settled()
    for kind in ("png", "pdf"):
        e.root.locator(f"[name={kind}]").click()
        wait_for(lambda: e.words().endswith(f".{kind}"), f"the {kind} is saved")
        path = Path(e.words().removeprefix("saved "))
        assert path.read_bytes()[:4] == {"png": b"\x89PNG", "pdf": b"%PDF"}[kind]
        if kind == "png": (PICTURES / "explore_figure.png").write_bytes(path.read_bytes())
    e.root.locator("[name=code]").click()
    source = e.root.locator(".code pre")
    source.wait_for()
    code = source.inner_text()
    assert "read_maps(encoder, video)" in code
    digest = """import numpy as np
for name, image in panels.items():
    hashed = 0
    for byte in np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]).ravel().tolist(): hashed = (hashed * 31 + byte) & 0xffffffff
    print(f'{name} {image.shape[1]}x{image.shape[0]}:{hashed - (hashed >> 31 << 32)}')"""
    # the code, run in the same kernel, gives the pixels that are on the page
    printed = dict(line.split() for line in e.notebook.evaluate(code + "\n" + digest).splitlines() if ":" in line and " " in line and "|" not in line)
    on_page = e.pixels()
    assert printed == on_page, {name: (printed.get(name), on_page[name]) for name in on_page if printed.get(name) != on_page[name]}
    assert e.notebook.console_errors() == []


def test_restart_and_run_all(explorer):
    notebook = explorer.notebook
    notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    notebook.wait_idle()
    notebook.run_all()
    again = Page(notebook)
    again.settled()
    assert "IoU" in again.title("mask") and "pca" in again.changed(lambda: again.set("frame", 3))
    assert notebook.console_errors() == []


def interactions(e, taps, shown):
    "Name -> times (ms) of each kind of interaction with an explorer; the probes of `taps` are fitted before."
    for tap in taps:
        e.set("tap", tap)
        e.settled()
    e.page.evaluate(CLOCK)
    measured = {}
    for tap in shown:
        e.set("tap", tap)
        e.settled()
        measured[f"frame slider, {tap}"] = e.timed([lambda i=i: e.set("frame", i % 8) for i in range(1, REPEATS + 1)])
        measured[f"click, {tap}"] = e.timed([lambda i=i: e.click("frame", (i + .5) / REPEATS, .4) for i in range(REPEATS)])
        measured[f"channel, {tap}"] = e.timed([lambda i=i: e.set("channel", i + 1) for i in range(REPEATS)])
        measured[f"threshold, {tap}"] = e.timed([lambda i=i: e.set("threshold", (i + 1) / (REPEATS + 1)) for i in range(REPEATS)])
    measured["tap"] = e.timed([lambda i=i: e.set("tap", taps[i % len(taps)]) for i in range(REPEATS)])
    return measured


def keep_times(measured, setting):
    "Print the times, and write them into outputs/browser/explore_times.json, beside those of other tests."
    times = {name: dict(median=round(sorted(ms)[len(ms) // 2], 1), worst=round(max(ms), 1), n=len(ms)) for name, ms in measured.items()}
    for name, row in times.items(): print(f"{name:28}{row['median']:8.1f} ms  worst {row['worst']:8.1f}")
    assert len(times) == 9 and all(row["n"] == REPEATS and row["median"] > 0 for row in times.values())
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / "explore_times.json"
    known = json.loads(path.read_text())["times"] if path.exists() else {}
    path.write_text(json.dumps(dict(unit="ms, from event to paint", setting=setting, times=known | times), indent=1) + "\n")


def test_interaction_times_and_film(explorer):
    "Measures, and writes outputs/browser/explore_times.json and explorer.gif; no time is asserted."
    from PIL import Image
    e = explorer
    measured = interactions(e, ("vqvae:pre", "resnet", "hidden", "resnet:stages"), ("resnet", "vqvae:pre"))
    keep_times(measured, f"JupyterLab, Chromium {e.page.context.browser.version}, videogpt-sim on sim-bair")

    pictures = []

    def shoot(times=1):
        e.settled()
        image = Image.open(io.BytesIO(e.root.screenshot())).convert("RGB")
        pictures.extend([image] * times)
    e.set("frame", 0), e.set("tap", "resnet"), e.settled(), e.set("threshold", .5)
    for i in range(0, 16, 2): e.set("frame", i), shoot()
    for y, x in ((.3, .5), (.45, .55), (.75, .25)): e.click("frame", y, x), shoot(3)
    for tap in ("hidden", "vqvae:pre"):
        e.set("tap", tap), shoot(3)
        for i in range(14, 6, -2): e.set("frame", i), shoot()
    for t in (.2, .5, .8): e.set("threshold", t), shoot(2)
    size = max(p.width for p in pictures), max(p.height for p in pictures)
    frames = []
    for picture in pictures:
        page = Image.new("RGB", size, "white")
        page.paste(picture)
        frames.append(page)
    some = frames[::4]  # one palette for all, or colours would jump
    sheet = Image.new("RGB", (size[0], size[1] * len(some)))
    for i, frame in enumerate(some): sheet.paste(frame, (0, i * size[1]))
    palette = sheet.quantize(220, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(PICTURES / "explorer.gif", save_all=True, append_images=frames[1:], duration=350, loop=0, optimize=True)
    assert (PICTURES / "explorer.gif").stat().st_size < 1.5e6


def test_magvit_taps(lab, open_notebook):
    "The same explorer on the shipped MAGVIT: its taps are there, and their times are measured like VideoGPT's."
    cell = dict(cell_type="code", id="magvit", metadata={}, execution_count=None, outputs=[], source="from vpenc.views.explore import explore\n\nexplore(encoder='magvit-sim', frame=4)")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (lab.root / "magvit.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))
    notebook = open_notebook("magvit.ipynb", width=1280, height=1100)
    notebook.run_all()
    e = Page(notebook)
    e.settled()
    offered = e.root.locator("[name=tap] option").evaluate_all("nodes => nodes.map(node => node.value)")
    assert offered == ["pre", "levels", "embed", "hidden", "expected"]
    measured = interactions(e, offered, ("pre", "hidden"))
    setting = f"JupyterLab, Chromium {e.page.context.browser.version}, videogpt-sim and magvit-sim on sim-bair"
    keep_times({name.replace(", ", ", magvit:") if "," in name else "tap, magvit": ms for name, ms in measured.items()}, setting)
    e.notebook.screenshot("explore_magvit", e.root)
    assert notebook.console_errors() == []
