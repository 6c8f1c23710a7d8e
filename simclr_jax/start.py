"""What the weights of a run begin as: a pretrained run, a file of weights, or what its seed draws."""

from typing import Any

import numpy as np
from flax import nnx

from simclr_jax import evaluation, paths, probe, recipe, runs, torchvision_weights, training
from simclr_jax.classifier import Classifier
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.simclr import SimCLR


def start_model(config: Config, *, fresh: bool = True) -> SimCLR:
    """The encoder and projection head that `config.start` asks for.

    A run gives its encoder, and where they are used its head too; a file gives the encoder. The rest is drawn
    from the seed, and all of it where the run is not `fresh`, as its checkpoint then has the weights. Raises
    `UserError` naming the first parameter that differs from the config's model.
    """
    model = recipe.build_model(config)
    start = config.start
    if not fresh or not (start.run or start.weights):
        return model
    params, batch_stats = training.weights(model)
    if start.run:
        run = runs.open_run(paths.parse(start.run))
        uses_head = config.stage == "pretrain" or config.classifier.head_layer > 0
        modules = ("encoder", "head") if uses_head else ("encoder",)
        loaded = run.weights(run.steps[-1], (_only(params, modules), _only(batch_stats, modules)))
    else:
        try:
            loaded = torchvision_weights.from_torchvision(
                torchvision_weights.read(paths.parse(start.weights)),
                params["encoder"],
                batch_stats.get("encoder", {}),
            )
        except ValueError as error:
            raise UserError(f"config.start.weights={start.weights}: {error}") from error
        loaded = [{"encoder": tree} for tree in loaded]
    params, batch_stats = ({**old, **new} for old, new in zip((params, batch_stats), loaded, strict=True))
    graphdef, _, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.merge(graphdef, params, batch_stats)


def _only(tree: Any, modules: tuple[str, ...]) -> dict[str, Any]:
    return {name: tree.get(name, {}) for name in modules}


def start_at_probe(config: Config, model: Classifier, images: Pack) -> None:
    """Sets the classifier of `model` to the linear probe of its features on labelled `images`.

    The images are seen as in evaluation, and the penalty is the probe's own choice (Kumar et al. 2022,
    arXiv:2202.10054, on why few labels distort features less from there). Raises `UserError` where a class
    has too few images for it.
    """
    if np.bincount(images.label).min() < 2:
        raise UserError(
            "config.classifier.start is 'probe', which needs two labelled images of each class, as some "
            "choose its penalty; set config.labels.per_class=2 or more, or config.classifier.start='zeros'"
        )
    encode = recipe.build_inference(model, Classifier.features)(*training.weights(model))
    views = recipe.clean_views(config, recipe.view_size(config))
    features = evaluation.embed(encode, images, views, batch_size=config.evaluation.batch_size)
    classes = len(images.class_names)
    rows = features, images.label
    (found,) = probe.linear_probe(*rows, *rows, classes=classes, seeds=[config.labels.seed])
    fitted = probe.fit(*rows, classes=classes, l2=found.l2)
    kernel = np.asarray(fitted.weights / fitted.std[:, None])
    assert model.classifier.bias is not None
    model.classifier.kernel[...] = kernel
    model.classifier.bias[...] = np.asarray(fitted.bias) - np.asarray(fitted.mean) @ kernel
