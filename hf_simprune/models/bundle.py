# SPDX-License-Identifier: Apache-2.0
"""The code of token reduction as one file, for folders that must work without this package."""

import ast
import inspect
import sys
from types import ModuleType

from ..errors import InputError
from ..reduction import attention, base, inference, token_maps, walk
from ..reduction.methods import INFERENCE_METHODS


_HEADER = '''# SPDX-License-Identifier: Apache-2.0
"""Token reduction{of}: the files of hf_simprune for it, joined into one that needs no package."""'''


def bundle_reduction(method: str | None) -> str:
    """The source of a module with the names of `reduction_simprune_*.py`, with that one method or none.

    Raises `ValueError` where a file cannot be joined: it imports what is not joined too, or repeats a name.
    """
    chosen = [] if method is None else [INFERENCE_METHODS[method]]
    own = (sys.modules[one.__module__] for one in chosen)
    joiner = _Joiner([token_maps, base, walk, attention, *own, inference])
    entries = ", ".join(f'"{one.name}": {one.__name__}' for one in chosen)
    texts = [joiner.text_of(module) for module in joiner.modules]
    head = _HEADER.format(of=f" by {method}" if method else "")
    parts = [f"{head}\n\n{joiner.imports()}", inspect.getsource(InputError).strip(), *texts]
    return "\n\n\n".join([*parts, f"INFERENCE_METHODS = {{{entries}}}"]) + "\n"


class _Joiner:
    """Takes the imports off modules, and remembers which of them come from outside and what is defined where."""

    def __init__(self, modules: list[ModuleType]) -> None:
        self.modules = modules
        self._siblings = {module.__name__.rpartition(".")[2] for module in modules} | {"errors"}
        self._plain: set[str] = set()
        self._from: dict[str, set[str]] = {}
        self._owners: dict[str, str] = {}

    def text_of(self, module: ModuleType) -> str:
        """The text of a module from behind its docstring and imports."""
        source = inspect.getsource(module)
        tree = ast.parse(source)
        start = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._sort_out(module, node)
                start = node.end_lineno
            for name in _defined(node):
                if self._owners.setdefault(name, module.__name__) != module.__name__:
                    raise ValueError(f"{self._owners[name]} and {module.__name__} both define {name}")
        return "\n".join(source.splitlines()[start:]).strip()

    def imports(self) -> str:
        """The imports from outside, once the text of every module was asked for."""
        lines = sorted(self._plain)
        lines += [f"from {source} import {', '.join(sorted(names))}" for source, names in sorted(self._from.items())]
        return "\n".join(lines)

    def _sort_out(self, module: ModuleType, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            self._plain.add(ast.unparse(node))
        elif not node.level and node.module is not None:  # it is None in `from . import` only
            self._from.setdefault(node.module, set()).update(map(ast.unparse, node.names))
        elif node.module not in self._siblings or any(alias.asname for alias in node.names):
            raise ValueError(f"{module.__name__}: {ast.unparse(node)} is of no file that is joined, or renames")


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


__all__ = ["bundle_reduction"]
