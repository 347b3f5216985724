"""The first thing in the box: sets the limits, runs the program and reports that it returned.

Its text is handed to ``python -c``, for the folder it lies in is not in the box. Arguments: the descriptor of the
report and the length of the program in bytes. Standard input: the program, then the secret.
"""

import os
import resource
import sys
from typing import Any

SECRET_BYTES = 32
BEGUN = b"begun\n"
"""The first report: from here on the program's time counts."""

LIMITS = {
    resource.RLIMIT_NPROC: 4,  # one is bubblewrap's
    resource.RLIMIT_AS: 1 << 30,
    resource.RLIMIT_FSIZE: 1 << 20,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CPU: 4,
    resource.RLIMIT_CORE: 1,  # 0 would still start a host's crash reporter; 1 starts none and is too small for a file
}


def main(report: int, length: int) -> None:
    """Run the program and write the secret to ``report`` when it has returned."""
    write, read = os.write, os.read
    program = read_exactly(length).decode("utf-8", "surrogatepass")
    if sys.platform == "linux":  # elsewhere there is no box either, and other systems refuse some of the limits
        for limit, value in LIMITS.items():
            resource.setrlimit(limit, (value, value))
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    sys.addaudithook(refuse_to_look)
    write(report, BEGUN)
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
        # The order within this expression is what keeps the secret. It is read first and lies, while the program
        # runs, on the evaluation stack of this frame: no name, container or attribute leads to it. All names are
        # looked up before the program begins, so it cannot put itself in their place; what is called after it is
        # C code. slice(None) is what becomes of exec's result, and takes the whole of the secret.
        write(report, read(0, SECRET_BYTES)[slice(exec(code, {}))])  # type: ignore[func-returns-value]
    except BaseException:
        sys.__excepthook__(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def read_exactly(length: int) -> bytes:
    """The next ``length`` bytes of standard input, and not one more."""
    parts = []
    while length:
        part = os.read(0, length)
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def refuse_to_look(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook against what shows an evaluation stack or memory, or moves a frame past its tests.

    The sets are constants of the code, so that a program which gets hold of this frame cannot empty them. A
    subinterpreter would be free of the hook. The files of these modules are not in the box either
    (``bubblewrap.HIDDEN_MODULES``); but some builds of Python have modules without a file.
    """
    if event in {"sys.settrace", "sys.setprofile", "sys.monitoring.register_callback"}:
        raise RuntimeError(f"{event} is refused to a program under test")
    if event == "import" and args[0] in {"_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters"}:
        raise ImportError(f"{args[0]} is refused to a program under test")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
