"""Pages that list something list all of it: the environment variables, the files, the citation."""

import re

import pytest
from conftest import ROOT

import part_fast

NAME = r"([A-Z][A-Z0-9_]+)"
ENVIRONMENT = (ROOT / "docs" / "environment.md").read_text()
STRUCTURE = (ROOT / "docs" / "structure.md").read_text()


def read_by_the_code() -> set[str]:
    """Environment variables that part_fast, its build or its Makefile reads or sets, by name."""
    sources = [*(ROOT / "part_fast").rglob("*.py"), ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    found: set[str] = set()
    for path in sources:
        found |= set(re.findall(rf"""os\.environ(?:\.(?:get|pop|setdefault)\(|\[)["']{NAME}["']""", path.read_text()))
    for path in (ROOT / "csrc").iterdir():
        found |= set(re.findall(rf"""getenv\("{NAME}"\)""", path.read_text()))
    return found | set(re.findall(rf"^{NAME} \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_environment_variable_is_on_the_page_and_the_other_way_round():
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", ENVIRONMENT, re.MULTILINE)
    (make,) = re.findall(r"^For `make`.*?;", ENVIRONMENT, re.MULTILINE | re.DOTALL)
    on_the_page = {name for text in (*rows, make) for name in re.findall(rf"`{NAME}`", text)}
    assert on_the_page == read_by_the_code()


def test_no_variable_is_read_in_another_way():
    """Only the forms that the test above finds: an `os.getenv`, or a name in a variable, would pass it by."""
    for path in [*(ROOT / "part_fast").rglob("*.py"), ROOT / "setup.py"]:
        text = path.read_text()
        assert "os.getenv" not in text, path
        assert "from os import" not in text, path
        whole = len(re.findall(r"\bos\.environ\b", text))
        named = len(re.findall(r"""os\.environ(?:\.(?:get|pop|setdefault)\(|\[)["'][A-Z]""", text))
        handed_on = len(re.findall(r"\*\*os\.environ", text))
        assert whole == named + handed_on, path


def test_every_file_is_in_the_tree_and_the_other_way_round():
    there = {path.relative_to(ROOT / "part_fast").as_posix() for path in (ROOT / "part_fast").rglob("*.py")}
    named = re.findall(r"\(\.\./part_fast/([\w/]+\.py)\)", STRUCTURE)
    assert len(named) == len(set(named))
    assert set(named) == there


def test_files_that_the_guide_names_are_there():
    named = re.findall(r"`((?:part_fast|csrc|tests|benchmarks)/[\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_citation_is_the_packages():
    text = (ROOT / "CITATION.cff").read_text()
    values = dict(re.findall(r"^([a-z-]+): (.+)$", text, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    assert values["cff-version"] == "1.2.0"
    assert values["title"] == part_fast.__name__
    assert values["version"] == part_fast.__version__
    assert f'license = "{values["license"]}"' in project
    (author,) = re.findall(r"^authors:\n  - name: (.+)$", text, re.MULTILINE)
    assert f'authors = [{{ name = "{author}" }}]' in project
    (title,) = re.findall(r"title     = \{(.+)\}", (ROOT / "README.md").read_text())
    assert f"title: {title}\n" in text
    assert "arXiv:2406.00685" in text


@pytest.mark.parametrize(
    "page", ["docs/environment.md", "docs/structure.md", "docs/versions.md", "CONTRIBUTING.md", "CITATION.cff"]
)
def test_the_readme_links_it(page):
    assert f"({page})" in (ROOT / "README.md").read_text()
