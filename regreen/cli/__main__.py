"""`python -m regreen.cli`, and the `regreen` program: the command line, whatever interrupts it.

- An interrupt while the modules are still being loaded ends it as quietly as any later one.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from regreen.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
