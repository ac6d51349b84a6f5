#!/usr/bin/env bash
# gRPC servers and the file of a Unix socket (seen with grpcio 1.85.3 on Linux).
#
# Two servers of one host, or the old and the new instance of one service, may be told the same path:
#   1. add_insecure_port() of the second raises nothing. It replaces the socket file, although the first server listens
#      and has clients: new clients reach only the second, and the first is not told.
#   2. stop() of the first then removes the file by its name. It is the second's file by now: the second server goes on
#      without a file, and no client finds it.
#   3. A socket that was renamed after it was bound stays when its server stops; what has the old name by then goes.
# So a service that hands over its socket to a new instance binds a temporary name and renames it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grpcio==1.85.3

cat >"$folder/servers.py" <<'PYTHON'
import os
import sys
from concurrent import futures

import grpc

path, aside = sys.argv[1], sys.argv[1] + ".aside"


def serve():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server


first = serve()
before = os.stat(path).st_ino
second = serve()
print("the second server replaced the file of the first:", os.stat(path).st_ino != before)
first.stop(0).wait()
print("the file of the second is there once the first has stopped:", os.path.exists(path))
second.stop(0).wait()

first = serve()
os.rename(path, aside)
second = serve()
first.stop(0).wait()
print("a renamed socket is there once its server has stopped:", os.path.exists(aside))
print("the file that has the old name is there:", os.path.exists(path))
second.stop(0).wait()
PYTHON

"$folder/venv/bin/python" "$folder/servers.py" "$folder/socket" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
the second server replaced the file of the first: True
the file of the second is there once the first has stopped: False
a renamed socket is there once its server has stopped: True
the file that has the old name is there: False
SEEN
