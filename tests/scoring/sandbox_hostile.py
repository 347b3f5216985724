"""Programs that attack the box they run in. Each would pass if its attack worked; none may.

SECRET_VARIABLE, CANARY (a file that everyone on the host may read) and PORT (where the host listens) are replaced
by the test's own.
"""

FORGERIES = {
    "leaves with status 0": "import os; os._exit(0)",
    "raises SystemExit": "import sys; sys.exit(0)",
    "becomes another program": "import os; os.execv('/usr/bin/env', ['env', 'true'])",
    "prints what a passing run prints": "import os; print('begun\\npassed', flush=True); os._exit(0)",
    "leaves in a child": "import os\nif os.fork() == 0: os._exit(0)\nos.wait()\nos._exit(0)",
    "leaves from an exit handler": "import atexit, os; atexit.register(os._exit, 0); assert False",
    "leaves from the except hook": """
import os, sys
sys.excepthook = sys.__excepthook__ = lambda *_: os._exit(0)
assert False
""",
    "leaves from a finaliser": "import os\nclass A:\n  def __del__(self): os._exit(0)\na = A()\nassert False",
    "reads the secret again": """
import os
for source in range(64):
    try:
        os.set_blocking(source, False)
        said = os.read(source, 1000)
    except OSError:
        continue
    for report in range(3, 64):
        try: os.write(report, said)
        except OSError: pass
os._exit(0)
""",
    "writes to every descriptor": """
import os
for report in range(64):
    try: os.write(report, bytes(32)); os.write(report, b"begun\\n" + bytes(32))
    except OSError: pass
os._exit(0)
""",
    "walks the frames": """
import os, signal, sys
def report(frame):
    while frame:
        code, spaces = frame.f_code, (frame.f_locals, frame.f_globals)
        values = [value for space in spaces for value in space.values()]
        for value in [*values, *code.co_consts, *(item for value in values if type(value) is tuple for item in value)]:
            if isinstance(value, bytes) and len(value) == 32:
                for number in range(3, 64):
                    try: os.write(number, value)
                    except OSError: pass
                os._exit(0)
        frame = frame.f_back
signal.signal(signal.SIGALRM, lambda _, frame: report(frame))
signal.setitimer(signal.ITIMER_REAL, 0.01)
while signal.getitimer(signal.ITIMER_REAL)[0]: pass
for frame in sys._current_frames().values(): report(frame)
try: raise KeyError
except KeyError as error: report(error.__traceback__.tb_frame)
os._exit(0)
""",
    "asks the garbage collector": """
import gc, os, sys
things = gc.get_objects()
frame = sys._getframe()
while frame:
    things += [frame, *gc.get_referrers(frame)]
    frame = frame.f_back
for thing in things:
    for secret in gc.get_referents(thing):
        if isinstance(secret, bytes) and len(secret) == 32:
            for number in range(3, 64):
                try: os.write(number, secret)
                except OSError: pass
            os._exit(0)
os._exit(0)
""",
    "reads its own memory": "open('/proc/self/mem', 'rb')",
    "calls C": "import ctypes; ctypes.string_at(id(b'x'), 8)",
    "calls C under another name": """
import importlib.util, pathlib, math
path, = pathlib.Path(math.__file__).parent.glob("_ctypes.*")
importlib.util.module_from_spec(importlib.util.spec_from_file_location("x._ctypes", path))
""",
    "makes an interpreter without hooks": """
import importlib.util, pathlib, math
path, = pathlib.Path(math.__file__).parent.glob("_xxsubinterpreters.*")
inner = importlib.util.module_from_spec(importlib.util.spec_from_file_location("x._xxsubinterpreters", path))
inner.run_string(inner.create(), "import ctypes")
""",
    "empties the audit hook": """
import sys
try: sys.settrace(print)
except RuntimeError as error: frame = error.__traceback__.tb_next.tb_frame
frame.f_globals.update(refuse_to_look=print, event="")
frame.f_locals.update(event="")
assert frame.f_code.co_name == "refuse_to_look"
sys.settrace(None)
""",
    "jumps over its tests": """
import sys
def jump(frame, event, _):
    if event == "line" and frame is program and frame.f_lineno == 10:
        frame.f_lineno = 11
    return jump
program = sys._getframe()
program.f_trace = jump
sys.settrace(jump)
assert False
x = 1
""",
    "replaces built-ins": """
import builtins, os, sys
def quiet(*_, **__): return None
class Quiet(Exception):
    def __init__(self, *_): os._exit(0)
for name in ("exec", "compile", "slice", "isinstance"): setattr(builtins, name, quiet)
builtins.AssertionError = Quiet
os.write = os.read = quiet
sys.modules["__main__"].main = quiet
sys._getframe().f_back.f_globals.update(read_exactly=quiet, BEGUN=b"")
assert False
""",
}

ESCAPES = {
    "reaches the host's network": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "has a network": """
import socket
assert [name for _, name in socket.if_nameindex() if name != "lo"]
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
""",
    "reads a file of the host": "open('CANARY').read()",
    "writes over a file of the host": "open('CANARY', 'w').write('taken')",
    "lists a home": "import os, pathlib; assert [*os.scandir('/home')] or [*os.scandir('/root')]",
    "reads /etc": "open('/etc/passwd').read()",
    "reads the environment": """
import os, glob
said = str(os.environ) + "".join(open(path).read() for path in glob.glob("/proc/*/environ"))
assert "SECRET_VARIABLE" in said
""",
    "writes outside its folder": """
import os, sys
done = 0
for folder in ("/", "/usr", "/usr/bin", "/dev", "/etc", "/lib", "/root", "/home", sys.prefix, os.__file__[:-6]):
    try: open(folder + "/palmtop-was-here", "w"); done += 1
    except OSError: pass
assert done
""",
    "mounts": """
import subprocess
tries = ["mount -o remount,rw /usr", "mount -o remount,rw /", "mount -t tmpfs x /tmp", "mount -t proc x /tmp",
         "umount -l /usr", "mount --bind /tmp /usr", "nsenter -t 1 -m true"]
assert any(subprocess.run(words.split()).returncode == 0 for words in tries)
""",
    "makes namespaces": """
import subprocess
tries = ["unshare --user --map-root-user true", "unshare --net true", "unshare --mount true", "bwrap --bind / / true"]
assert any(subprocess.run(words.split()).returncode == 0 for words in tries)
""",
    "sets the kernel's settings": "open('/proc/sys/kernel/hostname', 'w').write('taken')",
    "becomes root": """
import os
done = 0
for become, *words in (os.setuid, 0), (os.setgroups, [0]), (os.chroot, "/tmp"), (os.mknod, "/tmp/a", 0o60600):
    try: become(*words); done += 1
    except OSError: pass
assert done
""",
    "raises its own limits": """
import resource
done = 0
for limit in range(16):
    try: resource.setrlimit(limit, (1 << 40, 1 << 40)); done += 1
    except (OSError, ValueError): pass
assert any(resource.getrlimit(l)[0] > 1 << 30 for l in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE))
""",
    "kills all it can": """
import os, signal
for process in (os.getppid(), 1, 0 - 1, *range(3, 2000)):
    try: os.kill(process, signal.SIGKILL)
    except OSError: pass
os._exit(0)
""",
}

GREED = {
    "forks without end": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "forks six children": "import os, time\nfor _ in range(6):\n  if os.fork() == 0: time.sleep(60)",
    "starts a hundred threads": """
import threading, time
for _ in range(100): threading.Thread(target=time.sleep, args=[9]).start()
""",
    "loops without end": """
import signal
for number in (1, 2, 3, 13, 14, 15, 24): signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "sleeps": "import time; time.sleep(60)",
    "waits for input": "input()",
    "takes 10 GB": "x = bytearray(10 << 30)",
    "takes 10 GB by and by": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "takes memory in each child": """
import os, time
for _ in range(3):
    try:
        if os.fork() == 0: break
    except OSError: pass
x = bytearray(900 << 20)
for place in range(0, len(x), 4096): x[place] = 1
time.sleep(60)
""",
    "fills shared memory": """
total = 0
for folder in ("/dev/shm", "/tmp"):
    for number in range(200):
        try: open(f"{folder}/{number}", "wb").write(bytes(1 << 20)); total += 1
        except OSError: break
assert total > 90
""",
    "fills memory files": """
import os
total = 0
for _ in range(500):
    try:
        file = os.memfd_create("x")
        total += os.write(file, bytes(1 << 24))
    except OSError: break
assert total > 100 << 20
""",
    "takes System V memory": "import subprocess; subprocess.run(['ipcmk', '-M', '1000'], check=True)",
    "writes a big file": "with open('/tmp/x', 'wb') as file: file.write(bytes(2 << 20))",
    "opens a hundred files": "x = [open('/dev/null') for _ in range(100)]",
    "writes without end": "while True: print('x' * 10000)",
    "leaves a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(60)
    os._exit(0)
os.wait()
os._exit(0)
""",
    "recurses without end": "import sys; sys.setrecursionlimit(10**9)\nf = lambda: f() or f()\nf()",
    "recurses in C": "import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "is deep to parse": "(" * 100_000 + ")" * 100_000,
    "dumps core": "import os; os.abort()",
    "holds an open quotation": 'x = """',
    "is no text": "\ud800 \x00",
}

PROGRAMS = FORGERIES | ESCAPES | GREED
