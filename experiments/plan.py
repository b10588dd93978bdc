"""Plans a run for devices that need not be present: `python -m metajax.run plan`, with a default config."""

import pathlib

from metajax.run import main

if __name__ == "__main__":
    main("plan", default=pathlib.Path(__file__).parent / "configs" / "prototypical_glyphs.py")
