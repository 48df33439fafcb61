"""Scoring on a CPU about twice as fast: its float32 matrix products by the library oneDNN.

PyTorch hands them to a BLAS (MKL in the published x86 builds), which on processors of another maker may leave half of
their vector width unused; oneDNN, in the same builds, asks the processor itself. On two AMD cores with AVX-512 it ran
a 135M model's products at 1.9 to 2.7 times the speed, from 1 to 2,048 rows; with AVX2 alone it was no slower. All of
scoring was 1.8 times as fast, with 49,000 tokens as with 152,000.

Only where gradients are off, so that training is as it was; not under autocast, and not for tensors of other kinds
(quantised, distributed). `torch.backends.mkldnn.flags(enabled=False)` switches it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .private_names import has_onednn_linear, onednn_linear

_PLAIN = (torch.Tensor, nn.Parameter)


class OneDNN(TorchFunctionMode):
    """Inside this context `linear` and `addmm` of float32 tensors on a CPU are computed by oneDNN, where there is one.

    >>> with torch.no_grad(), OneDNN():
    ...     nn.functional.linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0, 7.0]]
    """

    def __init__(self) -> None:
        super().__init__()
        self._works = available() and not torch.is_grad_enabled()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _OPERANDS.get(func) if self._works else None
        # Asked at each call: a trainer may switch autocast on inside the model's forward.
        product = None if operands is None or torch.is_autocast_enabled("cpu") else operands(*args, **kwargs)
        return func(*args, **kwargs) if product is None or not _fits(*product) else _product(*product)


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's products, switched on, and an x86 processor with AVX2 or more.

    A build that has them under another name by now says so, once; see `scoring.private_names`.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and has_onednn_linear()
    )


def rounded(rows: int) -> int:
    """The next number of rows with five significant bits.

    oneDNN compiles code for each shape and keeps it. Without rounding, what it keeps between the results of products
    split up the heap: 736 MiB after 600 rows with 512 tokens in a batch, against 213 MiB.

    >>> [rounded(rows) for rows in (7, 33, 1000, 2017)]
    [7, 34, 1024, 2048]
    """
    step = _step(rows)
    return -(-rows // step) * step


def rounded_down(rows: int) -> int:
    """The last such number up to this one.

    >>> [rounded_down(rows) for rows in (7, 33, 1000, 2017)]
    [7, 32, 992, 1984]
    """
    return rows // _step(rows) * _step(rows)


def _step(rows: int) -> int:
    return 1 << max(rows.bit_length() - 5, 0)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    *batch, size = x.shape
    rows = math.prod(batch)
    if added := rounded(rows) - rows:
        x = torch.cat([x.reshape(rows, size), x.new_zeros(added, size)])
    out = onednn_linear(x, weight, bias)
    return out[:rows].view(*batch, weight.shape[0]) if added else out


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # x (..., K), weight (N, K), bias (N,)


_OPERANDS: dict[Callable[..., Any], Callable[..., Operands | None]] = {
    nn.functional.linear: lambda input, weight, bias=None: (input, weight, bias),
    # GPT-2's layers
    torch.addmm: lambda input, mat1, mat2, **others: None if others else (mat1, mat2.t(), input),
}


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN takes these; what does not fit gets PyTorch's own product, or its error."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(type(t) in _PLAIN and t.dtype == torch.float32 and t.is_cpu and t.layout == torch.strided for t in tensors)
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1] > 0
        and (bias is None or bias.shape == weight.shape[:1])
    )
