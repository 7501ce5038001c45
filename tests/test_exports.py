"Damaged exports of labelling tools: whatever stands in a file, it is read or refused in one line."
import base64
import io
import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from vpenc.data.exports import find_export, tool_files

CORNERS = [[3, 2], [8, 2], [8, 6], [3, 6]]


def png(mask):
    memory = io.BytesIO()
    Image.fromarray(mask).save(memory, "PNG")
    return memory.getvalue()


def exports():
    "Name of the file, and its content, of each tool that writes JSON."
    patch = base64.b64encode(png(np.full((4, 5), 255, np.uint8))).decode()
    yield "studio.json", [dict(id=1, data=dict(image="/data/upload/1/0123abcd-a.png"), annotations=[dict(result=[
        dict(type="polygonlabels", original_width=20, original_height=12, value=dict(points=CORNERS, polygonlabels=["robot"])),
        dict(type="brushlabels", original_width=20, original_height=12, value=dict(rle=[0, 0, 3, 192, 0], brushlabels=["robot"]))])])]
    yield "a.json", dict(imagePath="a.png", imageWidth=20, imageHeight=12, shapes=[dict(label="robot", points=CORNERS, shape_type="polygon"),
                                                                                  dict(label="robot", points=[[3, 2], [7, 5]], shape_type="mask", mask=patch)])
    yield "via.json", {"a.png1": dict(filename="a.png", regions=[dict(shape_attributes=dict(name="circle", cx=5, cy=5, r=2), region_attributes=dict(name="robot"))])}
    yield "via3.json", dict(file={"1": dict(fname="a.png")}, view={"1": dict(fid_list=["1"])}, attribute={}, metadata={"x": dict(vid="1", xy=[2, 3, 2, 5, 4], av={})})
    yield "darwin.json", dict(item=dict(name="a.png", slots=[dict(width=20, height=12)]), annotations=[dict(name="robot", polygon=dict(paths=[[dict(x=x, y=y) for x, y in CORNERS]]))])
    yield "ann/a.png.json", dict(size=dict(width=20, height=12), objects=[dict(classTitle="robot", geometryType="polygon", points=dict(exterior=CORNERS, interior=[])),
                                                                         dict(classTitle="robot", geometryType="bitmap", bitmap=dict(origin=[3, 2], data=patch))])


HOSTILE = (None, True, -1, 0, 1e30, float("nan"), 10**20, "", "../../etc/passwd", "a" * 300, "\0", [], {}, [[]], [[1]], {"x": 1}, [1e9, 1e9], "0")


def spoiled(value, draw):
    "The same with one leaf or branch replaced by something hostile."
    if isinstance(value, (dict, list)) and value and draw.random() < .85:
        value = type(value)(value)
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < .1:
            del value[key]
            return value
        value[key] = spoiled(value[key], draw)
        return value
    return draw.choice(HOSTILE)


@pytest.mark.parametrize("name, content", list(exports()), ids=lambda value: value if isinstance(value, str) else "")
def test_whatever_stands_in_it(name, content, tmp_path):
    folder = tmp_path / "export"
    (folder / name).parent.mkdir(parents=True)
    for place in ("a.png", "img/a.png"):
        (folder / place).parent.mkdir(exist_ok=True)
        if (place == "img/a.png") == name.startswith("ann/"): (folder / place).write_bytes(png(np.zeros((12, 20, 3), np.uint8)))
    if not name.startswith("ann/"): shutil.rmtree(folder / "img")
    outcomes = set()
    for seed in range(150):
        changed = spoiled(content, random.Random(seed)) if seed else content
        (folder / name).write_text(json.dumps(changed))
        try:
            found = find_export(folder)
            if found: tool_files(folder, found)
            outcomes.add("read" if found else "not recognised")
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, error
            outcomes.add("refused")
        except Exception as error: raise AssertionError(f"{name}, seed {seed}: {json.dumps(changed)[:400]}") from error
    assert {"read", "refused"} <= outcomes or name == "studio.json"  # its brush is cut off: refused from the start
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]  # nothing is written


def test_xml_that_grows_is_not_read(tmp_path):
    (tmp_path / "annotations.xml").write_text('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "xxxxxxxxxx">]><annotations><image id="0" name="&x;" width="2" height="2"/></annotations>')
    with pytest.raises(ValueError, match="document type"): tool_files(tmp_path, find_export(tmp_path))
