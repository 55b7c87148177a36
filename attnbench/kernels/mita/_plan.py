"""Sizes of tiles, splits and buffers, from the shape alone: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .._define import power


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def even_splits(programs: int, most: int, sms: int) -> int:
    """The fewest splits of `programs` equal programs, up to two a multiprocessor or `most`, that end soonest if each takes turns alone.

    An H100 reads no faster with two of them a multiprocessor than with one, and each split writes partial sums.
    """
    options = range(1, min(most, max(1, 2 * sms // programs)) + 1)
    return min(options, key=lambda x: (-(-x * programs // sms) / x, x))


LEAST_LENGTH = 128
"""queries of a segment, at least"""


def most_segments(pairs: int, experts: int) -> int:
    """Rows of a table of segments that is large enough whatever the plan says."""
    return pairs // LEAST_LENGTH + experts


@dataclass(frozen=True)
class Plan:
    """Launch sizes of one shape. Lengths are in rows; `*_warps` are warps a program."""

    prec: str
    """precision of products of float32: three tensor-core products make up one, to about 2^-21; 16-bit types ignore it"""
    gate_prec: str
    """the same for the gate, which holds all landmarks at once and so runs out of shared memory first"""
    dim: int
    dim_v: int
    """head dimensions padded to a power of two"""
    landmarks: int
    """M padded to a power of two, at least 16"""
    block_m: int
    """landmarks a tile"""
    block_k: int
    """selected keys a tile"""
    pool_block: int
    probe_block: int
    """keys a block of the landmark pass"""
    probe_tiles: int
    probe_splits: int
    chunk: int
    """keys a chunk"""
    group: int
    """chunks a group"""
    gate_rows: int
    gate_block: int
    gate_warps: int
    tile: int
    """queries that the attention kernel reads at a time"""
    length: int
    """queries of one expert in a segment, which one program of the attention kernels handles at a time"""
    run: int
    """segments that a program of the forward pass's attention handles"""
    grad_tile: int
    """queries that the kernels of the backward pass read at a time"""
    stream: int
    """queries whose landmark gradients are summed by one program"""
    key_block: int
    """keys a block of the landmark pass's backward"""
    key_splits: int
    finish_block: int
    """queries a program that adds pooling's share to dq"""
    attend_stages: int
    query_stages: int
    select_warps: int
    select_block: int
    """keys that the selection scores at a time"""
    select_stages: int
    attend_warps: int
    attend_ahead: bool
    """whether the attention kernel asks a tile ahead which its queries are"""
    query_warps: int
    """of the kernel that makes gradients of queries"""
    select_regs: int | None
    attend_regs: int | None
    """registers a thread, at most; None leaves it to the compiler"""
    query_regs: int | None
    fused: bool
    """whether gradients of an expert's keys are summed by the kernel that makes those of its queries"""
    grad_warps: int
    """of the kernels that sum gradients of landmarks"""
    fork: bool
    """whether experts are built on a second stream while queries are routed"""

    def segments(self, pairs: int, experts: int) -> int:
        """Bound on the segments of a head, whose experts are cut by length; without experts, how many there are."""
        return pairs // self.length + min(experts, pairs) if experts else -(-pairs // self.length)


@lru_cache(maxsize=256)
def plan(heads: int, n: int, keys: int, m: int, k: int, s: int, d: int, dv: int, fp32: bool, sms: int) -> Plan:
    """The plan for `heads` = B H heads of n queries and `keys` keys with m landmarks, k keys and s experts a query."""
    dim, dim_v, mp = max(16, power(d)), max(16, power(dv)), max(16, power(m))
    big = fp32 or max(dim, dim_v) > 64
    block_m, block_k = min(mp, 32 if big else 64), min(max(16, power(k)), 32 if big else 64)
    probe_block = 64 if big else 128
    probe_tiles = -(-m // block_m)
    blocks = -(-keys // probe_block)
    chunk = min(32, max(4, power((keys / (16 * k)) ** 0.5 * 0.75)))
    chunks = blocks * probe_block // chunk
    # what the selection's levels search; of equals the smaller group, whose first level reads side by side
    group = min((1 << i for i in range(11)), key=lambda g: (power(chunks / g) + (g > 1) * (power(k) * g + 129), g))
    gate_block = 64
    # at least 4 programs a multiprocessor, and 16 a head where it is long: each of them reads the counts of all of its head
    rows = min(power(heads * n / (4 * sms)), max(512, power(n / 16)), 4096)
    tile = 32 if fp32 else 64
    widest = max(power(chunks / group), power(k) * max(group, chunk))
    prec = "tf32x3" if fp32 else "tf32"
    return Plan(
        prec=prec, gate_prec="ieee" if fp32 and mp * dim > 1 << 14 else prec, dim=dim, dim_v=dim_v, landmarks=mp,
        block_m=block_m, block_k=block_k, pool_block=64 if n // m >= 64 else 32, probe_block=probe_block,
        probe_tiles=probe_tiles, probe_splits=even_splits(heads * probe_tiles, blocks, sms), chunk=chunk, group=group,
        gate_rows=max(rows, gate_block), gate_block=gate_block, gate_warps=8 if mp > 64 else 4,
        tile=tile, length=min(512, max(LEAST_LENGTH, power(heads * n * s / (8 * sms)))), grad_tile=tile,
        # where experts have few queries, reading the landmarks costs as much as they do
        run=4 if 2 * n * s <= 3 * m * tile and heads * m >= 32 * sms else 1,
        stream=min(2048, max(128, power(heads * n / (2 * sms)))),
        key_block=32 if big else 64, key_splits=min(-(-keys // 32), max(1, 2 * sms // heads)), finish_block=64 if dim <= 64 else 32,
        select_warps=4 if widest > 4096 else 2 if widest > 1024 else 1, select_block=32 if big else 64,
        # few programs wait for their keys, many hide it from each other
        select_stages=3 if heads * m <= 8 * sms else 1, attend_ahead=heads * n >= 1 << 20,
        attend_warps=4, attend_stages=2 if big else 1, query_warps=4, query_stages=2 if big else 3,
        select_regs=None if big or widest > 1024 else 96, attend_regs=None if big else 128, query_regs=None,
        fused=k <= block_k, grad_warps=4, fork=True,
    )  # fmt: skip
