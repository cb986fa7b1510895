"""Our data-free quantizers beside their peers: error and speed at equal bits and equal format, in one run.

    python benchmarks/quantizers.py [--threads 2] [--rounds 5] [--json FILE]

Peers, each left out aloud if it does not import here: compressed-tensors and llm-compressor, AutoRound without tuning, torchao,
HQQ, bitsandbytes, Meta's llama_models. docs/quantizers.md says how to install them, and shows a run.

The error is that of scale * code in float32 against the bf16 weights, squared, by the squared weights. The tensors: Gaussian and
Student's t with 5 degrees of freedom, 1024 x 4096, and the gate of an expert of the trained demo model. Speed is bf16 read
by a matrix [out, in] larger than the caches; before each call a plain copy of the same bytes is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama4_convert.reference.checkpoint import Checkpoint
from quant.formats.compressed_tensors import unpack_int4
from quant.schemes.fp8 import Fp8
from quant.schemes.int4 import Int4
from quant.schemes.nf4 import Nf4

SHAPE, SPEED_SHAPE, SLOW_ROWS = (1024, 4096), (2048, 8192), 64
SLOW = 0.03  # GB/s; what is slower is timed on SLOW_ROWS rows
EXPERT = "layers.1.feed_forward.experts.0.gate"
GROUP = 128
TOLERANCE = 1e-5  # of the error; NF4's offset is the last bit of a mean, see quant/schemes/nf4.py

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


# The lower references


def exhaustive(bits: np.ndarray, signed: bool) -> float:
    """Relative error if every group had the best of all bf16 scales from a third of amax / 7.5 to a little above it."""
    weights = floats(bits).reshape(-1, GROUP)
    total = 0.0
    for first in range(0, len(weights), 512):
        x = weights[first : first + 512]
        top = np.abs(x).max(1, keepdims=True) / np.float32(7.5)
        start = (top.view(np.uint32) >> 16).astype(np.int32)
        best = np.full(len(x), np.inf, np.float32)
        for step in range(-200, 20):
            scale = floats((start + step).astype(np.uint16))
            units = x / scale
            for sign in (1, -1) if signed else (1,):
                q = np.rint(units) if sign == 1 else -np.rint(units)
                left = sign * units - np.clip(q, -8, 7)
                best = np.minimum(best, np.einsum("ij,ij->i", left, left) * scale[:, 0] ** 2)
        total += float(best.sum(dtype=np.float64))
    return total / float(np.square(weights, dtype=np.float64).sum())


def exhaustive_fp8(x: torch.Tensor) -> float:
    """Relative error if every output had the best of all bf16 scales from amax / 640 to amax / 224: an octave above plain is
    enough, as e4m3 by twice the scale is the same but for the smallest numbers."""
    weights = x.float()
    start = (weights.abs().amax(1) / 448).bfloat16().view(torch.int16)
    best = torch.full((len(x),), torch.inf)
    for step in range(-64, 129):
        scale = (start + step).view(torch.bfloat16).float()[:, None]
        read = (weights / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).float().mul_(scale)
        best = torch.minimum(best, read.sub_(weights).square_().sum(1))
    return float(best.double().sum() / weights.double().square().sum())


# Measuring


def matrices() -> dict[str, torch.Tensor]:
    drawn = {
        "Gaussian": np.random.default_rng(0).standard_normal(SHAPE, np.float32),
        "t5": np.random.default_rng(1).standard_t(5, SHAPE).astype(np.float32),
    }
    found = {name: torch.from_numpy(values / 32).bfloat16() for name, values in drawn.items()}
    checkpoint = Checkpoint.open(Path(str(resources.files("llama4_convert.samples") / "demo_model")))
    expert = next(tensor for tensor in checkpoint.logical_tensors() if tensor.name == EXPERT)
    found["trained"] = torch.from_numpy(np.array(expert.load(None), order="C")).view(torch.bfloat16)
    return found


def relative_error(x: torch.Tensor, read: np.ndarray) -> float:
    weights = x.float().numpy()
    return float(np.square(weights - read, dtype=np.float64).sum() / np.square(weights, dtype=np.float64).sum())


class Speed:
    """Calls timed in turn, a copy of the same bytes before each."""

    def __init__(self) -> None:
        drawn = np.random.default_rng(2).standard_normal(SPEED_SHAPE, np.float32) / 32
        self.x = torch.from_numpy(drawn).bfloat16()
        self.to = torch.empty_like(self.x)
        self.copies: list[float] = []
        self.to.copy_(self.x)  # allocates its pages

    def copy(self) -> float:
        start = time.perf_counter()
        self.to.copy_(self.x)
        self.copies.append(self.x.nbytes / (time.perf_counter() - start) / 1e9)
        return self.copies[-1]

    def one(self, method: Method, slow: bool) -> tuple[float, float]:
        """GB/s, and that as a part of the copy's."""
        x = self.x[:SLOW_ROWS] if slow else self.x
        copied = self.copy()
        start = time.perf_counter()
        method.encode(x)
        speed = x.nbytes / (time.perf_counter() - start) / 1e9
        return speed, speed / copied


def jiffies() -> tuple[float, float]:
    """Seconds that all processors were busy, and that this process was."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), time.process_time()


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    skipped: dict[str, str] = {}
    pool = ThreadPoolExecutor(chosen.threads)
    methods = list(ours(chosen.threads, pool))
    versions = {"torch": torch.__version__, "numpy": np.__version__, "numba": metadata.version("numba")}
    for package, peer in PEERS.items():
        try:
            methods += peer()
            versions[package] = metadata.version(package)
        except Exception as error:  # whatever a package does as it is imported
            skipped[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    if "llmcompressor" in versions:
        versions["compressed-tensors"] = metadata.version("compressed-tensors")

    tensors = matrices()
    rows, stored, slow = [], {}, {}
    for method in methods:
        row: dict[str, Any] = {"by": method.by, "method": method.name, "format": method.format, "bits": method.bits}
        row["error"] = {}
        try:
            for name, x in tensors.items():
                start = time.perf_counter()
                made = method.encode(x)
                if x.nbytes >= 1 << 20:
                    slow[id(method)] = x.nbytes / (time.perf_counter() - start) / 1e9 < SLOW and method.by != "ours"
                row["error"][name] = relative_error(x, method.decode(made))
                if method.stored_bytes:
                    blobs = [np.ascontiguousarray(part).tobytes() for part in method.stored_bytes(made)]
                    if method.by == "ours":
                        stored.setdefault((method.format, name), blobs)  # of int4: plain, the first
                    else:
                        row["same_bytes"] = row.get("same_bytes", True) and blobs == stored[method.format, name]
        except Exception as error:
            if method.by == "ours":
                raise
            skipped[f"{method.by}: {method.name}, {method.format}"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        rows.append(row)
        row["timed"] = method
        print(f"{method.by}: {method.name}, {method.format}", file=sys.stderr)

    speed = Speed()
    before = jiffies(), time.perf_counter()
    times: dict[int, list[tuple[float, float]]] = {}
    for number in range(chosen.rounds):
        for row in rows:
            method = row["timed"]
            if not (slow[id(method)] and number >= min(3, chosen.rounds)):
                times.setdefault(id(method), []).append(speed.one(method, slow[id(method)]))
        print(f"round {number + 1} of {chosen.rounds}", file=sys.stderr)
    after = jiffies(), time.perf_counter()
    for row in rows:
        method = row.pop("timed")
        taken = times[id(method)]
        row["gb_per_s"], row["of_copy"] = (statistics.median(t[i] for t in taken) for i in (0, 1))
        row["timed_rows"] = SLOW_ROWS if slow[id(method)] else SPEED_SHAPE[0]

    for form, signed in ((POSITIVE, False), (SIGNED, True)):
        error = {name: exhaustive(x.view(torch.uint16).numpy(), signed) for name, x in tensors.items()}
        rows.append({"by": "oracle", "method": "every bf16 scale", "format": form, "bits": 4.125, "error": error})
    error = {name: exhaustive_fp8(x) for name, x in tensors.items()}
    rows.append({"by": "oracle", "method": "every bf16 scale", "format": FP8["channel"]})
    rows[-1] |= {"bits": fp8_bits("channel"), "error": error}
    busy = (after[0][0] - before[0][0]) - (after[0][1] - before[0][1])
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "other_work": busy / ((after[1] - before[1]) * (os.cpu_count() or 1)),
        "load_average": os.getloadavg(),
        "copy_gb_per_s": statistics.median(speed.copies),
        "versions": versions,
        "tensors": {name: list(x.shape) for name, x in tensors.items()},
        "rows": rows,
        "skipped": skipped,
    }


# Telling

# Which of ours is held against which peers, by format.
MINE = {POSITIVE: "search, g128", SIGNED: "signed, g128", NF4_DQ: "NF4", NF4_PLAIN: "NF4"} | dict.fromkeys(
    FP8.values(), "FP8 search"
)


def verdicts(told: dict[str, Any]) -> list[dict[str, Any]]:
    """Our error by the peer's for each peer in our format, and whether it is nowhere above 1."""
    found = []
    for form, name in MINE.items():
        mine = next(r for r in told["rows"] if r["by"] == "ours" and r["format"] == form and r["method"] == name)
        for row in told["rows"]:
            # AutoRound's round to nearest also against the scale above zero: the default must not lose to it.
            other = form == POSITIVE and row["method"].startswith("round to nearest")
            if row["by"] == "ours" or (row["format"] != form and not other):
                continue
            ratios = {tensor: mine["error"][tensor] / error for tensor, error in row["error"].items()}
            worse = max(ratios.values()) > 1 + TOLERANCE
            found.append({"ours": name, "format": form, "by": row["by"], "method": row["method"], "ratios": ratios})
            found[-1] |= {"worse": worse and row["by"] != "oracle", "same_bytes": row.get("same_bytes")}
    return found


def tell(told: dict[str, Any]) -> None:
    names = list(told["tensors"])
    print(f"| by | method | format | bits | {' | '.join(names)} | GB/s | of a copy |")
    print("|---" * (len(names) + 6) + "|")
    order = [*MINE, *sorted({row["format"] for row in told["rows"]} - {*MINE})]
    for row in sorted(told["rows"], key=lambda row: order.index(row["format"])):
        errors = " | ".join(f"{row['error'][name]:.5f}" for name in names)
        speed = f"{row['gb_per_s']:.3g} | {row['of_copy']:.2g}" if "gb_per_s" in row else "- | -"
        by = f"**{row['by']}**" if row["by"] == "ours" else row["by"]
        print(f"| {by} | {row['method']} | {row['format']} | {row['bits']:.3f} | {errors} | {speed} |")
    shapes = ", ".join(f"{name} {shape[0]} x {shape[1]}" for name, shape in told["tensors"].items())
    print(
        f"\nRelative squared error ({shapes}), and bf16 read. {told['date']}, {told['machine']}, {told['threads']}"
        f" threads; median of {told['rounds']} rounds, each call beside a copy of the matrix ({told['copy_gb_per_s']:.1f} GB/s)."
        f" Other work took {told['other_work']:.0%} of the cores meanwhile. What is slower than {SLOW} GB/s was timed on"
        f" {SLOW_ROWS} of {SPEED_SHAPE[0]} rows, in 3 rounds."
    )
    print("\nOur error by the peer's, at equal bits and equal format:\n")
    print(f"| ours | against | {' | '.join(names)} | |")
    print("|---" * (len(names) + 3) + "|")
    found = verdicts(told)
    for one in found:
        ratios = " | ".join(f"{one['ratios'][name]:.4f}" for name in names)
        remark = "WORSE" if one["worse"] else "the limit" if one["by"] == "oracle" else "not worse"
        if one["same_bytes"] is not None:
            what = (
                "NF4 codes"
                if "NF4" in one["format"]
                else "bytes of FP8 plain"
                if "FP8" in one["format"]
                else "bytes of our plain"
            )
            remark += f"; {'the' if one['same_bytes'] else 'NOT the'} {what}"
        print(f"| {one['ours']}: {one['format']} | {one['by']}: {one['method']} | {ratios} | {remark} |")
    lost = [one for one in found if one["worse"]]
    peers = sum(one["by"] != "oracle" for one in found)
    print(
        f"\n{'WORSE than a peer in ' + str(len(lost)) if lost else 'Never worse than a peer in any'} of {peers} comparisons."
    )
    for one in lost:
        most = max(one["ratios"].values()) - 1
        print(f"- {one['ours']} by up to {most:.2%}: {one['by']}, {one['method']} ({one['format']})")
    print("\nOther formats with zero points or wider scales, beside ours of the same bits, for orientation:\n")
    print(f"| ours | beside | bits | {' | '.join(names)} |")
    print("|---" * (len(names) + 3) + "|")
    for row in told["rows"]:
        if row["format"].startswith("int4") and row["format"] not in MINE and row["by"] != "ours":
            for mine in told["rows"]:
                if mine["by"] == "ours" and mine["bits"] == row["bits"] and mine["method"].startswith(("se", "si")):
                    ratios = " | ".join(f"{mine['error'][name] / row['error'][name]:.4f}" for name in names)
                    beside = f"{row['by']}: {row['method']}, {row['format']}"
                    print(f"| {mine['method']} | {beside} | {row['bits']:.2f} | {ratios} |")
    print()
    for name, reason in told["skipped"].items():
        print(f"SKIPPED {name}: {reason}")
    if not told["skipped"]:
        print("No peer was skipped.")
    for name, reason in NOT_MEASURED.items():
        print(f"Not measured: {name}: {reason}.")
    print("Versions: " + ", ".join(f"{name} {version}" for name, version in told["versions"].items()) + ".")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    with torch.no_grad():
        told = measure(chosen)
    tell(told)
    if chosen.json:
        chosen.json.write_text(json.dumps(told | {"verdicts": verdicts(told)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
