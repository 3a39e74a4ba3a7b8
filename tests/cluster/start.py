"""A Ray cluster of two nodes on this machine, and the application on it: run with the interpreter of `environment`.

    python start.py FOLDER DASHBOARD_PORT TEMPORARY

FOLDER has `serve.yaml`; what Ray writes goes into the folder TEMPORARY, whose path must be short. Writes a line of
JSON once the application is deployed, with the process ids of both raylets. Ends everything when its standard input
ends, be it that whoever started it has died.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ray._common.usage.usage_lib import usage_stats_enabled
from ray.cluster_utils import Cluster


def main(folder: str, dashboard: str, temporary: str) -> None:
    assert not usage_stats_enabled()
    # The agent's port is a fixed one unless told, and another cluster may run on this machine.
    node = {"object_store_memory": 80 * 2**20, "temp_dir": temporary, "dashboard_agent_listen_port": None}
    head = {"num_cpus": 2, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": int(dashboard)}
    cluster = Cluster(initialize_head=True, head_node_args={**node, **head, "include_log_monitor": False})
    try:
        second = cluster.add_node(num_cpus=1, **node)
        serve = str(Path(sys.executable).parent / "serve")
        address = f"http://127.0.0.1:{dashboard}"
        subprocess.run([serve, "deploy", "--address", address, f"{folder}/serve.yaml"], check=True, stdout=sys.stderr)
        print(json.dumps([pid_of(node) for node in (cluster.head_node, second)]), flush=True)
        sys.stdin.read()
    finally:
        for node in cluster.list_all_nodes():
            cluster.remove_node(node, allow_graceful=False)


def pid_of(node: object) -> int:
    """Of its raylet, the parent of all its replicas."""
    return int(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(*sys.argv[1:])
