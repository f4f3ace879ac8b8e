"""Threads of the CPU kernels: workers that enter a compiled loop once and wait there on an atomic counter.

A Python thread pool would cost more than most of the products. Workers hold no GIL; idle ones sleep. There are as many
as torch has threads, less the caller's.
"""

import atexit
import contextlib
import ctypes
import os
import threading

import torch

from .llvm_microvlm import BUILDING, arch_of, built_once, compile_ir, native_available
from .packing_microvlm import round_up

# 64-bit words of a pool's state, each on its own 128 bytes so that no two share a cache line
FIELDS = (
    *("generation", "next", "inside", "open", "busy", "sleepers", "stop"),
    *("kernel", "args", "total", "chunk", "limit", "wake", "wait"),
)
SPINS = 2000  # pauses before a worker sleeps: 30 to 100 microseconds, the gap between two products of a decode step
PAUSE = {"x86_64": "call void @llvm.x86.sse2.pause()", "aarch64": "call void @llvm.aarch64.hint(i32 1)"}

# share: run chunks of the open job until none is left. worker: share in every job until stopped.
# run: post a job, share, wait. run_many: run jobs in order.
#
# A job is open while its caller works on it. A worker says that it is inside before it looks whether the job is open,
# and the caller closes the job before it looks whether someone is inside (atomics are sequentially consistent). So the
# words of a job never change under a worker. A worker that spins in vain counts itself as a sleeper and blocks in
# read() on a pipe; the next caller takes the count and writes as many bytes. A caller that finds the pool busy runs its
# job alone.
POOL_IR = """
declare void @llvm.x86.sse2.pause()
declare void @llvm.aarch64.hint(i32)
declare i64 @read(i32, ptr, i64)
declare i64 @write(i32, ptr, i64)
declare i32 @sched_yield()

define void @share(ptr %pool) {
  FIELDS
  %f = load ptr, ptr %kernel
  %a = load ptr, ptr %args
  %n = load i64, ptr %total
  %size = load i64, ptr %chunk
  br label %head
head:
  %i = atomicrmw add ptr %next, i64 1 seq_cst
  %begin = mul i64 %i, %size
  %more = icmp slt i64 %begin, %n
  br i1 %more, label %work, label %done
work:
  %full = add i64 %begin, %size
  %short = icmp slt i64 %n, %full
  %end = select i1 %short, i64 %n, i64 %full
  call void %f(ptr %a, i64 %begin, i64 %end)
  br label %head
done:
  ret void
}

define void @worker(ptr %pool) {
entry:
  FIELDS
  %byte = alloca i8
  br label %idle
idle:
  %seen = phi i64 [ 0, %entry ], [ %seen, %awake ], [ %now, %leave ]
  br label %spin
spin:
  %i = phi i64 [ 0, %idle ], [ %i1, %again ]
  %now = load atomic i64, ptr %generation seq_cst, align 8
  %same = icmp eq i64 %now, %seen
  br i1 %same, label %again, label %changed
again:
  PAUSE
  %i1 = add i64 %i, 1
  %patient = icmp eq i64 %i1, SPINS
  br i1 %patient, label %tired, label %spin
tired:
  %count = atomicrmw add ptr %sleepers, i64 1 seq_cst
  %last = load atomic i64, ptr %generation seq_cst, align 8
  %still = icmp eq i64 %last, %seen
  br i1 %still, label %sleep, label %awake
sleep:
  %pipe = load i64, ptr %wait
  %fd = trunc i64 %pipe to i32
  %got = call i64 @read(i32 %fd, ptr %byte, i64 1)
  br label %awake
awake:
  br label %idle
changed:
  %stopped = load atomic i64, ptr %stop seq_cst, align 8
  %end = icmp ne i64 %stopped, 0
  br i1 %end, label %done, label %enter
enter:
  %others = atomicrmw add ptr %inside, i64 1 seq_cst
  %opened = load atomic i64, ptr %open seq_cst, align 8
  %is_open = icmp ne i64 %opened, 0
  %most = load atomic i64, ptr %limit seq_cst, align 8
  %is_free = icmp slt i64 %others, %most
  %join = and i1 %is_open, %is_free
  br i1 %join, label %work, label %leave
work:
  call void @share(ptr %pool)
  br label %leave
leave:
  %left = atomicrmw sub ptr %inside, i64 1 seq_cst
  br label %idle
done:
  ret void
}

define void @run(ptr %pool, ptr %f, ptr %a, i64 %n, i64 %size, i64 %helpers) {
  FIELDS
  %none = icmp eq ptr %pool, null
  br i1 %none, label %alone, label %try
try:
  %taken = atomicrmw xchg ptr %busy, i64 1 seq_cst
  %is_busy = icmp ne i64 %taken, 0
  br i1 %is_busy, label %alone, label %post
alone:
  call void %f(ptr %a, i64 0, i64 %n)
  ret void
post:
  store ptr %f, ptr %kernel
  store ptr %a, ptr %args
  store i64 %n, ptr %total
  store i64 %size, ptr %chunk
  store atomic i64 %helpers, ptr %limit seq_cst, align 8
  store atomic i64 0, ptr %next seq_cst, align 8
  store atomic i64 1, ptr %open seq_cst, align 8
  %before = atomicrmw add ptr %generation, i64 1 seq_cst
  %asleep = atomicrmw xchg ptr %sleepers, i64 0 seq_cst
  %any = icmp ne i64 %asleep, 0
  br i1 %any, label %rouse, label %work
rouse:
  %pipe = load i64, ptr %wake
  %fd = trunc i64 %pipe to i32
  %wrote = call i64 @write(i32 %fd, ptr %pool, i64 %asleep)
  br label %work
work:
  call void @share(ptr %pool)
  store atomic i64 0, ptr %open seq_cst, align 8
  br label %wait_all
wait_all:
  %i = phi i64 [ 0, %work ], [ %i1, %again ], [ 0, %yield ]
  %busy_workers = load atomic i64, ptr %inside seq_cst, align 8
  %waiting = icmp ne i64 %busy_workers, 0
  br i1 %waiting, label %again, label %done
again:
  PAUSE
  %i1 = add i64 %i, 1
  %patient = icmp eq i64 %i1, SPINS
  br i1 %patient, label %yield, label %wait_all
yield:
  %y = call i32 @sched_yield()
  br label %wait_all
done:
  store atomic i64 0, ptr %busy seq_cst, align 8
  ret void
}

define void @run_many(ptr %pool, ptr %jobs, i64 %n, i64 %helpers) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %first = shl i64 %i, 2
  %place0 = getelementptr i64, ptr %jobs, i64 %first
  %place1 = getelementptr i64, ptr %place0, i64 1
  %place2 = getelementptr i64, ptr %place0, i64 2
  %place3 = getelementptr i64, ptr %place0, i64 3
  %kernel = load ptr, ptr %place0
  %arguments = load ptr, ptr %place1
  %total = load i64, ptr %place2
  %chunk = load i64, ptr %place3
  call void @run(ptr %pool, ptr %kernel, ptr %arguments, i64 %total, i64 %chunk, i64 %helpers)
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


@built_once
def pool_functions():
    """Compile POOL_IR for this CPU; returns its `run`, `worker` and `run_many`."""
    arch = arch_of()
    fields = "\n".join(f"  %{name} = getelementptr [16 x i64], ptr %pool, i64 {i}" for i, name in enumerate(FIELDS))
    # without the intrinsics of other CPUs
    lines = [line for line in POOL_IR.splitlines() if "@llvm" not in line or arch in line.replace("x86", "x86_64")]
    source = "\n".join(lines).replace("FIELDS", fields).replace("SPINS", str(SPINS))
    address = compile_ir("generic", source.replace("PAUSE", PAUSE.get(arch, "")))
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    types = {
        "run": ctypes.CFUNCTYPE(None, pointer, pointer, ctypes.c_char_p, i64, i64, i64),
        "worker": ctypes.CFUNCTYPE(None, pointer),
        "run_many": ctypes.CFUNCTYPE(None, pointer, pointer, i64, i64),
    }
    return tuple(type_(address(name)) for name, type_ in types.items())


class ThreadPool:
    """Threads that stay in the compiled `worker`, without the GIL, until `stop`."""

    def __init__(self, workers: int):
        self.workers = workers
        # the state, aligned to cache lines
        self.buffer = ctypes.create_string_buffer(128 * (len(FIELDS) + 1))
        self.address = round_up(ctypes.addressof(self.buffer), 128)
        # sleepers read from a pipe
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self.write("wait", self.pipe[0])
        self.write("wake", self.pipe[1])
        _, loop, _ = pool_functions()
        options = {"target": loop, "args": (self.address,), "daemon": True, "name": "microvlm-kernels"}
        self.threads = [threading.Thread(**options) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def write(self, field: str, value: int) -> None:
        ctypes.c_int64.from_address(self.address + 128 * FIELDS.index(field)).value = value

    def stop(self) -> None:
        self.write("stop", 1)
        self.write("generation", 2**62)
        os.write(self.pipe[1], bytes(self.workers))
        for thread in self.threads:
            thread.join()

    def __del__(self):  # not in `stop`: a caller may still be about to write
        for end in self.pipe:
            os.close(end)


pool: ThreadPool | None = None
local = threading.local()


def stop_pool() -> None:
    """End the workers, which must not run in code that the interpreter frees."""
    global pool
    stopped, pool = pool, None
    if stopped is not None:
        stopped.stop()


def forget_pool() -> None:
    """Forget the workers in a forked child, which has no threads."""
    global pool
    pool = None


atexit.register(stop_pool)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_pool)


@contextlib.contextmanager
def kernel_threads():
    """Leave this thread's share of the cores to the kernels.

    Torch's own operations run on one thread meanwhile. Threads of OpenMP wait by spinning, in the way of the workers
    here, so a small operation of torch between two products would cost more than both.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not native_available():
        yield
        return
    local.threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del local.threads


def helper_count() -> int:
    """Return how many workers help this thread: torch's threads less one."""
    return (getattr(local, "threads", None) or torch.get_num_threads()) - 1


def pool_of(helpers: int) -> ThreadPool | None:
    """Return a pool with at least this many workers; the caller holds it while a call runs in it."""
    global pool
    if not helpers:
        return None
    chosen = pool
    if chosen is None or chosen.workers < helpers:
        with BUILDING:
            if pool is None or pool.workers < helpers:
                stop_pool()
                pool = ThreadPool(helpers)
            chosen = pool
    return chosen


def run(kernel: int, arguments: bytes, total: int, chunk: int) -> None:
    """Run kernel(arguments, begin, end) over 0 to total, shared in chunks."""
    helpers = helper_count()
    workers = pool_of(helpers if total > chunk else 0)
    pool_functions()[0](workers and workers.address, kernel, arguments, total, chunk, helpers)


def run_many(jobs: ctypes.Array, count: int) -> None:
    """Run jobs in order: four 64-bit words each, the arguments of `run`."""
    helpers = helper_count()
    workers = pool_of(helpers)
    pool_functions()[2](workers and workers.address, jobs, count, helpers)
