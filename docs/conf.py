"""The documentation site: `sphinx-build -W --keep-going -n docs docs/_build`.

Pages are MyST Markdown. Made at build time: the settings (from the dataclasses of
`lopd.config.settings`) and the pages of the API (one per folder of lopd, by autodoc). Formulas
become MathML here, so pages need no network when they are read. The build fails on a public name
without documentation and on a reference to a name of lopd that does not exist.
"""

import os
import pathlib
import sys
import tomllib

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_ext")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
_COLAB = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")

project, author = "lopd", "the authors of lopd"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "mathml",
    "generated",
]
exclude_patterns = ["_build", "extending/examples"]
templates_path = []

html_theme = "furo"
html_title = "lopd"
smartquotes = False  # --flags are not dashes
html_static_path = ["_static"]
html_css_files = ["lopd.css"]
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
html_theme_options = {"footer_icons": []}
copybutton_prompt_text = "$ "
pygments_style = "tango"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution", "attrs_inline"]
myst_heading_anchors = 3
myst_substitutions = {
    "repository": REPOSITORY,
    **{
        f"colab_{name}": f"[in Colab]({_COLAB}/blob/main/notebooks/{name}.ipynb)"
        for name in ("lightning_opd", "huggingface")
    },
}

# Docstrings name things of lopd in single backticks; those that do not exist are warnings (-n).
# Names of other packages are not looked up, which would need the network.
default_role = "py:obj"
nitpick_ignore_regex = [(r"py:.*", r"(?!lopd\.).*|.*\._\w+|.*\.NAME")]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "ignore-module-all": True,
}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["math_verify", "wandb"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
suppress_warnings = ["config.cache"]
