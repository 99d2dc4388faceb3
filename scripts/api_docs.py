"""Renders the docstrings of the package as web pages with pdoc; `bash scripts/api_docs.sh` sets
up what this needs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

PACKAGE = "pangu_locmoe"
# What runs when it is imported is not a page.
PROGRAMS = ("pangu_locmoe.__main__", "pangu_locmoe.check.__main__")


def render(output: Path, modules: list[str] | None = None) -> Path:
    """Write a page for each module, and index.html. Returns the first page to open.

    Args:
        output: a folder; made if it is not there.
        modules: with what is below them; None: the whole package.
    """
    # MindSpore asks lscpu for the processor when it is imported.
    os.environ.setdefault("PDOC_ALLOW_EXEC", "1")
    import pdoc

    pdoc.render.configure(docformat="google", show_source=True)
    pdoc.pdoc(*(modules or [PACKAGE]), *(f"!{name}" for name in PROGRAMS), output_directory=output)
    return output / "index.html"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="only these (the whole package)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/api"), help="a folder (docs/api)")
    options = parser.parse_args(arguments)
    print(render(options.output, options.modules))


if __name__ == "__main__":
    main()
