"""Each example is there twice, as a script and as a notebook, and the two agree."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
FIX = "run `python .ci/notebooks.py`"


@pytest.fixture(scope="module")
def notebooks() -> ModuleType:
    """The tool in `.ci`, which is no package."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci" / "notebooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_notebook_agrees_with_script(script: Path, notebooks: ModuleType) -> None:
    path = script.with_suffix(".ipynb")
    assert path.exists(), FIX
    assert path.read_text() == notebooks.notebook(script.read_text()), FIX


def test_no_notebook_without_script() -> None:
    notebooks = (ROOT / "examples").glob("*.ipynb")
    assert {path.stem for path in notebooks} <= {path.stem for path in SCRIPTS}


SCRIPT = '''"""Title.

More.
"""

import a

# %% [markdown]
# # Head
#
# text

# %%
b = 1

c = "# %%"
'''


def test_cells_of_a_script(notebooks: ModuleType) -> None:
    assert notebooks.cells(SCRIPT) == [
        ("code", notebooks.INSTALL),
        ("markdown", "Title.\n\nMore."),
        ("code", "import a"),
        ("markdown", "# Head\n\ntext"),
        ("code", 'b = 1\n\nc = "# %%"'),
    ]


def test_notebook_is_stripped_and_the_same_each_time(notebooks: ModuleType) -> None:
    text = notebooks.notebook("# %%\na = 1\n# %%\nb = 'µ'\n")
    content = json.loads(text)
    assert [cell["id"] for cell in content["cells"]] == ["cell-0", "cell-1", "cell-2"]
    assert all(cell["outputs"] == [] for cell in content["cells"])
    assert "µ" in text
