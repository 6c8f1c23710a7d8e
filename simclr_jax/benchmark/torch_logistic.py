"""Logistic regression in PyTorch, as the UvA tutorial 17 writes it, and with L-BFGS. It imports no JAX."""

import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch.utils import data  # pyright: ignore[reportMissingImports]

from simclr_jax.benchmark import torch_threads

_EPOCHS, _BATCH = 100, 64


class _Fit:
    """What the two have in common."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, l2: float):
        """Of float32 features [N, F] and int64 labels [N]; `l2` as of `probe.fit`."""
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.features, self.labels, self.l2 = torch.from_numpy(features), torch.from_numpy(labels), l2
        self.model = nn.Linear(features.shape[1], int(labels.max()) + 1).to(self.device)
        self.threads = torch_threads.choose(self.trial)

    def time(self) -> float:
        """Seconds of a fit."""
        began = time.perf_counter()
        self.model = nn.Linear(self.model.in_features, self.model.out_features).to(self.device)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.fit()
        self.solution()  # which waits for the device
        return time.perf_counter() - began

    def solution(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights [F, C] and bias [C] of the last fit."""
        weight, bias = self.model.weight.detach(), self.model.bias.detach()
        return weight.cpu().numpy().T, bias.cpu().numpy()

    def fit(self) -> None:
        """Trains `model`, which is at zero."""
        raise NotImplementedError

    def trial(self) -> None:
        """What tells how many threads are fastest."""
        self.fit()


class Minibatches(_Fit):
    """AdamW on batches of 64, 100 epochs, the learning rate a tenth from 60 and from 80 on.

    Written after https://uvadlc-notebooks.readthedocs.io/en/latest/tutorial_notebooks/tutorial17/SimCLR.html.
    """

    def fit(self) -> None:
        """Its decay is another one than the penalty, so that it ends elsewhere."""
        self._train(_EPOCHS)

    def trial(self) -> None:
        """An epoch."""
        self._train(1)

    def _train(self, epochs: int) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 80], gamma=0.1)
        loader = data.DataLoader(data.TensorDataset(self.features, self.labels), _BATCH, shuffle=True)
        for _ in range(epochs):
            for features, labels in loader:
                loss = functional.cross_entropy(self.model(features.to(self.device)), labels.to(self.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()


class FullBatch(_Fit):
    """`torch.optim.LBFGS` on all rows at once, on the device, to the minimum of `probe.fit`."""

    def fit(self) -> None:
        """Until the gradient is as good as zero in float32."""
        features, labels = self.features.to(self.device), self.labels.to(self.device)
        optimizer = torch.optim.LBFGS(
            self.model.parameters(),
            max_iter=500,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = self.l2 / 2 * self.model.weight.square().sum()
            loss = functional.cross_entropy(self.model(features), labels) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
