"""The server on a Ray cluster of two nodes, all on this machine."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import yaml

from cluster import environment
from support.answerable import within
from support.ports import free_port
from support.serving import TIMEOUT_S, Server

START = environment.LIST.parent / "start.py"
FILE = environment.FOLDER.parent / "docs/guides/ray/serve.yaml"
MARK = "SFUMATO_TEST_CLUSTER"
"""Environment variable of all its processes."""
MODEL = "sfumato-tiny"
HEALTH = {"health_check_period_s": 1, "health_check_timeout_s": 3}
"""Ray replaces a replica that has not answered three times in a row."""
REPLICA = "ray::ServeReplica:sfumato:"
"""How the title of a replica's process begins; its deployment follows."""


class RayServer(Server):
    """The YAML of the guide with other arguments, deployed with `serve deploy`; `with RayServer(...) as server:`."""

    def __init__(
        self, folder: Path, arguments: Mapping[str, Any], env: Mapping[str, str] | None = None, other: str = ""
    ) -> None:
        """`other`: a model file beside the built-in one."""
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._port, dashboard = free_port(), free_port()
        self._dashboard = f"http://127.0.0.1:{dashboard}/api/serve/applications/"
        self._temporary = tempfile.mkdtemp(
            prefix="ray-", dir="/tmp"
        )  # sockets lie in it, and no path of one may be long
        self._log = folder / "log"
        self._command = [environment.PYTHON, str(START), str(folder), str(dashboard), self._temporary]
        path = os.pathsep.join([str(environment.FOLDER.parent / "src"), os.environ.get("PYTHONPATH", "")])
        # Nothing is told to anybody, and Ray's processes get as much of this machine as others.
        of_ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        of_ray["RAY_memory_monitor_refresh_ms"] = "0"  # it kills replicas where others fill the machine's memory
        of_ray["RAY_health_check_period_ms"] = "500"  # five that fail are the end of a node; of 3 s each unless told
        of_ray["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] = "1"
        self.env = {**os.environ, **of_ray, **(env or {}), "PYTHONPATH": path, MARK: self._mark}
        self.url = f"http://127.0.0.1:{self._port}"
        document = yaml.safe_load(FILE.read_text())
        document["http_options"] |= {"host": "127.0.0.1", "port": self._port}
        args = document["applications"][0]["args"]
        del args["num_gpus"]  # there is none
        args |= {"device": "cpu", "models": str(folder / "models"), "data": str(folder / "data"), **arguments}
        document["applications"][0]["deployments"].append({"name": MODEL, **HEALTH})
        (folder / "models").mkdir()
        if other:
            (folder / "models" / "other.yaml").write_text(other)
        (folder / "serve.yaml").write_text(yaml.safe_dump(document))

    def __enter__(self) -> RayServer:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)
        try:
            assert self._process.stdout is not None
            assert select.select([self._process.stdout], [], [], TIMEOUT_S)[0], self._logged("has not started in time")
            nodes = self._process.stdout.readline()
            assert nodes, self._logged("has ended")
            self.nodes: list[int] = json.loads(nodes)
            within(TIMEOUT_S, self._answers)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _logged(self, what: str) -> str:
        return f"the Ray cluster {what}; its log ends so:\n{self._log.read_text()[-4000:]}"

    def _answers(self) -> bool:
        application = httpx.get(self._dashboard, timeout=TIMEOUT_S).json()["applications"].get("sfumato", {})
        failed = application.get("status") in ("DEPLOY_FAILED", "UNHEALTHY")
        assert not failed, self._logged(f"does not run the application: {application['message']}")
        return application.get("status") == "RUNNING" and self.client.get("/healthz").status_code == 200

    def _end(self) -> None:
        """Ends the cluster, and what is left of it, whatever has happened."""
        self.client.close()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(TIMEOUT_S)
        finally:
            self._process.stdout.close()
            for process in self.processes():
                _kill(process)
            within(60, lambda: not list(self.processes()))
            shutil.rmtree(self._temporary)

    def processes(self) -> Iterator[psutil.Process]:
        """All of the cluster that are alive."""
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    yield process
            except psutil.Error:
                continue

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of its replicas, on whichever node."""
        return [
            process
            for process in self.processes()
            if _title(process).startswith(REPLICA + deployment + ".") or _title(process) == REPLICA + deployment
        ]

    @staticmethod
    def worker(replica: psutil.Process) -> psutil.Process:
        """The process that draws for a replica."""
        (worker,) = (each for each in replica.children() if "sfumato.process.worker" in each.cmdline())
        return worker

    def kill_node(self, number: int) -> None:
        """All processes of a node at once, as a power cut."""
        raylet = psutil.Process(self.nodes[number])
        for process in [raylet, *raylet.children(recursive=True)]:
            _kill(process)


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
