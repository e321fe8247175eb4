"""How Sphinx builds these pages: `./scripts/dev docs` makes HTML and the manual pages, and takes a warning for an error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

_PROJECT: Final = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = _PROJECT["name"]
author = "the mini-kms authors"
version = release = _PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
# What docstrings have in single backquotes is code.
default_role = "code"

html_theme = "furo"
html_title = f"mini-kms {release}"
html_copy_source = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

myst_heading_anchors = 2

# A manual page bears a date. Today's would make the committed pages differ from one day to the next.
today = f"mini-kms {release}"
man_show_urls = True
_MAN_PAGES: Final = {
    "kms-admin": "set up mini-kms and manage its keys",
    "kms-client": "encrypt and decrypt with keys that never leave the server",
    "kms-server": "serve keys on one machine",
}
man_pages = [(f"commands/{name}", name, what, "", 1) for name, what in _MAN_PAGES.items()]
