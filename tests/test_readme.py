"""The README's commands can be believed; tests/test_docs.py looks at its Python and its links."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


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
