"""`python -m lopd.cache COMMAND`: look after finished caches. Errors are one line, exit code 2.

Commands::

    verify DIR             every file against the manifest, every record against the schema; also
                           of a worker's part, before it is merged
    summary DIR            lengths, log-probabilities, teacher against π_ref, by position
    show DIR               records as text, with each token's advantage
    merge OUT PART...      joins what workers made (lopd.main --worker=i/N)
    to-parquet DIR FILE    a cache as one Parquet file
    from-parquet FILE DIR  and back
    import-released FILE DIR --config=C [--config.key=value...]
                           the Parquet of the authors' released code as a cache for opd.cache
"""

import lopd.interrupts  # noqa: F401  # isort: skip

import argparse
import os
import sys

from absl import logging

from lopd import cli
from lopd.errors import UserError
from lopd.machine import lock
from lopd.machine.storage import absolute


def _verify(args: argparse.Namespace) -> None:
    from lopd.cache import reader

    artefact = reader.open_cache(args.dir)
    count = reader.verify_records(artefact)
    what = f"{count} records in {len(artefact.manifest.shards)} shards"
    if artefact.manifest.worker:
        what = "part {}/{} of a cache, {}".format(*artefact.manifest.worker, what)
    print(f"{artefact.path}: {what}, all right")


def _summary(args: argparse.Namespace) -> None:
    from lopd.cache import reader, summary

    print(summary.summarize(reader.open_cache(args.dir)))


def _show(args: argparse.Namespace) -> None:
    from lopd.cache import reader, summary
    from lopd.checkpoints import hugging_face
    from lopd.data.tokenizers import load_tokenizer

    artefact = reader.open_cache(args.dir)
    source = args.tokenizer or artefact.outputs.get("tokenizer")
    if not source:
        raise UserError(f"{artefact.path} does not say which tokenizer it is of: give --tokenizer")
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        tokenizer = load_tokenizer(hugging_face.resolve_checkpoint(source))
    made_with = artefact.manifest.settings.get("tokenizer")
    if tokenizer.fingerprint != made_with:
        raise UserError(
            f"tokenizer {source} has fingerprint {tokenizer.fingerprint}, {artefact.path} was made "
            f"with {made_with}: give that one with --tokenizer"
        )
    records = reader.Records(artefact)
    if not 0 <= args.record < len(records):
        raise UserError(f"--record={args.record}: {artefact.path} holds {len(records)} records")
    for i in range(args.record, min(args.record + args.count, len(records))):
        print(summary.show_record(records[i], tokenizer, colour=sys.stdout.isatty()))


def _merge(args: argparse.Namespace) -> None:
    from lopd.cache import merge

    with lock.held(absolute(args.out)):
        artefact = merge.merge(args.out, args.parts)
    print(f"{artefact.path}: {artefact.outputs['responses']} responses")


def _to_parquet(args: argparse.Namespace) -> None:
    from lopd.cache import parquet, reader

    parquet.to_parquet(reader.open_cache(args.dir), absolute(args.file))


def _from_parquet(args: argparse.Namespace) -> None:
    from lopd.cache import parquet

    with lock.held(absolute(args.dir)):
        parquet.from_parquet(absolute(args.file), args.dir)


def _import_released(args: argparse.Namespace) -> None:
    from lopd.stages import released

    cli.parse_flags(["lopd.cache", *args.settings])
    if cli.CONFIG.value is None:
        raise UserError("import-released needs --config=FILE, as lopd.main does")
    with lock.held(absolute(args.dir)):
        print(released.import_file(cli.settings(), args.file, args.dir))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m lopd.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, *names: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, allow_abbrev=False)
        for argument in names:
            sub.add_argument(argument, type=cli.path_argument)
        sub.set_defaults(run=run)
        return sub

    command("verify", _verify, "dir")
    command("summary", _summary, "dir")
    show = command("show", _show, "dir")
    show.add_argument("--record", type=int, default=0, help="the first to show")
    show.add_argument("--count", type=int, default=1, help="how many")
    show.add_argument(
        "--tokenizer",
        default="",
        type=os.path.expanduser,
        help="instead of the one the manifest names",
    )
    merge = command("merge", _merge, "out")
    merge.add_argument("parts", nargs="+", type=cli.path_argument)
    command("to-parquet", _to_parquet, "dir", "file")
    command("from-parquet", _from_parquet, "file", "dir")
    command("import-released", _import_released, "file", "dir")
    return parser


def main() -> None:
    """Runs one command."""
    logging.set_verbosity(logging.WARNING)
    with cli.one_line_errors():
        args, settings = _parser().parse_known_args()
        if settings and args.command != "import-released":
            _parser().error(f"unrecognized arguments: {' '.join(settings)}")
        args.settings = settings
        args.run(args)


if __name__ == "__main__":
    with cli.door(answers=True):
        main()
