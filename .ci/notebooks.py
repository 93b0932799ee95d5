"""Writes each example beside its script as a notebook without outputs, for Colab.

    python .ci/notebooks.py            # write examples/*.ipynb
    python .ci/notebooks.py --check    # only say which of them are not as their scripts

A script is in percent format: `# %%` begins a cell of code, `# %% [markdown]` one of comments that
are text, and a docstring on top is the first text. The same script gives the same bytes.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
# By its folder, not by a name: there is no release, and anybody could publish one by that name.
INSTALL = (
    "# In the folder `examples` of a clone of jaxhandler; in Colab, bring one there first.\n"
    '%pip install -q "..[examples]"'
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(script: str) -> list[tuple[str, str]]:
    """The cells of a script in percent format, each its kind and its text."""
    head, *blocks = f"\n{script}".split("\n# %%")
    top = ast.parse(head)
    doc = ast.get_docstring(top)
    if doc:
        head = "\n".join(head.split("\n")[top.body[0].end_lineno :])
    found = [("markdown", doc or ""), ("code", head.strip())]
    for block in blocks:
        title, _, text = block.partition("\n")
        kind, text = "code", text.strip()
        if title.strip() == "[markdown]":
            kind = "markdown"
            text = "\n".join(line[1:].removeprefix(" ") for line in text.splitlines())
        found.append((kind, text))
    return [("code", INSTALL), *(cell for cell in found if cell[1])]


def notebook(script: str) -> str:
    """The text of the notebook that is the same as a script."""
    content = {
        "cells": [cell(f"cell-{number}", *each) for number, each in enumerate(cells(script))],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def cell(name: str, kind: str, text: str) -> dict[str, Any]:
    source = text.splitlines(keepends=True)
    content = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
    return content if kind == "markdown" else content | {"execution_count": None, "outputs": []}


def stale() -> dict[Path, str]:
    """The notebooks that are not as their scripts, and what they should be."""
    scripts = sorted(EXAMPLES.glob("*.py"))
    should = {path.with_suffix(".ipynb"): notebook(path.read_text()) for path in scripts}
    return {
        path: text for path, text in should.items() if not path.exists() or path.read_text() != text
    }


def main(check: bool) -> int:
    todo = stale()
    for path, text in todo.items():
        print("not as its script:" if check else "wrote", path.relative_to(EXAMPLES.parent))
        if not check:
            path.write_text(text)
    return int(check and bool(todo))


if __name__ == "__main__":
    sys.exit(main(check=sys.argv[1:] == ["--check"]))
