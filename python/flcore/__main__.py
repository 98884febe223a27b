"""`flcore` and `python -m flcore`: train, bench and info."""

from __future__ import annotations

import importlib.util
import sys

from flcore import cli
from flcore._info import report

__all__ = ["main"]


def main() -> None:
    """Run the command line; `flcore info` needs nothing beyond NumPy."""
    if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
        cli.application()()
    elif sys.argv[1:2] == ["info"]:
        print(report())
    else:
        sys.exit("flcore: the command line needs typer and rich: pip install 'flcore[cli]'")


if __name__ == "__main__":
    main()
