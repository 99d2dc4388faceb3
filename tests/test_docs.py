"""Links of the pages lead somewhere, to files and to headings, and the glossary has every letter
once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """The relative ones: file and heading, either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            file, _, heading = target.partition("#")
            yield file, heading


def headings(page: Path) -> set[str]:
    """As GitHub names them: lower case, no punctuation, blanks are hyphens."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for file, heading in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {file} is not there"
        if heading:
            assert heading in headings(target), f"{page.name}: no heading {file}#{heading}"


def test_every_page_is_reached_from_the_first():
    reached = set()
    left = [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        left += [(page.parent / file).resolve() for file, _ in links(page) if file]
    assert [page.name for page in PAGES if page not in reached] == []


OLD_MODULES = {"pangu_locmoe.noise"}  # in the glossary's table of old names
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
FOLDERS = {path.name for path in (ROOT / "pangu_locmoe").iterdir() if path.is_dir()}


def quoted(page: Path) -> Iterator[str]:
    """What stands between backticks."""
    return iter(re.findall(r"`([^`\s]+)`", prose(page)))


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    for name in quoted(page):
        first = name.split("/")[0]
        ours = first in {"pangu_locmoe", "scripts", "tests", "docs", "configs"} | FOLDERS
        if first == "data":  # beside the package there is a folder of text with this name
            ours = name.endswith(".py")
        if ours and re.fullmatch(r"\w+/[\w/.]*", name) and not name.startswith("docs/api/"):
            found = [folder / name for folder in (ROOT, ROOT / "pangu_locmoe")]
            assert any(path.exists() for path in found), f"{page.name}: {name} is not there"


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: page.name)
def test_attributes_and_modules_that_are_named_are_there(page):
    """`Class.name` and `pangu_locmoe.module`."""
    files = {
        file: file.read_text(encoding="utf-8") for file in (ROOT / "pangu_locmoe").rglob("*.py")
    }
    for name in quoted(page):
        if re.fullmatch(r"[A-Z][a-z]\w*\.[a-z]\w*", name):
            owner, attribute = name.split(".")
            bodies = [
                text for text in files.values() if re.search(rf"^class {owner}\b", text, re.M)
            ]
            there = any(re.search(rf"\b{attribute}\b", text) for text in bodies)
            assert there, f"{page.name}: there is no {name}"
    for name in re.findall(r"\bpangu_locmoe(?:\.[a-z_]+)+", page.read_text(encoding="utf-8")):
        path = ROOT / name.replace(".", "/")
        if name not in OLD_MODULES:
            assert path.is_dir() or path.with_suffix(".py").exists(), f"{page.name}: {name}?"


def letters() -> dict[str, str]:
    """The glossary's table of letters."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    table = text.split("## Letters")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([A-Z]) \| ([^|]+) \|", table, re.MULTILINE)
    assert len(rows) == len({letter for letter, _ in rows}) == len({axis for _, axis in rows})
    return dict(rows)


def test_letters_have_one_meaning_and_code_uses_no_other():
    known = letters()
    for file in (ROOT / "pangu_locmoe").rglob("*.py"):
        suffixes = re.findall(r"\b[a-z][a-z0-9_]*_([A-Z]{1,5})\b", file.read_text(encoding="utf-8"))
        unknown = set("".join(suffixes)) - set(known)
        assert not unknown, f"{file}: {sorted(unknown)} are not in docs/glossary.md"


def test_legends_say_what_the_glossary_says():
    """A legend such as "T tokens, E experts of this rank" has a word of each letter's row."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([A-Z]) \| (.+) \|$", text, re.MULTILINE))
    wrong = []
    for file in sorted((ROOT / "pangu_locmoe").rglob("*.py")):
        found = re.search(
            r'Letters: (.*?)(?:\n\n|""")', file.read_text(encoding="utf-8"), re.DOTALL
        )
        legend = " ".join(found[1].split()).split(". ")[0] if found else ""
        for letter, meaning in re.findall(r"(?:^|[,;] |and )([A-Z]) ([a-z][^,;.(]*)", legend):
            said = {word[:5] for word in re.findall(r"[a-z]{4,}", meaning)}
            known = {word[:5] for word in re.findall(r"[a-z]{4,}", rows[letter])}
            if letter != "X" and not said & known:
                wrong.append(f"{file.relative_to(ROOT)}: {letter} {meaning.strip()}")
    assert not wrong, "\n".join(wrong)
