"""JupyterLab on loopback and a headless Chromium, for the tests that use notebooks as people do.

Run with `make test-browser` (or `python -m pytest tests/browser`). Without Playwright or Chromium every test here is skipped and says so.
Pictures are kept in `outputs/browser/`.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "outputs" / "browser"
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
         " --disable-sync --disable-dev-shm-usage").split()
PATIENCE = int(os.environ.get("VPENC_BROWSER_PATIENCE", "120"))  # seconds that any one condition may take
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def wait_for(condition, what, seconds=PATIENCE):
    "Call `condition` until it returns something true, and return that; AssertionError says `what` did not happen."
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value: return value
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(.05)


class Lab:
    "A JupyterLab server with folders of its own, so that no setting or kernel of the user takes part."

    def __init__(self, folder: Path):
        self.folder, self.root, self.token = folder, folder / "root", "browser-test"
        self.root.mkdir(parents=True)
        names = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython",
                     JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces", HOME="home")
        own = {name: str(folder / part) for name, part in names.items()}
        for path in own.values(): Path(path).mkdir(parents=True, exist_ok=True)
        self._settings("@jupyterlab/apputils-extension/notification", fetchNews="false", checkForUpdates=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = dict(os.environ, **own, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
                           MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        for name in ("IN_TEST", "VPENC_BATCH"): environment.pop(name, None)
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={self.port}",
                   f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}", "--ServerApp.port_retries=0",
                   "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
        self.log = folder / "jupyterlab.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=self.root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try: wait_for(self._answers, f"JupyterLab starts (see {self.log})")
        except BaseException:
            self.stop()
            raise

    def _settings(self, plugin, **values):
        "Write a JupyterLab user setting, as the Settings editor would."
        path = self.folder / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")

    def _answers(self):
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try: return self.api("status")
        except OSError: return None

    def api(self, path, method="GET", **body):
        "Call the server's REST interface: `lab.api('kernels')`."
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method, data=json.dumps(body).encode() if body else None,
                                         headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer: text = answer.read()
        return json.loads(text) if text else None

    def put(self, notebook, name=None, **parameters):
        """Copy a notebook (a path, relative ones from nbs/) into the server's root; return its name there.

        `parameters` are set in a new cell after the one tagged `parameters`, as papermill does; an unknown name is an error.
        """
        source = ROOT / "nbs" / notebook
        content = json.loads(source.read_text(encoding="utf-8"))
        if parameters:
            (position,) = [i for i, cell in enumerate(content["cells"]) if "parameters" in cell["metadata"].get("tags", [])]
            known = "".join(content["cells"][position]["source"])
            unknown = [key for key in parameters if not re.search(rf"^{key}\s*(:[^=]+)?=", known, re.M)]
            assert not unknown, f"{source.name} has no parameter {unknown}"
            plain = {key: str(value) if isinstance(value, Path) else value for key, value in parameters.items()}
            lines = "\n".join(f"{key} = {value!r}" for key, value in plain.items())
            content["cells"].insert(position + 1, dict(cell_type="code", id="injected", metadata={"tags": ["injected-parameters"]},
                                                    execution_count=None, outputs=[], source=lines))
        name = name or source.name
        (self.root / name).write_text(json.dumps(content), encoding="utf-8")
        return name

    def stop(self):
        "Stop the server with everything it started (its own process group, and the kernels' sessions)."
        try:
            for kernel in self.api("kernels"): self.api(f"kernels/{kernel['id']}", "DELETE")
        except OSError: pass
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try: os.killpg(self.process.pid, kind)
            except ProcessLookupError: pass
            try: return self.process.wait(20)
            except subprocess.TimeoutExpired: continue


class Notebook:
    "One notebook in one browser page: open it, run it, look at it. Every wait is for a condition."

    def __init__(self, lab: Lab, page, name: str):
        self.lab, self.page, self.name, self.errors = lab, page, name, []
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.goto()

    def goto(self):
        "Load (or load again) the page and wait until the kernel is there and idle."
        self.page.goto(f"{self.lab.url}/lab/tree/{urllib.parse.quote(self.name)}?reset&token={self.lab.token}")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell")
        self.wait_idle()

    def wait_idle(self):
        "Wait for `| Idle` in the status bar, and for every cell to have finished."
        self.page.wait_for_function("""() => /\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')
            && ![...document.querySelectorAll('.jp-InputPrompt')].some(prompt => prompt.innerText.includes('[*]'))""")

    def command(self, name, **arguments):
        "Execute a JupyterLab command and wait until it is done: `notebook.command('notebook:run-all-cells')`."
        return self.page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args).then(value => value === undefined ? null : !!value)",
                                  [name, arguments])

    def run_all(self):
        "Run every cell; AssertionError shows the first error output."
        self.command("notebook:run-all-cells")
        self.wait_idle()
        failed = self.page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] .ansi-red-fg, "
                                   ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
        assert failed.count() == 0, failed.first.inner_text()[-3000:]

    def evaluate(self, code):
        "Add a cell at the end, run it, and return the text that it printed."
        self.command("notebook:move-cursor-down")
        cells = self.page.locator(".jp-Notebook-cell")
        before = cells.count()
        self.page.evaluate("""code => { const panel = window.jupyterapp.shell.currentWidget, model = panel.content.model.sharedModel;
            model.insertCell(model.cells.length, {cell_type: 'code', source: code, metadata: {}}); panel.content.activeCellIndex = model.cells.length - 1; }""", code)
        wait_for(lambda: cells.count() > before, "a cell is added")
        self.command("notebook:run-cell")
        self.wait_idle()
        return cells.last.locator(".jp-OutputArea").inner_text().strip() if cells.last.locator(".jp-OutputArea-output").count() else ""

    @property
    def kernel(self):
        "The id of this notebook's kernel."
        (session,) = [s for s in self.lab.api("sessions") if s["path"] == self.name]
        return session["kernel"]["id"]

    def _kernel_processes(self):
        import psutil
        found = []
        for process in psutil.Process(self.lab.process.pid).children(recursive=True):
            try: found += [process] if self.kernel in " ".join(process.cmdline()) else []
            except psutil.Error: pass  # it has just ended
        return found

    def kill_kernel(self):
        "kill -9 the kernel's process; returns when the server has started another one in its place and the page knows."
        (process,) = self._kernel_processes()
        process.kill()
        wait_for(lambda: [p for p in self._kernel_processes() if p.pid != process.pid], "the kernel is started again")
        self.goto()

    def figures(self):
        "The pictures that the cells show (a locator)."
        return self.page.locator(".jp-OutputArea .jp-RenderedImage img")

    def screenshot(self, name, locator=None):
        "Keep a picture of the page, or of one part of it, as outputs/browser/NAME.png."
        PICTURES.mkdir(parents=True, exist_ok=True)
        (locator or self.page).screenshot(path=str(PICTURES / f"{name}.png"))
        return PICTURES / f"{name}.png"

    def console_errors(self):
        "Errors in the browser's console that are not JupyterLab's own noise about the network it must not use."
        noise = ("favicon", "net::ERR_", "Failed to load resource", "api/news", "pypi.org", "WebSocket")
        return [text for text in self.errors if not any(word in text for word in noise)]


@pytest.fixture(scope="session")
def browser():
    "A headless Chromium from the system."
    try: from playwright.sync_api import sync_playwright
    except ImportError: pytest.skip("browser tests need Playwright: pip install -e '.[browser]'")
    path = os.environ.get("VPENC_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if not path: pytest.skip(f"browser tests need Chromium on the PATH ({', '.join(CHROMIUMS)}): apt install chromium")
    pytest.importorskip("jupyterlab", reason="browser tests need JupyterLab: pip install -e '.[notebook]'")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    "A JupyterLab server on loopback; `lab.put(notebook, **parameters)` positions a notebook there."
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.stop()


@pytest.fixture
def open_notebook(lab, browser):
    "A function: name of a notebook in the server's root -> `Notebook` in a fresh page."
    contexts = []

    def open_notebook(name, width=1400, height=1000):
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), device_scale_factor=1))
        return Notebook(lab, contexts[-1].new_page(), name)
    yield open_notebook
    for context in contexts: context.close()
