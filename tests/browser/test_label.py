"""The labelling notebook as its user sees it: mouse and keys in a browser, and what is on the disk after each."""
import json
import math
import os
import signal

import numpy as np
import pytest
from PIL import Image

from conftest import wait_for
from vpenc.views.label_session import frame_keys
from vpenc.data.masks import LabelledFrames

SIZE, CLIPS, LONG = 64, 3, 3  # three clips of three frames
ROOT, IDLE = ".vpenc-label", ".vpenc-label[data-busy='no'][data-saved='yes']"


def footage() -> np.ndarray:
    "A bright disc that moves over a noisy ground: uint8 (CLIPS, LONG, 64, 64, 3)."
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 60, (CLIPS, LONG, SIZE, SIZE, 3), dtype=np.uint8)
    for c in range(CLIPS):
        for t in range(LONG): frames[c, t][disc(c, t)] = (230, 180, 60)
    return frames


def disc(clip, t):
    y, x = np.mgrid[:SIZE, :SIZE]
    return (x + .5 - 20 - 12 * t) ** 2 + (y + .5 - 20 - 10 * clip) ** 2 < 64


class Pen:
    "The mouse over the canvas, in pixels of the frame, and the masks on the disk."

    def __init__(self, notebook, folder, frames):
        self.notebook, self.page, self.folder = notebook, notebook.page, folder
        self.keys = frame_keys(frames.reshape(-1, SIZE, SIZE, 3))

    @property
    def root(self): return self.page.locator(ROOT)

    def where(self, x, y):
        "Where the frame's point is on the screen, once JupyterLab no longer scrolls; the canvas must not be stretched."
        boxes = [None]
        def rests():
            boxes.append(self.page.locator(f"{ROOT} canvas").bounding_box())
            return boxes[-1] is not None and boxes[-1] == boxes[-2]
        wait_for(rests, "the canvas stays where it is")
        box = boxes[-1]
        assert abs(box["width"] - 512) < 1 and abs(box["height"] - 512) < 1, box
        return box["x"] + x * 8, box["y"] + y * 8

    def ready(self):
        self.page.wait_for_selector(f"{IDLE}:not([data-index=''])")
        self.page.locator(f"{ROOT} canvas").scroll_into_view_if_needed()

    def stroke(self, *points, steps=1):
        "Press at the first point, move through the others (`steps` events each), release."
        self.page.mouse.move(*self.where(*points[0]))
        self.page.mouse.down()
        for point in points[1:]: self.page.mouse.move(*self.where(*point), steps=steps)
        self.page.mouse.up()

    def click(self, *point): self.page.mouse.click(*self.where(*point))

    def press(self, *keys):
        "Keys for the widget, as a user presses them who sees which part of the page has the focus."
        if not self.root.evaluate("root => root === document.activeElement"): self.root.focus()
        for key in keys: self.page.keyboard.press(key)

    def saved(self):
        "Wait until the widget says that all is saved and answered."
        self.page.wait_for_selector(IDLE)

    def disk(self, index):
        "What the mask's file holds now, or None."
        path = self.folder / "masks" / f"{self.keys[index]}.png"
        return np.array(Image.open(path)) if path.exists() else None

    def at(self, index):
        "Wait until this frame is shown."
        from playwright.sync_api import TimeoutError
        try: self.page.wait_for_selector(f"{ROOT}[data-index='{index}'][data-busy='no']")
        except TimeoutError as error:
            self.notebook.screenshot(f"label-not-at-{index}")
            active = self.page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
            raise AssertionError(f"frame {index} is not shown: {self.root.evaluate('e => JSON.stringify(e.dataset)')}, "
                                 f"{self.root.inner_text()!r}, the focus is on {active}") from error


def path_of(points, radius):
    "Pixels whose centre is within `radius` of the line through `points`."
    y, x = np.mgrid[:SIZE, :SIZE] + .5
    near = np.full((SIZE, SIZE), np.inf)
    for (xa, ya), (xb, yb) in zip(points, points[1:]):
        along = np.clip(((x - xa) * (xb - xa) + (y - ya) * (yb - ya)) / max((xb - xa) ** 2 + (yb - ya) ** 2, 1e-9), 0, 1)
        near = np.minimum(near, np.hypot(x - xa - along * (xb - xa), y - ya - along * (yb - ya)))
    return near <= radius


@pytest.fixture
def labelling(lab, open_notebook, tmp_path):
    "The notebook, opened on a small source, all cells run."
    frames = footage()
    np.savez(tmp_path / "discs.npz", frames=frames)
    lab.put("analysis/label.ipynb", "label.ipynb", source=str(tmp_path / "discs.npz"), folder=str(tmp_path / "labels"), every=1)
    notebook = open_notebook("label.ipynb")
    notebook.run_all()
    pen = Pen(notebook, tmp_path / "labels", frames)
    pen.ready()
    return notebook, pen, tmp_path


def test_paint_kill_and_continue(labelling):
    notebook, pen, tmp_path = labelling
    cells = notebook.page.locator(".jp-Notebook-cell").count()
    assert pen.disk(0) is None and "0 of 9 labelled" in pen.root.inner_text()

    # a slow stroke, then a fast drag of one single event across the whole frame: no cell is lost
    pen.stroke((10, 10), (30, 12), (30, 30), steps=20)
    pen.saved()
    slow = pen.disk(0)
    assert (slow == 1)[path_of([(10, 10), (30, 12), (30, 30)], 1.8)].all() and not slow[~path_of([(10, 10), (30, 12), (30, 30)], 2.2)].any()
    pen.press("[", "[")  # brush of one pixel
    pen.stroke((4, 60), (60, 40))
    pen.saved()
    fast = pen.disk(0)
    assert all((fast[40:60, column] == 1).any() for column in range(4, 60)), "the fast drag has gaps"
    notebook.screenshot("label-strokes", pen.root)

    # undo and redo, by key; they are on the disk too
    pen.press("z")
    pen.saved()
    assert np.array_equal(pen.disk(0), slow)
    pen.press("y")
    pen.saved()
    assert np.array_equal(pen.disk(0), fast)
    pen.press("z", "z")
    pen.saved()
    assert pen.disk(0) is None and "0 of 9 labelled" in pen.root.inner_text()

    # a closed outline of class 2, filled; the eraser takes a piece out; class 1 as a polygon
    pen.press("2")
    pen.stroke((40, 40), (56, 40), (56, 56), (40, 56), (40, 40), steps=3)
    pen.press("f")
    pen.click(48, 48)
    pen.saved()
    assert (pen.disk(0)[40:56, 40:56] == 2).all() and not pen.disk(0)[:39].any()
    pen.press("e", "]", "]")
    pen.click(48, 48)
    pen.saved()
    assert not pen.disk(0)[47:49, 47:49].any() and (pen.disk(0) == 2).sum() > 220
    pen.press("1", "p")
    for corner in ((5, 5), (25, 5), (25, 25), (5, 25)): pen.click(*corner)
    pen.press("Enter")
    pen.saved()
    assert (pen.disk(0)[5:25, 5:25] == 1).all() and (pen.disk(0) == 1).sum() == 400
    notebook.screenshot("label-classes", pen.root)

    # the next frame: copy the mask, undo that, propose from motion
    pen.press("ArrowRight")
    pen.at(1)
    pen.press("c")
    pen.saved()
    assert np.array_equal(pen.disk(1), pen.disk(0)) and "2 of 9 labelled" in pen.root.inner_text()
    pen.press("z", "m")
    pen.saved()
    found = pen.disk(1) == 1
    assert (found & disc(0, 1)).sum() / (found | disc(0, 1)).sum() > .6
    pen.press("b")
    pen.stroke((2, 62), (8, 62), steps=2)
    pen.saved()
    kept = [pen.disk(i) for i in range(9)]
    notebook.screenshot("label-motion")
    assert notebook.page.locator(".jp-Notebook-cell").count() == cells, "JupyterLab took the keys"

    # a stroke while the kernel is frozen, which is then killed: the browser sends it again
    (process,) = notebook._kernel_processes()
    os.kill(process.pid, signal.SIGSTOP)
    pen.stroke((50, 4), (60, 4), steps=2)
    wait_for(lambda: pen.root.get_attribute("data-saved") == "no", "the stroke waits for its receipt")
    assert np.array_equal(pen.disk(1), kept[1])
    notebook.kill_kernel()
    assert all(np.array_equal(pen.disk(i), kept[i]) for i in range(2)), "something was lost"
    notebook.run_all()
    pen.ready()
    wait_for(lambda: pen.disk(1)[3:5, 50:60].all(), "the stroke that the killed kernel never received")
    assert np.array_equal(np.where(pen.disk(1) == kept[1], 0, 1).any(1), [2 <= row <= 5 for row in range(SIZE)]), "something else changed"
    assert np.array_equal(pen.disk(0), kept[0]) and "2 of 9 labelled" in pen.root.inner_text()
    assert notebook.console_errors() == []


def test_probe_and_export(labelling):
    notebook, pen, tmp_path = labelling
    pen.click(1, 1)  # focus, and a first dot
    pen.press("z", "p")
    for number in range(5):  # a polygon around each disc
        clip, t = divmod(number, LONG)
        pen.at(number)
        for k in range(12):
            angle = 2 * math.pi * k / 12
            pen.click(20 + 12 * t + 8 * math.cos(angle), 20 + 10 * clip + 8 * math.sin(angle))
        pen.press("Enter")
        pen.saved()
        if number < 4: pen.press("u")
    assert "5 of 9 labelled" in pen.root.inner_text()
    pen.press("ArrowRight")
    pen.at(5)

    notebook.run_all()  # exports, and fits the probe; the widget is made anew
    pen.ready()
    labels = LabelledFrames.load(tmp_path / "labels" / "labels.h5")
    truth = [disc(*divmod(i, LONG)) for i in range(5)]
    assert len(labels) == 5 and min((m & t).sum() / (m | t).sum() for m, t in zip(labels.masks, truth)) > .8
    (coco,) = (tmp_path / "labels").glob("coco-1/*/_annotations.coco.json")
    content = json.loads(coco.read_text())
    assert [c["name"] for c in content["categories"]] == ["robot", "toy"] and len(content["annotations"]) == 5
    assert notebook.figures().count() == 1
    notebook.figures().scroll_into_view_if_needed()
    notebook.screenshot("label-probe-masks", notebook.figures())

    # its proposals in the widget: only a clip that has no label at all
    pen.page.locator(f"{ROOT} canvas").scroll_into_view_if_needed()
    pen.root.focus()
    pen.page.locator(f"{ROOT} input").fill("8")
    pen.page.keyboard.press("Enter")
    pen.at(7)
    wait_for(lambda: "probe" in pen.root.inner_text(), "the probe can be used")
    pen.press("r")
    pen.saved()
    wait_for(lambda: pen.disk(7) is not None, "a proposal is saved")
    found = pen.disk(7) == 1
    notebook.screenshot("label-probe", pen.root)
    assert (found & disc(2, 1)).sum() / (found | disc(2, 1)).sum() > .3
    assert notebook.console_errors() == []
