"""Products by oneDNN: the numbers of PyTorch's own, for every shape and layout, and only where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import ROUNDING, build_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.onednn import OneDNN, available, rounded, rounded_down

# Switching oneDNN off and on again sets an option that this build of PyTorch has no use for, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
needs_onednn = pytest.mark.skipif(not available(), reason="no oneDNN, or another kind of processor")


class Products(TorchDispatchMode):
    """The shapes of what oneDNN's operator itself is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("mkldnn._linear_pointwise"):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def products() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what oneDNN was given."""
    available()  # tries a product out
    with Products() as watched:
        yield watched.shapes


LAYOUTS = {
    "dense": lambda rows, columns, draw: draw(rows, columns),
    "transposed": lambda rows, columns, draw: draw(columns, rows).t(),
    "every second": lambda rows, columns, draw: draw(rows, 2 * columns)[:, ::2],
    "behind others": lambda rows, columns, draw: draw(rows + 1, columns)[1:],
    "one row": lambda rows, columns, draw: draw(1, columns).expand(rows, columns),
}


@needs_onednn
@given(
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)),
    st.booleans(),
    st.integers(0, 9),
)
def test_products_are_those_of_float64(batch, inner, outer, x_layout, weight_layout, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x = LAYOUTS[x_layout](int(np.prod(batch)), inner, draw).reshape(*batch, inner)
    weight = LAYOUTS[weight_layout](outer, inner, draw)
    bias = draw(outer) if has_bias else None
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    with torch.no_grad(), OneDNN():
        found = nn.functional.linear(x, weight, bias)
        if bias is not None and x.dim() == 2:
            np.testing.assert_allclose(torch.addmm(bias, x, weight.t()), wanted, rtol=1e-4, atol=1e-4)
    assert (found.shape, found.dtype) == (wanted.shape, torch.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10**6))
def test_rows_are_rounded_to_few_numbers(rows):
    found = rounded(rows)
    assert rows <= found <= rows * 17 / 16
    assert rounded(found) == found == rounded_down(found)
    assert rounded_down(rows) <= rows <= found
    assert rounded(rounded_down(rows)) == rounded_down(rows)
    assert len({rounded(i) for i in range(1024, 2048)}) == 17


@needs_onednn
def test_products_are_of_few_shapes(products):
    x, layer = torch.randn(3, 1001, 7), nn.Linear(7, 5)
    with torch.no_grad():
        wanted = layer(x)
        with OneDNN():
            found = layer(x)
    assert products == [(rounded(3003), 7)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@needs_onednn
def test_what_onednn_is_given(products):
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with torch.no_grad(), OneDNN():
        nn.functional.linear(x, weight)
        nn.Linear(3, 4)(x[None])
        torch.addmm(torch.ones(4), x, weight.t())
    assert products == [(2, 3), (1, 2, 3), (2, 3)]


class Other(torch.Tensor):
    """A tensor of another kind, which brings its own products."""


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.functional.linear(torch.ones(2, 3).double(), torch.ones(4, 3).double()),
        lambda: nn.functional.linear(torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16()),
        lambda: nn.functional.linear(torch.ones(2, 3), torch.ones(3)),
        lambda: nn.functional.linear(torch.ones(2, 0), torch.ones(4, 0)),
        lambda: nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3).as_subclass(Other)),
        lambda: torch.addmm(torch.ones(2, 4), torch.ones(2, 3), torch.ones(3, 4)),
        lambda: torch.addmm(torch.ones(4), torch.ones(2, 3), torch.ones(3, 4), alpha=2),
    ],
    ids=["float64", "bfloat16", "a vector", "no columns", "a subclass", "a matrix added", "scaled"],
)
def test_what_it_is_not_given_is_computed_as_ever(call, products):
    wanted = call()
    with torch.no_grad(), OneDNN():
        found = call()
    assert products == []
    assert type(found) is type(wanted)
    assert torch.equal(found, wanted)


def test_shapes_that_do_not_match_are_pytorchs_error(products):
    with torch.no_grad(), OneDNN(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nn.functional.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert products == []


def test_not_while_gradients_are_on_nor_under_autocast_nor_switched_off(products):
    layer = nn.Linear(3, 4)
    with OneDNN():
        layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), OneDNN():
        assert layer(torch.ones(2, 3)).dtype == torch.bfloat16
    with torch.no_grad(), OneDNN(), torch.autocast("cpu", torch.bfloat16):  # as in a forward that a trainer wraps
        assert layer(torch.ones(2, 3)).dtype == torch.bfloat16
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), OneDNN():
        layer(torch.ones(2, 3))
    assert products == []


@needs_onednn
def test_scoring_uses_it_and_training_afterwards_does_not(products):
    model = build_model(400)
    segments = [Segment([5, 6, 7, 8], 2), Segment([9, 8, 7], 1)]
    found = answer_nll(model, segments)
    assert products
    products.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        wanted = answer_nll(model, segments)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert products == []
    np.testing.assert_allclose(found, wanted, rtol=ROUNDING)
