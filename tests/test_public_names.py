"""Every public name says what it takes, gives and raises, and shows an example (pytest runs it)."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest

import jaxhandler as jh


def public_names(module: ModuleType, name: str) -> Iterator[tuple[str, Any]]:
    """What stands in a module's `__all__`, and what stands in that of the namespaces among it."""
    for child in module.__all__:
        value = getattr(module, child)
        yield f"{name}.{child}", value
        if isinstance(value, ModuleType):
            yield from public_names(value, f"{name}.{child}")


def public_methods(owner: type, name: str) -> Iterator[tuple[str, FunctionType]]:
    for child, value in vars(owner).items():
        value = getattr(value, "fget", value)  # of a property
        value = getattr(value, "__func__", value)  # of a class method or a static method
        if isinstance(value, FunctionType) and not child.startswith("_"):
            yield f"{name}.{child}", value


NAMES = dict(public_names(jh, "jh"))
CLASSES = {name: value for name, value in NAMES.items() if isinstance(value, type)}
MODULES = {name: value for name, value in NAMES.items() if isinstance(value, ModuleType)}
FUNCTIONS = {name: NAMES[name] for name in NAMES.keys() - CLASSES.keys() - MODULES.keys()}
METHODS = dict(pair for name in CLASSES for pair in public_methods(CLASSES[name], name))


def section(doc: str, title: str) -> str:
    """The text under `title:` in a docstring, or nothing."""
    match = re.search(rf"^{title}:\n((?: .*\n|\n)+)", doc + "\n", re.MULTILINE)
    return textwrap.dedent(match[1]) if match else ""


def described(doc: str, title: str) -> list[str]:
    """The names that a section describes, in its order."""
    return re.findall(r"^\**(\w+)(?: \(.*\))?:", section(doc, title), re.MULTILINE)


def arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def raises(function: Any) -> bool:
    """Whether a function raises itself or has an argument checked, not counting ones it makes."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    nodes = list(ast.iter_child_nodes(definition))
    for node in nodes:
        if isinstance(node, ast.Call) and "check_" in ast.unparse(node.func):
            return True
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))
    return False


def test_all_lists_what_the_root_imports() -> None:
    names = {name for name in dir(jh) if not name.startswith("_")}
    modules = {name for name in names if isinstance(getattr(jh, name), ModuleType)}
    assert names - (modules - set(jh.__all__)) - {"TYPE_CHECKING"} == set(jh.__all__)
    assert len(jh.__all__) == len(set(jh.__all__))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_namespace(name: str) -> None:
    assert MODULES[name].__doc__


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function(name: str) -> None:
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function) or ""
    gives = inspect.signature(function).return_annotation is not None
    assert doc
    assert described(doc, "Args") == arguments(function)
    assert section(doc, "Returns") or section(doc, "Yields") or not gives
    assert section(doc, "Raises") or not raises(function)
    assert ">>> " in section(doc, "Example")


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_class(name: str) -> None:
    owner = CLASSES[name]
    doc = inspect.cleandoc(owner.__doc__ or "")
    made_by_python = doc.startswith(f"{owner.__name__}(")
    assert doc
    assert not made_by_python
    assert ">>> " in section(doc, "Example")
    fields = getattr(owner, "_fields", ())
    if dataclasses.is_dataclass(owner):
        fields = [field.name for field in dataclasses.fields(owner)]
    shown = [field for field in fields if not field.startswith("_")]
    assert described(doc, "Attributes") + described(doc, "Args") == shown or not shown


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method(name: str) -> None:
    method = METHODS[name]
    doc = inspect.getdoc(method) or ""
    gives = inspect.signature(method).return_annotation is not None
    assert doc
    assert described(doc, "Args") == arguments(method)
    assert section(doc, "Returns") or not gives or not arguments(method)
    assert section(doc, "Raises") or not raises(method)
