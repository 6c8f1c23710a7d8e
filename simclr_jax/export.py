"""Writes the encoder of a run to a file that PyTorch reads, with torchvision's names.

    python -m simclr_jax.export --workdir RUN --out resnet18.safetensors [--step N]

    --workdir=RUN   folder of a run, finished or not
    --out=FILE      safetensors, for torchvision's ResNets; what to build is printed, and in its metadata
    --step=N        one of the kept checkpoints; default: the last

In PyTorch:

    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(safetensors.torch.load_file("resnet18.safetensors"))
"""

import json
import sys
from typing import Any

import jax
import optax
from absl import flags
from flax import nnx

from simclr_jax import command, paths, recipe, torchvision_weights, training
from simclr_jax.config import Config
from simclr_jax.errors import UserError
from simclr_jax.logs import say
from simclr_jax.runs import Run, open_run

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "File to write.", flag_values=_FLAGS)
_STEP = flags.DEFINE_integer("step", None, "Of a kept checkpoint; default: the last.", flag_values=_FLAGS)

# Depths that torchvision has blocks for but no function.
_UNNAMED = {10: "resnet.ResNet(BasicBlock, [1, 1, 1, 1])", 200: "resnet.ResNet(Bottleneck, [3, 24, 36, 3])"}


def encoder_weights(run: Run, step: int) -> tuple[Any, Any]:
    """Parameters and running statistics of the encoder of a run of any stage, from a checkpoint.

    Raises `UserError` where they cannot be read.
    """
    model = nnx.eval_shape(lambda: recipe.build_model(run.settings))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), training.weights(model)
    )
    # Under GroupNorm the encoder has no statistics.
    params, batch_stats = ({"encoder": tree["encoder"]} if "encoder" in tree else {} for tree in like)
    params, batch_stats = run.weights(step, (params, batch_stats))
    return params["encoder"], batch_stats.get("encoder", {})


def building(settings: Config) -> str:
    """What to build in PyTorch for the encoder of a checked config, in words."""
    model = settings.model
    text = f"torchvision.models.{_UNNAMED.get(model.depth, f'resnet{model.depth}()')} without fc"
    if model.stem == "cifar":
        text += " and maxpool, conv1 3x3 with stride 1"
    if model.norm == "group":
        text += ", norm_layer GroupNorm of gcd(32, channels) groups"
    if model.width != 1:
        text += f", all channels times {model.width:g} in multiples of 8"
    return text


def metadata(run: Run, step: int) -> dict[str, str]:
    """What whoever loads the encoder of a run has to know, as text by name; lists as JSON."""
    model, views = run.settings.model, run.settings.views
    return {
        "depth": str(model.depth),
        "width": f"{model.width:g}",
        "stem": model.stem,
        "norm": model.norm,
        "build": building(run.settings),
        "mean": json.dumps(views.mean),
        "std": json.dumps(views.std),
        "view_size": str(views.size),
        "run": paths.absolute(run.workdir).name,
        "step": str(step),
    }


def main() -> int:
    """Runs the command line; returns the exit status."""
    if not _WORKDIR.value:
        raise UserError("name a run with --workdir")
    if not _OUT.value:
        raise UserError("name the file to write with --out, such as --out encoder.safetensors")
    workdir, out = paths.parse(_WORKDIR.value), paths.parse(_OUT.value)
    if out.is_dir():
        raise UserError(f"--out is {out}, a folder; name a file such as {out / 'encoder.safetensors'}")
    if not (paths.is_remote(out) or out.parent.is_dir()):
        raise UserError(f"--out is {out}; there is no folder {out.parent}")
    run = open_run(workdir)
    step = run.steps[-1] if _STEP.value is None else _STEP.value
    if step not in run.steps:
        kept = ", ".join(map(str, run.steps))
        raise UserError(f"--step is {step}; the checkpoints kept in {workdir} are of steps {kept}")

    params, batch_stats = encoder_weights(run, step)
    try:
        tensors = torchvision_weights.to_torchvision(params, batch_stats)
    except ValueError as error:
        raise UserError(
            f"the encoder of {workdir} cannot be written: {error}; name a run whose config.model.stem is "
            "'imagenet' or 'cifar' and config.model.attention 'none'"
        ) from error
    facts = metadata(run, step)
    torchvision_weights.write(out, tensors, facts)
    count = optax.tree.size(params)
    say(
        f"wrote {out}: {count:,} parameters of step {step}, for {facts['build']}; "
        f"normalise pixels in [0, 1] with mean {facts['mean']} and std {facts['std']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, usage=__doc__ or "", flag_values=_FLAGS))
