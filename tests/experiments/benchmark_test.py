"""The benchmarks that the documentation names are there; what they measure is no test."""

import re

from experiments import benchmark


def test_every_benchmark_that_is_documented_can_be_named(launch):
    documented = re.findall(r"experiments\.benchmark (\w+)", benchmark.__doc__)
    done = launch("benchmark", "nothing")
    assert done.returncode != 0
    assert f"name one benchmark of {', '.join(documented)}, got ['nothing']" in done.stdout + done.stderr
