"""The pages can be believed without building them: their Python, their links, what they cover.

The build itself (`.ci/run`) looks at references into the API and executes the pages once more.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import jax
import matplotlib.pyplot as plt
import pytest

import jaxhandler as jh
from benchmarks import page as benchmarks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Neither what a build leaves, nor the notebooks that it makes of the examples.
MADE = ("_build/*", "examples/*")
PAGES = {
    path.relative_to(DOCS).with_suffix("").as_posix(): path
    for path in sorted(DOCS.rglob("*.md"))
    if not any(fnmatch(path.relative_to(DOCS).as_posix(), made) for made in MADE)
}
MARKDOWN = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES.values()]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The Python that runs: "```python not run" says that it does not."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def directives(page: Path, name: str) -> list[str]:
    """The bodies of all directives of one name."""
    pattern = rf"^```{{{name}}}\n(.*?)^```"
    return re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)


def public_names(module: ModuleType, name: str) -> Iterator[str]:
    for child in module.__all__:
        value = getattr(module, child)
        yield f"{name}.{child}"
        if isinstance(value, ModuleType):
            yield from public_names(value, f"{name}.{child}")


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.usefixtures("compiled_soon")
@pytest.mark.parametrize("page", [page for page in MARKDOWN if blocks(page)], ids=relative)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are read from top to bottom: a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    # Pages are written for JAX as it comes.
    with jax.numpy_dtype_promotion("standard"):
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    plt.close("all")


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_local_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    for target in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text):
        link, _, section = "".join(target).partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        lands = page.parent / link if link else page
        assert lands.exists(), f"{page.name} links to {link}"
        assert not section or section in sections(lands), f"{page.name} links to {link}#{section}"


def sections(page: Path) -> set[str]:
    """What GitHub and MyST call the headings of a page in a link."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_one_table_of_contents() -> None:
    listed = ["index"]
    for name, page in PAGES.items():
        for body in directives(page, "toctree"):
            entries = [line for line in body.splitlines() if line and not line.startswith(":")]
            listed += [(Path(name).parent / entry).as_posix() for entry in entries]
    assert sorted(listed) == sorted([*PAGES, "examples/*"])


def test_the_api_reference_has_every_public_name() -> None:
    text = "\n".join(body for page in PAGES.values() for body in directives(page, "eval-rst"))
    described = re.findall(r"^\.\. (?:auto\w+|py:module):: ([\w.]+)", text, re.MULTILINE)
    assert set(public_names(jh, "jaxhandler")) <= set(described)
    assert len(described) == len(set(described))


def test_every_example_has_its_line_among_the_examples() -> None:
    page = PAGES["examples"].read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{script.name})" in page


def test_the_page_of_benchmarks_is_made_of_the_results() -> None:
    assert benchmarks.PAGE.read_text() == benchmarks.text(), "run `python -m benchmarks.page`"
