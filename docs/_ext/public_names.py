"""The public names of a package, read from its source, and those that have no documentation.

Public is what has no leading underscore, in a module without one. Documented is

- a module, class, function, method or property with a docstring of its own; or a method that a base
  class of the same module documents. Methods like `__len__` need none;
- a constant of a module, or an alias of a type, with a docstring below it, a comment above it or at
  the end of its line. A flag has its help text; the `stage` of a module in `lopd.stages` is what
  the docstring of the module is about;
- a field or attribute of a class with a docstring below it or a comment at the end of its line, or
  named in the docstring of the class (as `prompt_length`, or in words: "prompt length"), or named
  like its type: `mesh: Mesh`, `runtime: RuntimeSettings`.

Folders without an `__init__.py` hold scripts and data, no modules.
"""

import ast
import dataclasses
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Module:
    """A module in its file."""

    name: str
    """Dotted; a package has its own name, not `__init__`'s."""
    path: pathlib.Path

    def source(self) -> str:
        """Its text."""
        return self.path.read_text(encoding="utf-8")


def comments(source: str) -> dict[int, tuple[str, bool]]:
    """By line the text of its comment, and whether the line has nothing else."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# fmt")):
            text = token.string.lstrip("# ").strip()
            found[token.start[0]] = (text, not token.line[: token.start[1]].strip())
    return found


def comment_on(node: ast.stmt, found: dict[int, tuple[str, bool]]) -> str:
    """The comment at the end of a statement's line, or else the lines of comment above it."""
    for line in (node.lineno, node.end_lineno):
        if line in found and not found[line][1]:
            return found[line][0]
    lines, above = [], node.lineno - 1
    while above in found and found[above][1]:
        lines.insert(0, found[above][0])
        above -= 1
    return " ".join(lines)


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


def _fields(node: ast.ClassDef, remarks: dict) -> Iterator[tuple[int, str]]:
    text = ast.get_docstring(node) or ""
    for name, statement, below in assigned(node.body):
        said = below or comment_on(statement, remarks)
        if not (said or _in_text(name, text) or _like_its_type(name, statement)):
            yield statement.lineno, f"{node.name}.{name}"


def _methods(node: ast.ClassDef, documented: dict[str, set[str]]) -> Iterator[tuple[int, str]]:
    inherited = set().union(*(documented.get(ast.unparse(base), set()) for base in node.bases))
    for one in node.body:
        if not isinstance(one, ast.FunctionDef) or one.name.startswith("_"):
            continue
        if not ast.get_docstring(one) and one.name not in inherited:
            yield one.lineno, f"{node.name}.{one.name}"


def undocumented(module: Module) -> list[tuple[int, str]]:
    """(line, dotted name) of what is public in a module and not documented."""
    source = module.source()
    tree, remarks, found = ast.parse(source), comments(source), []
    documented: dict[str, set[str]] = {}
    if not ast.get_docstring(tree):
        found.append((1, ""))
    for name, node, below in assigned(tree.body):
        is_stage = name == "stage" and module.name.startswith("lopd.stages.")
        if not (below or _is_flag(node) or is_stage or comment_on(node, remarks)):
            found.append((node.lineno, name))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            found.append((node.lineno, node.name))
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            documented[node.name] = {one.name for one in methods if ast.get_docstring(one)}
            found += [*_fields(node, remarks), *_methods(node, documented)]
    return sorted((line, f"{module.name}.{name}".rstrip(".")) for line, name in found)


def remarks(module: Module) -> dict[str, str]:
    """By dotted name the comment on it, for fields and constants that have no docstring."""
    source, found = module.source(), {}
    tree, texts = ast.parse(source), comments(source)
    bodies = {"": tree.body} | {
        f"{node.name}.": node.body for node in tree.body if isinstance(node, ast.ClassDef)
    }
    for prefix, body in bodies.items():
        for name, node, below in assigned(body):
            if not below and (text := comment_on(node, texts)):
                found[f"{module.name}.{prefix}{name}"] = text
    return found
