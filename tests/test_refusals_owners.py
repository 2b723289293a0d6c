"""What is refused of arrays of another library, another device or another kind of memory, and the limits of a GPU."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from refusals import (
    ARRAY,
    FACTORS,
    FLOATS,
    INTEGERS,
    TYPE,
    VALUE,
    assert_refused,
    call_layer,
    experts,
    groups,
    ones,
    routing,
    shared,
    table,
)
from support import CPU, GPU

import cumoe


class Foreign:
    """An array of a library that speaks DLPack and nothing else."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


@pytest.fixture(autouse=True)
def foreign_library(monkeypatch):
    """Let the class above come from a package that can import."""
    library = SimpleNamespace(__name__="foreign", from_dlpack=lambda exporter: Foreign(np.from_dlpack(exporter)))
    monkeypatch.setattr(Foreign, "__module__", "foreign")
    monkeypatch.setitem(sys.modules, "foreign", library)


Homeless = type("Homeless", (Foreign,), {"__module__": "nowhere"})  # its library takes nothing back


def big_endian(*shape, dtype=">f4"):
    return np.ones(shape, dtype)


def read_only(*shape):
    return np.broadcast_to(np.float32(1), shape)


CPU_ROWS = [
    (cumoe.moe, {"x": np.ma.ones((3, 5), np.float32)}, TYPE, "x", ARRAY, "MaskedArray"),
    (cumoe.moe, {"x": big_endian(3, 5)}, TYPE, "x", "dtype float32", "float32 in foreign byte order"),
    (cumoe.route, {"router_logits": big_endian(3, 6)}, TYPE, "router_logits", FLOATS, "foreign byte order"),
    (cumoe.group, {"topk_ids": big_endian(3, 2, dtype=">i4")}, TYPE, "topk_ids", INTEGERS, "foreign byte order"),
    (cumoe.Router, {"selection_bias": big_endian(6)}, TYPE, "selection_bias", FACTORS, "foreign byte order"),
    (cumoe.Experts, {"w_gate_up": big_endian(6, 8, 5)}, TYPE, "w_gate_up", FLOATS, "foreign byte order"),
    (cumoe.Experts, {"w_down": big_endian(6, 5, 4)}, TYPE, "w_down", "dtype float32", "foreign byte order"),
    (cumoe.SharedExperts, {"gate": big_endian(5)}, TYPE, "gate", "dtype float32", "foreign byte order"),
    (cumoe.grouped_gemm, {"w": big_endian(6, 4, 5)}, TYPE, "w", "dtype float32", "foreign byte order"),
    (cumoe.moe, {"out": read_only(3, 5)}, VALUE, "out", "a writable array", "a read-only one"),
    (cumoe.combine, {"out": read_only(3, 5)}, VALUE, "out", "a writable array", "a read-only one"),
    (call_layer, {"out": read_only(3, 5)}, VALUE, "out", "a writable array", "a read-only one"),
    (cumoe.route, {"router_logits": read_only(2**30, 6)}, VALUE, "num_tokens", "below 2^31", "1073741824"),
    (cumoe.group, {"topk_ids": np.broadcast_to(0, (2**30, 2))}, VALUE, "num_tokens", "below 2^31", "1073741824"),
    (call_layer, {"x": read_only(2**30, 5)}, VALUE, "num_tokens", "below 2^31", "1073741824"),
    (cumoe.moe, {"x": Foreign(ones(3, 5))}, TYPE, "x", "a numpy array on cpu, like experts", "a foreign array on cpu"),
    (cumoe.moe, {"out": Foreign(ones(3, 5))}, TYPE, "out", "a numpy array on cpu, like x", "a foreign array on cpu"),
    (cumoe.moe, {"shared": lambda a: shared(Foreign)}, TYPE, "shared", "a numpy array", "a foreign array on cpu"),
    (cumoe.moe, {"experts": lambda a: experts(Foreign)}, TYPE, "x", "a foreign array on cpu", "a numpy array on cpu"),
    (cumoe.moe, {"routing": lambda a: routing(Foreign)}, TYPE, "topk_ids", "a numpy array", "a foreign array on cpu"),
    (cumoe.Experts, {"w_down": Foreign(ones(6, 5, 4))}, TYPE, "w_down", "a numpy array", "a foreign array on cpu"),
    (cumoe.MoE, {"router_weight": Foreign(ones(6, 5))}, TYPE, "router_weight", "a numpy array", "a foreign array"),
    (cumoe.combine, {"groups": lambda a: groups(Foreign)}, TYPE, "permutation", "a numpy array", "a foreign array"),
    (cumoe.route, {"router": lambda a: cumoe.Router(2, selection_bias=Foreign(ones(6)))}, TYPE, "selection_bias",
     "a numpy array on cpu, like router_logits", "a foreign array on cpu"),
    (cumoe.moe, {"x": Foreign(ones(3, 5), (10, 0))}, TYPE, "x", "on the CPU or on a CUDA device", "device type 10"),
    (cumoe.moe, {"x": Homeless(ones(3, 5))}, TYPE, "x", "whose library has from_dlpack", "nowhere.Homeless"),
]  # fmt: skip

GPU_ROWS = [
    (cumoe.moe, {"x": lambda a: ones(3, 5)}, TYPE, "x", "a cupy array on cuda:0, like experts", "a numpy array"),
    (cumoe.moe, {"experts": lambda a: experts(CPU.asarray)}, TYPE, "x", "a numpy array on cpu", "a cupy array"),
    (cumoe.moe, {"shared": lambda a: shared(CPU.asarray)}, TYPE, "shared", "a cupy array", "a numpy array on cpu"),
    (cumoe.moe, {"routing": lambda a: routing(CPU.asarray)}, TYPE, "topk_ids", "a cupy array", "a numpy array on cpu"),
    (cumoe.Experts, {"w_down": lambda a: ones(6, 5, 4)}, TYPE, "w_down", "a cupy array", "a numpy array on cpu"),
    (cumoe.combine, {"groups": lambda a: groups(CPU.asarray)}, TYPE, "permutation", "a cupy array", "a numpy array"),
    (cumoe.moe, {"out": lambda a: a(ones(3, 10))[:, ::2]}, VALUE, "out", "a C-contiguous array on a GPU", "strides"),
    (cumoe.route, {"router_logits": ones(3, 1025)}, VALUE, "num_experts", "an int from 1 to 1024 on a GPU", "1025"),
    (cumoe.group, {"num_experts": 1025}, VALUE, "num_experts", "an int from 1 to 1024 on a GPU", "1025"),
    (cumoe.expert_load, {"num_experts": 1025}, VALUE, "num_experts", "an int from 1 to 1024 on a GPU", "1025"),
    (cumoe.MoE, {"experts": lambda a: experts(a, 1025)}, VALUE, "num_experts", "1 to 1024 on a GPU", "1025"),
]  # fmt: skip


def test_a_foreign_library_is_accepted():
    """An exporter goes in and one of its library comes out."""
    y = cumoe.moe(Foreign(ones(3, 5)), routing(Foreign), experts(Foreign), shared(Foreign))
    assert type(y) is Foreign
    assert (y.array == cumoe.moe(ones(3, 5), routing(CPU.asarray), experts(CPU.asarray), shared(CPU.asarray))).all()


@table(CPU_ROWS)
def test_refused_on_the_cpu(row):
    """What only a NumPy array can be, and arrays of two libraries."""
    assert_refused(CPU, *row)


@pytest.mark.gpu
@table(GPU_ROWS)
def test_refused_on_a_gpu(row):
    """NumPy arrays beside CuPy arrays, and the limits of the kernels."""
    assert_refused(GPU, *row)
