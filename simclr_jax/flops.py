"""Floating-point operations of a program, counted in what JAX traced of it.

XLA is not asked: of a program that is not compiled the plugins for GPUs and TPUs tell nothing
(`Lowered.cost_analysis()` is None there, jax-ml/jax#22713), and of loops no plugin does.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives


def count(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of convolutions and products of matrices in `function`, two for each multiplication and addition.

    Sums, exponentials and the like are not counted: of a ResNet's step they are under 1 %. Of the forms
    that `jax.lax.platform_dependent` chooses between it is the last, that of accelerators; the body of a
    loop counts as often as it runs where that is known, and else once.

    Args:
      function: traced and not run.
      *arguments: trees of arrays or of their shapes.
    """
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    return _of(traced, traced.outvars)


def _of(jaxpr: Any, results: Sequence[Any]) -> int:
    """Of what `results` depend on: `jax.vjp` traces outputs, and gradients of images, that nobody wants."""
    total, wanted = 0, set(map(id, results))
    for equation in reversed(jaxpr.eqns):
        if wanted.isdisjoint(map(id, equation.outvars)):
            continue
        total += _of_equation(equation, [id(variable) in wanted for variable in equation.outvars])
        wanted |= set(map(id, equation.invars))
    return total


def _of_equation(equation: Any, wanted: list[bool]) -> int:
    shapes = [variable.aval.shape for variable in (*equation.invars[:2], *equation.outvars[:1])]
    if equation.primitive is primitives.dot_general_p:
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(shapes[2]) * math.prod(shapes[0][axis] for axis in contracted)
    if equation.primitive is primitives.conv_general_dilated_p:
        return _of_convolution(equation.params, *shapes)
    times, total = 1, 0
    if equation.primitive is primitives.scan_p:
        times = equation.params["length"]
    elif equation.primitive.name == "shard_map":  # the program of each device
        times = equation.params["mesh"].size
    for inner in inner_programs(equation):
        results = inner.outvars
        # What a loop carries its next round may need.
        if equation.primitive not in (primitives.scan_p, primitives.while_p) and len(results) == len(wanted):
            results = [variable for variable, needed in zip(results, wanted, strict=True) if needed]
        total += _of(inner, results)
    return times * total


def _of_convolution(
    params: dict[str, Any], lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> int:
    """Of the pixels that a kernel meets: neither those beside the map nor zeros between its pixels."""
    numbers = params["dimension_numbers"]
    batch, features, *spatial = numbers.out_spec
    total = 2 * out[batch] * out[features] * rhs[numbers.rhs_spec[1]]
    for i, axis in enumerate(spatial):
        places = np.arange(out[axis])[:, None] * params["window_strides"][i] - params["padding"][i][0]
        places = places + np.arange(rhs[numbers.rhs_spec[2 + i]]) * params["rhs_dilation"][i]
        apart, pixels = params["lhs_dilation"][i], lhs[numbers.lhs_spec[2 + i]]
        total *= int(((places >= 0) & (places % apart == 0) & (places // apart < pixels)).sum())
    return total


def inner_programs(equation: Any) -> Iterator[Any]:
    """The programs within an equation, such as the body of a loop; of a choice by platform the last."""
    for value in equation.params.values():
        value = value[-1] if isinstance(value, tuple) and value else value
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr
