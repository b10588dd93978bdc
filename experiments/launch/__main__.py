"""`python -m experiments.launch`."""

from experiments import launch
from metajax import run

if __name__ == "__main__":
    run.launch(launch.main)
