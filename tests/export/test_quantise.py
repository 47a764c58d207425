"""Weight-only quantisation: pure functions, and what onnxruntime computes from them."""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import embeddings
from export.calibrate import DataFree
from export.embeddings import EmbeddingTable, write_table
from export.gptq import gptq_blocks
from export.graph import GraphWriter
from export.quantise import fits_bfloat16, from_bfloat16, quantise_blocks, to_bfloat16
from export.vocabulary import Vocabulary
from halve.errors import InputError


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 100), st.sampled_from([4, 8]), st.sampled_from([16, 32]),
    st.floats(1e-6, 1e3), st.integers(0, 99),
)  # fmt: skip
def test_error_is_at_most_one_step(
    rows: int, columns: int, bits: int, block: int, size: float, seed: int
) -> None:
    weight = (np.random.default_rng(seed).normal(0, size, (rows, columns))).astype(np.float32)
    blocks = quantise_blocks(weight, bits, block, search=False)
    steps = np.repeat(np.abs(blocks.scales.astype(np.float32)), block, axis=1)[:, :columns]
    # The extreme on the side with one code less may be a whole step off, and a scale in 16 bits half a 2048th of
    # itself, which counts as often as a code is large.
    most = 1.001 + 2.0 ** (bits - 12)
    assert (np.abs(blocks.dequantise() - weight) <= steps * most + 1e-12).all()


def test_search_never_makes_the_error_larger() -> None:
    weight = np.random.default_rng(0).standard_t(4, (64, 96)).astype(np.float32)
    plain, searched = (quantise_blocks(weight, 4, 32, search=search) for search in (False, True))
    errors = [np.square(blocks.dequantise() - weight).sum() for blocks in (plain, searched)]
    assert errors[1] < errors[0]


def test_zero_blocks_stay_zero() -> None:
    assert not quantise_blocks(np.zeros((2, 40), np.float32), 4, 32).dequantise().any()


def test_bfloat16_round_trip() -> None:
    values = np.array([1.0, -0.5, 3.140625, 0.0], np.float32)
    assert fits_bfloat16(values)
    assert (from_bfloat16(to_bfloat16(values)) == values).all()
    assert not fits_bfloat16(np.array([0.1], np.float32))


@pytest.mark.parametrize(("bits", "zero_point"), [(32, False), (8, False), (4, False), (4, True)])
def test_onnxruntime_multiplies_what_dequantise_says(tmp_path, bits: int, zero_point: bool) -> None:
    generator = np.random.default_rng(bits)
    weight = generator.normal(0, 0.1, (48, 80)).astype(np.float32)
    bias = generator.normal(0, 1, 48).astype(np.float32)
    x = generator.normal(0, 1, (3, 80)).astype(np.float32)
    graph = GraphWriter(tmp_path, "one", DataFree(zero_point=zero_point))
    out = graph.linear("one", graph.input("x", ["rows", 80]), weight, bias, bits=bits)
    graph.nodes("Identity", [out], ["y"])
    graph.output("y", ["rows", 48])
    graph.save()
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"))
    blocks = quantise_blocks(weight, min(bits, 8), 32, zero_point=zero_point)
    stands_for = weight if bits == 32 else blocks.dequantise()
    expected = x @ stands_for.T + bias
    # Activations are rounded to 8 bits within their own row.
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() < (1e-5 if bits == 32 else 0.03)


@pytest.mark.parametrize(("bits", "stored"), [(32, 32), (8, 8), (4, 4)])
def test_embedding_table(tmp_path, bits: int, stored: int) -> None:
    table = np.random.default_rng(0).normal(0, 1, (50, 72)).astype(np.float32)
    assert write_table(tmp_path, table, bits, 32)["bits"] == stored
    rows = EmbeddingTable(tmp_path, stored, 72)([3, 3, 49])
    assert np.abs(rows - table[[3, 3, 49]]).max() <= {32: 0, 8: 0.02, 4: 0.3}[bits]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_tokens_looked_up_again_are_the_same(
    tmp_path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's rows come out of memory, a prompt's from disk; more rows than are kept push others out."""
    monkeypatch.setattr(embeddings, "KEPT_BYTES", 10 * 4 * 64)
    table = np.random.default_rng(0).normal(0, 1, (200, 64)).astype(np.float32)
    write_table(tmp_path, from_bfloat16(to_bfloat16(table)), 32 if bits == 16 else bits, 32)
    table = EmbeddingTable(tmp_path, bits, 64, Vocabulary(np.arange(0, 400, 2)))
    whole = table(range(0, 400, 2))
    for _ in range(2):
        for token in range(0, 60, 2):
            assert (table([token]) == whole[token // 2]).all()
    assert (table([8, 2, 8]) == whole[[4, 1, 4]]).all()
    with pytest.raises(ValueError, match="read-only"):
        table([2])[:] = 0
    for tokens in ([7], [8, 7], [*range(0, 200, 2), 399], [400], [-1]):
        with pytest.raises(InputError, match=r"trimmed, and token -?\d+ is not in it"):
            table(tokens)


def test_embedding_table_keeps_bfloat16_exactly(tmp_path) -> None:
    table = from_bfloat16(
        np.random.default_rng(0).integers(0, 2**15, (9, 8)).astype(np.uint16) % 17000
    )
    assert write_table(tmp_path, table, 32, 32)["bits"] == 16
    assert (EmbeddingTable(tmp_path, 16, 8)(list(range(9))) == table).all()


def correlated(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and inputs whose columns depend on each other and differ in size."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(0, 0.1, (rows, columns)).astype(np.float32)
    mixed = generator.normal(0, 1, (400, columns // 3)) @ generator.normal(
        0, 1, (columns // 3, columns)
    )
    sizes = np.exp(generator.normal(0, 1, columns))
    return weight, ((mixed + generator.normal(0, 0.3, mixed.shape)) * sizes).astype(np.float32)


@pytest.mark.parametrize("zero_point", [False, True])
def test_gptq_changes_the_output_less_than_rounding(zero_point: bool) -> None:
    weight, x = correlated(24, 90, 0)
    moments = (x.T @ x).astype(np.float64)
    exact = x @ weight.T
    errors = {
        name: float(np.square(x @ blocks.dequantise().T - exact).mean())
        for name, blocks in (
            ("rounded", quantise_blocks(weight, 4, 32, zero_point=zero_point)),
            ("gptq", gptq_blocks(weight, moments, 4, 32, zero_point=zero_point)),
        )
    }
    assert errors["gptq"] < 0.6 * errors["rounded"]


def test_gptq_of_independent_inputs_is_rounding() -> None:
    weight = np.random.default_rng(3).normal(0, 0.1, (8, 64)).astype(np.float32)
    blocks = gptq_blocks(weight, np.eye(64) * 7, 4, 32)
    assert (blocks.codes == quantise_blocks(weight, 4, 32).codes).all()


def test_gptq_takes_columns_that_were_never_read() -> None:
    weight, x = correlated(8, 60, 1)
    x[:, [3, 40]] = 0
    blocks = gptq_blocks(weight, (x.T @ x).astype(np.float64), 4, 32)
    assert np.isfinite(blocks.dequantise()).all()


def test_a_zero_point_helps_lopsided_blocks() -> None:
    weight = np.random.default_rng(5).exponential(1, (16, 64)).astype(np.float32)
    errors = [
        np.square(quantise_blocks(weight, 4, 32, zero_point=zero).dequantise() - weight).sum()
        for zero in (False, True)
    ]
    assert errors[1] < 0.5 * errors[0]
