"""Writes `docs/benchmarks.md` from `results/*.json`, without measuring anything.

`python -m benchmarks` does it at its end; after a single benchmark, `python -m benchmarks.page`.
"""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
PAGE = _HERE.parent / "docs" / "benchmarks.md"

_HEAD = """# Benchmarks

Written by `python -m benchmarks` from its own results; no figure is typed by hand. Peers are timed
one after another, in an order that changes from round to round. Times are medians; a ratio is the
median over rounds of two times of the same round, with its quartiles in brackets. All timings are
in `benchmarks/results`.
"""


def text() -> str:
    """Returns the page, one section per result."""
    paths = sorted(
        path for path in (_HERE / "results").glob("*.json") if path.suffixes == [".json"]
    )
    return "\n".join([_HEAD, *(_section(json.loads(path.read_text())) for path in paths)])


def write() -> None:
    """Writes the page."""
    PAGE.write_text(text(), encoding="utf-8")
    print(f"written to {PAGE.relative_to(_HERE.parent)}")


def _section(result: Mapping[str, Any]) -> str:
    source = (_HERE / f"{result['benchmark']}.py").read_text()
    question, _, explanation = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    notes = [f"{note[:1].upper()}{note[1:]}" for note in [*result["notes"], _circumstances(result)]]
    bullets = "".join(f"- {note}\n" for note in notes)
    return f"## {question}\n\n{explanation}\n\n{_table(result['rows'])}\n{bullets}"


def _circumstances(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    parts = [
        f"`{result['command']}` on {result['date']}",
        f"{machine['cpus']} CPUs ({machine['cpu']}), {machine['system']}, "
        f"load {', '.join(f'{load:g}' for load in machine['load'])}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if "devices" in machine:
        parts.insert(2, f"JAX on {', '.join(machine['devices'])}")
    return "; ".join(parts) + "."


def _table(rows: list[Mapping[str, Any]]) -> str:
    cells = {name: value for row in rows for name, value in row.items()}
    columns = [name for name, value in cells.items() if not isinstance(value, list | dict)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row, name) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    quartiles = row.get("quartiles", {})
    between = quartiles.get(name) if isinstance(quartiles, dict) else None
    value = _number(row.get(name, ""))
    return f"{value} ({_number(between[0])} to {_number(between[1])})" if between else value


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    write()
