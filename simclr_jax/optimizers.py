"""The optimizers of the published SimCLR recipes, by name."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

NAMES = ("lars", "sgd", "adamw")
DECAYS = ("kernels", "all")


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    momentum: float = 0.9,
    decay: str = "kernels",
    trust_coefficient: float = 1e-3,
    rates: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """Build the gradient transformation for a tree of parameters.

    Kernels are the parameters with more than one axis; biases and the scales and offsets of
    normalisation layers have one.

    Args:
      name: "lars" (You et al. 2017, arXiv:1708.03888), as google-research/simclr runs it: the
        learning rate is inside the momentum, and only kernels get a trust ratio, but not that of a
        `classifier`. "sgd": as torch.optim.SGD, weight decay joins the gradient before the momentum.
        "adamw": as torch.optim.AdamW, `momentum` being its β₁; β₂ = 0.999, ε = 1e-8.
      learning_rate: a number or a schedule of the step.
      weight_decay: its coefficient; it is not multiplied into the learning rate beforehand.
      momentum: decay rate of the average of gradients.
      decay: which parameters decay, "kernels" or "all".
      trust_coefficient: η of LARS; the others do not use it.
      rates: by the first name of a parameter's path, what its learning rate is multiplied with; 0 leaves
        the parameter as it is, to the bit. Where absent, 1.

    Raises:
      ValueError: for an unknown name or decay.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay is {decay!r}; expected one of {', '.join(DECAYS)}")
    decay_mask = _kernels if decay == "kernels" else _all
    optimizer = _of_name(name, learning_rate, weight_decay, momentum, decay_mask, trust_coefficient)
    return optax.chain(optimizer, _multiply(rates)) if rates else optimizer


def _of_name(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    momentum: float,
    decay_mask: Any,
    trust_coefficient: float,
) -> optax.GradientTransformation:
    match name:
        case "lars":
            return optax.lars(
                learning_rate,
                weight_decay=weight_decay,
                weight_decay_mask=decay_mask,
                trust_coefficient=trust_coefficient,
                trust_ratio_mask=_trusted,
                momentum=momentum,
            )
        case "sgd":
            return optax.chain(
                optax.add_decayed_weights(weight_decay, decay_mask),
                optax.sgd(learning_rate, momentum),
            )
        case "adamw":
            return optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask)
    raise ValueError(f"name is {name!r}; expected one of {', '.join(NAMES)}")


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _trusted(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and _first_name(path) != "classifier", params
    )


def _multiply(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Of every optimizer here the last step is linear in the learning rate, so this multiplies it."""

    def multiply(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree_util.tree_map_with_path(
            lambda path, update: rates.get(_first_name(path), 1.0) * update, updates
        )

    return optax.stateless(multiply)


def _first_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path[:1], simple=True)


def _all(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda _: True, params)
