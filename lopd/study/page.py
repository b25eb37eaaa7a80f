"""The page of a study: every section's text, figure and tables, in one file."""

from etils import epath
from markupsafe import Markup

from lopd.report.page import environment
from lopd.study.design import Study
from lopd.study.figures import draw
from lopd.study.table import Results, tables

_LOPD = epath.resource_path("lopd")


def render(study: Study, results: Results, about: dict) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNG of every figure by its section's name."""
    sections, images = [], {}
    for section in study.sections:
        found = tables(section, results)
        figure = draw(section, results)
        if figure:
            images[section.name] = figure[0]
        if found:
            shown = {"section": section, "figure": figure and figure[1], "tables": found}
            sections.append(shown)
    css = (_LOPD / "report" / "page.css").read_text()
    template = environment(_LOPD / "study").get_template("page.html.j2")
    return template.render(css=Markup(css), sections=sections, about=about), images
