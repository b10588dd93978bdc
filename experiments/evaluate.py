"""Evaluates a run: `python -m metajax.run evaluate`."""

from metajax.run import main

if __name__ == "__main__":
    main("evaluate")
