"""What every entry does around its work: flags, one-line errors, exit status."""

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import config_flags

from simclr_jax import kept_memory, paths
from simclr_jax.data.sources import cache_dir
from simclr_jax.errors import UserError, disk_trouble


def run(
    main: Callable[[], int],
    argv: Sequence[str],
    *,
    usage: str,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> int:
    """Parses the flags in `argv`, runs `main`, and returns the exit status.

    Args:
      main: the entry's work, once flags are parsed; returns its exit status.
      argv: the command line, program first.
      usage: printed for `--help`.
      flag_values: the entry's flags; its own, so that entries with flags of one name can be imported
        together.

    Returns:
      0; what `main` returns; 2 after a line `error: ...` for bad input; 130 after Ctrl-C.
    """
    if {"-h", "-help", "--help"} & set(argv[1:]):
        print(usage.strip())
        return 0
    # Orbax and TFDS have set up logging by now, and report through absl what no user can act on.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        _parse(argv, flag_values)
        _keep_compilations()
        kept_memory.by_jax()
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(error)
    except OSError as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        print(f"error: {reason}: {error}; put it right and run the same command again", file=sys.stderr)
        return _leave(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _leave(error: Exception) -> int:
    """Exit status 2; at once where the disk failed, as writers that flush at exit would fail once more."""
    if disk_trouble(error) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    return 2


def config_file(flag_values: flags.FlagValues) -> pathlib.Path:
    """The file that `--config` was given. Raises `UserError` where there is none."""
    flag = flag_values["config"]
    file = pathlib.Path(config_flags.get_config_filename(flag)) if flag.present else None
    if file is None or not file.is_file():
        missing = f"there is no {file}; " if file else ""
        raise UserError(f"{missing}name a recipe with --config, such as {', '.join(_recipes())}")
    return file


def _recipes() -> list[str]:
    """The configs in `configs/`, of the current folder or else of this checkout."""
    for folder in (pathlib.Path("configs"), pathlib.Path(__file__).parent.parent / "configs"):
        found = sorted(folder.glob("*.py"))
        if found:
            return [str(path) for path in found]
    return []


def _parse(argv: Sequence[str], flag_values: flags.FlagValues) -> None:
    try:
        rest = flag_values(argv)
        flags.FLAGS.mark_as_parsed()  # or what libraries read of their own would raise
    except (AttributeError, KeyError) as error:  # from ml_collections, with its suggestion
        text = str(error.args[0]).replace("\\n", "\n")  # quoted once or twice
        reason = ". ".join(text.translate({ord("'"): None, ord("\\"): None}).splitlines())
        raise UserError(f"no such key of the config: {reason}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"the config file does not run: {type(error).__name__}: {error}") from error
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; see --help")


def _keep_compilations() -> None:
    """Keeps compiled programs between runs, in the user's cache, unless JAX was told where or not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_dir() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if paths.is_remote(folder):
            # What XLA tried for a GPU would be kept too, by pathlib, in a folder "gs:" beside the run's.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
