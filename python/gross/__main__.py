"""The ``gross`` command, which is also ``python -m gross``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; without the optional libraries that it needs, say which and exit with 1."""
    try:
        from .cli import app
    except ImportError as error:
        sys.exit(f"error: {error}")
    app(prog_name="gross")


if __name__ == "__main__":
    main()
