"""`python -m part_fast.gpu`: build for the card that is there, check everything, time everything, report.

It needs no command-line package, so that it runs where only torch is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from part_fast.errors import UsageError
from part_fast.gpu import battery


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parts = ", ".join(battery.PARTS)
    flags = argparse.ArgumentParser(
        prog="python -m part_fast.gpu",
        description="Build part_fast for the GPU that is there, check every op and attack on it, time them, and leave "
        "report.md, results.jsonl and CSV files in a folder.",
    )
    flags.add_argument("--minutes", type=float, default=9.0, help="for everything; default 9")
    flags.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder; default runs/gpu")
    flags.add_argument("--only", default="", help=f"parts, separated by commas: {parts}; default: all but poster")
    flags.add_argument("--dry-run", action="store_true", help="everything tiny on a CPU; what needs CUDA is skipped")
    flags.add_argument("--models", default="resnet18,wrn-34-10", help="of the steps that are timed, by commas")
    flags.add_argument("--data", type=Path, help="poster: the folder of CIFAR-10")
    flags.add_argument("--methods", default="at,part", help="poster: rows to train, side by side")
    flags.add_argument("--runs", type=Path, default=Path("runs/poster"), help="poster: the folder of its runs")
    flags.add_argument("--device", help="default: cuda, on a dry run cpu")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code: 0, 1 where something failed, 2 for bad input."""
    args = parser().parse_args(arguments)
    try:
        settings = battery.default_settings(
            args.device,
            args.dry_run,
            out=args.out,
            minutes=args.minutes,
            models=tuple(_names(args.models)),
            methods=tuple(_names(args.methods)),
            data=args.data,
            runs=args.runs,
        )
        return battery.run(settings, _names(args.only))
    except UsageError as error:
        print(f"part_fast.gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
