"""Pages generated from the source (settings, API), and the check that public names have docs."""

import dataclasses
import inspect
import pathlib
import re
import typing

import public_names
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "lopd"
API = ROOT / "docs" / "api"

# Settings


def _texts(kind: type) -> dict[str, str]:
    """The text below each field of a class, its base classes' included."""
    import ast

    found = {}
    for one in reversed(kind.__mro__[:-1]):
        tree = ast.parse(inspect.getsource(one))
        for name, _, text in public_names.assigned(tree.body[0].body):
            if text:
                found[name] = " ".join(text.split())
    return found


def _linked(text: str) -> str:
    """Names of lopd in backticks as references."""
    return re.sub(r"`(lopd\.[\w.]+)`", r"{py:obj}`\1`", text)


def _type_name(annotation) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = str(annotation) if typing.get_args(annotation) else name
    name = re.sub(r"\b[a-z_.]+\.(?=[A-Z])", "", name)
    name = re.sub(r"tuple\[(.*), \.\.\.\]", r"tuple of \1", name)
    return name.replace(" | ", " or ")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
        if isinstance(value, str) and len(value) > 24:
            return "below"
        return f"`{value!r}`"
    return "`{}`"


def _row(name: str, field: dataclasses.Field, annotation, text: str) -> str:
    domain = field.metadata.get("domain")
    if domain:
        text = f"{text} It must {domain.text}.".strip()
    text = _linked(text).replace("|", r"\|")
    return f"| `{name}` | {_type_name(annotation)} | {_default(field)} | {text} |"


def _table(kind: type, prefix: str, skip: frozenset[str]) -> list[str]:
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    rows = [
        _row(prefix + field.name, field, hints[field.name], texts.get(field.name, ""))
        for field in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(hints[field.name]) and field.name not in skip
    ]
    return ["| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""]


def _shared(kind: type, base: type) -> frozenset[str]:
    """The fields of a base that a section takes over as they are."""
    return frozenset(
        field.name
        for field in dataclasses.fields(base)
        if field.name not in kind.__annotations__ or kind is base
    )


def settings_page() -> str:
    """Every setting of `lopd.config.settings`, section by section, as Markdown."""
    from lopd.config import settings as source

    bases = {
        source.TrainingRecipe: "training recipe",
        source.SamplingSettings: "sampling",
    }
    lines = ["## On top", "", *_table(source.Settings, "", frozenset())]
    for base, title in bases.items():
        users = [
            f"`{field.name}`"
            for field in dataclasses.fields(source.Settings)
            if isinstance(field.default, base)
        ]
        lines += [f"## Shared: {title}", "", f"{base.__doc__.strip()}", ""]
        lines += [f"In the sections {', '.join(users)}.", "", *_table(base, "", frozenset())]
    for field in dataclasses.fields(source.Settings):
        kind = type(field.default)
        if not dataclasses.is_dataclass(kind):
            continue
        base = next((b for b in bases if issubclass(kind, b)), None)
        lines += [f"## {field.name}", ""]
        if kind is not base:
            lines += [" ".join(kind.__doc__.split()), ""]
        if base:
            anchor = f"#shared-{bases[base].replace(' ', '-')}"
            lines += [f"Has the settings of a [{bases[base]}]({anchor}).", ""]
        skip = _shared(kind, base) if base else frozenset()
        table = _table(kind, f"{field.name}.", skip)
        lines += table if len(table) > 3 else []
        for part in dataclasses.fields(kind):
            if dataclasses.is_dataclass(inner := type(part.default)):
                name = f"{field.name}.{part.name}"
                lines += [f"### {name}", "", inspect.cleandoc(inner.__doc__), ""]
                lines += _table(inner, f"{name}.", frozenset())
    return "\n".join(lines)


def _on_source_read(app, docname: str, source: list[str]) -> None:
    if docname == "settings":
        source[0] = source[0].replace("<!-- settings -->", settings_page())


# API


def _api_files() -> dict[str, str]:
    """File name → text: a page for each folder of lopd, with all its modules, and the index."""
    pages: dict[str, list[str]] = {}
    for module in public_names.public_modules(PACKAGE):
        parts = module.name.split(".")
        is_package = module.path.name == "__init__.py"
        page = parts[1] if len(parts) > 2 or (is_package and len(parts) > 1) else "lopd"
        pages.setdefault(page, []).append(module.name)
    files = {}
    for page, modules in pages.items():
        title = "lopd" if page == "lopd" else f"lopd.{page}"
        lines = [title, "=" * len(title), ""]
        for name in modules:
            if name != title:
                lines += [name, "-" * len(name), ""]
            lines += [f".. automodule:: {name}", ""]
        files[f"{page}.rst"] = "\n".join(lines)
    toctree = "\n".join(sorted(pages))
    files["index.md"] = (
        "# API\n\nEvery public module, from its docstrings; one page for each folder of `lopd`.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{toctree}\n```\n"
    )
    return files


def _write_api() -> None:
    """Writes the files that changed, so that Sphinx reads only these again."""
    API.mkdir(exist_ok=True)
    files = _api_files()
    for path in API.iterdir():
        if path.name not in files:
            path.unlink()
    for name, text in files.items():
        path = API / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _check_names(app) -> None:
    _write_api()
    app.lopd_remarks = {}
    for module in public_names.public_modules(PACKAGE):
        app.lopd_remarks |= public_names.remarks(module)
        for line, name in public_names.undocumented(module):
            place = f"{module.path}:{line}"
            LOGGER.warning("%s is public and not documented", name, location=place)


# Docstrings

_CODE = re.compile(r"(``.*?``|`[^`]*`)")


def _escaped(line: str) -> str:
    """A line with what reStructuredText would take for markup, but for what is in backticks."""
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"([|*\\])", r"\\\1", part) for part in parts[::2]]
    # Neither an identifier with a hanging underscore nor a word after one is a reference.
    parts[::2] = [re.sub(r"(\w)_(?=[^\w]|$)", r"\1\\_", part) for part in parts[::2]]
    return "".join(parts)


_GOOGLE = Config(
    napoleon_google_docstring=True,
    napoleon_numpy_docstring=False,
    napoleon_use_ivar=True,
)


def _on_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """From the house's docstrings (Google's sections, plain text) to reStructuredText.

    Not by Napoleon's own hook, which takes what is before a colon in the text of a field for its
    type.
    """
    if not any(lines):
        lines[:] = [app.lopd_remarks.get(name, "")]
    block: int | None = None
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None:
            code = line.rstrip().endswith("::")
            lines[i] = _escaped(line)
            if code:
                block = indent
    kind = "" if what in ("attribute", "data", "property") else what
    lines[:] = GoogleDocstring(lines, _GOOGLE, app, kind, name, obj, options).lines()


def setup(app) -> dict:
    """Connects all of it."""
    app.connect("builder-inited", _check_names)
    app.connect("source-read", _on_source_read)
    app.connect("autodoc-process-docstring", _on_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
