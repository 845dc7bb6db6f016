"""An `optin` that starts in milliseconds: a client hands its arguments, environment and streams to a server that has
imported every library and forks. What runs is the real command line, in the client's process group.

The server is a fork of the test's process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from helpers import forks

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with open({started!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
asked = {{"args": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "group": os.getpgrp()}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
child = int(server.recv(20))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(child, number))
said = b""
while not said.endswith(b"\\n"):
    more = server.recv(20)
    if not more:
        sys.exit(137)
    said += more
sys.exit(int(said))
"""


@contextmanager
def optin(folder: Path) -> Iterator[Path]:
    """The executable, as long as its server lives. `folder`/started has a line for each command that was run."""
    address = folder / "socket"
    server = forks.process(lambda: serve(str(address)), folder / "server.log")
    try:
        for _ in range(1200):
            if address.exists() or os.waitpid(server, os.WNOHANG)[0]:
                break
            time.sleep(0.1)
        assert address.exists(), (folder / "server.log").read_text()
        made = folder / "optin"
        made.write_text(
            CLIENT.format(python=sys.executable, socket=str(address), started=str(folder / "started"))
        )
        made.chmod(0o755)
        yield made
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # it did not start
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)


def serve(address: str) -> NoReturn:
    """Answer every client with a forked process of its own."""
    import datasets  # noqa: F401 - what the commands import, once for all
    import numpy  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification  # noqa: F401

    import optin_cli.compensation.compensate
    import optin_cli.data.opening
    import optin_cli.main
    import optin_cli.measure.evaluate
    import optin_cli.pipeline
    import optin_cli.pruning.apply
    import optin_cli.scoring.score  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    listening = socket.socket(socket.AF_UNIX)
    waiting = f"{address}.new"
    listening.bind(waiting)
    listening.listen()
    Path(waiting).rename(address)
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _answer(client)
        client.close()


def _answer(client: socket.socket) -> None:
    """Be the command that a client asks for."""
    content, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    asked = json.loads(content)
    os.setpgid(0, asked["group"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # the server's own may have been files, and these be pipes
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process lives
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["optin", *asked["args"]]
    client.sendall(str(os.getpid()).encode())
    from optin_cli.__main__ import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(f"{code}\n".encode())
        os._exit(code)
