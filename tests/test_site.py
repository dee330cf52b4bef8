"""The site of `make docs`: it builds without a warning, its links lead somewhere, and it names every public name."""

import collections
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT

import part_fast

REFERENCE = ROOT / "docs" / "reference"
# Pages that mkdocs_hooks.py takes from outside of docs/.
FROM_OUTSIDE = {"index.md", "contributing.md", "changelog.md"}


def documented():
    """{identifier: object} of everything that a page of the reference documents."""
    found = {}
    for page in sorted(REFERENCE.glob("*.md")):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            assert name not in found, f"{name} is documented twice"
            found[name] = resolve(name)
    return found


def resolve(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def public():
    """{name: object} of what `import part_fast` and its public modules give, modules left out."""
    modules = {"part_fast": part_fast, "part_fast.data": importlib.import_module("part_fast.data")}
    for name in part_fast.__all__:
        value = getattr(part_fast, name)
        if inspect.ismodule(value):
            modules[f"part_fast.{name}"] = value
    found = {}
    for place, module in modules.items():
        for name in getattr(module, "__all__", ()) or defined(module):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found[f"{place}.{name}"] = value
    return found


def defined(module):
    """Names of a module without __all__ that it defines itself."""
    return [
        n for n, value in vars(module).items() if n[0] != "_" and getattr(value, "__module__", "") == module.__name__
    ]


def test_every_public_name_is_in_the_reference():
    there = list(documented().values())
    missing = [name for name, value in public().items() if not any(value is other for other in there)]
    assert not missing, f"no page of docs/reference documents {', '.join(missing)}"
    assert len(public()) > 60


def test_the_list_of_names_is_whole():
    named = set(re.findall(r"`(\w+)`", (REFERENCE / "index.md").read_text()))
    missing = [name for name in public() if name.rpartition(".")[2] not in named]
    missing += [name for name in part_fast.__all__ if name not in named]
    assert not missing, f"docs/reference/index.md lacks {', '.join(missing)}"


def test_what_is_documented_has_a_docstring():
    bare = [name for name, value in documented().items() if not isinstance(value, dict | tuple) and not value.__doc__]
    assert not bare


# The navigation


def navigation(entries):
    for entry in entries:
        (value,) = entry.values() if isinstance(entry, dict) else (entry,)
        yield from [value] if isinstance(value, str) else navigation(value)


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    listed = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there | FROM_OUTSIDE


# The site


def mkdocs():
    for place in (ROOT / "build" / "docs" / "bin", Path(sys.executable).parent):
        if (place / "mkdocs").is_file():
            return place / "mkdocs"
    return pytest.skip("mkdocs is not installed: `make docs` installs it")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [str(mkdocs()), "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Links(HTMLParser):
    """Of a page: what it links, what it loads, and what can be linked in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        # A <link> is a style sheet or an icon, but for those that say how pages follow each other.
        loaded = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}.get(tag)
        if loaded and values.get(loaded):
            self.loads.append(values[loaded])


def test_links_and_anchors_lead_somewhere_and_nothing_is_fetched(site):
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 150
    broken, fetched, seen = [], [], collections.Counter()
    for path, page in pages.items():
        for target in page.links + page.loads:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loads and not target.startswith("data:"):
                    fetched.append((path.name, target))
                continue
            if path.name == "404.html":  # whose links are from the root of the server
                continue
            found = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            anchor = unquote(parts.fragment)
            seen["anchors" if anchor else "links"] += 1
            if not found.is_file() or (anchor and found in pages and anchor not in pages[found].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not fetched
    assert not broken, "\n".join(broken)
    assert min(seen["anchors"], seen["links"]) > 100, seen


def test_style_sheets_and_scripts_of_the_site_fetch_nothing(site):
    """But for what the theme loads where a page has a diagram, and no page has one."""
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", path.read_text()), path
    assert not [path for path in site.rglob("*.html") if 'class="mermaid"' in path.read_text()]


def test_docstrings_come_out_as_lists_and_code(site):
    page = (site / "reference" / "attacks.html").read_text()
    assert re.search(r"<li>\s*(?:<p>)?<code>alpha</code>: step size, image units\.", page)
    assert re.search(r"<li>\s*(?:<p>)?<code>steps</code>: 0 gives the start back\.", page)
    ops = (site / "reference" / "ops.html").read_text()
    assert "H*W*3 values" in re.sub(r"<[^>]+>", "", ops)
    assert re.search(r"<pre>.*gradcam {4}mean_hw\(g_k\)", ops)


def test_functions_are_documented_and_not_modules_of_their_name(site):
    pages = {path.stem: path.read_text() for path in (site / "reference").glob("*.html")}
    functions = [name for name, value in documented().items() if inspect.isfunction(value)]
    assert len(functions) > 30
    for name in functions:
        (page,) = (text for text in pages.values() if f'<h2 id="{name}"' in text)
        section = page.partition(f'<h2 id="{name}"')[2].partition("<h2 id=")[0]
        assert "doc-signature" in section, name
        assert "<h3" not in section, f"{name} has members: it is the module's page"


def test_a_link_out_of_the_documentation_shows_the_file(site):
    structure = Links((site / "structure.html").read_text())
    assert "source/part_fast/ops/pgd_step.py.html" in structure.links
    shown = (site / "source" / "part_fast" / "ops" / "pgd_step.py.html").read_text()
    assert "def pgd_step_(" in re.sub(r"<[^>]+>", "", shown)


def test_a_broken_link_is_seen(tmp_path):
    """By mkdocs itself, which the page is built with."""
    command = mkdocs()
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "mkdocs_hooks.py", tmp_path / "docs")
    (tmp_path / "docs" / "page.md").write_text("# A page\n\n[nowhere](nothing.md) [no file](../part_fast/nothing.py)\n")
    done = subprocess.run(
        [str(command), "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    for said in ("'nothing.md'", "'source/part_fast/nothing.py.md'"):
        assert f"page.md' contains a link {said}" in done.stderr, done.stderr
