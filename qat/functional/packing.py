"""Codes of a few bits side by side in bytes: little-endian, the first element in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.utils.validate import check_bits

_BYTE = 8


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits take, side by side."""
    return (n * bits + _BYTE - 1) // _BYTE


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Put codes side by side, element i in bits [i * bits, (i + 1) * bits) of the stream; the last byte is filled up with zeros.

    Args:
        codes: whole numbers of any shape; signed ones in [-2^(bits-1), 2^(bits-1)-1] as two's complement.
        bits: 2 to 8.

    Returns:
        (ceil(n * bits / 8),), uint8.

    Raises:
        ValueError: a code has more bits.
    """
    check_bits("bits", bits)
    if codes.numel() and not (
        -(2 ** (bits - 1)) <= int(codes.min()) and int(codes.max()) < 2**bits
    ):
        raise ValueError(
            f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits"
        )
    flat = codes.flatten().to(torch.int16)
    stream = ((flat.unsqueeze(1) >> torch.arange(bits, device=flat.device)) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % _BYTE)).view(-1, _BYTE)
    return (stream << torch.arange(_BYTE, device=flat.device)).sum(1).to(torch.uint8)


def unpack_codes(
    packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...], *, signed: bool
) -> Tensor:
    """What `pack_codes` was given.

    Args:
        packed: (ceil(n * bits / 8),), uint8.
        bits: 2 to 8.
        shape: of the codes.
        signed: the highest bit is the sign.

    Returns:
        int8 where signed, else uint8.

    Raises:
        ValueError: not as many bytes as the shape needs.
    """
    check_bits("bits", bits)
    n = torch.Size(shape).numel()
    if packed.shape != (packed_bytes(n, bits),):
        raise ValueError(
            f"{tuple(packed.shape)} bytes for {n} codes of {bits} bits, expected {packed_bytes(n, bits)}"
        )
    stream = (
        (packed.unsqueeze(1).to(torch.int16) >> torch.arange(_BYTE, device=packed.device)) & 1
    ).flatten()[: n * bits]
    codes = (stream.view(-1, bits) << torch.arange(bits, device=packed.device)).sum(1)
    if signed:
        codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return codes.to(torch.int8 if signed else torch.uint8).view(shape)


def pack_pairs(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the lower half: (..., n) to (..., ceil(n / 2)), uint8."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_pairs(packed: Tensor, n: int) -> Tensor:
    """The n codes of each row that `pack_pairs` was given."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :n]
