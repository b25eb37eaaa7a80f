"""The public names of a package, read from its source, and those that have no documentation.

Public is what has no leading underscore, in a module without one. Documented is

- a module, class, function, method or property with a docstring of its own; methods with two
  underscores at each end need none;
- a constant of a module, or an alias of a type, with a docstring below it; a flag has its help
  text; the `stage` of a module in `lopd.stages` is what the module's docstring is about;
- a field or attribute of a class with a docstring below it, or named in the docstring of the class
  (as `prompt_length`, or in words: "prompt length"), or named like its type: `mesh: Mesh`,
  `runtime: RuntimeSettings`.

Folders without an `__init__.py` hold scripts and data, no modules.
"""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Module:
    """A module in its file."""

    name: str
    """Dotted; a package has its own name, not `__init__`'s."""
    path: pathlib.Path

    @property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.path.read_text(encoding="utf-8"))


def public_modules(package: pathlib.Path) -> list[Module]:
    """All public modules below a package's folder, `__main__` included, in the order of names."""
    found = []
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        folders = [package.parent.joinpath(*parts[: i + 1]) for i in range(len(parts) - 1)]
        if not all((folder / "__init__.py").exists() for folder in folders):
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") and part != "__main__" for part in parts):
            found.append(Module(".".join(parts), path))
    return sorted(found, key=lambda module: module.name)


def _is_text(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt, str | None]]:
    """Of each public name that statements assign: the name, the statement, the text below it."""
    for i, node in enumerate(body):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else []
        targets = node.targets if isinstance(node, ast.Assign) else targets
        names = [t for target in targets for t in getattr(target, "elts", [target])]
        below = body[i + 1] if i + 1 < len(body) else None
        text = below.value.value if _is_text(below) else None
        for name in names:
            if isinstance(name, ast.Name) and not name.id.startswith("_"):
                yield name.id, node, text


def _is_flag(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, ast.Call) and "DEFINE_" in ast.unparse(value.func)


def _in_text(name: str, text: str) -> bool:
    words = r"[\s_]".join(map(re.escape, name.split("_")))
    return bool(re.search(rf"(?<![A-Za-z0-9]){words}s?(?![A-Za-z0-9])", text, re.IGNORECASE))


def _like_its_type(name: str, node: ast.stmt) -> bool:
    kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
    kinds = re.findall(r"\w+", kind.replace("_", ""))
    plain = name.replace("_", "")
    return any(k.lower().startswith(plain) or k.lower().endswith(plain) for k in kinds)


def _of_class(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    text = ast.get_docstring(node) or ""
    for name, statement, below in assigned(node.body):
        if not (below or _in_text(name, text) or _like_its_type(name, statement)):
            yield statement.lineno, f"{node.name}.{name}"
    yield from _definitions(node.body, f"{node.name}.")


def _definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[int, str]]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.lineno, f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _of_class(node)


def undocumented(module: Module) -> list[tuple[int, str]]:
    """(line, dotted name) of what is public in a module and not documented."""
    tree, found = module.tree, []
    if not ast.get_docstring(tree):
        found.append((1, module.name))
    for name, node, below in assigned(tree.body):
        is_stage = name == "stage" and module.name.startswith("lopd.stages.")
        if not (below or _is_flag(node) or is_stage):
            found.append((node.lineno, f"{module.name}.{name}"))
    found += [(line, f"{module.name}.{name}") for line, name in _definitions(tree.body)]
    return sorted(found)
