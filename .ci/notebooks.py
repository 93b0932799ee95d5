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
INSTALL = '%pip install -q "jaxhandler[examples]"'
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(script: str) -> list[tuple[str, str]]:
    """The cells of a script in percent format, each its kind and its text."""
    head, *blocks = f"\n{script}".split("\n# %%")
    doc = ast.get_docstring(ast.parse(head))
    found = [("markdown", doc) if doc else ("code", head.strip())]
    for block in blocks:
        title, _, body = block.partition("\n")
        if title.strip() == "[markdown]":
            lines = body.strip().splitlines()
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
            found.append(("markdown", body))
        else:
            found.append(("code", body.strip()))
    return [("code", INSTALL), *(cell for cell in found if cell[1])]


def notebook(script: str) -> str:
    """The text of the notebook that is the same as a script."""
    content = {
        "cells": [cell(f"cell-{number}", *each) for number, each in enumerate(cells(script))],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def cell(name: str, kind: str, text: str) -> dict[str, Any]:
    source = text.splitlines(keepends=True)
    content = {"cell_type": kind, "id": name, "metadata": {}, "source": source}
    return content if kind == "markdown" else content | {"execution_count": None, "outputs": []}


def stale() -> dict[Path, str]:
    """The notebooks that are not as their scripts, and what they should be."""
    should = {path.with_suffix(".ipynb"): notebook(path.read_text()) for path in EXAMPLES.glob("*.py")}
    return {
        path: text
        for path, text in sorted(should.items())
        if not path.exists() or path.read_text() != text
    }


def main(arguments: list[str]) -> int:
    check = arguments == ["--check"]
    for path, text in stale().items():
        print(f"{'differs' if check else 'writes'}: {path}")
        if not check:
            path.write_text(text)
    return int(check and bool(stale()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
