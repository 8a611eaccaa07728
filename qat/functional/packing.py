"""Pack codes of a few bits into bytes: little-endian, the first element in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.utils.validate import check_bits

_BYTE = 8


def packed_bytes(n: int, bits: int) -> int:
    """Number of bytes of n packed codes of `bits` bits."""
    return (n * bits + _BYTE - 1) // _BYTE


def _fits(codes: Tensor, bits: int) -> bool:
    """True if each code has at most `bits` bits, as a signed or as an unsigned number."""
    if codes.numel() == 0:
        return True
    return int(codes.min()) >= -(2 ** (bits - 1)) and int(codes.max()) < 2**bits


def _to_bits(values: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits of int16 values (n,), as a stream (n * bits,) of zeros and ones."""
    shifts = torch.arange(bits, device=values.device)
    return ((values.unsqueeze(1) >> shifts) & 1).flatten()


def _from_bits(stream: Tensor, bits: int) -> Tensor:
    """The unsigned values whose bits are the stream; the inverse of `_to_bits`."""
    return (stream.view(-1, bits) << torch.arange(bits, device=stream.device)).sum(1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a stream of bits; element i occupies bits [i * bits, (i + 1) * bits).

    The last byte is padded with zeros.

    Args:
        codes: n integers in [-2^(bits-1), 2^bits - 1], any shape; negative codes are stored in
            two's complement.
        bits: 2 to 8.

    Returns:
        (ceil(n * bits / 8),), uint8.

    Raises:
        ValueError: a code does not fit in `bits` bits.
        UsageError: `bits` is out of range.
    """
    check_bits("bits", bits)
    if not _fits(codes, bits):
        raise ValueError(
            f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits"
        )
    stream = _to_bits(codes.flatten().to(torch.int16), bits)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % _BYTE))
    return _from_bits(stream, _BYTE).to(torch.uint8)


def unpack_codes(
    packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...], *, signed: bool
) -> Tensor:
    """Codes from the bytes of `pack_codes`.

    Args:
        packed: (ceil(n * bits / 8),), uint8.
        bits: 2 to 8.
        shape: shape of the codes.
        signed: True = the highest bit is the sign.

    Returns:
        Codes of this shape, int8 if signed, else uint8.

    Raises:
        ValueError: the shape of `packed` does not match `shape`.
        UsageError: `bits` is out of range.
    """
    check_bits("bits", bits)
    n = torch.Size(shape).numel()
    if packed.shape != (packed_bytes(n, bits),):
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}, "
            f"expected {packed_bytes(n, bits)} bytes for {n} codes of {bits} bits"
        )
    stream = _to_bits(packed.to(torch.int16), _BYTE)[: n * bits]
    codes = _from_bits(stream, bits)
    if not signed:
        return codes.to(torch.uint8).view(shape)
    is_negative = codes >= 2 ** (bits - 1)
    return torch.where(is_negative, codes - 2**bits, codes).to(torch.int8).view(shape)


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack two 4-bit codes per byte, the first code in the lower half.

    Args:
        codes: (..., n), uint8.

    Returns:
        (..., ceil(n / 2)), uint8, padded with zero bits.
    """
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: Tensor, n: int) -> Tensor:
    """Codes (..., n), uint8, from the bytes of `pack_pairs`."""
    pairs = torch.stack((packed & 15, packed >> 4), -1)
    return pairs.flatten(-2)[..., :n]
