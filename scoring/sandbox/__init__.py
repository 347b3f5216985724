"""Runs programs that a model wrote, each in a box of its own, and says which of them passed their tests.

A program is one text: the answer, its tests and the call that runs them, as HumanEval has it. It gets an
interpreter of its own (the standard library alone, no packages) inside bubblewrap.

What is held off, whoever starts it, root included:

* The host. A program sees /usr and the interpreter's prefix, read-only, an empty /tmp and /dev/shm of limited
  size, and nothing else: no home, no /proc, no /sys, no network, no environment, no other process. It has no
  capability, a uid that owns nothing and no way to make namespaces.
* The machine. Processes, address space, size of files, descriptors and processor time are limited
  (``child.LIMITS``), system calls that get memory past those limits are refused (``seccomp``), and a cgroup bounds
  all of it together where one is writable. Without one, the three processes that a program can have may hold 1 GiB
  each while its time lasts. When the verdict is there or the time is over, all that it started is killed.
* A verdict without the tests. Passed means that a secret reached the watcher, after the tests returned. The secret
  is different for each program, never in a variable, a file or the environment (``child.main``), so leaving early
  with any exit status, printing what a passing run prints, walking the frames, asking the garbage collector, tracing,
  ctypes, replacing built-ins, exit handlers and writing to every descriptor do not pass.

What is not: answer and tests share one interpreter, as they do in HumanEval's own harness. An answer that
returns objects equal to everything, or replaces the tests while they run, passes them; so does one that brings
machine code or made-up bytecode to search the memory of its own interpreter. Either is a false score and no way
out of the box. A hole in the kernel is one; the box makes holes harder to reach, but a virtual machine of its own
is the better place for programs of a real enemy.
"""

from scoring.sandbox.messages import Outcome
from scoring.sandbox.pool import available, run_programs

__all__ = ["Outcome", "available", "run_programs"]
