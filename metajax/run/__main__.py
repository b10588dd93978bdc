"""`python -m metajax.run train|evaluate|adapt|plan FLAGS`."""

import sys

from metajax.run import main

if __name__ == "__main__":
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    try:
        main(command)
    except ValueError as error:
        sys.exit(f"error: {error}")
