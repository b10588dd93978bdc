"""What `experiments.launch` renders: read as the clusters read it, and run with programs in their place."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import uuid

import pytest
import yaml

from metajax.run import _process

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "experiments/configs/maml_omniglot.py"
# what a shell, YAML and Kubernetes would each read as more than text
NASTY = '/shared/it\'s; $(touch pwned) `touch pwned` "x": {{name}} #é $HOME $$ $(PROCESS_ID)'
COMMON = [f"--config={CONFIG}", "--name=maml"]
TPU = ["--kind=jobset", "--hosts=32", "--topology=4x4x8", "--image=eu.example/train:1", "--claim=runs"]
GPU = ["--kind=jobset", "--hosts=4", "--accelerator=nvidia-h100-80gb", "--image=eu.example/train:1", "--claim=runs"]

# statuses of the training: those that another start cannot mend, and some that it can
END, AGAIN = {2, 130}, {os.EX_TEMPFAIL, _process.LOST_PEER, 1, 134, 137, 139}
MORE = ["--peer_timeout=30", "--config.watch.stall=600"]  # flags of the training that users pass on

_RENDER = """
import json, sys
from absl import flags
from experiments import launch
texts = []
for arguments in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["launch", *arguments])
    texts.append(launch.render())
assert "jax" not in sys.modules
print(json.dumps(texts))
"""


def test_the_status_of_a_lost_peer_is_that_of_the_launchers():
    text = (ROOT / "experiments/launch/__init__.py").read_text(encoding="utf-8")
    assert f"\nLOST_PEER = {_process.LOST_PEER}  #" in text


def _render(*lists):
    """The text for each list of flags, all in one process."""
    command = [sys.executable, "-c", _RENDER, json.dumps([[*COMMON, *map(str, flags)] for flags in lists])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _training(workdir, *own, python="python3"):
    return [python, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={workdir}", "--resume", *own]


# JobSet


def _expand(text, variables):
    """Kubernetes' expansion of $(NAME) in commands and in values of variables."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)", lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]), text
    )


def _check_jobset(text):
    """Parses a JobSet, and checks what its webhook and that of Job check."""
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = found["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
    policy = spec["failurePolicy"]
    assert set(policy) == {"maxRestarts", "restartStrategy", "rules"}
    assert policy["restartStrategy"] in ("Recreate", "BlockingRecreate")
    for rule in policy["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    pods = f"{found['metadata']['name']}-{replicated['name']}-{replicated['replicas'] - 1}-{job['completions'] - 1}"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{pods}-abcde")
    assert len(f"{pods}-abcde") <= 63
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # else a Job with podFailurePolicy is refused
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "FailIndex", "Ignore", "Count")
        codes = rule["onExitCodes"]
        assert codes["containerName"] == container["name"]
        assert codes["operator"] in ("In", "NotIn")
        assert 0 not in codes["values"]
        assert codes["values"] == sorted(set(codes["values"]))
    for key, value in pod["nodeSelector"].items():
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[a-z0-9]([-a-z0-9]*[a-z0-9])?", key)
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(value, str) for value in found["metadata"]["annotations"].values())
    return found, replicated, job, pod, container


def _ends(job, policy, status):
    """What becomes of a JobSet when a container ends with this status: it restarts, unless a rule says more."""
    for rule in job["podFailurePolicy"]["rules"]:
        if status in rule["onExitCodes"]["values"]:
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    else:
        assert job["backoffLimit"] == 0
        reason = "BackoffLimitExceeded"
    actions = [rule["action"] for rule in policy["rules"] if reason in rule["onJobFailureReasons"]]
    return actions[0] if actions else "RestartJobSet"


def test_a_jobset_of_one_and_of_several_slices():
    workdir = "/shared/runs/maml"
    several = ["--kind=jobset", "--hosts=32", "--topology=2x4x4", "--image=i", "--claim=c", "--max_restarts=3"]
    own = ["--cache=/tmp/xla", "--checkout=/app", "--grace=45", "--train_flag=--config.training.steps=9"]
    one, four = _render([f"--workdir={workdir}", *TPU], [f"--workdir={workdir}", *several, *own])

    found, replicated, job, pod, container = _check_jobset(one)
    assert (replicated["replicas"], job["completions"]) == (1, 32)
    assert found["metadata"] == {
        "name": "maml",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == _training(workdir, "--distributed")
    assert container["image"] == "eu.example/train:1"
    assert "workingDir" not in container
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == {"PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": "/shared/runs/xla"}
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}}]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert found["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    policy = found["spec"]["failurePolicy"]
    assert {_ends(job, policy, status) for status in END} == {"FailJobSet"}
    assert {_ends(job, policy, status) for status in AGAIN} == {"RestartJobSet"}

    found, replicated, job, pod, container = _check_jobset(four)
    assert (replicated["replicas"], job["completions"]) == (4, 8)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert pod["terminationGracePeriodSeconds"] == 45
    assert container["workingDir"] == "/app"
    assert container["env"][1] == {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/tmp/xla"}
    assert container["command"][-1] == "--config.training.steps=9"


def test_a_jobset_of_gpus_finds_its_coordinator():
    (text,) = _render([f"--workdir={NASTY}", *GPU, f"--checkout={NASTY}"])
    found, replicated, job, pod, container = _check_jobset(text)
    assert (replicated["replicas"], job["completions"]) == (1, 4)
    assert found["metadata"]["annotations"] == {}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    # the first pod of the first job, by the name that JobSet gives it in the headless service
    host = f"{found['metadata']['name']}-{replicated['name']}-0-0.{found['metadata']['name']}"
    cache, index = container["env"][1:]
    assert index["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    command = [_expand(argument, {"PROCESS_ID": "3"}) for argument in container["command"]]
    own = [f"--coordinator={host}:8476", "--num_processes=4", "--process_id=3"]
    assert command == _training(NASTY, *own)
    assert container["workingDir"] == NASTY
    assert _expand(cache["value"], {"PROCESS_ID": "3"}) == str(pathlib.PurePosixPath(NASTY).parent / "xla")


# programs in the place of those of the cluster

_PYTHON = """#!{python}
import json, os, sys
folder = os.environ["FAKES"]
with open(f"{{folder}}/calls", "a") as file:
    names = ("JAX_COMPILATION_CACHE_DIR", "PYTHONUNBUFFERED", "TASK", "SRUN_CPUS_PER_TASK")
    seen = {{name: os.environ.get(name) for name in names}}
    print(json.dumps([sys.argv[1:], os.getcwd(), seen]), file=file)
with open(f"{{folder}}/statuses") as file:
    statuses = json.load(file)
with open(f"{{folder}}/statuses", "w") as file:
    json.dump(statuses[1:], file)
sys.exit(statuses[0])
"""
_SRUN = """#!/bin/bash
# two tasks, and the highest of their statuses, as srun does
options=srun
while [[ $1 == --* ]]; do options="$options $1"; shift; done
echo "$options" >>"$FAKES/log"
highest=0
for TASK in 0 1; do
  TASK=$TASK "$@"; status=$?
  ((status > highest)) && highest=$status
done
[ -e "$FAKES/end" ] && kill -TERM $PPID
exit $highest
"""
_SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$FAKES/log"
"""
_GCLOUD = """#!/bin/bash
# describe: the next line of `states`; ssh: two hosts, and the first status that is not 0, as gcloud does
if [ "$4" = describe ]; then
  echo "describe ${*:5}" >>"$FAKES/log"
  # who reads the line goes on at once, maybe to the next call: it must be gone by then
  line=$(head -n 1 "$FAKES/states"); sed -i 1d "$FAKES/states"; printf '%s\n' "$line"
  exit
fi
echo "ssh ${*:5:$#-5}" >>"$FAKES/log"
first=0
for TASK in 0 1; do
  (cd / && TASK=$TASK sh -c "${!##--command=}"); status=$?
  [ $first = 0 ] && first=$status
done
exit $first
"""
_SLEEP = """#!/bin/bash
echo "sleep $*" >>"$FAKES/log"
"""


class _Cluster:
    """A folder of programs that come first on PATH, what they were told, and the statuses of the training."""

    def __init__(self, folder):
        self.folder, self.python = folder, folder / "bin" / "it's python"
        (folder / "bin").mkdir()
        programs = {"srun": _SRUN, "scontrol": _SCONTROL, "gcloud": _GCLOUD, "sleep": _SLEEP}
        for name, text in {**programs, self.python.name: _PYTHON.format(python=sys.executable)}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.checkout = folder / "the check'out"
        self.checkout.mkdir()

    def run(self, text, statuses, **environment):
        """Runs a script; gives its exit status and the lines of the programs' log."""
        script = self.folder / "script.sh"
        script.write_text(text)
        assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
        (self.folder / "statuses").write_text(json.dumps(statuses))
        (self.folder / "log").write_text("")
        (self.folder / "calls").write_text("")
        path = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "FAKES": str(self.folder), **environment}
        done = subprocess.run(["bash", script], cwd=self.folder, env=path, capture_output=True, text=True, timeout=60)
        self.stderr = done.stderr
        self.left = json.loads((self.folder / "statuses").read_text())
        self.calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        assert not list(self.folder.rglob("pwned"))
        return done.returncode, (self.folder / "log").read_text().splitlines()

    def check_calls(self, count):
        """Every call of the training had these arguments, in this folder."""
        assert len(self.calls) == count
        for arguments, folder, seen in self.calls:
            assert arguments == _training(NASTY, "--distributed", "--config.data.path=a b")[1:]
            assert folder == str(self.checkout)
            assert seen["JAX_COMPILATION_CACHE_DIR"] == str(pathlib.PurePosixPath(NASTY).parent / "xla")
            assert seen["PYTHONUNBUFFERED"] == "1"
        assert [seen["TASK"] for _, _, seen in self.calls] == ["0", "1"] * (count // 2)

    @property
    def flags(self):
        own = [f"--python={self.python}", f"--checkout={self.checkout}", "--train_flag=--config.data.path=a b"]
        return [f"--workdir={NASTY}", *own]


@pytest.fixture
def cluster(tmp_path):
    return _Cluster(tmp_path)


# Slurm


def test_slurm_reads_its_options(cluster):
    (text,) = _render(["--kind=slurm", "--hosts=4", "--devices=2", "--grace=60", *cluster.flags])
    # sbatch stops at the first line that is neither empty nor a comment
    lines = text.splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]
    assert sum("#SBATCH" in line for line in lines) == len(options)
    assert options == [
        "--job-name=maml", "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2",
        "--signal=TERM@60", "--requeue", "--open-mode=append",
    ]  # fmt: skip


def test_a_slurm_job_is_requeued_until_it_is_done(cluster):
    (text,) = _render(["--kind=slurm", "--hosts=1", "--max_restarts=2", *cluster.flags])
    job = {"SLURM_JOB_ID": "17"}
    srun = "srun --kill-on-bad-exit=0 --wait=0"
    # the highest status of the two tasks decides
    for statuses in [os.EX_TEMPFAIL, 0], [1, _process.LOST_PEER], [134, _process.LOST_PEER]:
        assert cluster.run(text, statuses, **job) == (max(statuses), [srun, "scontrol requeue 17"])
        cluster.check_calls(2)
    assert cluster.run(text, [0, 0], **job, SLURM_RESTART_COUNT="1", SLURM_CPUS_PER_TASK="6") == (0, [srun])
    cluster.check_calls(2)
    assert cluster.calls[0][2]["SRUN_CPUS_PER_TASK"] == "6"
    for statuses in ([2, 2], [130, 75]):
        assert cluster.run(text, statuses, **job) == (max(statuses), [srun])
    # the last restart is used up
    assert cluster.run(text, [75, 75], **job, SLURM_RESTART_COUNT="1") == (75, [srun, "scontrol requeue 17"])
    assert cluster.run(text, [75, 75], **job, SLURM_RESTART_COUNT="2") == (75, [srun])
    assert cluster.stderr == "status 75 after 2 restarts: not started again\n"
    # Slurm ends the job: the script itself gets SIGTERM
    (cluster.folder / "end").touch()
    assert cluster.run(text, [75, 75], **job) == (75, [srun])
    cluster.check_calls(2)


# TPU VMs


@pytest.fixture
def tpu(cluster):
    """The script for a TPU whose lock no other test takes."""
    if not shutil.which("flock"):
        pytest.skip("needs flock, as TPU VMs have it")
    name = f"test-{uuid.uuid4().hex[:12]}"
    flags = ["--kind=tpu_vm", "--hosts=2", f"--name={name}", "--zone=us-east5-a", "--max_restarts=2", *cluster.flags]
    yield name, *_render(flags)
    pathlib.Path(f"/tmp/metajax-{name}.lock").unlink(missing_ok=True)


def test_a_tpu_starts_again_until_it_is_done(cluster, tpu):
    name, text = tpu
    describe = f"describe {name} --zone=us-east5-a --format=value(state,networkEndpoints.len())"
    ssh = f"ssh {name} --zone=us-east5-a --worker=all"
    (cluster.folder / "states").write_text("READY\t2\nRESTARTING\t2\nREADY\t2\nREADY\t2\n")
    status, log = cluster.run(text, [75, 75, 0, 70, 0, 0])
    assert (status, log) == (
        0, [describe, ssh, "sleep 30", describe, "sleep 30", describe, ssh, "sleep 30", describe, ssh],
    )  # fmt: skip
    cluster.check_calls(6)
    assert cluster.stderr == "status 75: restart 1\nstatus 70: restart 2\n"

    (cluster.folder / "states").write_text("READY\t2\n" * 9)
    status, log = cluster.run(text, [70] * 9)
    assert (status, log.count(ssh)) == (70, 3)
    assert cluster.stderr.endswith("status 70 after 2 restarts: not started again\n")
    for stop in (2, 130):
        assert cluster.run(text, [0, stop, 75]) == (stop, [describe, ssh])
        cluster.check_calls(2)


def test_a_tpu_that_cannot_train_is_told(cluster, tpu):
    name, text = tpu
    for states, status, told in (
        ("PREEMPTED\t2\n", 75, "is PREEMPTED: create it again, then run this script again"),
        ("READY\t4\n", 2, "has 4 hosts, not 2"),
    ):
        (cluster.folder / "states").write_text(states)
        found, log = cluster.run(text, [])
        assert (found, len(log), cluster.calls) == (status, 1, [])
        assert cluster.stderr == f"{name} {told}\n"
    assert cluster.run(text, [])[0] == 1
    assert cluster.stderr == f"gcloud does not tell the state of {name}\n"


def test_scripts_without_the_checkout_are_refused(cluster, tpu):
    (text,) = _render(["--kind=slurm", "--hosts=1", *cluster.flags])
    cluster.checkout.rmdir()
    assert cluster.run(text, [], SLURM_JOB_ID="17") == (2, [])
    (cluster.folder / "states").write_text("READY\t2\n")
    status, log = cluster.run(tpu[1], [])
    assert (status, len(log), cluster.calls) == (2, 2, [])


def test_a_host_of_a_tpu_runs_one_training_at_a_time(cluster, tpu):
    name, text = tpu
    (cluster.folder / "states").write_text("READY\t2\n" * 9)
    assert "--wait 600 " in text
    with subprocess.Popen(["flock", f"/tmp/metajax-{name}.lock", "cat"], stdin=subprocess.PIPE) as holder:
        while subprocess.run(["flock", "--nonblock", f"/tmp/metajax-{name}.lock", "true"]).returncode == 0:
            pass  # until the holder has it
        status, _ = cluster.run(text.replace("--wait 600 ", "--wait 0 "), [0, 0])
        holder.stdin.close()
    assert (status, cluster.calls) == (70, [])
    (cluster.folder / "states").write_text("READY\t2\n")
    assert cluster.run(text, [0, 0])[0] == 0
    cluster.check_calls(2)


# the command itself


def _flags_of(text):
    """What a rendered file passes to `experiments.train`."""
    if text.startswith("#!"):
        line = next(line for line in text.splitlines() if line.startswith(("srun ", "command=")))
        words = shlex.split(line)
        if line.startswith("command="):  # for the shell of the host
            words = shlex.split(words[0])
    else:
        *_, container = _check_jobset(text)
        words = [_expand(word, {"PROCESS_ID": "3"}) for word in container["command"]]
    return words[words.index("experiments.train") + 1 :]


def test_the_training_takes_what_is_rendered(launch):
    more = ["--workdir=/shared/runs/maml", *(f"--train_flag={flag}" for flag in MORE)]
    others = (["--kind=slurm", "--hosts=4"], ["--kind=tpu_vm", "--hosts=4", "--checkout=/app"])
    gpu, *found = map(_flags_of, _render(*([*own, *more] for own in (GPU, TPU, *others))))
    assert found == 3 * [_training("/shared/runs/maml", "--distributed", *MORE)[3:]]
    for flags, status in (gpu, 0), (found[0], 0), ([*gpu, "--peer_timeouts=1"], 2):
        done = launch("train", *flags, "--only_check_args")
        assert done.returncode == status, (flags, done.stderr)


def test_the_command_writes_a_new_file(launch, tmp_path):
    flags = [*COMMON, "--kind=slurm", "--workdir=/runs/maml", "--hosts=4", "--output", tmp_path / "maml.sh"]
    done = launch("launch", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    written = (tmp_path / "maml.sh").read_text()
    assert launch("launch", *flags[:-2]).stdout == written
    done = launch("launch", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: output must name a new file, got '{tmp_path / 'maml.sh'}': File exists\n"
    assert (tmp_path / "maml.sh").read_text() == written
    done = launch("launch", "--config=no/such.py")
    assert (done.returncode, done.stderr) == (2, "error: config must name a config file, got 'no/such.py'\n")


def test_the_commands_of_the_readme_render():
    text = (ROOT / "experiments/launch/README.md").read_text(encoding="utf-8")
    found = re.findall(r"^python -m experiments\.launch ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    commands = [shlex.split(one.split("|")[0].replace("\\\n", " ")) for one in found]
    kinds = [flag for command in commands for flag in command if flag.startswith("--kind=")]
    assert kinds == ["--kind=jobset", "--kind=jobset", "--kind=slurm", "--kind=tpu_vm"]
    for text in _render(*commands)[:2]:
        _check_jobset(text)


def test_bad_input_is_refused(refusals):
    slurm = [*COMMON, "--workdir=/shared/runs/maml", "--kind=slurm", "--hosts=4"]
    tpu, gpu, vm = ([*slurm[:-2], *own] for own in (TPU, GPU, ["--kind=tpu_vm", "--hosts=2", "--checkout=/app"]))
    cases = [
        ([], "kind must be given, got none"),
        (["--kind=pbs"], "kind must be jobset, slurm, tpu_vm, got 'pbs'"),
        (slurm[:-1], "hosts must be given, got none"),
        (slurm[1:], "config must be given, got none"),
        ([*slurm, "--hosts=0"], "hosts must be from 1 to 65536, got 0"),
        ([*slurm, "--max_restarts=-1"], "max_restarts must be from 0 to 10000, got -1"),
        ([*slurm, "--grace=29"], "grace must be from 30 to 65535, got 29"),
        ([*slurm, "--name=-x"], "name must be lower-case letters, digits and '-', from a letter on, 63 at most, got"),
        ([*slurm, "--name=a\n#SBATCH --uid=0"], "name must be lower-case letters"),
        ([*slurm, f"--name={'a' * 64}"], "name must be lower-case letters"),
        ([*slurm, "--workdir=runs"], "workdir must be an absolute path without '..', got 'runs'"),
        ([*slurm, "--workdir=/a/../b"], "workdir must be an absolute path without '..', got '/a/../b'"),
        ([*slurm, "--workdir=/a\nb"], "workdir must be printable text that does not start with '-', got '/a\\nb'"),
        ([*slurm, "--python=-c"], "python must be printable text that does not start with '-', got '-c'"),
        ([*slurm, "--config=\u2028"], "config must be printable text"),
        ([*slurm, "--train_flag=steps=1"], "train_flag must be --NAME or --NAME=VALUE, got 'steps=1'"),
        ([*slurm, "--train_flag=--a=\n"], "train_flag must be --NAME or --NAME=VALUE, got '--a=\\n'"),
        ([*slurm, "--train_flag=--workdir=/x"], "train_flag must be none of config, workdir, resume, distributed"),
        ([*slurm, "--train_flag=--noresume"], "train_flag must be none of config, workdir, resume, distributed"),
        ([*slurm, "--topology=2x2x1"], "topology is a flag of jobset, not of slurm, got '2x2x1'"),
        ([*vm, "--grace=60"], "grace is a flag of jobset and slurm, not of tpu_vm, got 60"),
        (vm[:-1], "checkout must be given, got none"),
        ([*vm, "--zone=a;b"], "zone must be a zone of Google Cloud, as us-east5-a, got 'a;b'"),
        ([*tpu, "--hosts=33"], "hosts must be a multiple of 32, the hosts of a slice of 4x4x8, got 33"),
        ([*tpu, "--topology=4x4x"], "topology must be chips along each axis, as 4x4x8, got '4x4x'"),
        ([*tpu, "--topology=1x1x1"], "topology must be whole hosts of 4 chips, got '1x1x1' of 1 chips"),
        ([*tpu, "--topology=2x2x1"], "topology must have several hosts where there are several slices, got '2x2x1'"),
        ([*tpu, "--topology="], "topology must be given, got none"),
        ([*tpu, "--workdir=/home/runs"], "workdir must lie in the mounted claim, under '/shared', got '/home/runs'"),
        ([*tpu, "--workdir=/shared"], "workdir must lie in the mounted claim, under '/shared', got '/shared'"),
        ([*tpu, "--claim=Runs"], "claim must be lower-case letters, digits, '-' and '.', got 'Runs'"),
        ([*tpu, "--image= "], "image must be printable text"),
        ([*tpu, f"--name={'a' * 47}"], "name must be shorter: pods would have names of 64 > 63 letters"),
        ([*gpu, "--topology=4x4x8"], "topology is a flag of TPUs only, got '4x4x8' for accelerator 'nvidia-h100-80gb'"),
        ([*gpu, "--accelerator=h100"], "accelerator must be tpu-... or nvidia-..., as GKE names it, got 'h100'"),
    ]
    told = refusals("launch", [flags for flags, _ in cases])
    for (flags, expected), text in zip(cases, told, strict=True):
        assert text.startswith(expected), (flags, text)
