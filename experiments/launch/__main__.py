"""`python -m experiments.launch`."""

from experiments import _launch, launch

if __name__ == "__main__":
    _launch.run(launch.main)
