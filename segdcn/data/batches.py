"""Batches that repeat and resume bit for bit, with any number of workers and processes, whatever an item is."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from segdcn.data.transforms import single_threaded_worker
from segdcn.errors import UserError


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """The order of training: epoch after epoch a fresh permutation of all images, cut into batches.

    It yields batches of (epoch, index). Which batch comes next is a function of the number of batches already
    trained, so a run continues where its checkpoint stopped. Images that do not fill the last batch of an
    epoch are left out of that epoch.

    Args:
        size: images in the split.
        batch_size: images per batch and process.
        rank, world_size: this process and the number of processes, which share each global batch out.
        position: returns how many batches each process has trained so far; asked at each start of an epoch.

    Raises:
        ValueError: the images do not fill one batch on each process.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = position
        if len(self) == 0:
            raise UserError(
                f"the train split holds {size} images, fewer than one batch of {batch_size} on each of"
                f" {world_size} device(s): lower batch_size or add images"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch, per process."""
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.position()
        # The first epoch after a resume starts in the middle and Lightning ends it; nobody reads to its end.
        for number in range(start, start + len(self)):
            epoch, batch = divmod(number, len(self))
            if batch == 0 or number == start:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            shared = order[batch * self.batch_size * self.world_size :][: self.batch_size * self.world_size]
            yield [(epoch, int(index)) for index in shared[self.rank :: self.world_size]]


class EvaluationOrder(Sampler[tuple[int, bool]]):
    """Every image once over all processes, in order, and equally many items for each process.

    It yields (index, padding): padding repeats an image that must not count.
    """

    def __init__(self, size: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.rank, self.world_size = size, rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.size / self.world_size)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for number in range(self.rank, len(self) * self.world_size, self.world_size):
            yield number % self.size, number >= self.size


def check_world_size(trainer: pl.Trainer) -> None:
    """Refuse a trainer whose processes are not the ones that its devices and nodes ask for.

    Under some launchers Lightning would go on: with too few processes each trains on its share of the images and
    nobody on the rest; too many each train a network of their own, into one folder.

    Raises: ValueError that says who started how many processes.
    """
    environment = os.environ
    launcher, option = "the launcher", "as many processes per node as trainer.devices"
    started = trainer.world_size
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher, option = "torchrun", f"--nnodes={trainer.num_nodes} --nproc-per-node={trainer.num_devices}"
        started = int(environment["WORLD_SIZE"])
    elif "SLURM_NTASKS" in environment:
        launcher, option = "SLURM", f"srun --nodes={trainer.num_nodes} --ntasks-per-node={trainer.num_devices}"
        # of the job step; a batch script itself is one process, whatever SLURM_NTASKS says
        started = int(environment.get("SLURM_STEP_NUM_TASKS", trainer.world_size))
    wanted = trainer.num_devices * trainer.num_nodes
    if trainer.world_size != wanted or started > wanted:
        raise UserError(
            f"trainer.devices={trainer.num_devices} and trainer.num_nodes={trainer.num_nodes} ask for {wanted}"
            f" process(es), but {launcher} started {started}: start them with {option}, or set trainer=ddp,"
            " trainer.devices (per node) and trainer.num_nodes to what was started"
        )


def worker_init(worker_id: int) -> None:
    """DataLoader's `worker_init_fn`: no threads of OpenCV's, and deaf to what asks a run to stop, unless the run does.

    A launcher sends such a signal to all processes, and a run whose workers end cannot finish its batch and save.
    """
    single_threaded_worker(worker_id)
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_run_asks, daemon=True).start()


def _end_when_the_run_asks() -> None:
    """Take SIGTERM from the process that started this one, and from no other."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class DataModule(pl.LightningDataModule):
    """A data set's splits as batches; what an item of them is, a subclass says.

    The Trainer must be made with `use_distributed_sampler=False`: this module shares the images out.

    Args:
        batch_size: training images per device.
        eval_batch_size: images per device in validation and test.
        num_workers: loading processes per device and split; the batches are the same for any number.
        seed: of the order and the augmentation.

    Raises:
        ValueError: a value out of range; from the loaders, a missing split or one smaller than a batch; from a
            trainer, another number of processes than its devices and nodes, or than a resumed run had.
    """

    def __init__(self, dataset: Any, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size} (evaluation)")
        if num_workers < 0:
            raise UserError(f"num_workers must be at least 0, got {num_workers}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._batches_in_checkpoint = 0
        self._warned_of: set[str] = set()
        self._images: dict[str, list[Any]] | None = None

    # --- what a subclass says -----------------------------------------------------------------------------------

    def train_items(self, samples: Sequence[Any]) -> Dataset[Any]:
        """The augmented items of a split, by the keys (epoch, index) of `TrainBatches`."""
        raise NotImplementedError

    def eval_items(self, samples: Sequence[Any]) -> Dataset[Any]:
        """The items of a split, by the keys (index, padding) of `EvaluationOrder`."""
        raise NotImplementedError

    @staticmethod
    def collate(items: list[Any]) -> Any:
        """A batch of items."""
        raise NotImplementedError

    def image_names(self, samples: Sequence[Any]) -> Sequence[str]:
        """The names of a split's images, where they cost nothing."""
        return ()

    # --- Lightning's ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Lightning calls this on each process before anything is loaded."""
        if self.trainer is not None:
            check_world_size(self.trainer)

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches of the train split, from where the trainer stands; without a trainer, epoch 0."""
        if getattr(self.trainer, "overfit_batches", None):
            raise UserError("trainer.overfit_batches would replace the order of training: use a small data set")
        samples = self.dataset.split("train")
        rank, world_size = self._process()
        batches = TrainBatches(len(samples), self.batch_size, self.seed, rank, world_size, self._trained_batches)
        return _ResumableLoader(self.train_items(samples), batch_sampler=batches, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """The whole images of the val split, in order."""
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The whole images of the test split, in order."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader[Any]:
        samples = self.dataset.split(split)
        order = EvaluationOrder(len(samples), *self._process())
        return DataLoader(self.eval_items(samples), self.eval_batch_size, sampler=order, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": worker_init,
            "collate_fn": self.collate,
            "pin_memory": torch.cuda.is_available(),
            # Without its own generator a loader draws from the global one each time it is iterated.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _trained_batches(self) -> int:
        """Batches that this run has trained, counted over all its epochs and resumes.

        The trainer's total is the one counter that holds at every kind of checkpoint; its epochs are counted
        once too many when a run with `max_steps` resumes at an epoch's end. But the loader may be made, and
        prefetch, before the trainer restores that counter (a schedule that asks for
        `estimated_stepping_batches` does it): hence the copy in this module's own state, restored earlier.
        """
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total  # its type lacks `processed`
        return max(self._batches_in_checkpoint, int(total.processed))

    def state_dict(self) -> dict[str, Any]:
        """Lightning writes this into each checkpoint."""
        return {
            "trained_batches": self._trained_batches(),
            "world_size": self._process()[1],
            "images": self._images_of_splits(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before the network and its optimizers are set up."""
        world_size = self._process()[1]
        saved = state_dict["world_size"]
        if saved != world_size:
            raise UserError(
                f"the run was trained by {saved} process(es) and cannot go on with {world_size}, which would make"
                " another batch and another order of images: set trainer.devices and trainer.num_nodes as before"
            )
        self._batches_in_checkpoint = state_dict["trained_batches"]
        for split, now in self._images_of_splits().items():
            before = state_dict["images"][split]
            # once: the best checkpoint is read at the end too
            if before != now and split not in self._warned_of:
                self._warned_of.add(split)
                consequence = "the order of training is another" if split == "train" else "figures do not compare"
                warnings.warn(
                    f"the {split} split has other images than when the run was saved ({before[0]} then, {now[0]} now):"
                    f" {consequence} with those before",
                    stacklevel=1,  # a line of ours, which is shown without its place
                )

    def _images_of_splits(self) -> dict[str, list[Any]]:
        """The number of images of the splits that a run uses, and a digest of their names where names cost nothing."""
        if self._images is None:
            self._images = {}
            for split in ("train", "val"):
                samples = self.dataset.split(split)
                names = self.image_names(samples)
                digest = hashlib.blake2b("\n".join(names).encode("utf-8", "surrogateescape"), digest_size=8)
                self._images[split] = [len(samples), digest.hexdigest()]
        return self._images

    def teardown(self, stage: str) -> None:
        """Forget the checkpoint: the next fit may be a new run."""
        self._batches_in_checkpoint = 0


class _ResumableLoader(DataLoader[Any]):
    """A loader that Lightning knows to resume; its state is the trainer's own count of batches."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
