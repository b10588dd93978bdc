"""Meta-trains a learner: `python -m metajax.run train`, with a default config."""

import pathlib

from metajax.run import main

if __name__ == "__main__":
    main("train", default=pathlib.Path(__file__).parent / "configs" / "prototypical_glyphs.py")
