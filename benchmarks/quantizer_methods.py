"""The quantizers that quantizers.py compares: ours and the peers', each with the format that it writes and its bits a weight."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quant.formats.compressed_tensors import unpack_int4
from quant.schemes.fp8 import Fp8
from quant.schemes.int4 import Int4
from quant.schemes.nf4 import Nf4

SHAPE, SPEED_SHAPE, SLOW_ROWS = (1024, 4096), (2048, 8192), 64
SLOW = 0.03  # GB/s; what is slower is timed on SLOW_ROWS rows
GROUP = 128

# Formats whose errors are compared: the same codes, the same kind of scale, the same bits.
POSITIVE = "int4 symmetric g128"
SIGNED = "int4 symmetric g128, scale of either sign"
SIGNED_FP16 = "int4 symmetric g128, fp16 scale of either sign"  # AutoRound's own; in a bf16 model runtimes want bf16
NF4_DQ, NF4_PLAIN = "NF4 64, double quantization", "NF4 64"
FP8 = {"channel": "FP8 e4m3 per output", "block": "FP8 e4m3 by 128 x 128", "tensor": "FP8 e4m3 per matrix"}


@dataclass
class Method:
    """A quantizer. `encode` is what is timed, `decode` gives float32 [N, K]."""

    by: str
    name: str
    format: str
    bits: float
    encode: Callable[[torch.Tensor], Any]  # of bf16 [N, K]
    decode: Callable[[Any], np.ndarray]
    stored_bytes: Callable[[Any], list[np.ndarray]] | None = (
        None  # all that is stored, if ours must be equal byte for byte
    )


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def times_scale(codes: Any, scale: Any) -> np.ndarray:
    """Codes [N, K] times a scale for each group [N, K / group], in float32."""
    codes, scale = (np.asarray(a.float() if isinstance(a, torch.Tensor) else a, np.float32) for a in (codes, scale))
    groups = codes.reshape(*scale.shape, -1)
    return (groups * scale[..., None]).reshape(codes.shape)


# Ours


def ours(threads: int, pool: ThreadPoolExecutor) -> Iterator[Method]:
    how: dict[str, Any] = {"in_out": False, "threads": threads, "pool": pool}

    def bits(x: torch.Tensor) -> np.ndarray:
        return x.view(torch.uint16).numpy()

    for method, form in (("plain", POSITIVE), ("search", POSITIVE), ("signed", SIGNED)):
        for group in (GROUP, 64, 32):
            scheme = Int4(group, method)
            yield Method(
                "ours",
                f"{method}, g{group}",
                form if group == GROUP else form.replace(f"g{GROUP}", f"g{group}"),
                4 + 16 / group,
                lambda x, scheme=scheme: scheme.quantize(bits(x), **how),
                lambda made, scheme=scheme: scheme.dequantize(made.packed, made.scale, dtype="F32"),
                lambda made: [made.packed, made.scale],
            )
    for double, form in ((True, NF4_DQ), (False, NF4_PLAIN)):
        scheme = Nf4(64, double)
        yield Method(
            "ours",
            "NF4",
            form,
            nf4_bits(double),
            lambda x, scheme=scheme: (scheme.quantize(bits(x), **how), tuple(x.shape)),
            lambda made, scheme=scheme: scheme.dequantize(
                made[0].packed,
                scheme.scales(made[0].absmax, made[0].nested_absmax, made[0].offset),
                made[1],
                dtype="F32",
            ),
            lambda made: [made[0].packed],
        )
    for granularity, form in FP8.items():
        for method in ("plain", "search"):
            scheme = Fp8(granularity, method)
            yield Method(
                "ours",
                f"FP8 {method}",
                form,
                fp8_bits(granularity),
                lambda x, scheme=scheme: scheme.quantize(bits(x), **how),
                lambda made, scheme=scheme: scheme.dequantize(made.codes, made.scale, dtype="F32"),
                lambda made: [made.codes, made.scale],
            )


def nf4_bits(double: bool) -> float:
    return 4 + (8 / 64 + 32 / 64 / 256 if double else 32 / 64)


def fp8_bits(granularity: str, scale: int = 16) -> float:
    rows, columns = SHAPE
    return 8 + scale / {"channel": columns, "block": GROUP * GROUP, "tensor": rows * columns}[granularity]


# Peers


def llm_compressor() -> Iterator[Method]:
    """The observers' scales, then compressed-tensors' own codes: what oneshot writes without calibration data."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from llmcompressor.observers import Observer

    def encode(x: torch.Tensor, observer: str, args: dict[str, Any], options: dict[str, Any]) -> Any:
        how = QuantizationArgs(symmetric=True, observer=observer, **args)
        seen = Observer.load_from_registry(observer, base_name="weight", args=how, **options)
        found = seen(x).get_qparams()
        kind = torch.int8 if how.num_bits == 4 else torch.float8_e4m3fn
        codes = quantize(x, found["scale"], found["zero_point"], how, dtype=kind)
        return pack_to_int32(codes, 4) if how.num_bits == 4 else codes, found["scale"]

    wide = {"norm": 2.0, "maxshrink": 0.5, "patience": 50}
    observers: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("min-max", "memoryless_minmax", {}),
        ("memoryless_mse", "memoryless_mse", {}),
        ("memoryless_mse, norm 2, to half the range", "memoryless_mse", wide),
    )
    for name, observer, options in observers:
        int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
        yield Method(
            "llm-compressor",
            name,
            POSITIVE,
            4 + 16 / GROUP,
            lambda x, o=observer, a=int4, k=options: encode(x, o, a, k),
            lambda made: times_scale(unpack_int4(made[0].numpy()), made[1]),
            (lambda made: [raw(made[0]), raw(made[1])]) if observer == "memoryless_minmax" else None,
        )
    for granularity, form in FP8.items():
        for name, observer, options in observers[:2]:
            fp8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": granularity}
            if granularity == "block":
                fp8["block_structure"] = [GROUP, GROUP]
            yield Method(
                "llm-compressor",
                name,
                form,
                fp8_bits(granularity),
                lambda x, o=observer, a=fp8, k=options: encode(x, o, a, k),
                lambda made: read_fp8(*made),
                (lambda made: [raw(made[0]), raw(made[1])]) if observer == "memoryless_minmax" else None,
            )


def read_fp8(codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    wide = scale.float()
    if wide.ndim == 2 and wide.shape[1] > 1:
        rows, columns = codes.shape
        wide = wide.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[:rows, :columns]
    return (codes.float() * wide).numpy()


def autoround() -> Iterator[Method]:
    """Its functions of the modes without tuning (iters 0), no importance matrix. It stores scales as fp16; in
    compressed-tensors' format they are as the weights, bf16."""
    from auto_round.data_type import QUANT_FUNC_WITH_DTYPE

    def encode(x: torch.Tensor, function: str, kept: torch.dtype) -> Any:
        x = x.float()
        _, scale, _ = QUANT_FUNC_WITH_DTYPE[function](x, bits=4, group_size=GROUP, scale_dtype=kept)
        scale = scale.reshape(len(x), -1).to(kept)
        codes = (x.unflatten(1, (-1, GROUP)) / scale.float()[..., None]).round_().clamp_(-8, 7)
        return codes.to(torch.int8).flatten(1), scale

    for function, name in (
        ("rtn_int_sym", "round to nearest"),
        ("opt_rtn_int_sym", "optimized round to nearest"),
        ("opt_rtn_int_sym_neuqi", "optimized round to nearest, NeUQI"),
    ):
        for kept, of in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
            yield Method(
                "AutoRound",
                f"{name}, {of} scale",
                SIGNED if kept == torch.bfloat16 else SIGNED_FP16,
                4 + 16 / GROUP,
                lambda x, f=function, k=kept: encode(x, f, k),
                lambda made: times_scale(*made),
            )


def torchao() -> Iterator[Method]:
    """IntxWeightOnlyConfig's symmetric ones; for int4 with zero points the functions that Int4WeightOnlyConfig calls before
    it packs for a kernel of CUDA (its plain packing wants mslk)."""
    from torchao.quantization import quant_primitives as qp
    from torchao.quantization.quantize_.workflows import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm

    def symmetric(x: torch.Tensor, mapping: Any, algorithm: Any) -> Any:
        made = IntxUnpackedToInt8Tensor.from_hp(
            x, (1, GROUP), torch.int4, mapping_type=mapping, intx_choose_qparams_algorithm=algorithm
        )
        return made.qdata, made.scale

    kinds = IntxChooseQParamsAlgorithm
    for name, mapping, algorithm in (
        ("intx symmetric", qp.MappingType.SYMMETRIC, kinds.AFFINE),
        ("intx symmetric, no clipping", qp.MappingType.SYMMETRIC_NO_CLIPPING_ERR, kinds.AFFINE),
        ("intx HQQ, scale only", qp.MappingType.SYMMETRIC, kinds.HQQ_SCALE_ONLY),
    ):
        yield Method(
            "torchao",
            name,
            POSITIVE,
            4 + 16 / GROUP,
            lambda x, m=mapping, a=algorithm: symmetric(x, m, a),
            lambda made: times_scale(made[0], made[1].reshape(len(made[0]), -1)),
        )

    def tinygemm(x: torch.Tensor, group: int) -> Any:
        size, limits = (1, group), (torch.int32, 0, 15)
        scale, zero = qp._choose_qparams_affine_tinygemm(
            x, qp.MappingType.ASYMMETRIC, size, *limits, scale_dtype=x.dtype, zero_point_dtype=x.dtype
        )
        return qp._quantize_affine_tinygemm(x, size, scale, zero, *limits), scale, zero

    def hqq(x: torch.Tensor, group: int) -> Any:
        made = qp._choose_qparams_and_quantize_affine_hqq(
            x, nbits=4, group_size=group, axis=1, compute_dtype=x.dtype, device="cpu"
        )
        return made[:3]

    def read(made: Any) -> np.ndarray:
        codes, scale, zero = (t.float() for t in made)
        groups = (codes - 8).reshape(scale.numel(), -1)
        return (groups * scale.reshape(-1, 1) + zero.reshape(-1, 1)).reshape(codes.shape).numpy()

    for name, function in (("int4 tinygemm", tinygemm), ("int4 HQQ", hqq)):
        for group in (GROUP, 64):
            yield Method(
                "torchao",
                name,
                f"int4 with zero point g{group}",
                4 + 32 / group,
                lambda x, f=function, g=group: f(x, g),
                read,
            )


def hqq_package() -> Iterator[Method]:
    from hqq.core.quantize import Quantizer

    def encode(x: torch.Tensor, group: int) -> Any:
        return Quantizer.quantize(x, nbits=4, group_size=group, axis=1, compute_dtype=torch.float16, device="cpu")

    def read(made: Any) -> np.ndarray:
        codes, meta = made
        scale, zero = (meta[name].half().float() for name in ("scale", "zero"))
        unpacked = Quantizer.unpack[meta["packing"]](codes, dtype=torch.float32)
        return ((unpacked - zero) * scale).reshape(meta["shape"]).numpy()

    for group in (GROUP, 64):
        yield Method(
            "HQQ", "HQQ", f"int4 with zero point g{group}", 4 + 32 / group, lambda x, g=group: encode(x, g), read
        )


def bitsandbytes() -> Iterator[Method]:
    import bitsandbytes.functional as bnb

    def read(made: Any) -> np.ndarray:
        packed, state = made
        state.dtype = torch.float32
        return bnb.dequantize_4bit(packed, state).numpy()

    for double, form in ((True, NF4_DQ), (False, NF4_PLAIN)):
        yield Method(
            "bitsandbytes",
            "quantize_4bit",
            form,
            nf4_bits(double),
            lambda x, d=double: bnb.quantize_4bit(x, blocksize=64, compress_statistics=d, quant_type="nf4"),
            read,
            lambda made: [raw(made[0])],
        )


def meta() -> Iterator[Method]:
    """Its int4 is plain torch, but the module wants FBGEMM to be there: an empty one stands in."""
    for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"):
        sys.modules.setdefault(name, types.ModuleType(name))
    from llama_models.quantize_impls import int4_row_quantize, pack_int4

    def encode(x: torch.Tensor) -> Any:
        codes, scale = int4_row_quantize(x)
        return pack_int4(codes), scale

    def read(made: Any) -> np.ndarray:
        packed, scale = made
        codes = torch.stack([packed << 4 >> 4, packed >> 4], -1).flatten(1)
        return times_scale(codes, scale.T)

    yield Method("Meta", "int4_row_quantize", "int4 symmetric g128, fp32 scale", 4 + 32 / GROUP, encode, read)


PEERS = {
    "llmcompressor": llm_compressor,
    "auto-round": autoround,
    "torchao": torchao,
    "hqq": hqq_package,
    "bitsandbytes": bitsandbytes,
    "llama-models": meta,
}


# What needs more than a CPU and a wheel, said in every run.
NOT_MEASURED = {
    "torchao's Int4WeightOnlyConfig as a whole": "it packs for a kernel of CUDA or wants mslk; measured is what it calls before",
    "Meta's FP8": "torch.ops.fbgemm.quantize_fp8_per_row runs on CUDA only; for its int4 an empty fbgemm_gpu stands in",
    "AutoRound with tuning or an importance matrix": "these need calibration data",
}
