"""Checks every annotation of the package at every call while tests run, shapes included.

jaxtyping's own import hook does the same, but binds the arguments of every call to its signature
and checks them a second time with the result, which took most of the suite's time. Here arguments
and result are checked once, and only a function that names a shape opens a scope for shapes.
"""

import ast
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import jaxtyping
from beartype import beartype

HOOK = f"__import__({__name__!r}, fromlist=['checked']).checked"


def names_a_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(names_a_shape(part) for part in typing.get_args(hint))


def resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Its annotations; Any for one that names what is imported for type checkers only."""

    def hint(annotation: Any) -> Any:
        holder: Any = lambda: None  # noqa: E731
        holder.__annotations__ = {"value": annotation}
        try:
            return typing.get_type_hints(holder, function.__globals__, include_extras=True)["value"]
        except NameError:
            return Any

    return {name: hint(value) for name, value in function.__annotations__.items()}


def checked(thing: Any) -> Any:
    """A function that checks its arguments and its result; of a dataclass, its ``__init__``."""
    if isinstance(thing, type):
        if is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    if not thing.__annotations__ or getattr(thing, "__no_type_check__", False):
        return thing
    thing.__annotations__ = resolved(thing)
    typed = beartype(thing)
    shapes = any(names_a_shape(hint) for hint in thing.__annotations__.values())

    @wraps(thing)
    def call(*arguments: Any, **options: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return thing(*arguments, **options)
        if not shapes:
            return typed(*arguments, **options)
        with jaxtyping.jaxtyped("context"):
            return typed(*arguments, **options)

    return call


class Decorated(ast.NodeTransformer):
    """``checked`` innermost on every function and outermost on every class."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(self.decorator(node))
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, self.decorator(node))
        return self.generic_visit(node)

    def decorator(self, node: ast.AST) -> ast.expr:
        hook = ast.parse(HOOK, mode="eval").body
        for part in ast.walk(hook):
            ast.copy_location(part, node)
        return hook


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Never the bytecode that is kept beside the source: others run it, without checks."""
        path = self.get_filename(fullname)
        tree = Decorated().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class Finder:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def check(package: str) -> None:
    """Check every module of the package that is imported from here on."""
    assert package not in sys.modules, f"{package} was imported before it could be checked"
    sys.meta_path.insert(0, Finder(package))  # type: ignore[arg-type]
