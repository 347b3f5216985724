"""The filter of system calls that bubblewrap installs: classic BPF, as Linux's seccomp(2) takes it.

Refused are calls whose memory counts towards no limit of a process (System V shared memory, semaphores and
queues), calls that reach into another process, and parts of the kernel with a record of holes that no answer to
a programming question needs.
"""

import os
import platform
import struct

AMD64, ARM64 = 0xC000003E, 0xC00000B7
"""AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64 of linux/audit.h."""

# fmt: off
REFUSED = {
    #                     x86-64  arm64
    "shmget":            (29,     194),
    "semget":            (64,     190),
    "msgget":            (68,     186),
    "ptrace":            (101,    117),
    "add_key":           (248,    217),
    "request_key":       (249,    218),
    "keyctl":            (250,    219),
    "perf_event_open":   (298,    241),
    "process_vm_readv":  (310,    270),
    "process_vm_writev": (311,    271),
    "bpf":               (321,    280),
    "userfaultfd":       (323,    282),
    "io_uring_setup":    (425,    425),
}
# fmt: on

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # _REFUSE: the call fails with EPERM
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_X32 = 0x40000000  # numbers of amd64's second table, which has every call once more


def program(machine: str) -> bytes | None:
    """The filter for a machine as :func:`platform.machine` names it; None where its numbers are not known."""
    if machine not in ("x86_64", "aarch64"):
        return None
    amd64 = machine == "x86_64"
    numbers = [pair[0] if amd64 else pair[1] for pair in REFUSED.values()]
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, AMD64 if amd64 else ARM64),  # any other is a 32-bit call, with numbers of its own
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, len(numbers) + 1, 0, _X32),
        *((_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def filter_file() -> int | None:
    """A descriptor that holds this machine's filter, None where there is none.

    bubblewrap reads it to its end: whoever uses it again sets it back to the start.
    """
    steps = program(platform.machine())
    if steps is None:
        return None
    descriptor = os.memfd_create("seccomp")
    os.write(descriptor, steps)
    return descriptor
