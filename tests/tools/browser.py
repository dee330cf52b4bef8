"""Opens a page in headless Chromium: what it measures at several widths, what it complains of, what it asks for.

    python tests/tools/browser.py page.html picture.png 1280 900

takes a picture of the page's upper part, as wide and high as said; with a last word `dark`, in dark colours.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

# The page lies in a frame of the width wanted, since windows have a least width.
HARNESS = """<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head><body>
<pre id="found">nothing</pre><script>
const widths = WIDTHS, found = [];
function next() {
  if (!widths.length) { document.getElementById("found").textContent = JSON.stringify(found); return; }
  const width = widths.shift(), frame = document.createElement("iframe");
  frame.style = "border: 0; height: 900px; width: " + width + "px";
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const inside = (element) => element.closest(".scroll");
    const wide = [...page.querySelectorAll("body *")].filter(
      (e) => !inside(e) && e.getBoundingClientRect().right > root.clientWidth + 0.5);
    found.push({
      width: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight,
      wide: wide.map((e) => e.outerHTML.slice(0, 80)),
      broken: [...page.images].filter((i) => !i.complete || !i.naturalWidth).length,
      images: page.images.length, charts: page.querySelectorAll("svg.chart").length,
      unnamed: [...page.querySelectorAll("img, svg:not([aria-hidden])")].filter(
        (e) => !(e.getAttribute("alt") || e.getAttribute("aria-label"))).length,
      uncaptioned: [...page.querySelectorAll("table")].filter((t) => !t.caption).length,
      headings: [...page.querySelectorAll("h1, h2, h3")].map((h) => h.tagName + " " + h.textContent.trim()),
      ids: [...page.querySelectorAll("[id]")].map((e) => e.id),
      links: [...page.querySelectorAll("a")].map((a) => a.getAttribute("href")),
      scripts: page.scripts.length,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
      text: root.innerText,
    });
    next();
  };
  frame.src = "page.html?" + width;
  document.body.append(frame);
}
next();
</script></body></html>
"""


def find_chromium() -> str | None:
    """The program, or None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run_chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = find_chromium()
    assert program is not None
    # Chromium asks its maker for updates and the like, unless told not to.
    off = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars"]
        command += [*(f"--disable-{name}" for name in off), f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and writes down what it was asked for."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


def measure(page: Path, widths: list[int]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """(what the page is like at each width; lines of the console; what was asked of the server for it).

    What the page would load from elsewhere is in `loaded` of what it is like.
    """
    asked: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(page, Path(folder) / "page.html")
        (Path(folder) / "harness.html").write_text(HARNESS.replace("WIDTHS", json.dumps(widths)))
        handler = type("Handler", (_Server,), {"asked": asked})
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_address[1]}/harness.html"
            ran = run_chromium("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", address)
            server.shutdown()
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', ran.stdout, re.DOTALL)
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(text)), console, [path for path in asked if path != "/harness.html"]


def take_picture(page: Path, out: Path, width: int, height: int, dark: bool = False) -> None:
    """A PNG of the page's first `height` pixels in a window of that width, of at least 500."""
    run_chromium(
        f"--window-size={width},{height}",
        f"--screenshot={out.resolve()}",
        *(["--force-dark-mode"] if dark else []),
        page.resolve().as_uri(),
    )


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:] == ["dark"])
