"""Downloads and prepares a TFDS data set, once: `python -m simclr_jax.prepare NAME`.

Written as array_record, which everything else here reads without TensorFlow.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from simclr_jax.data.sources import ARRAY_RECORD, SHAPES, prepare_command, prepared_folder, tfds_dir
from simclr_jax.errors import UserError


def prepare(dataset: str, data_dir: str | None = None) -> str:
    """Prepares `dataset` (`name` or `name/config`) unless it is, and says in a line what was done.

    Args:
        dataset: its TFDS name, with a config if it is not the default one.
        data_dir: the TFDS folder; default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
        UserError: if TFDS knows no such data set, it is there in another format, TensorFlow is
            missing, or TFDS fails.
    """
    import tensorflow_datasets as tfds

    root = tfds_dir(dataset, data_dir)
    folder = prepared_folder(dataset, root)
    if folder is not None:
        info = tfds.builder_from_directory(folder).info
        formats = {file_format.value for file_format in info.available_file_formats()}
        if ARRAY_RECORD in formats:
            return f"{dataset} is already prepared in {folder}"
        # TFDS takes any finished folder for done, and its converter needs Apache Beam.
        raise UserError(
            f"{dataset} is prepared in {folder} as {', '.join(sorted(formats))}; "
            "delete that folder or give another --data_dir"
        )
    if not isinstance(root, pathlib.Path):
        raise UserError(f"TFDS cannot write to {root}; run: {prepare_command(dataset, data_dir)}")
    try:
        if dataset == SHAPES:
            from simclr_jax.data.shapes import prepare_shapes

            prepare_shapes(root)
        else:
            builder = tfds.builder(dataset, data_dir=root)
            builder.download_and_prepare(file_format=ARRAY_RECORD)
    except Exception as error:  # TFDS, its builders and the network raise nearly any type
        if isinstance(error, ImportError) and "tensorflow" in str(error).lower():
            raise UserError(
                f"preparing {dataset} needs TensorFlow; run: pip install 'simclr_jax[prepare]'"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot prepare {dataset} in {root}: {reason}") from error
    return f"{dataset} is prepared in {prepared_folder(dataset, root)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m simclr_jax.prepare",
        description="Downloads and prepares a TFDS data set, once, as array_record.",
    )
    parser.add_argument("name", metavar="NAME", help="e.g. cifar10 or imagenette/320px-v2")
    parser.add_argument("--data_dir", metavar="DIR", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    chosen = parser.parse_args(arguments)
    try:
        print(prepare(chosen.name, chosen.data_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
