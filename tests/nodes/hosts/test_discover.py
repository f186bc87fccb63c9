import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vlm.errors import ConfigError
from vlm.nodes.hosts.discover import (
    expand_nodelist,
    from_arguments,
    from_runpod_api,
    from_runpod_cluster,
    from_slurm,
)
from vlm.nodes.hosts.hostfile import Host

KEY = "rpa_SECRET0123456789"


def test_arguments() -> None:
    given = ["root@10.0.0.4:2222", "b", "c:22", "u@[2001:db8::1]:2200", "2001:db8::2", "[::1]"]
    assert from_arguments(given, 8) == [
        Host("10.0.0.4", 8, user="root", port=2222),
        Host("b", 8),
        Host("c", 8),
        Host("2001:db8::1", 8, user="u", port=2200),
        Host("2001:db8::2", 8),
        Host("::1", 8),
    ]


@pytest.mark.parametrize("target", ["@a", "a:b", "a:", "-oX@a;b", "a b", "-a", "", "[::1", "[a]b"])
def test_what_is_no_host(target: str) -> None:
    with pytest.raises(ConfigError):
        from_arguments([target], 8)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-11,3],login", ["gpu08", "gpu09", "gpu10", "gpu11", "gpu3", "login"]),
        ("r[1-2]n[0-1]-ib", ["r1n0-ib", "r1n1-ib", "r2n0-ib", "r2n1-ib"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


@pytest.mark.parametrize(
    "text", ["gpu[1-", "gpu]1[", "a,,b", "gpu[a]", "gpu[3-1]", "gpu[1-99999]", "a[1-99][1-99]", ","]
)
def test_node_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_nodelist(text)


def test_slurm() -> None:
    env = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    assert from_slurm(env) == [Host("gpu1", 4), Host("gpu2", 4)]
    assert from_slurm(env, 2) == [Host("gpu1", 2), Host("gpu2", 2)]
    env = {"SLURM_JOB_NODELIST": "gpu1", "SLURM_GPUS_PER_NODE": "a100:8"}
    assert from_slurm(env) == [Host("gpu1", 8)]
    with pytest.raises(ConfigError, match="not inside a SLURM job"):
        from_slurm({})
    with pytest.raises(ConfigError, match="--slots N"):
        from_slurm({"SLURM_JOB_NODELIST": "gpu1"})


CLUSTER = {
    "NUM_NODES": "3",
    "NUM_TRAINERS": "8",
    "NODE_RANK": "1",
    "NODE_ADDR": "10.65.0.3",
    "PRIMARY_ADDR": "10.65.0.2",
}


def resolver(**known: str) -> Any:
    def resolve(name: str) -> str:
        if name.replace("-", "_") not in known:
            raise OSError(-2, "Name or service not known")
        return known[name.replace("-", "_")]

    return resolve


def test_a_runpod_cluster() -> None:
    expected = [Host(f"10.65.0.{n}", 8, iface="ens1") for n in (2, 3, 4)]
    names = {"node_0": "10.65.0.2", "node_1": "10.65.0.3", "node_2": "10.65.0.4"}
    assert from_runpod_cluster(CLUSTER, resolver(**names)) == expected
    # its own address and the first one's are in the environment
    assert from_runpod_cluster(CLUSTER, resolver(node_2="10.65.0.4")) == expected
    with pytest.raises(ConfigError, match=r"node-2 does not resolve .*/etc/hosts"):
        from_runpod_cluster(CLUSTER, resolver())
    with pytest.raises(ConfigError, match=r"node-1 resolves to 127.0.1.1, expected 10.65.0.3"):
        from_runpod_cluster(CLUSTER, resolver(**{**names, "node_1": "127.0.1.1"}))
    with pytest.raises(ConfigError, match=r"NUM_NODES, .* not set: not on a node of a RunPod"):
        from_runpod_cluster({}, resolver())
    with pytest.raises(ConfigError, match="whole numbers"):
        from_runpod_cluster({**CLUSTER, "NUM_NODES": "two"}, resolver())
    with pytest.raises(ConfigError, match="NODE_RANK=7"):
        from_runpod_cluster({**CLUSTER, "NODE_RANK": "7"}, resolver())


PODS: dict[str, Any] = {
    "good": {"publicIp": "203.0.113.9", "portMappings": {"22": 10341}, "gpuCount": 2},
    "nested": {"publicIp": "203.0.113.8", "portMappings": {"22": 10342}, "gpu": {"count": 8}},
    "no-ssh": {"publicIp": "203.0.113.9", "portMappings": {"8888": 10341}, "gpuCount": 2},
    "stopped": {"publicIp": "", "portMappings": None, "gpuCount": 2},
    "cpu": {"publicIp": "203.0.113.9", "portMappings": {"22": 10341}, "gpuCount": 0},
    "evil": {"publicIp": "-oProxyCommand=x", "portMappings": {"22": 1}, "gpuCount": 1},
    "list": ["?"],
}


class Api(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        pod = self.path.removeprefix("/v1/pods/")
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.send_error(401)
        if pod == "html":
            return self._send(b"<html>")
        if pod not in PODS:
            return self.send_error(404 if pod == "gone" else 500)
        return self._send(json.dumps(PODS[pod]).encode())

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_pods(api: str) -> None:
    assert from_runpod_api(["good", "nested"], {"RUNPOD_API_KEY": KEY}, api) == [
        Host("203.0.113.9", 2, user="root", port=10341),
        Host("203.0.113.8", 8, user="root", port=10342),
    ]


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ("no-ssh", "no public address and port"),
        ("stopped", "no public address and port"),
        ("cpu", "no GPU"),
        ("evil", "expected a host name"),
        ("list", "no public address"),
        ("gone", "there is no such pod"),
        ("../../x", "the API answered 500"),
        ("html", "no answer from the API"),
    ],
)
def test_pods_that_cannot_be_used(api: str, pod: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_runpod_api([pod], {"RUNPOD_API_KEY": KEY}, api)
    assert reason in str(caught.value) and pod in str(caught.value)
    assert KEY not in str(caught.value)


def test_the_key_stays_in_the_environment(api: str) -> None:
    with pytest.raises(ConfigError, match="RUNPOD_API_KEY is not set"):
        from_runpod_api(["good"], {}, api)
    with pytest.raises(ConfigError, match="RUNPOD_API_KEY was refused") as caught:
        from_runpod_api(["good"], {"RUNPOD_API_KEY": "rpa_other"}, api)
    assert "rpa_other" not in str(caught.value)
    with pytest.raises(ConfigError, match="no answer") as caught:
        from_runpod_api(["good"], {"RUNPOD_API_KEY": KEY}, "http://127.0.0.1:1/v1")
    assert KEY not in str(caught.value)
