"""Pictures in, maps in and out, and colours to look at them: bytes on one side, NumPy arrays on the other.
What is read comes from strangers: every reader checks sizes first and raises only `saccade.errors.InvalidInput`."""

from saccade.formats.colour import colorize_depth, colorize_flow, colorize_mask
from saccade.formats.exr import read_exr, write_exr
from saccade.formats.maps import (
    read_flo,
    read_kitti_flow,
    read_npy,
    read_npz,
    read_pfm,
    read_png,
    to_uint8,
    to_uint16,
    write_flo,
    write_kitti_flow,
    write_npy,
    write_npz,
    write_pfm,
    write_png,
)
from saccade.formats.pictures import read_mask, read_picture

__all__ = [
    "colorize_depth",
    "colorize_flow",
    "colorize_mask",
    "read_exr",
    "read_flo",
    "read_kitti_flow",
    "read_mask",
    "read_npy",
    "read_npz",
    "read_pfm",
    "read_picture",
    "read_png",
    "to_uint8",
    "to_uint16",
    "write_exr",
    "write_flo",
    "write_kitti_flow",
    "write_npy",
    "write_npz",
    "write_pfm",
    "write_png",
]
