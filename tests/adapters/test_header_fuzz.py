"""10,000 hostile safetensors files for the header's parser, beside the reference implementation's own parser in Rust.

Whatever ours accepts the reference accepts, and both see the same tensors with the same bytes. Whatever ours refuses it
refuses with a HeaderError that names a known code, within two seconds of a processor.
"""

import io
import json
import re
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loradock_adapters.codes import codes
from loradock_adapters.errors import HeaderError
from loradock_adapters.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, TensorInfo, parse_header
from loradock_testing.checkpoints import Tensor, f32, safetensors_bytes, with_header, zeros

safetensors = pytest.importorskip("safetensors")

CASES = {"raw bytes": 2_000, "mutated": 5_000, "described": 3_000}
MOST_S = 2.0
"""The processor's time for one file."""
fuzzed = settings(suppress_health_check=list(HealthCheck))


def accepts(raw: bytes) -> bool:
    """Whether our parser takes a file; fails where the two parsers disagree in the dangerous direction."""
    try:
        found = parse_header(io.BytesIO(raw), len(raw), "x.safetensors")
    except HeaderError as error:
        refusal = error
    else:
        _agree(found, raw)
        return True
    assert refusal.problems
    assert all(problem.code in codes() and problem.fix for problem in refusal.problems)
    assert all(str(problem).isascii() and str(problem).isprintable() for problem in refusal.problems)
    return False


def _agree(found: Mapping[str, TensorInfo], raw: bytes) -> None:
    """The reference reads the same tensors with the same bytes."""
    reference = {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(raw)
    }
    assert {
        name: (info.dtype, info.shape, raw[info.offsets[0] : info.offsets[1]]) for name, info in found.items()
    } == reference


def outcomes(cases: int, files: st.SearchStrategy[bytes]) -> Counter[bool]:
    """How many of so many files were accepted and refused."""
    counted: Counter[bool] = Counter()

    @settings(fuzzed, max_examples=cases)
    @given(files)
    def each(raw: bytes) -> None:
        began_s = time.thread_time()
        counted[accepts(raw)] += 1
        assert time.thread_time() - began_s < MOST_S

    each()
    return counted


def test_there_are_ten_thousand_cases() -> None:
    assert sum(CASES.values()) == 10_000


lengths = st.integers(0, 80) | st.sampled_from([2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
raw_files = st.binary(max_size=300) | st.builds(
    lambda length, brace, body: struct.pack("<Q", length) + brace + body,
    lengths,
    st.sampled_from([b"", b"{", b"{}", b'{"']),
    st.binary(max_size=120),
)


def test_raw_bytes_are_refused_or_read_as_the_reference_reads_them() -> None:
    assert outcomes(CASES["raw bytes"], raw_files)[False] > 500


SEEDS: list[dict[str, Tensor]] = [
    {},
    {"a": f32(2, 3)},
    {"model.q.lora_A.weight": f32(2, 4), "model.q.lora_B.weight": f32(4, 2)},
    {"x": zeros("BF16", 3), "y": zeros("I8"), "z": zeros("F64", 2, 1)},
    {"empty": zeros("F16", 0, 7), "full": zeros("U8", 5)},
]
WHOLE = [safetensors_bytes(tensors, metadata) for tensors in SEEDS for metadata in (None, {"format": "pt"})]
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9.eE+]+|[\[\]{},:]|\s+|.', re.DOTALL)
PIECES = [
    b"0", b"-0", b"-1", b"1", b"2", b"8", b"24", b"1e1", b"1.0", b"00", b"18446744073709551615", b"true", b"null",
    b"18446744073709551616", b"9" * 400, b"NaN", b'""', b'"a"', b'"F32"', b'"f32"', b'"F4"', b'"BOOL"', b'"dtype"',
    b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"\\ud800"', b'"\\u0000"', b'"\xff"', b"[", b"]", b"{", b"}",
    b",", b":", b" ", b"\t\n", b"\x00", b"[" * 200, b'{"a":' * 50, b'{"format":"pt"}', b"[0,0]", b"/**/",
    b"[4294967296,4294967296,0]",
]  # fmt: skip
Step = tuple[str, int, bytes]


def _in_header(change: Callable[[list[bytes], int, bytes], None]) -> Callable[[bytes, int, bytes], bytes]:
    """A change of the header's tokens that leaves the length before it right."""

    def changed(raw: bytes, place: int, piece: bytes) -> bytes:
        length = min(struct.unpack("<Q", raw[:8].ljust(8, b"\0"))[0], max(0, len(raw) - 8))
        tokens = TOKEN.findall(raw[8 : 8 + length])
        if tokens:
            change(tokens, place % len(tokens), piece)
        return with_header(b"".join(tokens), raw[8 + length :])

    return changed


def _replace(tokens: list[bytes], place: int, piece: bytes) -> None:
    tokens[place] = piece


def _insert(tokens: list[bytes], place: int, piece: bytes) -> None:
    tokens.insert(place, piece)


def _delete(tokens: list[bytes], place: int, _: bytes) -> None:
    del tokens[place]


def _double(tokens: list[bytes], place: int, _: bytes) -> None:
    tokens[place:place] = [*tokens[place : place + 9], b","]


def _swap(tokens: list[bytes], place: int, _: bytes) -> None:
    tokens[place], tokens[place * 7 % len(tokens)] = tokens[place * 7 % len(tokens)], tokens[place]


STEPS: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "replace": _in_header(_replace),
    "insert": _in_header(_insert),
    "delete": _in_header(_delete),
    "double": _in_header(_double),
    "swap": _in_header(_swap),
    "pad": lambda raw, place, _: with_header(raw[8:].split(b"}}", 1)[0] + b"}}" + b" " * place, raw[-24:]),
    "flip": lambda raw, place, _: bytes(b ^ (1 << place % 8) if i == place else b for i, b in enumerate(raw)),
    "length": lambda raw, place, _: struct.pack("<Q", place) + raw[8:],
    "cut": lambda raw, place, _: raw[: len(raw) - place],
    "more": lambda raw, place, piece: raw + piece * (place % 3),
}


def _mutated(seed: int, steps: list[Step]) -> bytes:
    raw = WHOLE[seed]
    for step, place, piece in steps:
        raw = STEPS[step](raw, place, piece)
    return raw


mutated_files = st.builds(
    _mutated,
    st.integers(0, len(WHOLE) - 1),
    st.lists(st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 200), st.sampled_from(PIECES)), max_size=3),
)


def test_mutated_files_are_refused_or_read_as_the_reference_reads_them() -> None:
    counted = outcomes(CASES["mutated"], mutated_files)
    assert min(counted[True], counted[False]) > 300, counted


sizes = st.sampled_from([0, 0, 1, 2, 3, 4, 8, 2**32, 2**48, 2**63, 2**64, -1])
tensors = st.tuples(
    st.sampled_from(["a", "b", "a.b", "", "__metadata__", "é", "a\n"]),
    st.sampled_from([*DTYPE_BITS, "F33", "f32"]),
    st.lists(sizes, max_size=3),
    st.sampled_from([0, 0, 0, 1, 8, -8, 2**40]),
)


def _described(entries: list[tuple[str, str, list[int], int]], extra_bytes: int) -> bytes:
    """Entries that follow one another as they should, except where a slip says otherwise."""
    header: dict[str, object] = {}
    position = 0
    for name, dtype, shape, slip in entries:
        bits = DTYPE_BITS.get(dtype, 8)
        for size in shape:
            bits *= size
        end = position + (bits // 8 if bits < 2**20 else 0)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end + slip]}
        position = max(end, 0)
    return with_header(json.dumps(header).encode(), bytes(position + extra_bytes))


described_files = st.builds(_described, st.lists(tensors, max_size=3), st.sampled_from([0, 0, 0, 0, 1, 8]))


def test_described_tensors_are_refused_or_read_as_the_reference_reads_them() -> None:
    counted = outcomes(CASES["described"], described_files)
    assert min(counted[True], counted[False]) > 100, counted


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"[]," * 600_000 + b"[]]}",
        b'{"a":[' + b"1," * 900_000 + b"1]}",
        b"{" + b",".join(b'"%d":1' % number for number in range(200_000)) + b"}",
        b'{"a":' * 300_000,
        b"[" * 2_000_000,
        b'{"' + b"a" * 2_000_000 + b'":1}',
    ],
    ids=["lists", "numbers", "keys", "deep_objects", "deep_lists", "long_key"],
)
def test_hostile_header_takes_no_more_memory_than_thirty_times_its_bytes(body: bytes) -> None:
    raw = with_header(body)
    tracemalloc.start()
    try:
        assert not accepts(raw)
        assert tracemalloc.get_traced_memory()[1] < 30 * len(raw)
    finally:
        tracemalloc.stop()


def test_header_of_more_values_than_any_checkpoint_is_refused_before_it_is_parsed() -> None:
    raw = with_header(b'{"a":[' + b"1," * 2_100_000 + b"1]}")
    with pytest.raises(HeaderError) as caught:
        parse_header(io.BytesIO(raw), len(raw), "x.safetensors")
    assert [problem.code for problem in caught.value.problems] == ["header_too_many"]
