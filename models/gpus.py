"""GPUs by name: memory, peak and bandwidth. Imports nothing heavy."""

import difflib
import os
import re
from dataclasses import dataclass, replace

from common.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know of a device."""

    name: str
    memory: int
    """Bytes that the driver reports as the device's own: less than the number on the box."""
    peak: float | None = None
    """Dense bf16 FLOP/s, without sparsity and with fp32 accumulation; None when it is not known."""
    bandwidth: float | None = None
    """Bytes a second of its memory; None when it is not known."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a processor's share of main memory rather than a GPU."""
        return self.name == "cpu"


# Dense bf16 peaks and bandwidths from the makers' datasheets: NVIDIA A100 (2020), H100 (2022: SXM 989,
# PCIe 756, NVL 835 TFLOP/s a card), H200 (2023), GH200 (2023), B200 (HGX, 2024), L4, L40S (2023), A10,
# A40, RTX A6000 (2020), GeForce RTX 3090 and 4090 (Ada architecture paper: 165 with fp32 accumulation);
# A10G from Amazon's datasheet (70: an A10 with fewer matrix units). Memory is what torch reports as the
# "total capacity" of such cards, in GiB, rounded down; it differs by some tenths between drivers.
_ROWS = (
    # name            words in the device's own name   GiB  TFLOP/s  GB/s
    ("h100-80g",      "H100",                         79.1,   989,  3350),
    ("h100-pcie-80g", "H100 PCIe",                    79.1,   756,  2000),
    ("h100-nvl-94g",  "H100 NVL",                     93.0,   835,  3900),
    ("h200",          "H200",                        139.8,   989,  4800),
    ("gh200-96g",     "GH200",                        94.5,   989,  4000),
    ("b200",          "B200",                        178.3,  2250,  8000),
    ("a100-80g",      "A100",                         79.1,   312,  2039),
    ("a100-40g",      "A100 40GB",                    39.3,   312,  1555),
    ("l40s",          "L40S",                         44.3,   362,   864),
    ("l4",            "L4",                           22.0,   121,   300),
    ("a10",           "A10",                          21.9,   125,   600),
    ("a10g",          "A10G",                         21.9,    70,   600),
    ("a40",           "A40",                          44.3,   150,   696),
    ("rtx-a6000",     "A6000",                        47.4,   155,   768),
    ("rtx-4090",      "RTX 4090",                     23.5,   165,  1008),
    ("rtx-3090",      "RTX 3090",                     23.5,    71,   936),
)  # fmt: skip

GPUS = {name: Gpu(name, int(gib * GIB), peak * 1e12, rate * 1e9) for name, _, gib, peak, rate in _ROWS}
"""The GPUs that can be named, as ``--gpu`` takes them."""

_WORDS = {name: set(words.split()) for name, words, *_ in _ROWS}


def gpu(name: str) -> Gpu:
    """The GPU called ``name``; UserError with the list, closest names first, when there is none."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]

    def distance(known: str) -> tuple[bool, float]:
        return not known.startswith(name.lower()), -difflib.SequenceMatcher(None, name.lower(), known).ratio()

    ranked = sorted(GPUS, key=distance)
    raise UserError(f"no GPU is called {name!r}; the GPUs are {', '.join(ranked)} (closest first)")


def named_by(device_name: str) -> Gpu | None:
    """The GPU that a device's own name (``NVIDIA A100-SXM4-40GB``) means, or None.

    The row counts whose words are all in the name, the longest of several. A MIG slice carries the name of
    the card that it is a part of, so it counts as unknown.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    known = [name for name, needed in _WORDS.items() if needed <= words]
    return GPUS[max(known, key=lambda name: len(_WORDS[name]))] if known and "MIG" not in words else None


def here(device_name: str, memory: int) -> Gpu:
    """A device that is there, with the memory that its driver reports, whether or not it is in the table."""
    known = named_by(device_name)
    return replace(known, memory=memory) if known else Gpu(device_name, memory)


def cpu(memory: int) -> Gpu:
    """A processor with its share of main memory."""
    return Gpu("cpu", memory)


def cpu_here(sharers: int) -> Gpu:
    """This machine's processor, whose memory so many processes share."""
    return cpu(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // sharers)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s by its own name, or None when it is not in the table."""
    known = named_by(device_name)
    return known.peak if known else None
