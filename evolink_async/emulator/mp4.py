"""The smallest honest video file: H.264 of uncompressed macroblocks (I_PCM) in an MP4 container.

Every frame is an IDR picture of one slice whose macroblocks carry their samples verbatim, so there is no transform,
no prediction and no entropy coding to write, and every player can show it. The deblocking filter is switched off:
what goes in comes out, bit by bit.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

Planes = tuple[bytes, bytes, bytes]

_TIMESCALE = 1000


def encode(frames: Sequence[Planes], width: int, height: int, *, frames_per_second: int) -> bytes:
    """An MP4 file of these frames: planes Y, Cb, Cr in 4:2:0; width and height multiples of 16."""
    if width % 16 or height % 16:
        raise ValueError("width and height must be multiples of 16")
    sps, pps = _sequence_parameters(width, height), _picture_parameters()
    samples = [_with_length(_picture(planes, width, height, n)) for n, planes in enumerate(frames)]
    head = _box(b"ftyp", b"isom", _u32(0x200), b"isomiso2avc1mp41")
    # The index comes first, so that a player can start before the end is there; its size doesn't depend on offsets.
    size = len(_movie(samples, width, height, frames_per_second, sps, pps, 0))
    index = _movie(samples, width, height, frames_per_second, sps, pps, len(head) + size + 8)
    return head + index + _box(b"mdat", *samples)


# --- H.264 -----------------------------------------------------------------------------------------------------


class _Bits:
    """Bits, most significant first."""

    def __init__(self) -> None:
        self._value = 0
        self._count = 0

    def put(self, value: int, count: int) -> None:
        self._value = self._value << count | value
        self._count += count

    def ue(self, value: int) -> None:
        """Unsigned Exp-Golomb."""
        length = (value + 1).bit_length()
        self.put(value + 1, 2 * length - 1)

    def align(self) -> None:
        self.put(0, -self._count % 8)

    def stop(self) -> bytes:
        """The bytes, with the stop bit at the end."""
        self.put(1, 1)
        return self.bytes()

    def bytes(self) -> bytes:
        self.align()
        return self._value.to_bytes(self._count // 8, "big")


def _nal(kind: int, payload: bytes) -> bytes:
    """A NAL unit; three bytes 0 0 0..3 in a row are broken up by a 3, as the standard wants."""
    return bytes([0x60 | kind]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)


def _sequence_parameters(width: int, height: int) -> bytes:
    bits = _Bits()
    bits.put(66, 8)  # baseline profile
    bits.put(0b1100_0000, 8)  # also constrained baseline
    bits.put(30, 8)  # level 3.0: I_PCM is large, lower levels allow too few bits a second
    bits.ue(0)  # seq_parameter_set_id
    bits.ue(0)  # log2_max_frame_num - 4
    bits.ue(2)  # pic_order_cnt_type: output order is decoding order
    bits.ue(0)  # max_num_ref_frames
    bits.put(0, 1)  # no gaps in frame_num
    bits.ue(width // 16 - 1)
    bits.ue(height // 16 - 1)
    bits.put(1, 1)  # frames only
    bits.put(1, 1)  # direct_8x8_inference
    bits.put(0, 1)  # no cropping
    bits.put(0, 1)  # no VUI
    return _nal(7, bits.stop())


def _picture_parameters() -> bytes:
    bits = _Bits()
    bits.ue(0)  # pic_parameter_set_id
    bits.ue(0)  # seq_parameter_set_id
    bits.put(0, 1)  # CAVLC
    bits.put(0, 1)  # no field order
    bits.ue(0)  # one slice group
    bits.ue(0)  # num_ref_idx_l0
    bits.ue(0)  # num_ref_idx_l1
    bits.put(0, 1)  # no weighted prediction
    bits.put(0, 2)
    bits.ue(0)  # pic_init_qp - 26
    bits.ue(0)  # pic_init_qs - 26
    bits.ue(0)  # chroma_qp_index_offset
    bits.put(1, 1)  # deblocking is controlled per slice
    bits.put(0, 1)
    bits.put(0, 1)
    return _nal(8, bits.stop())


def _picture(planes: Planes, width: int, height: int, number: int) -> bytes:
    """One IDR picture."""
    bits = _Bits()
    bits.ue(0)  # first_mb_in_slice
    bits.ue(7)  # an I slice, like all of the picture
    bits.ue(0)  # pic_parameter_set_id
    bits.put(0, 4)  # frame_num
    bits.ue(number % 2)  # idr_pic_id: neighbours differ
    bits.put(0, 1)  # no_output_of_prior_pics
    bits.put(0, 1)  # no long-term reference
    bits.ue(0)  # slice_qp_delta
    bits.ue(1)  # no deblocking
    out = b""
    for top in range(0, height, 16):
        for left in range(0, width, 16):
            bits.ue(25)  # mb_type I_PCM
            out += bits.bytes() + _macroblock(planes, width, top, left)
            bits = _Bits()
    return _nal(5, out + bits.stop())


def _macroblock(planes: Planes, width: int, top: int, left: int) -> bytes:
    luma, cb, cr = planes
    rows = [luma[y * width + left : y * width + left + 16] for y in range(top, top + 16)]
    for plane in (cb, cr):
        start = left // 2
        rows += [plane[y * width // 2 + start : y * width // 2 + start + 8] for y in range(top // 2, top // 2 + 8)]
    return b"".join(rows)


# --- MP4 -------------------------------------------------------------------------------------------------------


def _u16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def _u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _with_length(nal: bytes) -> bytes:
    return _u32(len(nal)) + nal


def _box(kind: bytes, *parts: bytes) -> bytes:
    payload = b"".join(parts)
    return _u32(8 + len(payload)) + kind + payload


def _full(kind: bytes, *parts: bytes, flags: int = 0) -> bytes:
    return _box(kind, _u32(flags), *parts)


_MATRIX = _u32(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def _movie(samples: Sequence[bytes], width: int, height: int, rate: int, sps: bytes, pps: bytes, data_at: int) -> bytes:
    step = _TIMESCALE // rate
    duration = step * len(samples)
    movie_header = _full(
        b"mvhd", _u32(0, 0, _TIMESCALE, duration, 0x10000), _u16(0x100, 0), _u32(0, 0), _MATRIX, bytes(24), _u32(2)
    )
    track_header = _full(
        b"tkhd",
        _u32(0, 0, 1, 0, duration, 0, 0),
        _u16(0, 0, 0, 0),
        _MATRIX,
        _u32(width << 16, height << 16),
        flags=3,
    )
    media = _box(
        b"mdia",
        _full(b"mdhd", _u32(0, 0, _TIMESCALE, duration), _u16(0x55C4, 0)),  # language: undetermined
        _full(b"hdlr", _u32(0), b"vide", bytes(12), b"VideoHandler\0"),
        _box(
            b"minf",
            _full(b"vmhd", bytes(8), flags=1),
            _box(b"dinf", _full(b"dref", _u32(1), _full(b"url ", flags=1))),
            _sample_table(samples, width, height, step, sps, pps, data_at),
        ),
    )
    return _box(b"moov", movie_header, _box(b"trak", track_header, media))


def _sample_table(
    samples: Sequence[bytes], width: int, height: int, step: int, sps: bytes, pps: bytes, data_at: int
) -> bytes:
    config = _box(
        b"avcC", bytes([1, sps[1], sps[2], sps[3], 0xFF, 0xE1]), _u16(len(sps)), sps, b"\1", _u16(len(pps)), pps
    )
    entry = _box(
        b"avc1",
        bytes(6) + _u16(1) + bytes(16) + _u16(width, height) + _u32(0x480000, 0x480000, 0),
        _u16(1) + bytes(32) + _u16(24, 0xFFFF),
        config,
    )
    count = len(samples)
    return _box(
        b"stbl",
        _full(b"stsd", _u32(1), entry),
        _full(b"stts", _u32(1, count, step)),
        _full(b"stsc", _u32(1, 1, count, 1)),
        _full(b"stsz", _u32(0, count, *(len(sample) for sample in samples))),
        _full(b"stco", _u32(1, data_at)),
    )
