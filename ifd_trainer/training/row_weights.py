"""What rows weigh in the training loss, and what their losses were in it.

    loss of a batch  =  sum_i w_i sum_t l_it / N        l_it: the loss of token t of row i;  N: as without weights

Both are done in one place, behind the forward of a training step: where a trainer divides by N and scales for processes
and accumulation is left to it. A model that TRL has given a fused LM head returns the log probabilities of the tokens,
of which the trainer makes the loss: they are multiplied by the weights. Other models return the loss itself, with
logits: what weights other than 1 change of it is added to it,

    loss + sum_i (w_i - 1) sum_t l_it / N

so a batch of rows with weight 1 is computed as if there were none, and what else is in a loss (of a router, say) stays.

Which row a token belongs to is told by the order of the epoch: the batches that this process draws are those of its
loader's batch sampler, and the trained tokens of a batch are those of its examples one after another, whatever a
collator makes of them (padded on either side, packed, without padding). The tokens themselves are held against those of
the pool in each batch, so that a batch of other rows is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.nn.functional import cross_entropy, pad
from transformers import Trainer

from ..data.encoding import IGNORE
from ..errors import RunError, UserError
from .image_pool import ImagePool
from .pool import Pool, TrainingRow

_HELD = 64  # batches whose losses are kept where they were computed
_CHUNK = 4096  # tokens whose logits are read at once, where nothing is trained by it
_TOLERANCE = 0.02  # of a loss that a trainer makes of the weighted ones: models compute in bfloat16
_TOLD_APART = 0.1  # from which difference on, a weighted loss is told from one without weights


def check_weighable(trainer: Trainer, what: str) -> None:
    """Raise where a trainer's loss is no sum over the tokens of rows that could be weighted one by one.

    Args:
        what: that asks for it, which begins the sentence.

    Raises:
        UserError: with what to change.
    """
    args = trainer.args
    loss_type = getattr(args, "loss_type", None)
    reasons = {
        "label_smoothing_factor": ("smooths labels", "Set it to 0.0") if args.label_smoothing_factor else None,
        "use_liger_kernel": ("computes it without logits", "Set it to False")
        if getattr(args, "use_liger_kernel", False)
        else None,
        f"loss_type={loss_type!r}": ("is another one", "Set it to 'nll'")
        if loss_type not in (None, "nll", "chunked_nll")
        else None,
        "compute_loss_func": ("is one of your own", "Weight rows in it, or leave it out")
        if getattr(trainer, "compute_loss_func", None) is not None and loss_type in (None, "nll", "chunked_nll")
        else None,
        "DataParallel": (f"is split over {args.n_gpu} devices in one process", "Launch with torchrun or accelerate")
        if args.n_gpu > 1
        else None,
    }
    for name, reason in reasons.items():
        if reason is not None:
            raise UserError(
                f"{what} needs the loss of each row, a sum over its tokens, but the loss of {name} {reason[0]}. "
                f"{reason[1]}, or train without weights and train_losses."
            )
    if isinstance(trainer.selection_pool, ImagePool):
        raise UserError(f"{what} is for rows of text: the tokens of rows with images are made by the collator.")


@dataclass(frozen=True)
class BatchTokens:
    """The trained tokens of a batch by row.

    Attributes:
        rows: (r,) the examples of the batch, positions in the pool.
        place: (batch, length) which of them each trained token is of, -1 for other tokens.
    """

    rows: np.ndarray
    place: torch.Tensor

    @classmethod
    def of(cls, rows: np.ndarray, trained: list[list[int]], labels: torch.Tensor) -> BatchTokens | None:
        """Find the tokens of examples in the labels of a batch; None where they are not the ones that it holds.

        Args:
            trained: labels of these examples; the first one counts where the collator has not masked it, as it does
                where examples stand one behind another.
            labels: (batch, length).

        >>> found = BatchTokens.of(np.array([7, 3]), [[-100, 5], [-100, 6, 8]], torch.tensor([[-100, 5, -100, 6, 8]]))
        >>> found.place.tolist()
        [[-1, 0, -1, 1, 1]]
        """
        mask = labels != IGNORE
        found = labels[mask].cpu().numpy()
        arrays = [np.asarray(row, dtype=np.int64) for row in trained]
        for firsts in (0, 1):
            kept = [row[firsts:][row[firsts:] != IGNORE] for row in arrays]
            if np.array_equal(np.concatenate([*kept, np.empty(0, np.int64)]), found):
                place = torch.full(labels.shape, -1, dtype=torch.int64, device=labels.device)
                owner = np.repeat(np.arange(len(rows)), [len(row) for row in kept])
                place[mask] = torch.from_numpy(owner).to(labels.device)
                return cls(rows, place)
        return None

    def behind(self, length: int) -> torch.Tensor:
        """`place` with so many columns: a model with virtual tokens has put theirs before those of the batch."""
        if length < self.place.shape[1]:
            raise UserError(
                f"The model returns {length} positions for rows of {self.place.shape[1]} tokens, so rows cannot be "
                "weighted one by one. Train without weights and train_losses."
            )
        return pad(self.place, (length - self.place.shape[1], 0), value=-1)


class TrainLosses:
    """Sums of the losses of rows in the training forward, over all processes.

    Args:
        rows: of the pool.
    """

    def __init__(self, rows: int) -> None:
        self._sums, self._counts = np.zeros(rows), np.zeros(rows, dtype=np.int64)  # of all processes, as of the last
        self._held: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]] = []  # gathering; and of this one, since
        self._new: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, rows: np.ndarray, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Losses (nats, summed over tokens) and tokens of rows of a batch, each (r,)."""
        self._held.append((rows, sums, counts))
        if len(self._held) >= _HELD:
            self._take()

    def _take(self) -> None:
        self._new += [(rows, sums.double().cpu().numpy(), counts.cpu().numpy()) for rows, sums, counts in self._held]
        self._held = []

    def gather(self) -> None:
        """Bring together what each process has; all of them have to call it."""
        self._take()
        for rows, sums, counts in gather_object(self._new):
            np.add.at(self._sums, rows, sums)
            np.add.at(self._counts, rows, counts)
        self._new = []

    def means(self) -> np.ndarray:
        """(n,) mean loss of each row's trained tokens, nats, as of the last `gather`; NaN for rows without any."""
        with np.errstate(invalid="ignore"):
            return np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), np.nan)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint inside an epoch keeps."""
        rows = np.flatnonzero(self._counts)
        return {"loss_rows": rows, "loss_sums": self._sums[rows], "loss_tokens": self._counts[rows]}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take that out of the arrays of a checkpoint, if it is there."""
        if "loss_rows" in arrays:
            rows = arrays.pop("loss_rows")
            self._sums[rows], self._counts[rows] = arrays.pop("loss_sums"), arrays.pop("loss_tokens")


class RowLosses:
    """What a run does with the losses of single rows; the callback says what, the trainer lets it.

    Attributes:
        weights: (n,) of the epoch that runs, NaN for rows that it does not train on; None where all are 1.
        harvested: where losses of the epoch are kept; None where they are not.
    """

    def __init__(self) -> None:
        self.weights: np.ndarray | None = None
        self.harvested: TrainLosses | None = None
        self._pool: Pool | None = None
        self._batches: list[list[TrainingRow]] | None = None
        self._next = 0
        self._hook: _Hook | None = None
        self._seen = self._checked = False

    def begin(self, loader: Any, done: int, pool: Pool) -> None:
        """An epoch begins on this loader, of whose batches `done` were trained on before."""
        self._batches, self._seen = None, False
        if self.weights is None and self.harvested is None:
            return
        batches = getattr(loader, "batch_sampler", None)
        if batches is None:
            raise UserError(
                "Weights of rows and train_losses go by the batch sampler of the train data loader, and this one has "
                "none. Let the trainer build it from trainer.train_dataset."
            )
        self._pool, self._batches, self._next = pool, list(batches), done

    @contextlib.contextmanager
    def of_batch(self, trainer: Trainer, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While a training step runs on the next batch, weigh its loss and keep it, as is wanted."""
        if self._batches is None:
            yield
            return
        tokens = self._tokens(inputs)
        weights = None if self.weights is None else self.weights[tokens.rows]
        self._hook = _Hook(tokens, None if weights is None or (weights == 1).all() else weights, inputs)
        self._hook.reads = self.harvested is not None or not self._checked
        handle = model.register_forward_hook(self._hook, with_kwargs=True)
        try:
            yield
            if self._hook.forwards != 1:
                raise UserError(
                    f"{type(trainer).__name__} calls the model {self._hook.forwards} times in a training step, so the "
                    "loss of a row is not known. Weights of rows and train_losses need one forward of the model that "
                    "is passed to compute_loss."
                )
            if self.harvested is not None:
                self.harvested.add(tokens.rows, *self._hook.of_rows())
            self._seen = True
        finally:
            handle.remove()
            self._hook = None

    def check(self, loss: Any, trainer: Trainer, items: Any) -> None:
        """Raise unless a trainer has made its loss of the weighted ones, where the two can be told apart.

        Args:
            loss: what `compute_loss` returned.
            items: num_items_in_batch.
        """
        hook = self._hook
        if hook is None or self._checked or hook.weights is None or not hook.forwards or hook.of_router:
            return
        plain, weighted = (float(sum) for sum in hook.totals())
        if abs(weighted - plain) < _TOLD_APART * abs(plain):
            return
        loss = loss[0] if isinstance(loss, tuple) else loss
        share = float(loss.detach()) * (float(torch.as_tensor(items).sum()) if items is not None else hook.count)
        rounding = _TOLERANCE * max(abs(plain), abs(weighted))
        if not any(abs(share / scale - weighted) <= rounding for scale in (1, trainer.accelerator.num_processes)):
            raise UserError(
                f"The loss that {type(trainer).__name__} computes is not that of the model's tokens, of which rows "
                f"could be weighted: it is {share:.6g} in sum, where weighted rows have {weighted:.6g} and rows "
                f"without weights {plain:.6g}. Leave out its own compute_loss, or train without weights."
            )
        self._checked = True

    def check_seen(self, trainer: Trainer) -> None:
        """Raise where an update is about to be made of batches that went another way."""
        if self._batches is not None and not self._seen:
            raise UserError(
                f"The training_step of {type(trainer).__name__} does not go through that of its class, so rows are not "
                "weighted. Define it in a subclass that calls super().training_step, or train without weights and "
                "train_losses."
            )
        self._seen = False

    def _tokens(self, inputs: Mapping[str, Any]) -> BatchTokens:
        """The rows of the next batch, and which of its tokens they are."""
        if "labels" not in inputs or "shift_labels" in inputs:
            raise UserError(
                "Weights of rows and train_losses need batches with labels, as a collator for language modelling makes "
                f"them; this one has {', '.join(inputs)}."
            )
        batch = self._batches[self._next] if self._next < len(self._batches) else []
        self._next += 1
        rows = np.concatenate([np.empty(0, np.int64), *(np.ravel(row) for row in batch)]).astype(np.int64)
        found = BatchTokens.of(rows, self._pool.trained_labels(rows), inputs["labels"]) if len(rows) else None
        if found is None:
            raise RunError(
                f"Batch {self._next - 1} of the epoch is to hold {len(rows)} rows, but its labels are not those of "
                "these rows, so they cannot be weighted. The collator changes labels, or something else has changed "
                "what the train data loader yields; with weights of rows or train_losses they have to stay."
            )
        return found


class _Hook:
    """Reads the losses of single tokens off a model's outputs, and weighs them.

    Attributes:
        weights: (r,) of the rows of the batch; None where all are 1.
        reads: whether the losses of all tokens are asked for.
        count: trained tokens.
    """

    def __init__(self, tokens: BatchTokens, weights: np.ndarray | None, inputs: Mapping[str, Any]) -> None:
        self.tokens, self.weights, self.labels = tokens, weights, inputs["labels"]
        self.reads, self.forwards, self.of_router, self.count = False, 0, False, 0
        self._losses = self._owners = torch.empty(0)

    def __call__(self, module: nn.Module, inputs: Any, kwargs: Mapping[str, Any], outputs: Any) -> Any:
        self.forwards += 1
        known = outputs if isinstance(outputs, Mapping) else {}
        log_probs, logits = known.get("log_probs"), known.get("logits")
        self.of_router = known.get("aux_loss") is not None
        if log_probs is not None:
            return self._of_log_probs(outputs, log_probs)
        if torch.is_tensor(logits) and logits.dim() == 3 and known.get("loss") is not None:
            return self._of_logits(outputs, logits, kwargs.get("num_items_in_batch"))
        raise UserError(
            f"{type(module).__name__} returns {', '.join(known) or 'no named outputs'} in training, which is no loss "
            "with logits or log probabilities, so the loss of a row is not known (a fused or chunked loss hides it). "
            "Use the model's own loss, or train without weights and train_losses."
        )

    def _of_log_probs(self, outputs: Any, log_probs: torch.Tensor) -> Any:
        owners = self.tokens.behind(log_probs.shape[1] + 1)[:, 1:].to(log_probs.device)  # (batch, length - 1)
        trained = owners >= 0
        self._note(-log_probs.detach()[trained], owners[trained])
        if self.weights is not None:
            factor = torch.ones_like(log_probs)
            factor[trained] = self._of(owners[trained]).to(log_probs.dtype)
            outputs["log_probs"] = log_probs * factor
        return outputs

    def _of_logits(self, outputs: Any, logits: torch.Tensor, items: Any) -> Any:
        owners = self.tokens.behind(logits.shape[1])[:, 1:].to(logits.device)
        labels = pad(self.labels, (logits.shape[1] - self.labels.shape[1], 0), value=IGNORE)[:, 1:].to(logits.device)
        trained, logits = owners >= 0, logits[:, :-1]
        if self.reads:
            with torch.no_grad():
                parts = zip(logits[trained].split(_CHUNK), labels[trained].split(_CHUNK), strict=True)
                losses = [cross_entropy(part.float(), targets, reduction="none") for part, targets in parts]
            self._note(torch.cat([logits.new_empty(0, dtype=torch.float32), *losses]), owners[trained])
        self.count = int(trained.sum())
        if self.weights is not None:
            changed = trained.clone()
            changed[trained] = self._of(owners[trained]) != 1
            losses = cross_entropy(logits[changed].float(), labels[changed], reduction="none")
            more = ((self._of(owners[changed]) - 1).to(losses.dtype) * losses).sum()
            outputs["loss"] = outputs["loss"] + more / (self.count if items is None else items)
        return outputs

    def _note(self, losses: torch.Tensor, owners: torch.Tensor) -> None:
        self._losses, self._owners, self.count = losses.float(), owners, len(owners)

    def _of(self, owners: torch.Tensor) -> torch.Tensor:
        """The weights of the rows of tokens."""
        return torch.from_numpy(self.weights).to(torch.float32).to(owners.device)[owners]

    def totals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the tokens' losses, and of the weighted ones."""
        return self._losses.sum(), (self._losses * self._of(self._owners)).sum()

    def of_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of losses and numbers of tokens of the rows of the batch, each (r,)."""
        owners = self._owners.to(torch.int64)
        sums = torch.zeros(len(self.tokens.rows), dtype=torch.float32, device=owners.device)
        return sums.index_add(0, owners, self._losses), torch.bincount(owners, minlength=len(self.tokens.rows))
