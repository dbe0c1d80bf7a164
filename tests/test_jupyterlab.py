"""The explorer in a real JupyterLab in a real browser: keys move slices, masks change pictures, nothing fails
and nothing is asked from outside.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

import nbformat
import pytest

from tools.environment import find_browser

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "build" / "jupyterlab"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
]
CELL = """
import torch
from smae_utils.show.explorer import explore
from smae_utils.method.mae import MaskedAutoencoder
torch.manual_seed(0)
axes = torch.meshgrid(*(torch.linspace(0, 9, n) for n in (32, 32, 32)), indexing="ij")
x = torch.stack(axes).sum(0).sin()[None]
explore(MaskedAutoencoder((32, 32, 32), 8, 1, 24, 2, 2, 24, 1, 2), x, spacing_mm=(2, 2, 2))
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """Path of a browser; without one the test is skipped and says how to get it. A test changes nothing on
    the machine.
    """
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make env installs it")
    return find_browser() or pytest.skip("no Chromium on this machine: make env-browser installs one")


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """A JupyterLab without security, on loopback only, with one notebook: its address."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "config.py"
    config.write_text(
        "from jupyterlab.galata import configure_jupyter_server\nconfigure_jupyter_server(c)\n"
        f"c.ServerApp.port = {port}\nc.ServerApp.port_retries = 0\nc.ServerApp.allow_root = "
        f"True\nc.ServerApp.ip = '127.0.0.1'\nc.ServerApp.root_dir = {str(folder)!r}\n"
        "c.LabApp.extra_labextensions_path = []\nc.LabApp.news_url = None\nc.LabApp.check_for_updates_class "
        "= 'jupyterlab.NeverCheckForUpdate'\n"
        "c.KernelManager.transport_encryption = 'auto'\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
    }
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--config", str(config), "--no-browser"],
        cwd=folder,
        env=env,
        stdout=log,
        stderr=log,
    )
    address = f"http://127.0.0.1:{port}/lab"
    for _ in range(240):
        try:
            urlopen(f"{address}", timeout=1)
            break
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(20)
    log.close()


def test_a_scan_can_be_looked_through_in_a_browser(lab, chromium):
    from playwright import sync_api

    PICTURES.mkdir(parents=True, exist_ok=True)
    errors, outside, failed = [], [], []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1500})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda r: (
                outside.append(r.url)
                if urlparse(r.url).scheme in ("http", "https", "ws", "wss")
                and urlparse(r.url).hostname != "127.0.0.1"
                else None
            ),
        )
        page.on("requestfailed", lambda r: failed.append((r.url, r.failure)))
        page.on("response", lambda r: failed.append((r.url, r.status)) if r.status >= 400 else None)
        page.goto(f"{lab}/tree/explorer.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        page.wait_for_function(
            "window.jupyterapp && window.jupyterapp.commands.hasCommand('notebook:run-all-cells')",
            timeout=60_000,
        )
        # Asked to run before the kernel is there, JupyterLab opens a dialog instead.
        page.wait_for_function("document.body.innerText.includes('| Idle')", timeout=60_000)
        if page.get_by_role("button", name="No", exact=True).is_visible():  # news from Jupyter
            page.get_by_role("button", name="No", exact=True).click()
        # No promise: it may never resolve.
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        try:
            page.wait_for_selector("img.widget-image", timeout=90_000)
        finally:
            page.screenshot(path=PICTURES / "started.png")
        page.wait_for_function(
            "document.querySelectorAll('img.widget-image').length == 3 && "
            "[...document.querySelectorAll('img.widget-image')].every(i => i.naturalWidth > 100)",
            timeout=60_000,
        )
        page.screenshot(path=PICTURES / "explorer.png")

        def sources() -> list[str]:
            return page.eval_on_selector_all("img.widget-image", "images => images.map(i => i.src)")

        def status() -> str:
            return page.inner_text("[role=status]")

        def changes(act, view: int | None = None) -> None:
            before, said = sources(), status()
            act()
            page.wait_for_function(
                "([old, said]) => [...document.querySelectorAll('img.widget-image')].some((i, k) => i.src != "
                "old[k]) && document.querySelector('[role=status]').innerText != said",
                arg=[before, said],
                timeout=20_000,
            )
            page.wait_for_timeout(300)
            if view is not None:
                after = sources()
                assert [i for i in range(3) if after[i] != before[i]] == [view]

        def slider(name: str):
            return page.locator(f".widget-slider:has(label:text-is('{name}')) .noUi-handle").first

        def press(name: str, key: str = "ArrowRight") -> None:
            slider(name).focus()
            page.keyboard.press(key)

        assert "axial slice 17 of 32" in status() and "75% hidden" in status()
        changes(lambda: press("axial"), view=0)
        assert "axial slice 18 of 32 (34 mm)" in status()
        changes(lambda: press("sagittal", "ArrowLeft"), view=2)
        assert "sagittal slice 16 of 32" in status()
        changes(lambda: press("mask ratio", "ArrowLeft"))
        assert "70% hidden" in status()
        changes(lambda: page.get_by_role("button", name="new mask").click())
        page.get_by_role("button", name="normalised target").click()
        page.wait_for_function("document.body.innerText.includes('what the loss compares')", timeout=20_000)
        page.get_by_role("button", name="intensities").click()
        changes(lambda: page.get_by_text("hide a box by hand").click())
        hidden = status()
        assert "70% hidden" not in hidden
        changes(lambda: press("left to right", "ArrowLeft"))
        assert status() != hidden
        page.screenshot(path=PICTURES / "hidden_by_hand.png")
        page.evaluate(
            "() => { window.jupyterapp.commands.execute('apputils:change-theme', "
            "{theme: 'JupyterLab Dark'}) }"
        )
        page.wait_for_selector("body[data-jp-theme-light=false]", state="attached", timeout=20_000)
        page.wait_for_timeout(800)
        page.screenshot(path=PICTURES / "dark.png")
        browser.close()
    assert outside == [] and errors == [] and failed == []
