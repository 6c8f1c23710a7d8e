"""A recipe's network, loss and optimizer in PyTorch, as its users write them. It imports no JAX."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from simclr_jax.benchmark import peers
from simclr_jax.benchmark.task import Task

# Of torchvision's ResNets, by depth; 10 is ours, for tests.
_LAYOUTS = {
    10: ("BasicBlock", (1, 1, 1, 1)),
    18: ("BasicBlock", (2, 2, 2, 2)),
    34: ("BasicBlock", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
}


class Network(nn.Module):
    """An encoder of torchvision, and the projection head or classifier on it."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images [N, 3, H, W] to projections or logits [N, D]."""
        return self.head(self.encoder(images))


def build_network(task: Task) -> Network:
    """The network with PyTorch's initial weights, the last scale of each block at zero as in ours.

    Raises:
      ValueError: for what torchvision's ResNets do not have.
    """
    model = task.config["model"]
    plain = {"width": 1, "norm": "batch", "attention": "none"}
    for name, value in plain.items():
        if model[name] != value:
            raise ValueError(f"model.{name} is {model[name]!r}; torchvision's ResNets have {value!r}")
    if model["depth"] not in _LAYOUTS or model["stem"] not in ("imagenet", "cifar"):
        raise ValueError(f"there is no ResNet-{model['depth']} with stem {model['stem']!r} in torchvision")
    peers.import_torchvision()
    resnet = importlib.import_module("torchvision.models.resnet")
    block, layers = _LAYOUTS[model["depth"]]
    encoder = resnet.ResNet(getattr(resnet, block), layers, zero_init_residual=True)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if model["stem"] == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    if task.classes:
        head: nn.Module = nn.Linear(features, task.classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    else:
        head = _projection_head(features, model)
    return Network(encoder, head)


def _projection_head(features: int, model: Mapping[str, Any]) -> nn.Module:
    """`simclr.ProjectionHead`: a linear layer has a bias where no BatchNorm follows it."""
    layers = model["head_layers"]
    normed = {"none": 0, "hidden": layers - 1, "all": layers}[model["head_norm"]]
    widths = [features, *[model["head_hidden"]] * (layers - 1), model["head_out"]]
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.ReLU()] if i else []
        modules.append(nn.Linear(widths[i], widths[i + 1], bias=i >= normed))
        if i < normed:
            norm = nn.BatchNorm1d(widths[i + 1])
            norm.bias.requires_grad_(i + 1 < layers)  # the last has a scale, and its offset stays 0
            modules.append(norm)
    return nn.Sequential(*modules)


def nt_xent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent of the projections [2 * B, D] of B images, the first views of all before the second ones."""
    z = functional.normalize(z.float(), dim=1)
    similarities = (z @ z.T / temperature).masked_fill(
        torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf
    )
    partners = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return functional.cross_entropy(similarities, partners)


def build_loss(task: Task) -> Callable[[Network, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]:
    """(network, views, labels [B]) to the loss, a scalar; views are arrays [B, 3, S, S], one of each image.

    Raises:
      ValueError: for a loss or a number of views that PyTorch's side does not have.
    """
    config = task.config
    separate, temperature = config["model"]["passes"] == "separate", config["loss"]["temperature"]
    if task.classes:
        return lambda network, views, labels: functional.cross_entropy(network(views[0]).float(), labels)
    if config["loss"]["name"] != "nt_xent" or config["views"]["count"] != 2:
        raise ValueError("PyTorch's side has the loss nt_xent of two views")

    def contrastive(network: Network, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        z = torch.cat([network(images) for images in views]) if separate else network(torch.cat([*views]))
        with torch.autocast(z.device.type, enabled=False):
            return nt_xent(z, temperature)

    return contrastive


def build_optimizer(task: Task, network: Network, *, fused: bool) -> torch.optim.Optimizer:
    """SGD or AdamW with the recipe's decay, on all parameters or on those with more than one axis.

    Not `fused` it is as PyTorch has it by default, which its own `fused=False` is not: on a GPU a few
    operations for all parameters together.

    Raises:
      ValueError: for another optimizer.
    """
    chosen = task.config["optimizer"]
    decaying: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            decays = chosen["decay"] == "all" or parameter.ndim > 1
            (decaying if decays else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": chosen["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    rate, momentum = task.learning_rate, chosen["momentum"]
    match chosen["name"]:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, fused=fused or None)
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=(momentum, 0.999), fused=fused or None)
    raise ValueError(f"optimizer.name is {chosen['name']!r}; PyTorch's side has sgd and adamw")


def build_schedule(task: Task, optimizer: torch.optim.Optimizer) -> Any:
    """The cosine of the recipe; its `step` comes after the optimizer's."""
    least = task.config["optimizer"]["final_fraction"] * task.learning_rate
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.total_steps, least)
