"""The README can be believed: its commands, its Python and its links."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_command_stands_alone(command: str) -> None:
    """Set-up and work in one line that a shell at the root can run, of what there is."""
    subprocess.run(["bash", "-n", "-c", command], check=True)
    install, work = command.split(" && ")
    assert not command.endswith("\\")
    extra = re.fullmatch(r'pip install -e "\.\[(\w+)\]"', install)
    assert extra
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra[1] in project["optional-dependencies"]
    scripts = [word for word in shlex.split(work) if word.endswith(".py")]
    assert all((ROOT / script).is_file() for script in scripts)


def test_first_command_runs_and_second_tests() -> None:
    run, test = COMMANDS[:2]
    assert run.endswith("python examples/quickstart.py")
    assert test.endswith("pytest")


@pytest.mark.parametrize("name", ["README.md", "docs/models.md"])
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are read from top to bottom: a later one may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    # Pages are written for JAX as it comes.
    with jax.numpy_dtype_promotion("standard"):
        for number, block in enumerate(blocks("python", (ROOT / name).read_text())):
            exec(compile(block, f"{name}, Python block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text):
        link = "".join(target).partition("#")[0]
        if link and not re.match(r"[a-z]+:", link):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
