"""Measures the package: `python -m simclr_jax.benchmark NAME [--FLAG=VALUE ...]`.

    augment    images/s of the views and of each operation, beside dm-pix, torchvision and Kornia
    train      images/s of the training step, beside PyTorch with torchvision and with Kornia
    neighbors  seconds and memory of the search for nearest neighbours, beside scikit-learn and faiss
    memory     of the contrastive loss and of the training step: plain, tiled, in microbatches
    accuracy   minutes from the first image to an accuracy of the 10-NN
    compile    the training step for a GPU or TPU, on a machine without one: whether it fits

`python -m simclr_jax.benchmark NAME --help` lists the flags.
"""

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = ("augment", "train", "neighbors", "compile", "memory", "accuracy")


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that `argv[1]` names with the flags after it.

    Returns:
      Its exit status; 2 after a line that lists the names where there is none such.
    """
    name = argv[1] if len(argv) > 1 else ""
    if name in ("-h", "-help", "--help"):
        print((__doc__ or "").strip())
        return 0
    if name not in BENCHMARKS:
        problem = f"there is no benchmark {name!r}; " if name else ""
        print(f"error: {problem}name one of: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    benchmark = importlib.import_module(f"simclr_jax.benchmark.{name}")
    from simclr_jax import command
    from simclr_jax.benchmark import recipes

    arguments = [argv[0], *argv[2:]]
    if hasattr(benchmark, "RECIPE"):
        arguments = recipes.with_default(arguments, benchmark.RECIPE)
    return command.run(benchmark.main, arguments, usage=benchmark.__doc__ or "", flag_values=benchmark.FLAGS)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
