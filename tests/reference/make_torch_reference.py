"""Writes the reference values that the tests compare with, from PyTorch and torchvision.

Run by hand, in an environment with torch, torchvision and numpy (made with torch 2.13.0 and
torchvision 0.29.2, on the CPU):

    python tests/reference/make_torch_reference.py

Weights and inputs are not stored: both sides draw them with `draw`, by name.
"""

# pyright: reportMissingImports=false

import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

RESNETS = {"resnet18_imagenet": (18, "imagenet", 64), "resnet50_cifar": (50, "cifar", 16)}
BATCH = 4


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32, which depend on the name and the shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter or a statistic of a ResNet, by its torchvision name, in PyTorch's layout."""
    values = draw(name, shape)
    if name.endswith("running_var"):
        return np.exp(0.2 * values)
    if len(shape) > 1:
        return values * np.float32((2 / (shape[0] * np.prod(shape[2:]))) ** 0.5)
    return 0.1 * values + np.float32(name.endswith("weight"))


def resnet_reference(name: str) -> dict[str, np.ndarray]:
    """h in evaluation and in training mode, and the statistics after that one training step."""
    import torch
    import torchvision

    depth, stem, pixels = RESNETS[name]
    model = getattr(torchvision.models, f"resnet{depth}")()
    model.fc = torch.nn.Identity()
    if stem == "cifar":
        model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = torch.nn.Identity()
    state = {
        key: torch.from_numpy(draw_weight(key, tuple(value.shape)))
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    images = torch.from_numpy(draw(name, (BATCH, pixels, pixels, 3)).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        evaluated = model.eval()(images).numpy()
        trained = model.train()(images).numpy()
    # bn1 sees the largest batch and the last stage the smallest, where the unbiased variance, which
    # PyTorch keeps, differs most from the biased one.
    stats = {
        key: value.numpy()
        for key, value in model.state_dict().items()
        if "running" in key and (key.startswith("bn1") or key.startswith("layer4.0.bn1"))
    }
    return {"h_eval": evaluated, "h_train": trained, **stats}


def state_dict_reference() -> dict[str, np.ndarray]:
    """Names and shapes of torchvision's models, lines such as "bn1.weight 64" in its order."""
    import torchvision

    found = {}
    for name in ("resnet18", "resnet50"):
        state = getattr(torchvision.models, name)().state_dict()
        found[name] = np.array([" ".join([key, *map(str, value.shape)]) for key, value in state.items()])
    return found


def nt_xent_reference(temperature: float) -> dict[str, np.ndarray]:
    """Loss and gradient in the cross-entropy form: logits without the diagonal, labels i + B."""
    import torch

    z = torch.from_numpy(draw("nt_xent", (12, 8))).requires_grad_()
    unit = torch.nn.functional.normalize(z, dim=1)
    logits = (unit @ unit.T / temperature).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(12).roll(6))
    loss.backward()
    return {"loss": loss.detach().numpy(), "gradient": z.grad.numpy()}


def optimizer_reference(name: str) -> dict[str, np.ndarray]:
    """A kernel and a bias after five steps with drawn gradients and a changing learning rate."""
    import torch

    kernel = torch.nn.Parameter(torch.from_numpy(draw("kernel", (3, 4))))
    bias = torch.nn.Parameter(torch.from_numpy(draw("bias", (4,))))
    groups = [{"params": [kernel], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        kernel.grad = torch.from_numpy(draw(f"kernel gradient {step}", (3, 4)))
        bias.grad = torch.from_numpy(draw(f"bias gradient {step}", (4,)))
        optimizer.step()
    return {"kernel": kernel.detach().numpy(), "bias": bias.detach().numpy()}


def main() -> None:
    """Write every file, beside this one."""
    for name in RESNETS:
        np.savez_compressed(HERE / f"{name}.npz", allow_pickle=False, **resnet_reference(name))
    np.savez_compressed(HERE / "state_dict.npz", allow_pickle=False, **state_dict_reference())
    for temperature in (0.1, 0.5):
        np.savez_compressed(
            HERE / f"nt_xent_{temperature}.npz", allow_pickle=False, **nt_xent_reference(temperature)
        )
    for name in ("sgd", "adamw"):
        np.savez_compressed(HERE / f"{name}.npz", allow_pickle=False, **optimizer_reference(name))


if __name__ == "__main__":
    main()
