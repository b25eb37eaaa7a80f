"""Command line: `python -m lopd.report WORKDIR [WORKDIR2 ...]`."""

import lopd.interrupts  # noqa: F401  # isort: skip

import argparse

from lopd import cli, report


def main() -> None:
    """Writes the report of a run, or the comparison of several, and says where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m lopd.report",
        description="One HTML page of a run: WORKDIR/report.html. Of several runs, a comparison: "
        "comparison.html in the first.",
    )
    parser.add_argument("workdir", nargs="+", type=cli.path_argument, help="the --workdir of a run")
    with cli.one_line_errors():
        print(report.write_report(parser.parse_args().workdir))


if __name__ == "__main__":
    with cli.door(answers=True):
        main()
