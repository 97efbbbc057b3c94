"""Colour profiles made byte by byte (ICC.1:2001-04), and what they mean, by the published formulas and NumPy alone."""

import struct

import numpy as np
from PIL import ImageCms

D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
PRIMARIES = {
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


# --- what colours are -------------------------------------------------------------------------------------------------


def to_xyz(primaries) -> np.ndarray:
    """The matrix from linear RGB of these primaries, white D65, to XYZ."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, white())


def white() -> np.ndarray:
    x, y = D65
    return np.array([x / y, 1, (1 - x - y) / y])


def adapted(xyz: np.ndarray) -> np.ndarray:
    """From D65 to D50, by Bradford's matrix; columns."""
    scale = (BRADFORD @ D50) / (BRADFORD @ white())
    return np.linalg.solve(BRADFORD, scale[:, None] * (BRADFORD @ xyz))


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB's curve (IEC 61966-2-1), which Display P3 has too."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb(values: np.ndarray) -> np.ndarray:
    """Linear values as sRGB's numbers from 0 to 255, not rounded; those outside are at the border."""
    values = np.clip(values, 0, 1)
    return 255 * np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


CURVES = {"Display P3": linear, "Adobe RGB": lambda values: values ** (563 / 256)}


def expected(name: str, pixels: np.ndarray) -> np.ndarray:
    """What (..., 3) pixels, uint8, of this colour space are in sRGB, not rounded."""
    matrix = np.linalg.solve(to_xyz(SRGB), to_xyz(PRIMARIES[name]))
    return srgb(CURVES[name](pixels / 255) @ matrix.T)


# --- profiles ---------------------------------------------------------------------------------------------------------


def of_rgb(name: str) -> bytes:
    curve = curve_of_gamma(563 / 256) if name == "Adobe RGB" else curve_of(linear)
    columns = adapted(to_xyz(PRIMARIES.get(name, SRGB))).T
    tags = {b"rXYZ": xyz(columns[0]), b"gXYZ": xyz(columns[1]), b"bXYZ": xyz(columns[2])}
    return profile(name, b"RGB ", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def of_grey(gamma: float) -> bytes:
    return profile(f"Grey {gamma}", b"GRAY", {b"kTRC": curve_of_gamma(gamma)})


def of_cmyk(lab: np.ndarray) -> bytes:
    """lab: (2, 2, 2, 2, 3), the colour of each corner of ink, L in [0, 100]; between them it is interpolated."""
    codes = np.rint(lab * [2.55, 1, 1] + [0, 128, 128]).clip(0, 255).astype(np.uint8)
    straight = bytes(range(256))
    identity = struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * straight + codes.tobytes() + 3 * straight
    return profile("Four inks", b"CMYK", {b"A2B0": table}, kind=b"prtr", connection=b"Lab ")


def own_srgb() -> bytes:
    """LittleCMS's own sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(name: str, space: bytes, tags: dict, kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    described = name.encode() + b"\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(described)) + described + bytes(4 + 4 + 2 + 1 + 67)
    tags = {b"desc": described, b"cprt": b"text" + bytes(4) + b"nobody's\0", b"wtpt": xyz(D50), **tags}
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        table += signature + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = bytes(4) + struct.pack(">I", 0x02400000) + kind + space + connection
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(24) + bytes(4) + xyz(D50)[8:] + bytes(48)
    return struct.pack(">I", start + len(data)) + head + table + data


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve_of_gamma(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def curve_of(curve) -> bytes:
    values = np.rint(65535 * curve(np.linspace(0, 1, 1024))).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + values.tobytes()
