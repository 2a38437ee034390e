"""The services of ``compose.yaml`` without a container engine, each on its own loopback address.

The addresses of the file's network are those of 127.0.0.0/8 with the same end, so every service
has its ports to itself, and nothing else of the file is changed. A service that is built from the
Dockerfile runs in its image, in a chroot; for other images the program of their name stands in.
Nothing is restarted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from tests.children import bound
from tests.conftest import require, store_binary
from tests.example.test_deploy import PATIENCE_S, Process, haproxy_binary
from tests.servers import wait_for

#: Seconds for all packages of the root file system, or of the image.
DOWNLOAD_S: Final = 900

#: What the images start whose service names no command.
COMMANDS: Final = {
    "haproxy": ["haproxy", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"],
}

#: Shell script that binds paths to paths in a root folder, in pairs, and goes on there as a user.
ENTER: Final = """
set -e
root=$1 user=$2
shift 2
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
  mount --bind "$1" "$root$2"
  shift 2
done
shift
exec chroot --userspec="$user" "$root" "$@"
"""


class Builder:
    """Buildah with a store of its own, whose containers are a chroot in the network of the host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [
            # A run that is killed leaves its folder there.
            *("env", f"TMPDIR={folder}"),
            str(require(shutil.which("buildah"), "buildah")),
            *("--root", str(folder / "storage"), "--runroot", str(folder / "run")),
            *("--storage-driver", "vfs"),
        ]

    def __call__(self, *arguments: str) -> str:
        """Return what a command of buildah prints; fail with all that it says."""
        return run([*self.command, *arguments])

    def in_container(
        self,
        container: str,
        *arguments: str,
        **environment: str,
    ) -> list[str]:
        """Return the command that runs something in a container."""
        settings = [f"--env={name}={value}" for name, value in environment.items()]
        buildah = [*self.command, "run", "--isolation=chroot", *settings, container]
        return [*apart("--mount-proc"), *buildah, "--", *arguments]


def apart(*options: str) -> list[str]:
    """Return the beginning of a command line whose processes all end with the first of them.

    A buildah that is killed leaves its processes behind otherwise. Mounts made inside are seen
    nowhere else.
    """
    unshare = require(shutil.which("unshare"), "unshare")
    return [str(unshare), "--pid", "--mount", "--kill-child", *options, "--"]


def run(command: list[str]) -> str:
    """Return what a command prints; fail with all that it says."""
    done = subprocess.run(bound(command), capture_output=True, text=True, timeout=DOWNLOAD_S)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout.strip()


class Image(NamedTuple):
    """An image: the folder where it is unpacked, and its configuration as OCI has it."""

    root: Path
    config: dict[str, Any]


class Composition:
    """Run what a composition file says, in the order of its dependencies. A context manager.

    ``settings`` are the variables of the file.
    """

    def __init__(self, file: Path, folder: Path, builder: Builder, **settings: str) -> None:
        self.file, self.folder, self.builder = file, folder, builder
        read = yaml.safe_load(file.read_text())
        (network,) = read["networks"].values()
        (subnet,) = (ip_network(one["subnet"]) for one in network["ipam"]["config"])
        start, _ = str(subnet.network_address).rsplit(".", 1)
        loopback = "127" + start[start.index(".") :]
        #: The services, with addresses that this machine has.
        self.services: dict[str, Any] = json.loads(
            interpolated(json.dumps(read["services"]), settings).replace(
                f"{start}.", f"{loopback}."
            )
        )
        free = iter(f"{loopback}.{n}" for n in range(101, 255))
        self.addresses = {
            name: address_of(service) or next(free) for name, service in self.services.items()
        }
        self.processes: dict[str, Process] = {}
        self._images: dict[str, Image] = {}
        self._started = ExitStack()

    def __enter__(self) -> Composition:
        with self._started:
            self._stand_in("valkey-server", store_binary("valkey"))
            self._stand_in("haproxy", haproxy_binary())
            for name in self._in_order():
                self._start(name)
            for name, service in self.services.items():
                if "healthcheck" in service:
                    wait_for(
                        lambda name=name: self._is_healthy(name),
                        f"{name} is healthy",
                        timeout_s=PATIENCE_S,
                    )
            self._started = self._started.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        self._started.close()

    def published(self) -> tuple[str, str]:
        """Return the address of the only port that visitors reach, and what they call it."""
        ((name, port),) = (
            (name, port)
            for name, service in self.services.items()
            for port in service.get("ports", ())
        )
        outside, inside = port.split(":")
        return f"http://{self.addresses[name]}:{inside}", f"localhost:{outside}"

    def output(self) -> str:
        """Return what all services have printed."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"-- {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def _in_order(self) -> Iterator[str]:
        """Yield each service after those that it depends on."""
        waiting = dict(self.services)
        while waiting:
            for name, service in list(waiting.items()):
                if not waiting.keys() & service.get("depends_on", {}).keys():
                    yield name
                    del waiting[name]

    def _start(self, name: str) -> None:
        service = self.services[name]
        for other, needed in service.get("depends_on", {}).items():
            assert needed == {"condition": "service_completed_successfully"}
            assert self.processes[other].popen.wait(PATIENCE_S) == 0, self.output()
        if "build" in service:
            command = service.get("command") or self._image(service["image"]).config["Cmd"]
            process = Process(self.folder / f"{name}.log", self._in_image(name, command))
        else:
            image = Path(service["image"]).name.partition(":")[0]
            command = [*service.get("entrypoint", ()), *service.get("command", ())]
            command = [self._outside(name, word) for word in command or COMMANDS[image]]
            environment = {
                setting: self._outside(name, value)
                for setting, value in self._environment(name).items()
            }
            environment["PATH"] = f"{self.folder}:{os.environ['PATH']}"
            process = Process(self.folder / f"{name}.log", command, **environment)
        self.processes[name] = self._started.enter_context(process)

    def _is_healthy(self, name: str) -> bool:
        """Return whether a service passes its own check; fail when it has ended."""
        process = self.processes[name]
        assert process.popen.poll() is None, process.log_path.read_text()
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        check = bound(self._in_image(name, command))
        return subprocess.run(check, capture_output=True, timeout=PATIENCE_S).returncode == 0

    def _in_image(self, name: str, command: Sequence[str]) -> list[str]:
        """Return the command line that runs something in the image of a service, as it runs.

        Not ``buildah run``: one that ends may empty a volume that another one has mounted.
        """
        image = self._image(self.services[name]["image"])
        hosts = self.folder / f"{name}.hosts"
        if not hosts.exists():
            names = {"localhost": self.addresses[name], **self.addresses}
            hosts.write_text("".join(f"{address} {host}\n" for host, address in names.items()))
        binds = {**self._volumes(name), "/etc/hosts": hosts}
        environment = {
            **dict(setting.split("=", 1) for setting in image.config["Env"]),
            **self._environment(name),
        }
        return [
            *apart(),
            *("sh", "-c", ENTER, "sh", str(image.root), image.config["User"]),
            *(str(word) for target, source in binds.items() for word in (source, target)),
            *("--", "env", "--ignore-environment", f"--chdir={image.config['WorkingDir']}"),
            *(f"{setting}={value}" for setting, value in environment.items()),
            *command,
        ]

    def _image(self, name: str) -> Image:
        """Return an image, unpacked once for all services of it."""
        if name not in self._images:
            container = self.builder("from", "--pull-never", name)
            self._started.callback(self.builder, "rm", container)
            inspected = json.loads(self.builder("inspect", "--type", "image", name))
            root = Path(self.builder("mount", container))
            self._images[name] = Image(root, inspected["OCIv1"]["config"])
        return self._images[name]

    def _environment(self, name: str) -> dict[str, str]:
        """Return the settings of a service, which listens at its own address only."""
        return {
            setting: re.sub(r"^(0\.0\.0\.0)?:(?=\d+$)", f"{self.addresses[name]}:", value)
            for setting, value in self.services[name]["environment"].items()
        }

    def _volumes(self, name: str) -> dict[str, Path]:
        """Return files and folders of this machine by where a service has them."""
        volumes = {}
        for volume in self.services[name].get("volumes", ()):
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                volumes[target] = (self.file.parent / source).resolve()
                continue
            volumes[target] = self.folder / "volumes" / source
            if not volumes[target].exists():
                volumes[target].mkdir(parents=True)
                # A new volume has the owner that the folder has in the image.
                volumes[target].chmod(0o777)
        return volumes

    def _outside(self, name: str, word: str) -> str:
        """Return a word of a service that runs outside an image, with this machine's paths."""
        own = self.folder / f"{name}.tmp"
        own.mkdir(exist_ok=True)
        for target, source in {**self._volumes(name), "/tmp": own}.items():
            if word == target or word.startswith(f"{target}/"):
                return f"{source}{word[len(target) :]}"
        return word

    def _stand_in(self, name: str, binary: Path) -> None:
        (self.folder / name).symlink_to(binary)


def interpolated(text: str, settings: Mapping[str, str]) -> str:
    """Return JSON with its variables replaced: ``${A:-default}`` and ``${A:?message}``.

    Raises KeyError, with the message, for a variable that has to be set.
    """

    def value(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        if settings.get(name):
            return json.dumps(settings[name])[1:-1]
        if operator == ":-":
            return str(rest)
        raise KeyError(f"{name}: {rest}")

    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)


def address_of(service: Mapping[str, Any]) -> str | None:
    """Return the fixed address of a service, None if it has none."""
    (network,) = service.get("networks", {"default": {}}).values()
    found = network.get("ipv4_address")
    return found and str(IPv4Address(found))
