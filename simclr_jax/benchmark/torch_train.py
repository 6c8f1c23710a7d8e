"""SimCLR's training step in PyTorch, twice: as people write it, and as an expert would. It imports no JAX."""

import functools
import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch._dynamo.exc import TorchDynamoException  # pyright: ignore[reportMissingImports]
from torch._inductor import config as inductor  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch.utils import data  # pyright: ignore[reportMissingImports]

from simclr_jax import kept_memory
from simclr_jax.benchmark import apart, peak, peers, torch_model, torch_threads
from simclr_jax.benchmark.task import Images, Task

_PREFETCH = 2  # batches a worker makes ahead, as `DataLoader` has it
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


class Views(data.Dataset):
    """Views of images, which are PIL images in memory, by torchvision."""

    def __init__(self, images: Images, options: Mapping[str, Any], blur_kernel: int):
        """`options` are `config.views`; what is opened is opened by the process that uses it."""
        self._images, self._options, self._blur_kernel = images, options, blur_kernel

    @functools.cached_property
    def _canvas(self) -> np.ndarray:
        return self._images.open_canvas()

    @functools.cached_property
    def _chain(self) -> Callable[[Any], torch.Tensor]:
        return peers.torchvision_chain(self._options, self._options["size"], self._blur_kernel, pil=True)

    def __len__(self) -> int:
        return len(self._images.label)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        """The views [3, S, S] of an image, and its label."""
        height, width = self._images.extent[index]
        image = Image.fromarray(np.ascontiguousarray(self._canvas[index, :height, :width]))
        return [self._chain(image) for _ in range(self._options["count"])], int(self._images.label[index])


class _Shuffled(data.Sampler):
    """The images of `count` batches, each epoch in a new order and without its last ragged batch."""

    count = 0

    def __init__(self, images: int, batch_size: int):
        self._images, self._batch_size = images, batch_size

    def __iter__(self) -> Iterator[int]:
        left = self.count * self._batch_size
        while left:
            whole = self._images // self._batch_size * self._batch_size
            epoch = torch.randperm(self._images)[: min(left, whole)].tolist()
            left -= len(epoch)
            yield from epoch

    def __len__(self) -> int:
        return self.count * self._batch_size


class _Baseline:
    """What the two have in common: network, loss and optimizer, and how their parts are timed.

    `time` takes "step", or the name of a part: "input", "views", "gradient" or "update".
    """

    amp_dtype: torch.dtype  # of autocast on a GPU

    def __init__(self, task: Task, images: Images, *, fused: bool):
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(task.config["seed"])
        torch.backends.cudnn.benchmark = True
        self.task, self.images = task, images
        self.batch_size = task.config["train"]["batch_size"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = torch_model.build_network(task).to(self.device)
        self.loss = torch_model.build_loss(task)
        self.optimizer = torch_model.build_optimizer(task, self.network, fused=fused)
        self.schedule = torch_model.build_schedule(task, self.optimizer)
        self._kept: dict[str, Any] = {}  # what the parts that are timed alone begin with

    def start(self) -> dict[str, Any]:
        """Takes the first step, and on a CPU chooses the number of threads.

        Returns:
          `start_seconds`, all that comes before the second step, and `threads`.
        """
        began = time.perf_counter()
        self.single_step()
        self._wait()
        seconds = time.perf_counter() - began
        if self.device.type == "cpu":
            torch_threads.choose(lambda: self.gradient(*self._keep("views", self._views)))
        return {"start_seconds": seconds, "threads": torch.get_num_threads()}

    def time(self, what: str, count: int) -> float:
        """Seconds of a step, or of a part of it by itself: the mean of `count`, after one that is not timed.

        Where others ran meanwhile, the first takes up to half as long again.
        """
        run: Callable[[], Any] = {
            "step": self.step,
            "input": self.fetch,
            "views": lambda: self.make_views(self._keep("batch", self.fetch)),
            "gradient": lambda: self.gradient(*self._keep("views", self._views)),
            "update": self.optimizer.step,
        }[what]
        if what == "update":  # with gradients of zero, as the same ones over and over would ruin the weights
            self.optimizer.zero_grad(set_to_none=False)
        run()
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            run()
        self._wait()
        seconds = (time.perf_counter() - began) / count
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the others, whose memory it is too
        return seconds

    def peak(self) -> int | None:
        """Bytes that a step takes at most.

        Returns:
          On a CPU by how much the resident set of this process grows; else the peak on the device, of all
          that is there. None where the system does not tell.
        """
        self._kept.clear()
        self._wait()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.single_step()
            self._wait()
            return torch.cuda.max_memory_allocated()
        return peak.resident(self.single_step)

    def step(self) -> None:
        """A whole step: batch, views, gradient, update."""
        self.train(*self.make_views(self.fetch()))

    def single_step(self) -> None:
        """A step that no other follows."""
        self.step()

    def train(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Gradient and update; returns the loss, a scalar on the device."""
        loss = self.gradient(views, labels)
        self.update()
        self.schedule.step()
        return loss

    def fetch(self) -> Any:
        """The next batch, as `make_views` takes it."""
        raise NotImplementedError

    def make_views(self, batch: Any) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """The views [B, 3, S, S] of a batch, one array a view, and its labels [B]."""
        raise NotImplementedError

    def gradient(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The loss, whose gradient it leaves at the parameters."""
        raise NotImplementedError

    def update(self) -> None:
        """Takes the optimizer's step."""
        self.optimizer.step()

    def _forward(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, self.amp_dtype if on_gpu else None, enabled=on_gpu):
            return self.loss(self.network, views, labels)

    def _views(self) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        return self.make_views(self._keep("batch", self.fetch))

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Loaded(_Baseline):
    """As people write it: torchvision on PIL images in the processes of a `DataLoader`; fp16 on a GPU."""

    amp_dtype = torch.float16

    def __init__(self, task: Task, images: Images, *, workers: int | None = None):
        """By default there are as many workers as cores."""
        super().__init__(task, images, fused=False)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")
        self._workers = (os.cpu_count() or 1) if workers is None else workers
        self._order = _Shuffled(len(images.label), self.batch_size)
        on_gpu = self.device.type == "cuda"
        self._loader = data.DataLoader(
            Views(images, task.config["views"], task.blur_kernel),
            self.batch_size,
            sampler=self._order,
            drop_last=True,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            prefetch_factor=_PREFETCH if self._workers else None,
            multiprocessing_context="spawn" if self._workers else None,
            pin_memory=on_gpu,
        )
        self._batches: Iterator[Any] = iter(())
        self._waited = math.nan  # seconds for a batch, in the steps that were timed last

    def time(self, what: str, count: int) -> float:
        """As ever, but "input" is what the last steps waited for their batches, and "views" the loader alone.

        Steps and loader are timed in the middle of a stream of batches: at both ends the workers have as
        many batches ready as they would have in a long run. At the end all is used up, so that workers do
        nothing while others are timed.

        Workers that are the bottleneck deliver in bursts, one batch of each: `count` becomes a multiple of
        their number, at least twice it. Of a single step after such a burst, 16 workers seemed 14 times as
        slow as they are.
        """
        if what == "input":
            return self._waited
        if what not in ("step", "views"):
            return super().time(what, count)
        run = self.step if what == "step" else self.fetch
        ahead = max(1, _PREFETCH * self._workers)
        if self._workers:
            count = max(2, -(-count // self._workers)) * self._workers
        self._open(count + 2 * ahead)
        for _ in range(ahead):
            run()
        self._wait()
        self._waited = 0.0
        began = time.perf_counter()
        for _ in range(count):
            run()
        self._wait()
        seconds = (time.perf_counter() - began) / count
        self._waited /= count
        for _ in self._batches:
            pass
        return seconds

    def single_step(self) -> None:
        """A step with its batch, the only one that is made."""
        self._open(1)
        self.step()

    def _views(self) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        self._open(1)
        return super()._views()

    def _open(self, batches: int) -> None:
        self._order.count = batches
        self._batches = iter(self._loader)

    def fetch(self) -> Any:
        """The next batch, on the host."""
        began = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - began
        return batch

    def make_views(self, batch: Any) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """They are made; here they go to the device."""
        views, labels = batch
        put = functools.partial(torch.Tensor.to, device=self.device, non_blocking=True)
        return [put(images) for images in views], put(labels)

    def gradient(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The loss, whose gradient, on a GPU scaled, it leaves at the parameters."""
        self.optimizer.zero_grad()
        loss = self._forward(views, labels)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        """Takes the optimizer's step, unless fp16 has overflowed."""
        self._scaler.step(self.optimizer)
        self._scaler.update()


class Resident(_Baseline):
    """As an expert would: images and Kornia on the device, channels last, compiled views, freed memory kept.

    On a GPU in bf16.

    `torch.compile` makes one program of all views, for which the jitter has a fixed order: with a drawn one
    it would be 13. Of a gradient it gains nothing on a CPU, and is left to GPUs: a ResNet-18's for 32 views
    of 32 pixels takes 1.1 s with it and without, on one core, as the convolutions are the same, and 35 to
    100 s to compile.

    Crop and flip are one bilinear sampling of the canvas, as Kornia's crop takes the images one by one, or
    by a perspective transform (measured on two cores, 32 images of 160 pixels to 128: 19 ms, against 355
    and 79), and knows no images of different sizes. It is not antialiased; ours and torchvision's are.
    """

    amp_dtype = torch.bfloat16

    def __init__(self, task: Task, images: Images):
        """Puts the images on the device."""
        kept_memory.keep_freed()  # as PyTorch's guide to tuning has it, by another allocator
        super().__init__(task, images, fused=True)
        torch.set_float32_matmul_precision("high")
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._canvas = torch.from_numpy(np.load(images.canvas)).to(self.device)
        self._extent = torch.from_numpy(np.array(images.extent)).float().to(self.device)
        self._label = torch.from_numpy(np.array(images.label)).long().to(self.device)
        self._colors = peers.kornia_colors(task.config["views"], task.blur_kernel, jitter_order=(0, 1, 2, 3))
        self._views_program = Compiled(self._all_views)
        self._loss_program = Compiled(self._forward) if self.device.type == "cuda" else self._forward
        self._order, self._at = torch.empty(0), 0

    def start(self) -> dict[str, Any]:
        """As ever, and `uncompiled`, why, where PyTorch could not compile something."""
        found = super().start()
        programs = (self._views_program, self._loss_program)
        problems = [one.problem for one in programs if isinstance(one, Compiled) and one.problem]
        return found | ({"uncompiled": problems[0]} if problems else {})

    def fetch(self) -> Any:
        """The next images [B, 3, S, S] uint8, their extents and labels."""
        if self._at + self.batch_size > len(self._order):
            self._order, self._at = torch.randperm(len(self._label), device=self.device), 0
        index = self._order[self._at : self._at + self.batch_size]
        self._at += self.batch_size
        return self._canvas[index].permute(0, 3, 1, 2), self._extent[index], self._label[index]

    @torch.no_grad()
    def make_views(self, batch: Any) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """All views at once, with parameters of its own for each image."""
        canvas, extent, labels = batch
        return self._views_program(canvas, extent), labels

    def _all_views(self, canvas: torch.Tensor, extent: torch.Tensor) -> Sequence[torch.Tensor]:
        options = self.task.config["views"]
        count = options["count"]
        images = (canvas.float() / 255).repeat(count, 1, 1, 1)
        views = crop_and_flip(images, extent.repeat(count, 1), options)
        for operation in self._colors:
            views = operation(views)
        return views.contiguous(memory_format=torch.channels_last).chunk(count)

    def gradient(self, views: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The loss, whose gradient it leaves at the parameters."""
        self.optimizer.zero_grad()
        loss = self._loss_program(views, labels)
        loss.backward()
        return loss.detach()


class Compiled:
    """A function by `torch.compile`, anew in each process; as it is where it cannot be compiled.

    Attributes:
      problem: why it could not be, as without a C++ compiler; empty where it was compiled.
    """

    def __init__(self, function: Callable[..., Any]):
        """Compiles with the first call."""
        inductor.force_disable_caches = True
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        self._function = function
        self._compiled = torch.compile(function, fullgraph=True)
        self.problem = ""

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        if not self.problem:
            try:
                return self._compiled(*arguments)
            except TorchDynamoException as error:
                self.problem = apart.reason(error)
        return self._function(*arguments)


def crop_and_flip(images: torch.Tensor, extent: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """A random crop of each image, some of them flipped, sampled bilinearly at its view's size.

    The box is drawn as torchvision's `RandomResizedCrop` draws it: the first of ten that fits.

    Args:
      images: float [N, 3, S, S].
      extent: float [N, 2], height and width of each image, which lies at the top left.
      options: `config.views`.

    Returns:
      [N, 3, size, size].
    """
    count, side, size = len(images), images.shape[-1], options["size"]
    drawn = functools.partial(torch.rand, device=images.device)
    low, high = options["crop_area"]
    area = (low + (high - low) * drawn(_CROP_TRIES, count)) * extent.prod(dim=1)
    low, high = map(math.log, options["crop_aspect"])
    aspect = (low + (high - low) * drawn(_CROP_TRIES, count)).exp()
    boxes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1)
    fits = (boxes <= extent).all(dim=-1).int()
    box = boxes[fits.argmax(dim=0), torch.arange(count, device=images.device)].minimum(extent)
    center = box / 2 + drawn(count, 2) * (extent - box)
    flip = 1 - 2 * (drawn(count) < options["flip"]).float()
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = flip * box[:, 1] / side, 2 * center[:, 1] / side - 1
    theta[:, 1, 1], theta[:, 1, 2] = box[:, 0] / side, 2 * center[:, 0] / side - 1
    grid = functional.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
