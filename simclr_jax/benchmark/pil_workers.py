"""torchvision's operations on PIL images, by as many processes as one likes. It imports no JAX."""

import contextlib
from typing import Any, Self

import numpy as np

from simclr_jax.benchmark import apart, peers


class PilWorkers:
    """Processes that each take their share of the images, as PIL images in their memory, through torchvision.

    What they make stays with them: the way back to one process, which a data loader pays, is not in the
    time. Used as a context; at its end the processes end.
    """

    def __init__(self, count: int):
        """Starts `count` processes."""
        self._stack = contextlib.ExitStack()
        self._workers = [self._stack.enter_context(apart.Worker(__name__, "Share")) for _ in range(count)]

    def load(self, images: np.ndarray) -> None:
        """Gives each process its share of `images`, uint8 [N, S, S, 3], instead of what it had.

        The first time it takes seconds, as each imports PyTorch.
        """
        shares = np.array_split(images, len(self._workers))
        self._ask_all("load", [(share,) for share in shares])

    def run(self, name: str, blur_kernel: int) -> None:
        """Takes every image through the operation `name` once; returns when all processes are done.

        Raises:
          WorkerError: if a process failed.
        """
        self._ask_all("run", [(name, blur_kernel)] * len(self._workers))

    def _ask_all(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        for worker, given in zip(self._workers, arguments, strict=True):
            worker.send(method, *given)
        for worker in self._workers:
            worker.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: Any) -> None:
        self._stack.__exit__(*reason)


class Share:
    """What one of the processes has."""

    def __init__(self):
        """Nothing yet."""
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(1)
        self._images: list[Any] = []

    def load(self, images: np.ndarray) -> None:
        """Keeps images, uint8 [N, S, S, 3]."""
        from PIL import Image

        self._images = [Image.fromarray(image) for image in images]

    def run(self, name: str, blur_kernel: int) -> None:
        """Takes each image through the operation `name`."""
        if self._images:
            operation = peers.torchvision_operation(name, self._images[0].width, blur_kernel, pil=True)
            for image in self._images:
                operation(image)
