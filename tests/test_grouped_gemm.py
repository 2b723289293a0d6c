"""The grouped product against its definition, on both backends."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_close, relative_error

import cumoe

SIZES = st.sampled_from([1, 3, 7, 8, 16, 33, 64, 72, 96, 131, 136, 200])


def one_signed(rng, *shape, dtype):
    """Draw numbers near 1 that share a sign in each row: sums of products never cancel, whatever their length."""
    magnitude = rng.uniform(0.5, 1.5, shape)
    return (magnitude * rng.choice([-1, 1], (*shape[:-1], 1))).astype(dtype)


def draw_ids(rng, num_tokens, top_k, num_experts, holes):
    """Draw expert ids; with holes, a third of the slots has no expert."""
    ids = rng.integers(0, num_experts, (num_tokens, top_k)).astype(np.int32)
    if holes:
        ids[rng.random(ids.shape) < 1 / 3] = -1
    return ids


@dataclass
class Product:
    """NumPy operands of a grouped product."""

    ids: np.ndarray
    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None = None
    row_scale: np.ndarray | None = None
    rows: str = "sorted"

    def run(self, backend, dtype=None, transposed=False):
        """Multiply on `backend`, `w` perhaps as the strides of a transposed array; return a NumPy array."""
        w = np.ascontiguousarray(self.w.swapaxes(1, 2)).swapaxes(1, 2) if transposed else self.w
        x, w, bias, scale = map(backend.asarray, (self.x, w, self.bias, self.row_scale))
        groups = cumoe.group(backend.asarray(self.ids), len(self.w))
        y = cumoe.grouped_gemm(x, w, groups, bias, scale, rows=self.rows, dtype=dtype)
        return backend.asnumpy(y)

    def expected(self):
        """Return the product by definition, in float64."""
        groups = cumoe.reference.group(self.ids, len(self.w))
        return cumoe.reference.grouped_gemm(self.x, self.w, groups, self.bias, self.row_scale, rows=self.rows)


def draw_product(rng, dtype, *, num_tokens, top_k, num_experts, n, k, rows, bias=None, row_scale=None, holes=False):
    """Draw a product; `bias` and `row_scale` are their dtypes."""
    num_rows = num_tokens if rows == "tokens" else num_tokens * top_k
    return Product(
        draw_ids(rng, num_tokens, top_k, num_experts, holes),
        one_signed(rng, num_rows, k, dtype=dtype),
        one_signed(rng, num_experts, n, k, dtype=dtype),
        None if bias is None else (0.1 * one_signed(rng, num_experts, n, dtype=np.float64)).astype(bias),
        None if row_scale is None else rng.uniform(0.5, 1.5, (num_tokens, top_k)).astype(row_scale),
        rows,
    )


@settings(max_examples=150)
@given(
    sizes=st.fixed_dictionaries(
        {
            "num_tokens": st.sampled_from([0, 1, 2, 7, 17, 33, 65, 150]),
            "top_k": st.integers(1, 4),
            "num_experts": st.sampled_from([1, 2, 5, 8, 33]),
            "n": SIZES,
            "k": SIZES,
            "rows": st.sampled_from(["sorted", "tokens"]),
            "bias": st.sampled_from([None, *DTYPES.values(), np.float64]),
            "row_scale": st.sampled_from([None, *DTYPES.values(), np.float64]),
            "holes": st.booleans(),
        }
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    out_dtype=st.sampled_from([None, *sorted(DTYPES)]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_grouped_gemm_equals_its_definition(backend, sizes, dtype, out_dtype, transposed, seed):
    """Any shape, dtype, factor and order of axes; rows without an expert are zero."""
    product = draw_product(np.random.default_rng(seed), DTYPES[dtype], **sizes)
    y = product.run(backend, None if out_dtype is None else DTYPES[out_dtype], transposed)
    assert y.dtype == DTYPES[out_dtype or dtype]
    assert_close(y, product.expected(), y.dtype)
    num_grouped = int((product.ids >= 0).sum())
    assert (y[num_grouped:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ["sorted", "tokens"])
@pytest.mark.parametrize("num_tokens", [30, 400])
def test_normal_numbers(backend, dtype, transposed, rows, num_tokens):
    """Signs of their own for every number; several tiles in each direction."""
    rng = np.random.default_rng(num_tokens)
    product = draw_product(
        rng, DTYPES[dtype], num_tokens=num_tokens, top_k=2, num_experts=3, n=264, k=200, rows=rows, row_scale=np.float32
    )
    product.x = rng.standard_normal(product.x.shape).astype(product.x.dtype)
    product.w = rng.standard_normal(product.w.shape).astype(product.w.dtype)
    assert_close(product.run(backend, transposed=transposed), product.expected(), dtype)
    assert_close(product.run(backend, np.float32, transposed), product.expected(), np.float32)  # inputs are exact


def test_the_scale_comes_before_the_bias(backend):
    """It is scale * (x w) + bias, not scale * (x w + bias)."""
    ids, ones = np.array([[0], [1]], np.int32), np.ones((2, 8), np.float32)
    bias, scale = np.array([[100], [200]], np.float32), np.array([[0.5], [2]], np.float32)
    product = Product(ids, ones, np.ones((2, 1, 8), np.float32), bias, scale)
    assert (product.run(backend) == [[104], [216]]).all()


def test_the_scale_belongs_to_the_slot(backend):
    """Sorted rows find the factor of the slot they came from."""
    ids = np.array([[2, 0], [1, 2], [0, 1]], np.int32)
    scale = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    product = Product(ids, np.ones((3, 1), np.float32), np.ones((3, 1, 1), np.float32), row_scale=scale, rows="tokens")
    assert (product.run(backend)[:, 0] == [2, 5, 3, 6, 1, 4]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["sorted", "tokens"])
@pytest.mark.parametrize(("n", "k"), [(72, 136), (5, 3)])
def test_nan_of_slots_without_expert_does_not_leak(backend, dtype, rows, n, k):
    """NaN in rows, scales, weights and biases that no slot uses leaves every row as it is, and their own rows zero."""
    product = draw_product(
        np.random.default_rng(0), DTYPES[dtype], num_tokens=50, top_k=2, num_experts=4, n=n, k=k, rows=rows,
        bias=np.float32, row_scale=np.float32,
    )  # fmt: skip
    product.ids[product.ids == 2] = 3  # nobody chooses expert 2
    product.ids[::3] = -1
    product.ids[1::3, 1] = 4
    clean = product.run(backend)
    groups = cumoe.reference.group(product.ids, 4)
    num_grouped = groups.expert_offsets[-1]
    assert 0 < num_grouped < 100
    if rows == "tokens":
        product.x[::3] = np.nan
    else:
        product.x[num_grouped:] = np.nan
    product.row_scale[(product.ids < 0) | (product.ids > 3)] = np.nan
    product.w[2], product.bias[2] = np.nan, np.nan
    spoiled = product.run(backend)
    assert spoiled.tobytes() == clean.tobytes()
    assert not spoiled[num_grouped:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_its_expert(backend, dtype):
    """A NaN row spoils itself alone, a NaN expert its own rows alone."""
    product = draw_product(
        np.random.default_rng(1), DTYPES[dtype], num_tokens=60, top_k=1, num_experts=4, n=40, k=24, rows="sorted"
    )
    groups = cumoe.reference.group(product.ids, 4)
    row, expert = 3, 2
    product.x[row], product.w[expert, 5] = np.nan, np.nan
    spoiled = np.zeros((60, 40), bool)
    spoiled[row] = True
    spoiled[groups.expert_offsets[expert] : groups.expert_offsets[expert + 1], 5] = True
    assert (np.isnan(product.run(backend).astype(np.float32)) == spoiled).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["sorted", "tokens"])
def test_operands_may_be_any_view(backend, dtype, rows):
    """What lies between the elements is not read: it is NaN."""
    product = draw_product(
        np.random.default_rng(2), DTYPES[dtype], num_tokens=21, top_k=2, num_experts=3, n=40, k=24, rows=rows
    )
    wide_x = np.full((2 * len(product.x), 3 * 24), np.nan, product.x.dtype)
    wide_x[::2, ::3] = product.x
    wide_w = np.full((6, 80, 48), np.nan, product.w.dtype)
    wide_w[::-2, ::2, ::-2] = product.w
    groups = cumoe.group(backend.asarray(product.ids), 3)
    x, w = backend.asarray(wide_x)[::2, ::3], backend.asarray(wide_w)[::-2, ::2, ::-2]
    y = backend.asnumpy(cumoe.grouped_gemm(x, w, groups, rows=rows))
    assert_close(y, product.expected(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_is_a_plain_product(backend, dtype):
    """In token order, since there is nothing to sort."""
    rng = np.random.default_rng(3)
    product = draw_product(rng, DTYPES[dtype], num_tokens=33, top_k=1, num_experts=1, n=48, k=64, rows="sorted")
    y = product.run(backend)
    plain = product.x.astype(np.float64) @ product.w[0].astype(np.float64).T
    assert_close(y, plain, dtype)
    assert relative_error(y[::-1], plain) > 0.1  # rows differ, so their order was compared too
