# The daemon as a small image: Debian's own Python, grpc and protobuf (ready-made for amd64, arm64, armhf and more, so
# that nothing is compiled), cut down to what the daemon can need, on an empty base without a shell.
#
#   docker buildx build --platform linux/arm64 -t smarter-device-manager:1.0.0 --output type=docker,dest=image.tar .
#
# README.md says what to do with image.tar; docs/install.md how to build for a registry and for all platforms at once.

FROM debian:trixie-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-grpcio python3-protobuf
WORKDIR /image
RUN cp -a --parents /usr/bin/python3 /usr/bin/python3.* /usr/lib/python3.[0-9]* /usr/lib/python3/dist-packages .

# What is left out of the standard library, by name.
RUN cd usr/lib/python3.* && for name in \
        # developing, testing, debugging
        __hello__ __phello__ _pyrepl antigravity bdb cProfile cmd code codeop compileall doctest ensurepip idlelib \
        lib2to3 modulefinder pdb pickletools profile pstats py_compile pyclbr pydoc pydoc_data rlcompleter symtable tabnanny test \
        this timeit trace turtle turtledemo unittest venv zipapp \
        # the network beyond plain sockets and TLS: clients and servers
        ftplib http imaplib mailbox netrc nturl2path poplib smtplib socketserver urllib webbrowser wsgiref xmlrpc \
        # formats, archives and data bases that nothing here reads
        bz2 configparser csv dbm email fractions gzip lzma mimetypes plistlib shelve sqlite3 statistics tarfile \
        tomllib wave xml zipfile zoneinfo json/tool logging/config \
        # processes, terminals, other systems
        asyncio/__main__ asyncio/proactor_events asyncio/windows_events asyncio/windows_utils concurrent/futures/process \
        _aix_support _android_support _apple_support _ios_support _osx_support ctypes curses getpass multiprocessing \
        ntpath optparse pty tty \
        # Python versions of what is there in C, and what only packaging asks for
        _pydatetime _pydecimal _pyio _pylong _sysconfigdata_* sitecustomize EXTERNALLY-MANAGED LICENSE.txt \
    ; do rm -r $name $name.py 2>/dev/null || true; done
# The C halves of those.
RUN cd usr/lib/python3.*/lib-dynload && for name in \
        _bz2 _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw _ctypes _curses \
        _curses_panel _dbm _decimal _elementtree _hashlib _interpchannels _interpqueues _interpreters _lsprof _lzma \
        _multibytecodec _multiprocessing _sqlite3 '*test*' _uuid _zoneinfo mmap readline termios xxlimited \
        xxlimited_35 \
    ; do rm $name.*.so 2>/dev/null || true; done
# Every encoding but those of file names, sockets and text here.
RUN cd usr/lib/python3.*/encodings && find . -name '*.py' ! -name __init__.py ! -name aliases.py ! -name ascii.py \
        ! -name idna.py ! -name latin_1.py ! -name unicode_escape.py ! -name utf_8.py -delete
# Of grpc and protobuf: superseded interfaces, certificates, and what plugins of the protobuf compiler use.
RUN cd usr/lib/python3/dist-packages && rm -r grpc/beta grpc/framework grpc/_cython/_credentials \
        google/protobuf/compiler ./*.egg-info

# Byte code without docstrings in place of the sources; and the shared libraries that all of it loads.
RUN find . -name __pycache__ -prune -exec rm -r {} + \
    && python3 -m compileall -q -b -o 2 -s /image -p / /image/usr \
    && find . -name '*.py' -delete \
    && for file in usr/bin/python3 $(find . -name '*.so'); do ldd $file; done \
        | awk '/=> \//{print $3} /^\t\//{print $1}' | sort -u | xargs cp -L --parents -t . \
    && mkdir -m 1777 tmp

# The daemon keeps its sources, for tracebacks; Python uses the byte code without comparing it with them.
COPY smarter_device_manager.py api_pb2.py api_pb2_grpc.py /image/app/
COPY conf.yaml /image/root/config/
RUN python3 -m compileall -q --invalidation-mode unchecked-hash -s /image -p / /image/app

FROM scratch
COPY --from=build /image /
WORKDIR /app
# One malloc arena for all threads takes less memory than one per thread.
ENV MALLOC_ARENA_MAX=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SMARTER_DEVICE_MANAGER_CONF=/root/config/conf.yaml
LABEL org.opencontainers.image.title="smarter-device-manager" \
    org.opencontainers.image.description="Gives Kubernetes pods access to the devices of their node" \
    org.opencontainers.image.version="1.0.0" \
    org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/usr/bin/python3", "-m", "smarter_device_manager"]
