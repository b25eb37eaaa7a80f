"""Command line: `python -m lopd.report WORKDIR [WORKDIR2 ...]`."""

import argparse
import sys

from lopd import report
from lopd.errors import UserError
from lopd.machine import shutdown


def main() -> None:
    """Writes the report of a run, or the comparison of several, and says where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m lopd.report",
        description="One HTML page of a run: WORKDIR/report.html. Of several runs, a comparison: "
        "comparison.html in the first.",
    )
    parser.add_argument("workdir", nargs="+", help="the --workdir of a run")
    try:
        print(report.write_report(parser.parse_args().workdir))
    except (UserError, OSError) as error:
        print(f"lopd: error: {error}", file=sys.stderr)
        sys.exit(shutdown.EXIT_ERROR)


if __name__ == "__main__":
    main()
