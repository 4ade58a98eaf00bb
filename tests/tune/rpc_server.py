"""A TVM RPC server for tests, in this process: honest, one that dies, or one that lies.

    python rpc_server.py TRACKER_PORT KEY [dies AFTER | lies AFTER LIBRARY]

It counts libraries that were loaded in a session. One that lies loads LIBRARY in their place, whose
function does nothing but write zeros. Servers of `tvm.rpc.Server` start a process of their own,
which an emulated Python cannot.
"""

from __future__ import annotations

import os
import signal
import sys

from tvm.rpc import server
from tvm.runtime import load_module
from tvm_ffi import register_global_func


def misbehave(kind: str, after: int, library: str) -> None:
    honest_environment = server._server_env

    def environment(*arguments):
        temp = honest_environment(*arguments)
        loaded = 0

        @register_global_func("tvm.rpc.server.load_module", override=True)
        def load(name):
            nonlocal loaded
            loaded += 1
            if loaded <= after:
                return load_module(temp.relpath(name))
            if kind == "dies":
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(1)
            return load_module(library)

        return temp

    server._server_env = environment


if __name__ == "__main__":
    port, key, *fault = sys.argv[1:]
    if fault:
        misbehave(fault[0], int(fault[1]), fault[2] if len(fault) > 2 else "")
    first = 20000 + os.getpid() % 20000
    state = server.PopenRPCServerState(
        "127.0.0.1", first, first + 500, tracker_addr=("127.0.0.1", int(port)), key=key
    )
    state.thread.join()
