"""How Sphinx builds these pages: `./scripts/dev docs` makes HTML and the manual pages, and takes a warning for an error."""

from __future__ import annotations

import posixpath
import tomllib
from pathlib import Path
from typing import Final

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

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
html_static_path = ["style.css"]
html_css_files = ["style.css"]
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


def setup(app: Sphinx) -> None:
    # Before Sphinx looks for what there is to download.
    app.connect("doctree-read", _link, priority=100)


def _link(app: Sphinx, page: nodes.document) -> None:
    """Make links of links to files: they are written as such, since on the repository's page no role is known."""
    directory = posixpath.dirname(app.env.docname)
    for link in list(page.findall(nodes.reference)):
        path = link.get("refuri", "")
        if not path or "://" in path or path.startswith("#"):
            continue
        place = {"refdoc": app.env.docname, "refwarn": True, "refexplicit": True}
        if path.endswith((".rst", ".md")):
            target = "/" + posixpath.normpath(posixpath.join(directory, path.rpartition(".")[0]))
            new = addnodes.pending_xref("", refdomain="std", reftype="doc", reftarget=target, **place)
        else:
            new = addnodes.download_reference("", reftarget=path, **place)
        new += nodes.inline("", "", *link.children)
        link.replace_self(new)
