"""Memory that a command's programs take is mapped once."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from absl import flags
from simclr_jax import command

def main():
    # The product is 160 MB, 40,000 pages, and not kept apart: without the barrier it would be none at all.
    rows = jax.jit(lambda x: jax.lax.optimization_barrier(x[:, None] * jnp.arange(400.0)).sum())
    x = jnp.ones(100_000)
    rows(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        rows(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0

sys.exit(command.run(main, ["program"], usage="", flag_values=flags.FlagValues()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_a_command_maps_what_its_programs_take_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2_000
