"""Checks every annotation of the package at every call while tests run, shapes included.

jaxtyping's own import hook does the same, but binds the arguments of every call to its signature
and checks them a second time with the result, which took most of the suite's time. Here arguments
and result are checked once, only a function that names a shape opens a scope for shapes, and what
has fitted is not checked again: types, dtypes and shapes decide, whatever the values.
"""

import ast
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import jaxtyping
import numpy as np
from beartype import beartype
from torch import Tensor

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


OUTLINES: dict[type, Callable[[Any], Any]] = {  # by the base of a value's type; others: its type
    Tensor: lambda x: (type(x), x.dtype, x.shape),
    np.ndarray: lambda x: (type(x), x.dtype, x.shape),
    str: lambda text: text,  # for Literal["a"]
    type: lambda kind: kind,  # for type[A]
    tuple: lambda parts: (type(parts), tuple(map(outline, parts))),
    list: lambda parts: (type(parts), frozenset(map(outline, parts))),
    dict: lambda parts: (
        type(parts),
        frozenset((outline(k), outline(v)) for k, v in parts.items()),
    ),
    set: lambda parts: (type(parts), frozenset(map(outline, parts))),
    frozenset: lambda parts: (type(parts), frozenset(map(outline, parts))),
}
FOUND: dict[type, Callable[[Any], Any]] = {}


def outline(value: Any) -> Any:
    """Equal for two values only if an annotation fits both or neither."""
    kind = type(value)
    if (how := FOUND.get(kind)) is None:
        how = FOUND[kind] = next((OUTLINES[b] for b in kind.__mro__ if b in OUTLINES), type)
    return how(value)


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
    if not any(names_a_shape(hint) for hint in thing.__annotations__.values()):
        return switched(thing, typed)

    def scoped(*arguments: Any, **options: Any) -> Any:
        with jaxtyping.jaxtyped("context"):
            return typed(*arguments, **options)

    return switched(thing, scoped if inspect.iscoroutinefunction(thing) else known(thing, scoped))


def switched(thing: Callable[..., Any], with_checks: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its checks while they are on."""

    @wraps(thing)
    def call(*arguments: Any, **options: Any) -> Any:
        chosen = thing if jaxtyping.config.jaxtyping_disable else with_checks
        return chosen(*arguments, **options)

    return call


def known(thing: Callable[..., Any], scoped: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked where arguments or result have an outline that is new."""
    fitted: dict[Any, set[Any]] = {}  # the outlines of results, by those of the arguments

    def call(*arguments: Any, **options: Any) -> Any:
        given = outline(arguments), outline(options)
        results = fitted.get(given)
        if results is None:
            result = scoped(*arguments, **options)
            fitted[given] = {outline(result)}
            return result
        result = thing(*arguments, **options)
        if (found := outline(result)) not in results:
            with jaxtyping.jaxtyped("context"):
                beartype(wraps(thing)(lambda *_, **__: result))(*arguments, **options)
            results.add(found)
        return result

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
