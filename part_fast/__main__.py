"""`part-fast`, and `python -m part_fast`, which is the same."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process; the exit code.

    `part-fast info` says what an installation lacks, so that it alone runs without the package that parses the others.
    """
    try:
        from part_fast.cli import main as run
    except ImportError as error:
        if error.name != "tyro":
            raise
        if sys.argv[1:] == ["info"]:
            from part_fast.report.environment import environment, environment_text

            print(environment_text(environment()))
            return 0
        print(f"part-fast: error: {error}", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
