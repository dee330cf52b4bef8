"""What mkdocs does besides mkdocs.yml: pages from outside of docs/, links that lead there, docstrings as lists.

README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site as they are. A link to any other file or folder of the
repository leads to a page that shows it, so that the same link works on a code host and in the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
SHOWN = "source"  # where pages lie that show files
LANGUAGES = {".py": "python", ".cpp": "cpp", ".cu": "cuda", ".h": "cpp", ".cuh": "cuda", ".txt": "text"}

# Paths in the repository by those of the pages in the site.
_origins: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from outside of docs/: the three above, and whatever a page links."""
    _origins.clear()
    todo = []
    for origin, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / origin).read_text()))
        todo.append((origin, uri))
    todo += [(f"docs/{file.src_uri}", file.src_uri) for file in files.documentation_pages() if not file.generated_by]
    while todo:
        origin, uri = todo.pop()
        _origins[uri] = origin
        path = ROOT / origin
        if path.suffix != ".md":
            continue
        for target in targets(path.read_text(), posixpath.dirname(origin)):
            shown = page_of(target)
            if shown is not None and shown not in _origins and (ROOT / target).exists():
                hidden = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, shown, content=content_of(ROOT / target), inclusion=hidden))
                todo.append((target, shown))
                _origins[shown] = target
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    origin = _origins.get(page.file.src_uri, "")
    if not origin.endswith(".md"):
        return markdown
    folder, here = posixpath.dirname(origin), posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = repository_path(match[1], folder)
        if target is None:
            return match[0]
        return posixpath.relpath(place_of(target), here or ".") + (match[2] or "")

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def targets(markdown: str, folder: str) -> Iterator[str]:
    """Paths in the repository that a page in `folder` links."""
    for match in LINK.finditer(FENCE.sub("", markdown)):
        target = repository_path(match[1], folder)
        if target is not None:
            yield target


def repository_path(link: str, folder: str) -> str | None:
    """Where a link of a page in `folder` leads, from the root of the repository; None for a link to elsewhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(folder, link))


def place_of(target: str) -> str:
    """The source in the site of a path in the repository."""
    return page_of(target) or PAGES.get(target) or target.removeprefix("docs/")


def page_of(target: str) -> str | None:
    """The page that shows a path in the repository; None for what is a page, or a file of the site, as it is."""
    if target in PAGES or target.startswith("docs/"):
        return None
    if (ROOT / target).is_dir():
        return f"{SHOWN}/{target}/index.md"
    return f"{SHOWN}/{target}" if target.endswith(".md") else f"{SHOWN}/{target}.md"


def content_of(path: Path) -> str:
    """A page that shows a file, or lists a folder; out of the search, which is for what is written to be read."""
    front = "---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n"
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        names = sorted(one.name for one in path.iterdir() if one.is_file() and one.suffix in LANGUAGES)
        return f"{front}# {name}/\n\n" + "".join(f"- `{one}`\n" for one in names)
    text = path.read_text()
    if path.suffix == ".md":
        return front + text
    return f"{front}# {name}\n\n``````{LANGUAGES.get(path.suffix, 'text')}\n{text}``````\n"


class PlainDocstrings(griffe.Extension):
    """Docstrings as part_fast writes them: a line "name: what it is" for each argument becomes an item of a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value, arguments_of(obj))


def arguments_of(obj: griffe.Object) -> set[str]:
    if isinstance(obj, griffe.Class):
        return set(obj.members) | {name for member in obj.members.values() for name in _parameters(member)}
    return set(_parameters(obj))


def _parameters(obj: object) -> list[str]:
    return [parameter.name for parameter in obj.parameters] if isinstance(obj, griffe.Function) else []


STARTS = re.compile(r"(Returns?|Equivalent to|Errors|Source|Raises)\b(?!:$)")
NAMED = re.compile(r"(\w+(?:, \w+)*): ")
CHOICE = re.compile(r' +"[^"]+"[^:]*: ')
COLUMNS = re.compile(r"\S {3,}\S")


def listed(text: str, arguments: set[str]) -> str:
    """Lines "one, other: text", whose first name is an argument, as items of a list; other sentences as paragraphs.

    Of an item are the lines that are indented more, or begin in the middle of a sentence. Among them lines of columns
    are a block of code, and lines '"choice": what it is' a list of their own.
    """
    lines: list[str] = []
    inside = columns = False  # of an item; of its block of code
    for line in _one_argument_a_line(text, arguments):
        named = NAMED.match(line)
        if named and named[1].partition(",")[0] in arguments:
            names = ", ".join(f"`{name}`" if name in arguments else name for name in named[1].split(", "))
            lines += ([] if inside else [""]) + [f"- {names}: {_plain(line[named.end() :])}"]
            inside, columns = True, False
        elif inside and line and (line[0] == " " or line[0].islower()):
            was_columns, columns = columns, bool(COLUMNS.search(line))
            lines += [""] if columns and not was_columns else []
            start = " " * 8 if columns else " " * 4 + "- " * bool(CHOICE.match(line))
            lines.append(start + (line.strip() if columns else _plain(line.strip())))
        else:
            before = lines[-1] if lines else ""
            is_code = line[:1] == " " and line.lstrip()[0] != "`" and before[:1] != " " and before.endswith(":")
            lines += [""] if inside or is_code or STARTS.match(line) else []
            lines.append(line if line[:1] == " " else _plain(line))
            inside = False
    return "\n".join(lines)


def _one_argument_a_line(text: str, arguments: set[str]) -> Iterator[str]:
    inside = False
    for line in text.splitlines():
        first = NAMED.match(line)
        inside = bool(line) and (inside or (first is not None and first[1].partition(",")[0] in arguments))
        begin = 0
        for named in NAMED.finditer(line) if inside else ():
            if line[: named.start()].endswith(". ") and named[1].partition(",")[0] in arguments:
                yield line[begin : named.start()].rstrip()
                begin = named.start()
        yield line[begin:]


def _plain(line: str) -> str:
    """A line whose asterisks are themselves, outside of `code`."""
    return re.sub(r"`[^`]*`|\*", lambda match: "\\*" if match[0] == "*" else match[0], line)
