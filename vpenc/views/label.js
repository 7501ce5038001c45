// The browser side of `vpenc.views.label`: paints masks where the pointer is, and sends each finished stroke to the kernel.
// Edited by hand; anywidget loads this one file.

// ---- Three ways to change a mask: mask is a Uint8Array of W * H class numbers, row by row ------------------------------

// A line of a round brush, `size` pixels wide, from one pointer position to the next in steps of a quarter of a pixel.
export function brush(mask, W, H, [x0, y0], [x1, y1], size, value) {
  const steps = Math.max(1, Math.ceil(4 * Math.hypot(x1 - x0, y1 - y0)));
  const r = size / 2;
  for (let s = 0; s <= steps; s++) {
    const x = x0 + ((x1 - x0) * s) / steps;
    const y = y0 + ((y1 - y0) * s) / steps;
    for (let j = Math.floor(y - r); j <= y + r; j++)
      for (let i = Math.floor(x - r); i <= x + r; i++) {
        const under = i === Math.floor(x) && j === Math.floor(y);
        if (i >= 0 && j >= 0 && i < W && j < H && (under || (size > 1 && Math.hypot(i + 0.5 - x, j + 0.5 - y) <= r)))
          mask[j * W + i] = value;
      }
  }
}

// A pixel is inside when its centre is, by the even-odd rule.
export function polygon(mask, W, H, corners, value) {
  for (let j = 0; j < H; j++)
    for (let i = 0; i < W; i++) {
      let inside = false;
      for (let a = 0, b = corners.length - 1; a < corners.length; b = a++) {
        const [xa, ya] = corners[a];
        const [xb, yb] = corners[b];
        const y = j + 0.5;
        if (ya > y !== yb > y && i + 0.5 < xa + ((xb - xa) * (y - ya)) / (yb - ya)) inside = !inside;
      }
      if (inside) mask[j * W + i] = value;
    }
}

// Flood fill over the four neighbours of the same class.
export function fill(mask, W, H, [x, y], value) {
  const start = Math.floor(y) * W + Math.floor(x);
  const from = mask[start];
  const todo = [start];
  if (from === value) return;
  while (todo.length) {
    const at = todo.pop();
    const i = at % W;
    if (mask[at] !== from) continue;
    mask[at] = value;
    if (i > 0) todo.push(at - 1);
    if (i < W - 1) todo.push(at + 1);
    if (at >= W) todo.push(at - W);
    if (at < W * (H - 1)) todo.push(at + W);
  }
}

// ---- The screen ------------------------------------------------------------------------------------------------------

// "#RRGGBB" -> [r, g, b], each 0 to 255
function rgb(color) {
  return [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
}

// an empty canvas
function sheet(W, H) {
  const c = document.createElement("canvas");
  c.width = W;
  c.height = H;
  return c;
}

// the frame in large pixels, each class tinted and outlined, the cursor as large as the brush; s: the state of `render`
function paintScreen(canvas, s) {
  const { width: W, height: H } = s.facts;
  const Z = canvas.width / W;
  const context = canvas.getContext("2d");
  const picture = sheet(W, H);
  const pixels = new ImageData(W, H);
  for (let p = 0; p < W * H; p++) {
    const tint = s.mask[p] && !s.hidden ? rgb(s.facts.colors[s.mask[p] - 1]) : null;
    for (let c = 0; c < 3; c++)
      pixels.data[4 * p + c] = tint ? 0.6 * s.frame[3 * p + c] + 0.4 * tint[c] : s.frame[3 * p + c];
    pixels.data[4 * p + 3] = 255;
  }
  picture.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!s.hidden)
    for (let j = 0; j < H; j++)
      for (let i = 0; i < W; i++) {
        const id = s.mask[j * W + i];
        if (!id) continue;
        context.fillStyle = s.facts.colors[id - 1];
        const other = (x, y) => (x < 0 || y < 0 || x >= W || y >= H ? false : s.mask[y * W + x] !== id);
        if (other(i - 1, j)) context.fillRect(i * Z, j * Z, 2, Z);
        if (other(i + 1, j)) context.fillRect((i + 1) * Z - 2, j * Z, 2, Z);
        if (other(i, j - 1)) context.fillRect(i * Z, j * Z, Z, 2);
        if (other(i, j + 1)) context.fillRect(i * Z, (j + 1) * Z - 2, Z, 2);
      }
  context.lineWidth = 1.5;
  if (s.corners.length) {
    context.strokeStyle = "#fff";
    context.beginPath();
    for (const [x, y] of s.at ? [...s.corners, s.at] : s.corners) context.lineTo(x * Z, y * Z);
    context.stroke();
    for (const [x, y] of s.corners) context.strokeRect(x * Z - 3, y * Z - 3, 6, 6);
  } else if (s.at && (s.tool === "brush" || s.tool === "eraser")) {
    for (const [color, grow] of [
      ["#000", 1],
      ["#fff", 0],
    ]) {
      context.strokeStyle = color;
      context.beginPath();
      context.arc(s.at[0] * Z, s.at[1] * Z, Math.max((s.size * Z) / 2, Z / 2) + grow, 0, 7);
      context.stroke();
    }
  }
}

// ---- The widget: pointer, keys, messages -----------------------------------------------------------------------------

const KEYS = { b: "brush", e: "eraser", p: "polygon", f: "fill" };
const HELP =
  "b brush, e eraser, p polygon (Enter or double click closes, Esc gives up), f fill, [ ] size, 1-9 class, shift erases, z undo, y redo, " +
  "c copy previous, m motion, r probe, x empty, h hide, \u2190 \u2192 frame, u next unlabelled";
// strokes without a receipt: {key of the frame: base64 of its mask}
const store = {
  read: (id) => {
    try {
      return JSON.parse(localStorage.getItem("vpenc-label:" + id) || "{}");
    } catch {
      return {};
    }
  },
  write: (id, all) => {
    try {
      if (Object.keys(all).length) localStorage.setItem("vpenc-label:" + id, JSON.stringify(all));
      else localStorage.removeItem("vpenc-label:" + id);
    } catch {
      /* private window: the receipt still tells what is saved */
    }
  },
};

function render({ model, el }) {
  const s = {
    facts: null,
    frame: null,
    mask: null,
    tool: "brush",
    size: 4,
    class: 1,
    hidden: false,
    at: null,
    corners: [],
    drag: null,
    failed: false,
  };
  const view = Math.random().toString(36).slice(2);
  const waiting = new Map(); // seq -> {key, time}
  let seq = 0;
  let drawn = false;
  let opened = false;
  const make = (tag, parent, text = "", of = "") => {
    const e = document.createElement(tag);
    e.textContent = text;
    e.className = of;
    parent.append(e);
    return e;
  };
  const root = make("div", el, "", "vpenc-label");
  const canvas = make("canvas", root);
  const side = make("div", root, "", "side");
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true";
  canvas.width = canvas.height = 512;
  const button = (row, text, title, run) => {
    const b = make("button", row, text);
    b.title = title;
    b.onclick = () => {
      run();
      root.focus();
    };
    return b;
  };

  const title = make("div", side);
  const bar = make("progress", side);
  const said = make("div", side);
  const moves = make("div", side, "", "row");
  button(moves, "\u25c0", "previous frame (left arrow)", () => go("previous"));
  const jump = make("input", moves);
  jump.type = "number";
  jump.min = 1;
  jump.title = "jump to a frame";
  jump.onchange = () => {
    go(jump.value);
    root.focus();
  };
  button(moves, "\u25b6", "next frame (right arrow)", () => go("next"));
  button(moves, "next unlabelled", "u", () => go("unlabelled"));
  const classes = make("div", side, "", "row");
  const tools = make("div", side, "", "row");
  const toolButtons = {};
  for (const [key, tool] of Object.entries(KEYS)) toolButtons[tool] = button(tools, tool, key, () => use(tool));
  const sizes = make("div", side, "", "row");
  const sizeButtons = {};
  make("span", sizes, "size");
  for (const size of [1, 2, 4, 8, 14])
    sizeButtons[size] = button(sizes, size, "brush size, [ and ]", () => {
      s.size = size;
      draw();
    });
  const edits = make("div", side, "", "row");
  const undo = button(edits, "undo", "z", () => ask({ do: "undo" }));
  const redo = button(edits, "redo", "y", () => ask({ do: "redo" }));
  button(edits, "copy previous", "c: take the mask of the previous frame", () => ask({ do: "copy" }));
  button(edits, "empty", "x: there is nothing in this frame", () => ask({ do: "empty" }));
  const proposals = make("div", side, "", "row");
  const status = make("div", side);
  const error = make("div", side, "", "error");
  make("div", side, HELP, "keys");

  function send(message, buffers) {
    message = { ...message, seq: ++seq, view, key: message.key ?? s.facts?.key };
    waiting.set(seq, { key: message.do === "mask" ? message.key : null, time: performance.now() });
    model.send(message, undefined, buffers);
    tell();
  }
  const ask = (message) => {
    endDrag();
    s.corners = [];
    send(message);
  };
  const go = (to) => ask({ do: "go", to });
  const propose = (how) => ask({ do: "propose", how, class: s.class });
  function use(tool) {
    s.tool = tool;
    s.corners = [];
    draw();
  }
  // a stroke is finished: keep it here, send it, wait for the receipt
  function changed() {
    const all = store.read(s.facts.session);
    all[s.facts.key] = btoa(String.fromCharCode(...s.mask));
    store.write(s.facts.session, all);
    s.facts.labelled = true;
    send({ do: "mask" }, [s.mask.slice().buffer]);
    draw();
  }
  function receive(answer, buffers) {
    if (answer.view !== view) {
      // another view of this widget has changed something
      if (answer.do !== "show") send({ do: "show" });
      return;
    }
    const asked = waiting.get(answer.seq);
    waiting.delete(answer.seq);
    const failed = answer.error && answer.do === "mask";
    if (asked?.key && !failed && ![...waiting.values()].some((other) => other.key === asked.key)) {
      const all = store.read(answer.session);
      delete all[asked.key];
      store.write(answer.session, all);
      root.dataset.latency = (performance.now() - asked.time).toFixed(1);
    }
    if (answer.do === "mask") s.failed = failed;
    error.textContent = (failed ? "NOT SAVED: " : "") + answer.error;
    const bytes = buffers.map((b) => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength));
    const late = answer.seq !== seq;
    const key = s.facts?.key;
    if (bytes.length && !late && !s.drag) {
      s.frame = bytes[0];
      s.mask = bytes[1].slice();
      s.facts = answer;
      if (key !== answer.key) s.corners = [];
    } else if (s.facts && key === answer.key) s.facts = { ...answer, labelled: answer.labelled || s.facts.labelled };
    if (!opened && s.facts) {
      // once: strokes that an earlier kernel never received
      opened = true;
      for (const [key, text] of Object.entries(store.read(answer.session)))
        send({ do: "mask", key }, [Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer]);
      if (waiting.size) send({ do: "show" });
    }
    tell();
    draw();
  }
  // what the page, and a test, can read
  function tell() {
    const strokes = s.failed || [...waiting.values()].some((each) => each.key);
    Object.assign(root.dataset, {
      saved: strokes ? "no" : "yes",
      busy: waiting.size ? "yes" : "no",
      index: s.facts?.index ?? "",
      done: s.facts?.done ?? "",
    });
    status.textContent = s.failed ? "a stroke is not saved" : strokes ? "saving ..." : "all strokes saved";
  }
  function panel() {
    const f = s.facts;
    title.textContent = `${f.name}: clip ${f.clip}, frame ${f.position}`;
    bar.max = f.count;
    bar.value = f.done;
    said.textContent = `${f.done} of ${f.count} labelled; frame ${f.index + 1} ${f.labelled ? "is labelled" : "is not labelled"}`;
    if (document.activeElement !== jump) jump.value = f.index + 1;
    jump.max = f.count;
    undo.disabled = !f.undo;
    redo.disabled = !f.redo;
    if (classes.children.length !== f.classes.length) {
      classes.textContent = "";
      f.classes.forEach((name, i) => {
        const b = button(classes, "", `class ${i + 1}`, () => {
          s.class = i + 1;
          draw();
        });
        make("i", b).style.background = f.colors[i];
        b.append(name);
      });
    }
    if (proposals.children.length !== f.proposers.length + 1) {
      proposals.textContent = "";
      make("span", proposals, "propose from");
      for (const how of f.proposers)
        button(proposals, how, { motion: "m", probe: "r" }[how] ?? "", () => propose(how));
    }
    [...classes.children].forEach((b, i) => b.classList.toggle("on", i + 1 === s.class));
    for (const [tool, b] of Object.entries(toolButtons)) b.classList.toggle("on", tool === s.tool);
    for (const [size, b] of Object.entries(sizeButtons)) b.classList.toggle("on", +size === s.size);
    root.dataset.tool = s.tool;
  }
  // once a screen refresh, however many events there were
  function draw() {
    if (drawn || !s.facts) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      const h = Math.round((canvas.width * s.facts.height) / s.facts.width);
      if (canvas.height !== h) canvas.height = h;
      paintScreen(canvas, s);
      panel();
    });
  }
  // in pixels of the frame
  function position(event) {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * s.facts.width,
      ((event.clientY - box.top) / box.height) * s.facts.height,
    ];
  }
  const value = (event) =>
    s.tool === "eraser" || event.shiftKey || event.button === 2 || event.buttons === 2 ? 0 : s.class;
  const inside = ([x, y]) => x >= 0 && y >= 0 && x < s.facts.width && y < s.facts.height;
  function closePolygon(event) {
    const { width, height } = s.facts;
    const corners = s.corners;
    s.corners = [];
    if (corners.length > 2) {
      polygon(s.mask, width, height, corners, value(event));
      changed();
    }
    draw();
  }
  canvas.onpointerdown = (event) => {
    if (!s.facts) return;
    event.preventDefault();
    root.focus({ preventScroll: true });
    const at = (s.at = position(event));
    const { width, height } = s.facts;
    if (s.tool === "polygon") {
      const first = s.corners[0];
      if (s.corners.length > 2 && Math.hypot(at[0] - first[0], at[1] - first[1]) < 1.2) closePolygon(event);
      else s.corners.push(at);
    } else if (s.tool === "fill") {
      if (inside(at)) {
        fill(s.mask, width, height, at, value(event));
        changed();
      }
    } else {
      canvas.setPointerCapture(event.pointerId);
      s.drag = { at, value: value(event) };
      brush(s.mask, width, height, at, at, s.size, s.drag.value);
    }
    draw();
  };
  canvas.onpointermove = (event) => {
    if (!s.facts) return;
    const seen = event.getCoalescedEvents?.() ?? [];
    for (const each of seen.length ? seen : [event]) {
      const at = (s.at = position(each));
      if (s.drag) {
        brush(s.mask, s.facts.width, s.facts.height, s.drag.at, at, s.size, s.drag.value);
        s.drag.at = at;
      }
    }
    draw();
  };
  function endDrag() {
    if (s.drag) {
      s.drag = null;
      changed();
    }
  }
  canvas.onpointerup = canvas.onpointercancel = canvas.onlostpointercapture = endDrag;
  canvas.onpointerleave = () => {
    if (!s.drag) s.at = null;
    draw();
  };
  canvas.ondblclick = (event) => {
    if (s.tool === "polygon") closePolygon(event);
  };
  canvas.oncontextmenu = (event) => {
    event.preventDefault();
    event.stopPropagation();
  };
  root.onkeydown = (event) => {
    event.stopPropagation();
    if (event.target === jump || !s.facts || event.altKey) return;
    const key = event.key.toLowerCase();
    const control = event.ctrlKey || event.metaKey;
    const sizes = Object.keys(sizeButtons).map(Number);
    if (control && !"zy".includes(key)) return;
    const resize = (by) => {
      s.size = sizes[Math.min(Math.max(sizes.indexOf(s.size) + by, 0), sizes.length - 1)];
    };
    if (key in KEYS) use(KEYS[key]);
    else if (key === "y" || (key === "z" && event.shiftKey)) ask({ do: "redo" });
    else if (key === "z") ask({ do: "undo" });
    else if (key === "c") ask({ do: "copy" });
    else if (key === "x") ask({ do: "empty" });
    else if (key === "m") propose("motion");
    else if (key === "r") propose("probe");
    else if (key === "u") go("unlabelled");
    else if (key === "arrowright" || key === "n") go("next");
    else if (key === "arrowleft") go("previous");
    else if (key === "h") s.hidden = !s.hidden;
    else if (key === "[") resize(-1);
    else if (key === "]") resize(1);
    else if (key === "enter") closePolygon(event);
    else if (key === "escape") s.corners = [];
    else if (key >= "1" && key <= "9") {
      if (+key <= s.facts.classes.length) s.class = +key;
    } else return;
    event.preventDefault();
    draw();
  };
  model.on("msg:custom", receive);
  send({ do: "show" });
  return () => model.off("msg:custom", receive);
}
export default { render };
