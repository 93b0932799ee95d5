"""How Sphinx makes a site of these pages: `python -m sphinx -W docs docs/_build/html`.

The pages are plain Markdown that reads well on GitHub. This file adds three things:

- Code is run. A block that begins with "```python" becomes a cell of a notebook: its output stands
  below it, an error ends the build. (tests/test_docs.py runs the same blocks without Sphinx.) One
  that cannot run says so: "```python not run". Scripts in examples/ become notebooks as well.
- `jh.name` in code font is a link to the API reference, and a warning where there is no such name.
- Docstrings are in the code font of Markdown, single backticks; Sphinx gets its own.
"""

import importlib.metadata
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "jaxhandler"
author = copyright = "The jaxhandler authors"
version = release = importlib.metadata.version("jaxhandler")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "jaxhandler"

nitpicky = True
# A type variable, which has no page.
nitpick_ignore = [("py:class", "jaxhandler.ensembles.ensemble.H")]
# Their sites are not asked: a build needs no network. And the parts of an inferer have no pages.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(asyncio|collections|concurrent|flax|jax|jaxlib|numpy|optax|os|pathlib|typing)\..*",
    ),
    ("py:class", r"jaxhandler\.inference\.(agents|buckets|engine|layers|requests)\..*"),
    ("py:class", r"jaxhandler\.plans\.Held"),
    # Nor have those of an evaluator, of plots and of packs.
    ("py:class", r"jaxhandler\.assembly\.(metrics\.Metrics|plots\.PlotState)"),
    ("py:class", r"jaxhandler\.data\.(packing\.Packing|packing\.Packs|structures\.Structures)"),
    ("py:class", r"Figure|Axes|Atoms"),
]
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_attr_annotations = False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True

PYTHON = re.compile(r"^```python$", re.MULTILINE)
NOTEBOOK = """---
file_format: mystnb
kernelspec: {name: python3, display_name: Python 3}
---
"""


def write_examples(app: Sphinx) -> None:
    """Writes each script in examples/ as a notebook for myst-nb to run."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci" / "notebooks.py")
    assert spec
    assert spec.loader
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    folder = Path(app.srcdir) / "examples"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for script in sorted((ROOT / "examples").glob("*.py")):
        content = json.loads(notebooks.notebook(script.read_text()))
        # The first cell installs jaxhandler, which is there.
        del content["cells"][0]
        (folder / f"{script.stem}.ipynb").write_text(json.dumps(content))


def run_python(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes a notebook of a page with Python in it."""
    if PYTHON.search(source[0]):
        source[0] = NOTEBOOK + PYTHON.sub("```{code-cell} python", source[0])


def read_backticks(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Gives a docstring the code font of reStructuredText, also before a letter: "`x`s"."""
    lines[:] = re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w?))", _literal, "\n".join(lines)).split("\n")


def _literal(found: re.Match[str]) -> str:
    return f"``{found[1]}``" + ("\\ " if found[2] else "")


def mend_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Replaces defaults that do not print as code, which Sphinx would stumble over."""
    return signature and re.sub(r"= <[^>]*>", "= ...", signature), returns


def skip_fields(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out what Python says of the fields of a NamedTuple; their class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Makes a link of each `jh.name` in code font that is not in a title or a link already."""
    for literal in list(doctree.findall(nodes.literal)):
        found = re.match(r"jh\.(\w+(?:\.\w+)*)", literal.astext())
        around = literal.parent
        while around is not None and not isinstance(around, nodes.title | nodes.reference):
            around = around.parent
        if found and around is None:
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"jaxhandler.{found[1]}",
                refexplicit=True,
                refdoc=app.env.docname,
            )
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> None:
    """Connects the above."""
    app.connect("builder-inited", write_examples)
    app.connect("source-read", run_python)
    # Before napoleon, which makes of docstrings what backticks must not be changed in.
    app.connect("autodoc-process-docstring", read_backticks, priority=100)
    app.connect("autodoc-process-signature", mend_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", link_names)
