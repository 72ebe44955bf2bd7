"""Compile the Triton kernels without a GPU, and judge them from the machine code.

The figures are static. They show what is certainly bad (spills, narrow loads, a multiply that missed the tensor cores)
and rank variants of one kernel; they do not predict time.

Compiling needs Triton's compiler and not its interpreter: a process that imported Triton with ``TRITON_INTERPRET=1``
asks a second one through :func:`judge_elsewhere`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits.kernels import (
    triton_groups,
    triton_int,
    triton_pvq,
    triton_rotation,
    triton_row_vectors,
    triton_trellis,
    triton_vectors,
)
from fewbits.kernels.triton_int import GEMV_TILES, RUNS, Tile, gemm_tile, tile_for
from fewbits.quant.formats import parse_format

TIMEOUT = 600


@dataclass(frozen=True)
class Chip:
    """A GPU to compile for and what one of its multiprocessors (compute units) holds.

    Attributes:
        target: Triton's name of it.
        registers: 32-bit registers, of which a warp is given multiples of ``granule`` per lane.
        shared: bytes of shared memory.
        warps: resident warps (waves) at most.
    """

    target: GPUTarget
    registers: int
    granule: int
    shared: int
    warps: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 65536, 8, 164 << 10, 64),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 65536, 8, 228 << 10, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 131072, 8, 64 << 10, 32),
}


@dataclass(frozen=True)
class Job:
    """A kernel at one problem: ``tokens`` times a ``rows`` x ``columns`` weight in groups of ``group`` columns.

    A rotation has no ``bits``; its block is ``group``. Vectors with codebooks of their own are 4 rows or 8 columns, and
    ``bits`` are those of an index. Groups with tables of their own are ``named`` by their format.
    """

    kernel: str
    bits: int
    symmetric: bool = False
    tokens: int = 1
    rows: int = 4096
    columns: int = 4096
    group: int = 128
    dtype: str = "fp16"
    named: str = ""

    @property
    def format(self) -> str:
        if self.named:
            return self.named
        if self.kernel in ROTATIONS:
            return f"had{self.group}"
        if self.kernel in OWN:
            return f"{OWN[self.kernel][0]}{self.bits}_v{OWN[self.kernel][1]}"
        if family := self.kernel.rpartition("_")[0]:
            return f"{family}{self.bits}"
        return f"int{self.bits}{'_sym' if self.symmetric else ''}_g{self.group}"


ROTATIONS = ("rotate_in", "rotate_out")
OWN = {"vq_gemv": ("vq", 4), "vq_gemm": ("vq", 4), "row_gemv": ("pq", 8)}
"""Kernels of codebooks that a weight has of its own -> family of the format, length of a vector."""

QUICK = tuple(Job(kernel, bits, tokens=tokens) for bits in RUNS for kernel, tokens in (("gemv", 1), ("gemm", 256)))
"""Each bit width with each kernel, asymmetric (the larger code)."""


def _coded(family: str, widths: tuple[int, ...]) -> tuple[Job, ...]:
    return tuple(Job(f"{family}_{kernel}", bits, tokens=tokens) for bits in widths
                 for kernel, tokens in (("gemv", 1), ("gemm", 256)))


QUICK += _coded("trellis", (2, 3)) + _coded("rvq", (2,)) + _coded("pvq", (2,))  # points are bytes at every width
QUICK += tuple(Job(kernel, 0) for kernel in ROTATIONS)
QUICK += (Job("vq_gemv", 8), Job("row_gemv", 8))


def _grouped(*names: str) -> tuple[Job, ...]:
    return tuple(Job(f"group_{kernel}", parse_format(name).code_bits, tokens=tokens, named=name) for name in names
                 for kernel, tokens in (("gemv", 1), ("gemm", 256)))


QUICK += _grouped("ternary_g128", "binary2_g128", "binary_g128", "nf4_g64", "bitmod3_g128", "bitmod4_g128", "nvfp4")

FULL = QUICK + _coded("trellis", (1, 4)) + _coded("rvq", (3, 4)) + _coded("vq", (12,)) + (
    Job("vq_gemm", 8, tokens=256), Job("row_gemv", 12),
) + _grouped(
    "ternary_mean_g64", "binary_g32", "binary3_g128", "binary4_mean_g128", "fdb_g64", "seq_row", "nf4_row", "fp3_g16",
    "nupes4_g128", "mxfp4",
) + tuple(
    Job(kernel, 0, group=block, dtype=dtype) for kernel in ROTATIONS for block in (16, 32, 64, 128)
    for dtype in ("fp16", "bf16") if (block, dtype) != (128, "fp16")
) + tuple(
    Job("gemm", bits, symmetric, tokens, dtype=dtype)
    for bits in RUNS for symmetric in (True, False) for dtype in ("fp16", "bf16") for tokens in (16, 64, 256)
    if (symmetric, dtype, tokens) != (False, "fp16", 256)
) + tuple(Job("gemv", bits, symmetric=True) for bits in RUNS)


@dataclass(frozen=True)
class Judgement:
    """What the machine code of one kernel on one chip says.

    Attributes:
        registers: per thread.
        spills: bytes of stack per thread (AMD: spilled vector registers); anything but 0 is a bad tile.
        shared_bytes: shared memory per program.
        occupancy: share of a multiprocessor's warps that can be resident.
        instructions_per_weight: instructions of the hot loop, over the weights a lane decodes there; of a rotation,
            which has no loop, all of them over the values a lane transforms.
        bytes_per_thread_load: mean width of the global loads of the hot loop (16 is the best).
        mma: matrix instruction used, or ``none``.
    """

    kernel: str
    format: str
    chip: str
    tokens: int
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    occupancy: float
    instructions_per_weight: float
    bytes_per_thread_load: float
    mma: str


# -- compiling --------------------------------------------------------------------------------------------------


def arguments(job: Job, chip: Chip) -> tuple[dict[str, object], Tile]:
    """Arguments that the launcher passes for this job, pointers as type names, and its tile."""
    if job.kernel in ROTATIONS:
        return _rotation_arguments(job)
    if job.kernel == "row_gemv":
        return _row_arguments(job)
    if job.named:
        return _grouped_arguments(job)
    if "_" in job.kernel:
        return _coded_arguments(job, chip)
    words = job.columns * job.bits // 32
    group = 0 if job.group == job.columns else job.group
    common = {"p_x": f"*{job.dtype}", "p_w": "*i32", "p_s": "*fp16", "p_z": "*u8", "p_y": f"*{job.dtype}",
              **({"M": job.tokens} if job.kernel == "gemm" else {}), "N": job.rows, "K": job.columns, "words": words}
    strides = {"s_sn": 1, "s_sg": job.rows, "BITS": job.bits, "RUN": RUNS[job.bits], "GROUP": group,
               "SYM": job.symmetric}
    if job.kernel == "gemv":
        tile = tile_for(job.rows, GEMV_TILES)
        return {**common, "s_xm": job.columns, "s_ym": job.rows, **strides, "EVEN": job.columns % tile.b_k == 0,
                "b_n": tile.b_n, "b_r": tile.b_k // RUNS[job.bits]}, tile
    tile = gemm_tile(job.tokens, job.bits, group)
    return {**common, "steps": job.columns // tile.b_k, "s_xm": job.columns, "s_ym": job.rows,
            "s_ys": job.tokens * job.rows, **strides, "EVEN": job.columns % tile.b_k == 0, "WIDE": job.dtype == "fp32",
            "b_m": tile.b_m, "b_n": tile.b_n, "b_k": tile.b_k}, tile


def _coded_arguments(job: Job, chip: Chip) -> tuple[dict[str, object], Tile]:
    family, _, kernel = job.kernel.partition("_")
    module = {"trellis": triton_trellis, "rvq": triton_vectors, "vq": triton_vectors, "pvq": triton_pvq}[family]
    tile = module.GEMV_TILE if kernel == "gemv" else tile_for(job.tokens, module.GEMM_TILES)
    stages, height, entries = (1, OWN[job.kernel][1], 1 << job.bits) if family == "vq" else (job.bits, 8, 256)
    even, nvidia = job.columns % tile.b_k == 0, chip.target.backend == "cuda"
    known: dict[str, object] = {
        "p_x": f"*{job.dtype}", "p_w": {"trellis": "*i32", "rvq": "*u8", "vq": _index(job), "pvq": "*i8"}[family],
        "p_books": "*fp16", "p_s": "*fp32", "p_y": f"*{job.dtype}", "M": job.tokens, "N": job.rows, "K": job.columns,
        "steps": job.columns // tile.b_k, "step": "fp32", "s_xm": job.columns, "s_ym": job.rows,
        "s_ys": job.tokens * job.rows, "BITS": job.bits, "STATES": 16, "STAGES": stages, "HEIGHT": height,
        "ENTRIES": entries, "EVEN": even, "DP4A": nvidia, "WIDE": job.dtype == "fp32", "b_m": tile.b_m,
        "b_n": tile.b_n, "b_k": tile.b_k,
    }
    return {name: known[name] for name in KERNELS[job.kernel].arg_names}, tile


def _grouped_arguments(job: Job) -> tuple[dict[str, object], Tile]:
    fmt = parse_format(job.named)
    assert isinstance(fmt, triton_groups.Format)
    fixed, run = triton_groups.constants(fmt, job.columns), RUNS[fmt.code_bits]
    tile = (triton_groups.gemv_tile(fmt, job.rows) if job.kernel == "group_gemv"
            else tile_for(job.tokens, triton_int.GEMM_TILES))
    known: dict[str, object] = {
        "p_x": f"*{job.dtype}", "p_w": "*i32", "p_c": "*bf16" if job.named == "mxfp4" else "*fp16", "p_t": "*u8",
        "p_book": "*fp32", "p_whole": "*fp32", "p_y": f"*{job.dtype}", "M": job.tokens, "N": job.rows,
        "K": job.columns, "words": job.columns * fmt.code_bits // 32, "steps": job.columns // tile.b_k,
        "s_xm": job.columns, "s_ym": job.rows, "s_ys": job.tokens * job.rows, "s_cn": 1, "s_cp": job.rows,
        "s_cg": job.rows * (fixed["SCALES"] + fixed["MEAN"] or 1), **fixed,  # type: ignore[operator]
        "EVEN": job.columns % tile.b_k == 0, "WIDE": job.dtype == "fp32", "b_m": tile.b_m, "b_n": tile.b_n,
        "b_k": tile.b_k, "b_r": tile.b_k // run,
    }
    return {name: known[name] for name in KERNELS[job.kernel].arg_names}, tile


def _row_arguments(job: Job) -> tuple[dict[str, object], Tile]:
    length = OWN[job.kernel][1]
    tile = triton_row_vectors.gemv_tile(job.columns // length, length)
    return {"p_t": "*fp32", "p_w": _index(job), "p_y": f"*{job.dtype}", "M": job.tokens, "N": job.rows,
            "G": job.columns // length, "ENTRIES": 1 << job.bits, "b_n": tile.b_n, "b_g": tile.b_k // length}, tile


def _index(job: Job) -> str:
    return "*u8" if job.bits == 8 else "*i32"


def _rotation_arguments(job: Job) -> tuple[dict[str, object], Tile]:
    size = job.columns if job.kernel == "rotate_in" else job.rows
    known: dict[str, object] = {
        "p_x": f"*{job.dtype}", "p_s": "*fp32", "p_b": f"*{job.dtype}", "p_y": f"*{job.dtype}", "N": size,
        "BLOCK": job.group, "BIAS": True, "b_n": triton_rotation.VALUES,
    }
    tile = Tile(b_m=1, b_n=triton_rotation.VALUES, b_k=1, warps=1, stages=1)
    return {name: known[name] for name in KERNELS[job.kernel].arg_names}, tile


KERNELS = {
    "gemv": triton_int.int_gemv, "gemm": triton_int.int_gemm,
    "trellis_gemv": triton_trellis.trellis_gemv, "trellis_gemm": triton_trellis.trellis_gemm,
    "rvq_gemv": triton_vectors.vector_gemv, "rvq_gemm": triton_vectors.vector_gemm,
    "vq_gemv": triton_vectors.vector_gemv, "vq_gemm": triton_vectors.vector_gemm,
    "row_gemv": triton_row_vectors.row_gemv,
    "group_gemv": triton_groups.group_gemv, "group_gemm": triton_groups.group_gemm,
    "pvq_gemv": triton_pvq.pvq_gemv, "pvq_gemm": triton_pvq.pvq_gemm,
    "rotate_in": triton_rotation.rotate_in_kernel, "rotate_out": triton_rotation.rotate_out_kernel,
}


def _warps(tile: Tile, chip: Chip) -> int:
    return max(1, tile.warps * 32 // chip.target.warp_size)


def compile_job(job: Job, chip: Chip):
    """Triton's compiled kernel, specialized as a launch is: for 1, for multiples of 16, for aligned pointers."""
    kernel = KERNELS[job.kernel]
    values, tile = arguments(job, chip)
    assert list(values) == list(kernel.arg_names), "arguments() has to follow the kernel's signature"
    constants = {p.name for p in kernel.params if p.is_constexpr} | {n for n, v in values.items() if v == 1}
    signature, attrs, constexprs = {}, {}, {}
    for i, (name, value) in enumerate(values.items()):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "i32"
        if str(value).startswith("*") or (isinstance(value, int) and value % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": _warps(tile, chip), "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=chip.target, options=options)


def judge(job: Job, chip_name: str) -> Judgement:
    chip = CHIPS[chip_name]
    compiled = compile_job(job, chip)
    tile = arguments(job, chip)[1]
    warps = _warps(tile, chip)
    read = _read_nvidia if chip.target.backend == "cuda" else _read_amd
    registers, spills, loop, mma = read(compiled.asm)
    widths = [width for line in loop if (width := load_width(line))]
    return Judgement(
        job.kernel, job.format, chip_name, job.tokens, job.dtype, registers, spills, compiled.metadata.shared,
        occupancy(chip, registers, compiled.metadata.shared, warps),
        round(len(loop) * warps * chip.target.warp_size / (tile.b_n * tile.b_k), 2),
        round(sum(widths) / len(widths), 1) if widths else 0.0, mma)


def judge_elsewhere(jobs: Iterable[Job], chips: Iterable[str] = CHIPS) -> list[dict]:
    """Judgements from a fresh process without the interpreter; raises RuntimeError with its output when it fails."""
    request = json.dumps({"jobs": [asdict(j) for j in jobs], "chips": list(chips)})
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "fewbits.kernels.aot"], input=request, env=env, timeout=TIMEOUT,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling kernels failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


# -- reading machine code ---------------------------------------------------------------------------------------


def _read_nvidia(asm: Mapping[str, object]) -> tuple[int, int, list[str], str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        cubin = asm["cubin"]
        assert isinstance(cubin, bytes)
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True,
                              timeout=TIMEOUT).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    code = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)]
    backward = [(int(m[1], 16), address) for address, line in code
                if (m := re.search(r"\bBRA\S*\s+(?:\S+,\s*)?`?\(?0x([0-9a-f]+)", line)) and int(m[1], 16) < address]
    ends = [address for address, line in code if line.startswith("EXIT")]
    start, end = max(backward, key=lambda b: b[1] - b[0], default=(0, ends[-1]))
    ptx = str(asm["ptx"])
    kinds = {"wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}
    mma = next((name for name, text_of in kinds.items() if text_of in ptx), "none")
    return usage["REG"], usage["STACK"] + usage["LOCAL"], [line for a, line in code if start <= a <= end], mma


def _read_amd(asm: Mapping[str, object]) -> tuple[int, int, list[str], str]:
    text = str(asm["amdgcn"])
    figures = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count):\s*(\d+)", text)}
    lines = [line.split(";")[0].strip() for line in text.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.LBB\d+_\d+:", line)}
    backward = [(labels[m[1]], i) for i, line in enumerate(lines)
                if (m := re.match(r"s_c?branch\S*\s+(\.LBB\d+_\d+)", line)) and labels[m[1]] < i]
    start, end = max(backward, key=lambda b: b[1] - b[0], default=(0, lines.index("s_endpgm")))
    loop = [line for line in lines[start:end + 1] if line and line[0] not in ".#" and not line.endswith(":")]
    mma = "mfma" if "v_mfma" in text else "none"
    return figures["vgpr_count"], figures["vgpr_spill_count"], loop, mma


def load_width(line: str) -> int:
    """Bytes per thread of a global load instruction (NVIDIA or AMD), 0 for any other instruction."""
    if m := re.search(r"\b(?:LDG|LDGSTS)\.(\S+)", line):
        parts = m[1].split(".")
        return next((size for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
                     if suffix in parts), 4)
    if m := re.match(r"(?:global|buffer|flat)_load_(\w+)", line):
        widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}
        return next((size for name, size in widths.items() if m[1].startswith(name)), 4)
    return 0


def occupancy(chip: Chip, registers: int, shared: int, warps: int) -> float:
    """Share of the resident warps that registers and shared memory leave room for."""
    per_warp = -(-max(registers, 1) // chip.granule) * chip.granule * chip.target.warp_size
    programs = min(chip.registers // (per_warp * warps), chip.warps // warps)
    if shared:
        programs = min(programs, chip.shared // shared)
    return round(programs * warps / chip.warps, 2)


def main() -> None:
    """Read ``{"jobs": [...], "chips": [...]}`` from standard input, print the judgements as JSON."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    request = json.load(sys.stdin)
    found = [judge(Job(**job), chip) for job in request["jobs"] for chip in request["chips"]]
    json.dump([asdict(f) for f in found], sys.stdout)


if __name__ == "__main__":
    main()
