// The browser side of `vpenc.views.explore`: draws the arrays that the kernel sends, moves the linked cursor and zoom by
// itself, and asks the kernel for another state when a control moves. Edited by hand; anywidget loads this one file.
//
// Traits shared with the kernel:
//   choices  names of the sets and encoders
//   wanted   the state that the user asks for, with its number `seq`            (browser -> kernel)
//   shown    the state that is shown: panels as RGBA bytes, limits, threshold   (kernel -> browser)
//   task     progress or an error of what the kernel is doing
//   code     Python that makes the panels

// ---- Elements and controls -------------------------------------------------------------------------------------------

// a DOM element with properties and children
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// an input with its name before it
function labelled(text, input, after = "") {
  return make("label", {}, make("span", { textContent: text }), input, after);
}

// the controls of a state: name -> element; `ask(changes)` is called when the user moves one
function controls(choices, ask) {
  const options = (names) => names.map((name) => make("option", { value: name, textContent: name }));
  const choose = (field, names) =>
    make("select", { name: field, onchange: (e) => ask({ [field]: e.target.value }) }, ...options(names));
  const slide = (field) =>
    make("input", {
      type: "range",
      name: field,
      min: 0,
      step: 1,
      oninput: (e) => ask({ [field]: +e.target.value }),
    });
  const made = {
    data: choose("data", choices.data),
    encoder: choose("encoder", choices.encoder),
    tap: choose("tap", []),
    trajectory: make("input", {
      type: "number",
      name: "trajectory",
      min: 0,
      onchange: (e) => ask({ trajectory: +e.target.value }),
    }),
    frame: slide("frame"),
    layer: slide("layer"),
    time: slide("time"),
    channel: slide("channel"),
    threshold: slide("threshold"),
  };
  Object.assign(made.threshold, { max: 1, step: 0.01 });
  const show = (field, length) => {
    made[field].max = length - 1;
    made[field].closest("label").style.display = length > 1 ? "" : "none";
  };
  // bring all controls to a state that the kernel has shown
  made.follow = ({ state, limits, threshold }) => {
    if (
      made.tap.options.length != limits.taps.length ||
      [...made.tap.options].some((o, i) => o.value != limits.taps[i])
    )
      made.tap.replaceChildren(...options(limits.taps));
    made.trajectory.max = limits.trajectories - 1;
    for (const [field, length] of Object.entries({
      frame: limits.frames,
      layer: limits.layers,
      time: limits.times,
      channel: limits.channels,
    }))
      show(field, length);
    for (const field of ["data", "encoder", "tap", "trajectory", "frame", "layer", "time", "channel"])
      made[field].value = state[field];
    made.threshold.value = threshold;
  };
  return made;
}

// ---- Panels ----------------------------------------------------------------------------------------------------------

// float32 values out of a DataView, which need not start at a multiple of four
function floats(view) {
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// one panel: title, canvas, a frame around the cell under the cursor, a cross at the clicked position;
// `draw(panel)` puts another picture into the same canvas, one pixel a cell
function pictureBox(name) {
  const canvas = make("canvas");
  const cell = make("div", { className: "cell", hidden: true });
  const cross = make("div", { className: "cross" });
  const stage = make("div", { className: "stage" }, canvas, cell, cross);
  const view = make("div", { className: "window", tabIndex: 0 }, stage);
  const title = make("figcaption");
  const root = make("figure", {}, title, view);
  root.dataset.panel = name;
  const box = { root, view, stage, cell, cross, canvas, title, name, shown: null };
  box.draw = (panel) => {
    box.shown = panel;
    if (canvas.width != panel.width) canvas.width = panel.width;
    if (canvas.height != panel.height) canvas.height = panel.height;
    const rgba = new Uint8ClampedArray(panel.rgba.buffer, panel.rgba.byteOffset, panel.rgba.byteLength);
    canvas.getContext("2d").putImageData(new ImageData(rgba, panel.width, panel.height), 0, 0);
    box.values = panel.values ? floats(panel.values) : null;
    title.textContent = panel.title;
    root.classList.toggle("linked", panel.linked);
  };
  return box;
}

// the cursor, the click and the zoom that linked panels share
function link(boxes, readout, ask) {
  const zoom = { scale: 1, x: 0, y: 0 }; // x, y: shift in shares of the window
  let drag = null;
  const linked = () => boxes.filter((box) => box.shown && box.shown.linked);
  const apply = () => {
    const least = 1 - zoom.scale;
    zoom.x = Math.min(0, Math.max(least, zoom.x));
    zoom.y = Math.min(0, Math.max(least, zoom.y));
    for (const box of boxes) {
      box.stage.style.transform =
        box.shown && box.shown.linked ? `translate(${zoom.x * 100}%, ${zoom.y * 100}%) scale(${zoom.scale})` : "";
      box.root.style.setProperty("--zoom", zoom.scale);
    }
  };
  // position under the pointer, shares of the picture
  const at = (box, event) => {
    const edge = box.view.getBoundingClientRect();
    return [
      ((event.clientX - edge.left) / edge.width - zoom.x) / zoom.scale,
      ((event.clientY - edge.top) / edge.height - zoom.y) / zoom.scale,
    ];
  };
  const inside = (position) => position.every((share) => share >= 0 && share < 1);
  const index = (box, [x, y]) => [Math.floor(x * box.shown.width), Math.floor(y * box.shown.height)];
  let last = [-1, -1];
  const hover = (position) => {
    const words = [];
    last = position;
    for (const box of linked()) {
      box.cell.hidden = !inside(position);
      if (!inside(position)) continue;
      const [column, row] = index(box, position);
      const { width, height } = box.shown;
      Object.assign(box.cell.style, {
        left: `${(100 * column) / width}%`,
        top: `${(100 * row) / height}%`,
        width: `${100 / width}%`,
        height: `${100 / height}%`,
      });
      if (box.name == "frame") words.push(`y ${row}, x ${column}`);
      if (box.values) {
        const value = box.values[row * width + column];
        words.push(`${box.name} ${Number.isInteger(value) && box.name == "codes" ? value : value.toFixed(2)}`);
      }
    }
    readout.textContent = words.join("  ·  ") || "\u00a0";
  };
  const zoomAt = (factor, [x, y]) => {
    const scale = Math.min(16, Math.max(1, zoom.scale * factor));
    zoom.x += x * (zoom.scale - scale);
    zoom.y += y * (zoom.scale - scale);
    zoom.scale = scale;
    apply();
  };
  const reset = () => {
    Object.assign(zoom, { scale: 1, x: 0, y: 0 });
    apply();
  };
  for (const box of boxes) {
    const on = (name, act, options) =>
      box.view.addEventListener(
        name,
        (event) => {
          if (box.shown && box.shown.linked) act(event);
        },
        options,
      );
    on("pointermove", (event) => {
      if (drag) {
        const size = box.view.clientWidth;
        const far = Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 4;
        drag.moved = drag.moved || far;
        if (drag.moved && zoom.scale > 1) {
          zoom.x = drag.from.x + (event.clientX - drag.x) / size;
          zoom.y = drag.from.y + (event.clientY - drag.y) / size;
          apply();
        }
      }
      hover(at(box, event));
    });
    on("pointerleave", () => {
      if (!drag) hover([-1, -1]);
    });
    on("pointerdown", (event) => {
      drag = { x: event.clientX, y: event.clientY, from: { ...zoom }, moved: false };
      box.view.setPointerCapture(event.pointerId);
    });
    on("pointerup", (event) => {
      const position = at(box, event);
      const clicked = drag && !drag.moved;
      drag = null;
      if (clicked && inside(position)) ask({ position: [position[1], position[0]] });
    });
    on("pointercancel", () => {
      drag = null;
    });
    on(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.shiftKey) return; // without a key the page scrolls
        event.preventDefault();
        zoomAt(Math.exp(-(event.deltaY || event.deltaX) / 250), at(box, event));
      },
      { passive: false },
    );
    on("keydown", (event) => {
      if (event.key == "+" || event.key == "=")
        zoomAt(1.5, [(0.5 - zoom.x) / zoom.scale, (0.5 - zoom.y) / zoom.scale]);
      if (event.key == "-") zoomAt(1 / 1.5, [(0.5 - zoom.x) / zoom.scale, (0.5 - zoom.y) / zoom.scale]);
      if (event.key == "0") reset();
    });
  }
  const mark = ([y, x]) => {
    for (const box of boxes) Object.assign(box.cross.style, { left: `${x * 100}%`, top: `${y * 100}%` });
  };
  return { apply, reset, mark, refresh: () => hover(last) };
}

// ---- The widget ------------------------------------------------------------------------------------------------------

const NAMES = ["frame", "pca", "similarity", "channel", "codes", "usage", "entropy", "mask", "semantic", "instances", "depth", "motion", "futures"];

// Draws what the kernel shows and asks for what the user moves. `data-asked` and `data-drawn` count states, so that a test can
// measure from one to the other.
function render({ model, el }) {
  const root = make("div", { className: "vpenc-explorer" });
  root.dataset.lmSuppressShortcuts = true; // keys belong to the widget while it has the focus
  let state = {};
  let asked = 0;
  let playing = null;
  const ask = (changes) => {
    if (changes.encoder !== undefined && changes.encoder != state.encoder) changes = { ...changes, channel: 0 };
    if (changes.tap !== undefined) changes = { ...changes, channel: 0, layer: -1 };
    if (changes.data !== undefined) changes = { ...changes, trajectory: 0, frame: 0 };
    state = { ...state, ...changes };
    root.dataset.asked = ++asked;
    model.set("wanted", { ...state, seq: asked });
    model.save_changes();
  };
  const c = controls(model.get("choices"), ask);
  const boxes = Object.fromEntries(NAMES.map((name) => [name, pictureBox(name)]));
  const readout = make("div", { className: "readout", textContent: "\u00a0" });
  const shared = link(Object.values(boxes), readout, ask);

  const step = (by) => {
    const length = +c.frame.max + 1;
    ask({ frame: (state.frame + by + length) % length });
  };
  const play = make("button", {
    className: "play",
    title: "play (space)",
    textContent: "▶",
    onclick: () => {
      playing = playing ? (clearTimeout(playing), null) : setTimeout(tick, 0);
      play.textContent = playing ? "❚❚" : "▶";
    },
  });
  // the next frame when this one is drawn, at most 8 a second
  const tick = () => {
    if (!root.isConnected) return (playing = null);
    if (+root.dataset.drawn >= asked) step(1);
    playing = setTimeout(tick, 125);
  };
  root.addEventListener("keydown", (event) => {
    if (event.target.tagName == "INPUT" || event.target.tagName == "SELECT" || event.target.tagName == "BUTTON")
      return;
    if (event.key == "ArrowRight") step(1);
    else if (event.key == "ArrowLeft") step(-1);
    else if (event.key == " ") play.click();
    else return;
    event.preventDefault();
  });

  const button = (name, text, title) =>
    make("button", { name, textContent: text, title, onclick: () => model.send({ do: name }) });
  const bar = make("progress", { max: 1 });
  const words = make("span", { className: "words" });
  const stop = button("cancel", "cancel", "stop this");
  const source = make("pre");
  const copy = make("button", {
    textContent: "copy",
    onclick: () => navigator.clipboard.writeText(source.textContent),
  });
  const code = make("div", { className: "code", hidden: true }, copy, source);
  const sample = button("futures", "sample futures", "sample what may come next from the model");
  boxes.channel.root.append(labelled("channel", c.channel));
  boxes.mask.root.append(labelled("threshold", c.threshold));
  boxes.futures.root.hidden = true;
  root.append(
    make(
      "div",
      { className: "row" },
      labelled("data", c.data),
      labelled("trajectory", c.trajectory),
      play,
      labelled("frame", c.frame),
    ),
    make(
      "div",
      { className: "row" },
      labelled("encoder", c.encoder),
      labelled("tap", c.tap),
      labelled("layer", c.layer),
      labelled("latent time", c.time),
    ),
    make("div", { className: "panels" }, ...NAMES.slice(0, -1).map((name) => boxes[name].root)),
    readout,
    make(
      "div",
      { className: "row" },
      sample,
      button("png", "PNG", "save a figure of this state"),
      button("pdf", "PDF", "save a figure of this state"),
      button("code", "code", "the code that makes these panels"),
      make("button", {
        textContent: "unzoom",
        title: "zoom: shift + wheel, + and -; drag to move",
        onclick: shared.reset,
      }),
      words,
      bar,
      stop,
    ),
    boxes.futures.root,
    code,
  );

  const show = () => {
    const shown = model.get("shown");
    if (!shown.panels) return;
    for (const box of Object.values(boxes)) {
      const panel = shown.panels[box.name];
      if (panel) box.draw(panel);
      box.root.hidden = !panel && (!shown.partial || box.name == "futures");
      box.root.classList.toggle("waiting", !panel);
    }
    if (shown.limits && shown.seq >= asked) {
      // what the user has asked for meanwhile is not overwritten
      state = shown.state;
      asked = shown.seq;
      c.follow(shown);
    }
    sample.style.display = shown.samples ? "" : "none";
    shared.mark(shown.state.position);
    shared.apply();
    shared.refresh(); // the cursor reads the new values
    root.dataset.drawn = shown.seq;
    root.dataset.complete = !shown.partial && !shown.fitting;
  };
  const tell = () => {
    const task = model.get("task");
    words.textContent = task.text || "";
    words.classList.toggle("error", !!task.error);
    bar.value = task.share || 0;
    bar.style.visibility = stop.style.visibility = task.running ? "visible" : "hidden";
    root.dataset.busy = !!task.running;
  };
  const tellCode = () => {
    source.textContent = model.get("code");
    code.hidden = !source.textContent;
  };
  for (const [name, act] of Object.entries({ shown: show, task: tell, code: tellCode })) {
    model.on(`change:${name}`, act);
    act();
  }
  el.append(root);
  return () => {
    clearTimeout(playing);
    for (const [name, act] of Object.entries({ shown: show, task: tell, code: tellCode }))
      model.off(`change:${name}`, act);
  };
}
export default { render };
