"""Checks of shapes and types at run time, wherever a test imports sinkscope.

jaxtyping's own import hook checks shapes in every function, also where there are none, and compiles
the checks of a function inside another anew whenever the outer one runs: a scan of a tiny model
takes six times as long then. Here

- functions with shapes in their annotations, and dataclasses, are checked by jaxtyping as there,
  with checks that are compiled once for each signature;
- other functions of modules and classes have their types checked by beartype alone;
- other functions inside functions, and those marked `no_type_check`, are left as they are.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype

PACKAGE = "sinkscope"
_compiled: dict[tuple, Callable] = {}
_inside: dict[CodeType, dict[str, Any]] = {}


def compiled_once(function: Callable) -> Callable:
    """What beartype makes of `function`, which jaxtyping made of nothing but a signature."""
    code = function.__code__
    key = (
        function.__module__,
        function.__qualname__,
        tuple(function.__annotations__.items()),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
        len(function.__defaults__ or ()),
        tuple(function.__kwdefaults__ or ()),
    )
    try:
        known = _compiled.get(key)
    except TypeError:  # an annotation without a hash
        return beartype(function)
    return known or _compiled.setdefault(key, beartype(function))


shapes_and_types = jaxtyping.jaxtyped(typechecker=compiled_once)


def hints_of(function: Callable) -> dict[str, Any]:
    """Annotations without those that only a type checker can read, as jaxtyping takes them."""

    def one(value: Any) -> None: ...

    found = {}
    for name, hint in function.__annotations__.items():
        one.__annotations__ = {"value": hint}
        try:
            found[name] = get_type_hints(one, function.__globals__, include_extras=True)["value"]
        except Exception:  # a NameError mostly, also of a name inside: tuple[int, "SinkReport"]
            continue
    return found


def has_shapes(hint: Any) -> bool:
    return isinstance(hint, type(jaxtyping.AbstractArray)) or any(map(has_shapes, get_args(hint)))


def checked(function: Callable) -> Callable:
    """A function of a module or class with its checks."""
    hints = hints_of(function)
    if any(map(has_shapes, hints.values())):
        return shapes_and_types(function)
    function.__annotations__ = hints
    return beartype(function) if hints else function


def checked_inside(function: Callable) -> Callable:
    """A function inside another with its checks, if there are shapes among them."""
    code = function.__code__
    if code not in _inside:
        hints = hints_of(function)
        _inside[code] = hints if any(map(has_shapes, hints.values())) else {}
    if not _inside[code]:
        return function
    function.__annotations__ = _inside[code]  # the same objects, by which `compiled_once` knows it
    return shapes_and_types(function)


class _Decorated(ast.NodeTransformer):
    """Every function and dataclass of a module with a decorator of this file."""

    inside = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # What a further decorator makes of `__init__` takes other arguments than the fields.
        if node.decorator_list and ast.unparse(node.decorator_list[0]).startswith("dataclass"):
            node.decorator_list.insert(0, ast.Name("_test_class", ast.Load()))
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if any(ast.unparse(decorator) == "no_type_check" for decorator in node.decorator_list):
            return node  # Triton compiles its kernels from their source and signature
        # Innermost: what other decorators return may have other annotations, or none.
        name = "_test_inner" if self.inside else "_test_outer"
        node.decorator_list.append(ast.Name(name, ast.Load()))
        around, self.inside = self.inside, True
        self.generic_visit(node)
        self.inside = around
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _Decorated().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(
            _test_outer=checked, _test_inner=checked_inside, _test_class=shapes_and_types
        )
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check what is imported of sinkscope from now on.

    Raises:
        RuntimeError: If it was imported already.
    """
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} was imported before its checks were installed")
    sys.meta_path.insert(0, _Finder())
