"""Two hosts on this machine: each with a network of its own, a cable between them, and the file system in common."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment, wait_until
from lab import Lab

NEW_USER = "--user", "--map-root-user"
"""A namespace in which anybody may set up a network."""

ADDRESSES = "10.77.0.1", "10.77.0.2"
PORT = 8118


class Hosts:
    """A ``with`` block; they are gone at its end.  Skips the test where the kernel lets nobody make such hosts."""

    def __enter__(self):
        self._hosts: list[subprocess.Popen] = []
        refused = subprocess.run(["unshare", *NEW_USER, "--net", "true"], capture_output=True, text=True)
        if refused.returncode:
            pytest.skip(refused.stderr)
        self._boot(["unshare", *NEW_USER, "--net"])
        self._boot([*self._on(0), "unshare", "--net"])
        self._ip(0, f"link add cable type veth peer name cable netns {self._hosts[1].pid}")
        for number, address in enumerate(ADDRESSES):
            self._ip(number, "link set lo up")
            self._ip(number, f"address add {address}/24 dev cable")
            self._ip(number, "link set cable up")
        return self

    def _boot(self, command: list[str]) -> None:
        host = subprocess.Popen([*command, "sleep", "infinity"])
        self._hosts.append(host)
        wait_until(lambda: Path(f"/proc/{host.pid}/comm").read_text() == "sleep\n")

    def _on(self, number: int) -> list[str]:
        into = ["--user", "--preserve-credentials", "--net"]
        return ["nsenter", "--target", str(self._hosts[number].pid), *into]

    def _ip(self, number: int, arguments: str) -> None:
        subprocess.run([*self._on(number), "ip", *arguments.split()], check=True)

    def cut(self) -> None:
        """Cut the cable: neither end is told, as when a host loses its power."""
        self._ip(1, "link set cable down")

    def msrun(self, number: int, lab: Lab, stage: str = "TrainLoRA") -> subprocess.Popen:
        """Start one rank of two on a host, as a user does."""
        own = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["msrun", "--worker_num=2", "--local_worker_num=1", f"--node_rank={number}", "--join=True"]
        command += [f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}", f"--log_dir={lab.folder / 'logs'}"]
        command += ["python", "-m", "pipeline", "run", stage, "--experiment", str(lab.path)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*self._on(number), *command], env=own, **output)

    def __exit__(self, *error):
        for host in self._hosts:
            host.kill()
            host.wait()
