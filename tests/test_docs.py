"""The papers: every public name is documented, examples fit the source, one address, no dead link.

That the site builds without a warning is for `.ci/run`.
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "extending" / "examples"
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "api"} & {*page.relative_to(ROOT).parts}]


def public_names():
    spec = importlib.util.spec_from_file_location("public_names", DOCS / "_ext" / "public_names.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


NAMES = public_names()


def test_every_public_name_is_documented():
    found = [
        f"{module.path.relative_to(ROOT)}:{line}: {name}"
        for module in NAMES.public_modules(ROOT / "lopd")
        for line, name in NAMES.undocumented(module)
    ]
    assert not found, "\n".join(["public and not documented:", *found])


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("X = 1\n", ["lopd.x", "lopd.x.X"]),
        ('"""M."""\n\ndef f():\n    pass\n', ["lopd.x.f"]),
        ('"""M."""\n\nclass C:\n    """C."""\n\n    def m(self):\n        pass\n', ["lopd.x.C.m"]),
        ('"""M."""\n\nclass C:\n    """C."""\n\n    field: int\n', ["lopd.x.C.field"]),
        ('"""M."""\n\nclass C:\n    """Has a `field`."""\n\n    field: int\n', []),
        ('"""M."""\n\nclass C:\n    """C."""\n\n    field: int\n    """Said."""\n', []),
        ('"""M."""\n\nclass C:\n    """C."""\n\n    field: int  # said\n', []),
        ('"""M."""\n\nclass C:\n    """C."""\n\n    mesh: Mesh\n', []),
        ('"""M."""\n\n_X = 1\n\ndef _f():\n    pass\n', []),
        ('"""M."""\n\n# Said.\nX = 1\n', []),
    ],
)
def test_what_counts_as_documented(tmp_path, source, missing):
    path = tmp_path / "x.py"
    path.write_text(source)
    found = NAMES.undocumented(NAMES.Module("lopd.x", path))
    assert [name for _, name in found] == missing


def test_a_docstring_that_is_taken_away_is_missed(tmp_path):
    shutil.copytree(ROOT / "lopd" / "objectives", tmp_path / "lopd" / "objectives")
    (tmp_path / "lopd" / "__init__.py").write_text('"""L."""\n')
    path = tmp_path / "lopd" / "objectives" / "sampled.py"
    text = path.read_text()
    docstring = '    """½d² for |d| ≤ τ, τ(|d| − ½τ) beyond."""\n'
    assert docstring in text
    path.write_text(text.replace(docstring, ""))
    modules = NAMES.public_modules(tmp_path / "lopd")
    found = [name for module in modules for _, name in NAMES.undocumented(module)]
    assert found == ["lopd.objectives.sampled.huber"]


@pytest.fixture(params=sorted(path.name for path in EXAMPLES.iterdir()))
def example(request, tmp_path):
    """A copy of the source with an example of `docs/extending` applied."""
    name = request.param
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lopd", tmp_path / "lopd", ignore=ignored)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    edits = EXAMPLES / name / "edits.diff"
    subprocess.run(["git", "apply", "--verbose", edits], cwd=tmp_path, check=True)
    if (EXAMPLES / name / "lopd").exists():
        shutil.copytree(EXAMPLES / name / "lopd", tmp_path / "lopd", dirs_exist_ok=True)
    return name, tmp_path


def test_examples_fit_the_source(example):
    _, folder = example
    found = [
        name
        for module in NAMES.public_modules(folder / "lopd")
        for _, name in NAMES.undocumented(module)
    ]
    assert not found


@pytest.mark.slow
def test_examples_do_what_they_say(example, monkeypatch):
    name, folder = example
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.delenv("XLA_FLAGS")  # the fake devices of these tests
    command = [sys.executable, EXAMPLES / name / "check.py", ROOT]
    subprocess.run(command, cwd=folder, check=True)


def tracked() -> list[pathlib.Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_the_address_of_the_repository_is_stated_once():
    address = re.search(r'Repository = "(.*?)"', (ROOT / "pyproject.toml").read_text())[1]
    owner = address.removeprefix("https://github.com/")
    holders = [
        path.relative_to(ROOT).as_posix()
        for path in tracked()
        if path.suffix in {".md", ".ipynb", ".py", ".toml", ".sh", ""}
        and path.is_file()
        and owner in path.read_text(encoding="utf-8")
    ]
    assert holders == ["pyproject.toml"]


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        linked = (page.parent / place).resolve() if place else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_no_page_names_a_machine_of_ours():
    for page in PAGES:
        assert not re.search(r"/root/|/home/|/tmp/", page.read_text()), page
