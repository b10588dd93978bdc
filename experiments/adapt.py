"""Adapts a run to files of examples: `python -m metajax.run adapt`."""

from metajax.run import main

if __name__ == "__main__":
    main("adapt")
