"""Renders what starts `python -m experiments.train` on many hosts; README.md says which to use when.

    python -m experiments.launch --kind=jobset --name=maml --config=experiments/configs/maml_omniglot.py \
        --workdir=/shared/runs/maml --hosts=32 --topology=4x4x8 --image=IMAGE --claim=CLAIM | kubectl apply -f -
    python -m experiments.launch --kind=slurm --name=maml --config=... --workdir=... --hosts=4 --output=maml.sh
    python -m experiments.launch --kind=tpu_vm --name=TPU --config=... --workdir=... --hosts=32 --checkout=FOLDER
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import shlex
from typing import Any

from absl import flags

LOST_PEER = 70  # that of metajax.run, which a machine that only renders need not import
_KIND = flags.DEFINE_string("kind", None, "What to render: jobset, slurm or tpu_vm.")
_NAME = flags.DEFINE_string("name", None, "Name of the JobSet or of the Slurm job; tpu_vm: of the TPU.")
_CONFIG = flags.DEFINE_string("config", None, "Config file to train, with a path that holds in the checkout.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, the same one on all hosts.")
_HOSTS = flags.DEFINE_integer("hosts", None, "Hosts, in all slices together.")
_TRAIN_FLAG = flags.DEFINE_multi_string("train_flag", [], "Another flag of the training: --config.training.steps=9.")
_CACHE = flags.DEFINE_string("cache", None, "Folder of compiled programs; the folder xla beside workdir by default.")
_CHECKOUT = flags.DEFINE_string(
    "checkout", None, "Folder of the checkout on all hosts; by default that of the image, or where sbatch is called."
)
_PYTHON = flags.DEFINE_string("python", "python3", "The interpreter on the hosts.")
_MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 20, "How often the run is started again, at most.")
_OUTPUT = flags.DEFINE_string("output", None, "New file to write; standard output by default.")
# of some kinds only: None says that the flag was not given
_DEVICES = flags.DEFINE_integer("devices", None, "Devices of a host: 4 for TPUs, 8 for GPUs by default.")
_GRACE = flags.DEFINE_integer("grace", None, "Seconds from SIGTERM to SIGKILL, 30 at least: 120 by default.")
_IMAGE = flags.DEFINE_string("image", None, "Container image with the checkout and what it needs.")
_CLAIM = flags.DEFINE_string("claim", None, "PersistentVolumeClaim, ReadWriteMany, that holds workdir.")
_MOUNT = flags.DEFINE_string("mount", None, "Where the claim is mounted: /shared by default.")
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", None, "tpu-... or nvidia-..., as GKE names it: tpu-v5p-slice by default."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Topology of one TPU slice, 4x4x8 for instance.")
_ZONE = flags.DEFINE_string("zone", None, "Zone of the TPU; that of gcloud's configuration by default.")

_ONLY = (
    (_DEVICES, ("jobset", "slurm")), (_GRACE, ("jobset", "slurm")), (_ZONE, ("tpu_vm",)),
    *((flag, ("jobset",)) for flag in (_IMAGE, _CLAIM, _MOUNT, _ACCELERATOR, _TOPOLOGY)),
)  # fmt: skip
_OWN = ("config", "workdir", "resume", "distributed", "coordinator", "process_id", "num_processes")
_PORT = 8476
_LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"  # of RFC 1123, from a letter on, as JobSet and Cloud TPU want it


def main() -> int:
    """Does what the flags say."""
    text = render()
    if _OUTPUT.value is None:
        print(text, end="")
        return 0
    try:
        with open(_OUTPUT.value, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"output must name a new file, got {_OUTPUT.value!r}: {error.strerror}") from error
    return 0


def render() -> str:
    """What the flags ask for, as text.

    Raises:
      ValueError: a flag is missing, has a bad value, or is none of this kind's.
    """
    config = _CONFIG.value
    if config is not None:
        _check_text(_CONFIG)
        if not pathlib.Path(config.partition(":")[0]).is_file():
            raise ValueError(f"config must name a config file, got {config!r}")
    kinds = {"jobset": _jobset, "slurm": _slurm, "tpu_vm": _tpu_vm}
    kind = _given(_KIND)
    if kind not in kinds:
        raise ValueError(f"kind must be {', '.join(kinds)}, got {kind!r}")
    for flag, takers in _ONLY:
        if flag.value is not None and kind not in takers:
            raise ValueError(f"{flag.name} is a flag of {' and '.join(takers)}, not of {kind}, got {flag.value!r}")
    for flag, low, high in ((_HOSTS, 1, 65536), (_MAX_RESTARTS, 0, 10000), (_DEVICES, 1, 64), (_GRACE, 30, 65535)):
        if flag.value is not None and not low <= flag.value <= high:
            raise ValueError(f"{flag.name} must be from {low} to {high}, got {flag.value}")
    for flag, folder in ((_WORKDIR, True), (_CACHE, True), (_CHECKOUT, True), (_MOUNT, True), (_PYTHON, False)):
        _check_text(flag, folder=folder)
    _check_text(_CONFIG)
    _check_name(_NAME, _LABEL, "lower-case letters, digits and '-', from a letter on, 63 at most")
    values = kinds[kind]() | {"name": _given(_NAME), "max_restarts": str(_MAX_RESTARTS.value)}
    template = pathlib.Path(__file__).parent / ("jobset.yaml" if kind == "jobset" else f"{kind}.sh")
    # in one pass: what a value says is never read as a field
    return re.sub(r"\{\{(\w+)\}\}", lambda field: values[field[1]], template.read_text(encoding="utf-8"))


def _slurm() -> dict[str, str]:
    return {
        "hosts": str(_given(_HOSTS)),
        "devices": str(_DEVICES.value or 8),
        "grace": str(_GRACE.value or 120),
        "checkout": shlex.quote(_CHECKOUT.value or "."),
        "command": shlex.join(_command()),
    }


def _tpu_vm() -> dict[str, str]:
    name, checkout = _given(_NAME), _given(_CHECKOUT)
    _check_name(_ZONE, _LABEL, "a zone of Google Cloud, as us-east5-a")
    # a connection that is lost leaves its process behind: the next one waits for it
    lock = ["flock", "--wait", "600", "--conflict-exit-code", str(LOST_PEER), f"/tmp/metajax-{name}.lock"]
    return {
        "hosts": str(_given(_HOSTS)),
        "tpu": name + (f" --zone={_ZONE.value}" if _ZONE.value else ""),
        # quoted for the shell of the host, then for the one of the script
        "command": shlex.quote(f"cd {shlex.quote(checkout)} || exit 2; exec {shlex.join([*lock, *_command()])}"),
    }


def _jobset() -> dict[str, str]:
    name, hosts, accelerator = _given(_NAME), _given(_HOSTS), _ACCELERATOR.value or "tpu-v5p-slice"
    workdir, mount = pathlib.PurePosixPath(_given(_WORKDIR)), pathlib.PurePosixPath(_MOUNT.value or "/shared")
    if mount not in workdir.parents:
        raise ValueError(f"workdir must lie in the mounted claim, under {str(mount)!r}, got {str(workdir)!r}")
    _check_text(_IMAGE)
    _check_name(_CLAIM, r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", "lower-case letters, digits, '-' and '.'")
    _check_name(_ACCELERATOR, r"(tpu|nvidia)-[-a-z0-9]{0,55}[a-z0-9]", "tpu-... or nvidia-..., as GKE names it")
    environment: list[dict[str, Any]] = [
        {"name": variable, "value": _unexpanded(value)} for variable, value in _environment().items()
    ]
    if accelerator.startswith("tpu-"):
        devices, slices = _DEVICES.value or 4, _slices(hosts, _DEVICES.value or 4)
        resource = "google.com/tpu"
        selector = {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": _given(_TOPOLOGY),
        }
        # a node pool is a slice, and takes one job
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        command = list(map(_unexpanded, _training("--distributed")))
    elif _TOPOLOGY.value is not None:
        raise ValueError(f"topology is a flag of TPUs only, got {_TOPOLOGY.value!r} for accelerator {accelerator!r}")
    else:
        devices, slices = _DEVICES.value or 8, 1
        resource = "nvidia.com/gpu"
        selector = {"cloud.google.com/gke-accelerator": accelerator}
        annotations = {}
        first = f"{name}-hosts-0-0.{name}:{_PORT}"
        command = list(map(_unexpanded, _training(f"--coordinator={first}", f"--num_processes={hosts}")))
        command.append("--process_id=$(PROCESS_ID)")
        path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment.append({"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": path}}})
    longest = f"{name}-hosts-{slices - 1}-{hosts // slices - 1}-abcde"
    if len(longest) > 63:
        raise ValueError(f"name must be shorter: pods would have names of {len(longest)} > 63 letters, got {name!r}")
    return {
        "annotations": _yaml(annotations),
        "slices": str(slices),
        "hosts": str(hosts // slices),
        "grace": str(_GRACE.value or 120),
        "selector": _yaml(selector),
        "image": _yaml(_given(_IMAGE)),
        "command": _yaml(command),
        "checkout": f"workingDir: {_yaml(_CHECKOUT.value)}" if _CHECKOUT.value else "# workingDir: that of the image",
        "environment": _yaml(environment),
        "resources": _yaml({resource: devices}),
        "mount": _yaml(str(mount)),
        "claim": _yaml(_given(_CLAIM)),
    }


def _slices(hosts: int, devices: int) -> int:
    """How many slices of this topology the hosts make."""
    topology = _given(_TOPOLOGY)
    if not re.fullmatch(r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}", topology):
        raise ValueError(f"topology must be chips along each axis, as 4x4x8, got {topology!r}")
    chips = math.prod(map(int, topology.split("x")))
    each, rest = divmod(chips, devices)
    if rest:
        raise ValueError(f"topology must be whole hosts of {devices} chips, got {topology!r} of {chips} chips")
    if hosts % each:
        raise ValueError(f"hosts must be a multiple of {each}, the hosts of a slice of {topology}, got {hosts}")
    if each == 1 and hosts > 1:
        raise ValueError(f"topology must have several hosts where there are several slices, got {topology!r}")
    return hosts // each


def _training(*process: str) -> list[str]:
    """The command that every process runs; `process` says how it finds the others."""
    for flag in _TRAIN_FLAG.value:
        name = re.fullmatch(r"--(?:no)?([A-Za-z_][\w.]*)(=.*)?", flag)
        if not name or not flag.isprintable():
            raise ValueError(f"train_flag must be --NAME or --NAME=VALUE, got {flag!r}")
        if name[1] in _OWN:
            raise ValueError(f"train_flag must be none of {', '.join(_OWN)}, which are set here, got {flag!r}")
    command = [_PYTHON.value, "-m", "experiments.train", f"--config={_given(_CONFIG)}", f"--workdir={_given(_WORKDIR)}"]
    return [*command, "--resume", *process, *_TRAIN_FLAG.value]


def _environment() -> dict[str, str]:
    cache = _CACHE.value or str(pathlib.PurePosixPath(_given(_WORKDIR)).parent / "xla")
    return {"PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": cache}


def _command() -> list[str]:
    """Environment and training in one command, where JAX finds the processes."""
    return ["env", *(f"{name}={value}" for name, value in _environment().items()), *_training("--distributed")]


def _unexpanded(text: str) -> str:
    """Text that Kubernetes leaves as it is: it puts variables in the place of $(NAME), and $ in that of $$."""
    return text.replace("$", "$$")


def _yaml(value: object) -> str:
    """As JSON, which YAML contains where, as here, all text is printable."""
    return json.dumps(value, ensure_ascii=False)


def _given(flag: flags.FlagHolder[Any]) -> Any:
    if flag.value is None or flag.value == "":
        raise ValueError(f"{flag.name} must be given, got none")
    return flag.value


def _check_name(flag: flags.FlagHolder[str | None], pattern: str, accepted: str) -> None:
    if flag.value is not None and not re.fullmatch(pattern, flag.value):
        raise ValueError(f"{flag.name} must be {accepted}, got {flag.value!r}")


def _check_text(flag: flags.FlagHolder[str | None], *, folder: bool = False) -> None:
    """Refuses what no quoting makes safe or the same on all hosts."""
    value = flag.value
    if value is None:
        return
    if not value.strip() or value.startswith("-") or not value.isprintable():
        raise ValueError(f"{flag.name} must be printable text that does not start with '-', got {value!r}")
    if folder and (not value.startswith("/") or ".." in value.split("/")):
        raise ValueError(f"{flag.name} must be an absolute path without '..', got {value!r}")
