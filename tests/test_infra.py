"""KubeRay accepts the manifests, they start jobs that exist with flags that parse, and keys stay unseen."""

import copy
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
INFRA = REPOSITORY / "infra"
SCHEMAS = REPOSITORY.parent / "shared" / "schemas" / "kuberay"
JOBS = ("make_pairs", "train", "evaluate", "promote", "upscale")
TOOLS = (
    "manipulate",
    "image",
    "import_weights",
)  # they work on files of the machine they are typed on

MANIFESTS = {
    f"{path.relative_to(INFRA)}#{number}": document
    for path in sorted(INFRA.rglob("*.yaml"))
    for number, document in enumerate(yaml.safe_load_all(path.read_text()))
}
RAY_MANIFESTS = {name: document for name, document in MANIFESTS.items() if document["apiVersion"].startswith("ray.io/")}


def nodes(value):
    """Every mapping inside `value`, itself included."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(child)


def strict(schema: dict) -> dict:
    """The schema as the API server applies it with fieldValidation=Strict: a field without a name in it is an error."""
    closed = copy.deepcopy(schema)
    for node in nodes(closed):
        # `type` tells a schema from a table of properties, in which "properties" could be the name of a field.
        named = node.get("type") == "object" and "properties" in node
        if named and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
    return closed


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's resource definitions are not beside this repository: {path.name}")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def ray_jobs() -> dict[str, dict]:
    """The specification of every RayJob, those inside a RayCronJob included."""
    found = {}
    for name, document in RAY_MANIFESTS.items():
        if document["kind"] != "RayCluster":
            found[name] = document["spec"].get("jobTemplate", document["spec"])
    return found


def cluster_specs() -> dict[str, dict]:
    jobs = ray_jobs()
    return {
        name: jobs[name]["rayClusterSpec"] if name in jobs else RAY_MANIFESTS[name]["spec"] for name in RAY_MANIFESTS
    }


def test_there_is_one_manifest_of_each_kind():
    assert sorted(document["kind"] for document in RAY_MANIFESTS.values()) == ["RayCluster", "RayCronJob", "RayJob"]


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_manifest_is_valid_for_kuberay(name):
    document = RAY_MANIFESTS[name]
    assert document["apiVersion"] == "ray.io/v1"
    errors = validator(document["kind"]).iter_errors(document)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_unknown_field_and_wrong_type_are_refused(name):
    """The oracle of the test above: a validator that accepts everything would pass it."""
    kind = RAY_MANIFESTS[name]["kind"]
    for path, value in [("concurrencyPolicy", "Forbid"), ("metadata", [])]:
        wrong = copy.deepcopy(RAY_MANIFESTS[name])
        (wrong if path == "metadata" else wrong["spec"])[path] = value
        assert not validator(kind).is_valid(wrong)
    wrong = copy.deepcopy(RAY_MANIFESTS[name])
    for node in nodes(wrong):
        for container in node.get("containers", ()):
            container["resources"]["request"] = container["resources"].pop("requests")
    assert not validator(kind).is_valid(wrong)


@pytest.mark.parametrize("name", RAY_MANIFESTS)
def test_cluster_has_token_auth_and_the_ray_of_pyproject(name):
    spec = cluster_specs()[name]
    assert spec["authOptions"]["mode"] == "token"
    (minimum,) = re.findall(r'"ray\[.*\]>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert spec["rayVersion"].startswith(minimum)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", ray_jobs())
def test_entrypoint_names_a_job_with_flags_that_parse(name):
    from pipelines.cli import parse

    python, script, *flags = shlex.split(ray_jobs()[name]["entrypoint"])
    assert python == "python"
    assert (REPOSITORY / script).is_file()
    assert Path(script).stem in JOBS
    parse(Path(script).stem, flags)  # raises SystemExit for a flag that is not there


@pytest.mark.parametrize("name", ray_jobs())
def test_job_carries_its_commit_and_leaves_no_cluster_behind(name):
    spec = ray_jobs()[name]
    runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    assert runtime_env["working_dir"].endswith(f"/{runtime_env['env_vars']['DIFFSR_COMMIT']}.zip")
    assert (
        spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0 and spec["activeDeadlineSeconds"] > 0
    )
    # The head offers no CPU: a driver that reserves one would wait for ever, or take a GPU machine for itself.
    assert "entrypointNumCpus" not in spec


def test_training_has_as_many_gpu_pods_as_workers():
    (spec,) = (spec for name, spec in ray_jobs().items() if "train" in name)
    flags = shlex.split(spec["entrypoint"])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == int(flags[flags.index("--num-workers") + 1])


@pytest.mark.parametrize("name", MANIFESTS)
def test_keys_and_passwords_come_from_secrets(name):
    for node in nodes(MANIFESTS[name]):
        for variable in node.get("env", ()):
            assert not re.search("KEY|SECRET|TOKEN|PASSWORD|URI", variable["name"]) or "valueFrom" in variable
        for argument in [*node.get("args", ()), *node.get("command", ())]:
            assert "postgresql" not in argument and "backend-store" not in argument
        assert "stringData" not in node and node.get("kind") != "Secret"


def test_pods_find_the_mlflow_server_that_is_deployed():
    documents = {d["kind"]: d for name, d in MANIFESTS.items() if name.startswith("mlflow/")}
    service, container = documents["Service"], documents["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    place = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert documents["ConfigMap"]["data"]["MLFLOW_TRACKING_URI"] == f"http://{place}"
    assert "--serve-artifacts" in container["args"]
    (hosts,) = (arg for arg in container["args"] if arg.startswith("--allowed-hosts="))
    assert place in hosts.removeprefix("--allowed-hosts=").split(",")
    selector = documents["Deployment"]["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == selector == documents["Deployment"]["spec"]["template"]["metadata"]["labels"]


def test_image_installs_the_pinned_dependencies_and_is_not_root():
    text = (INFRA / "docker" / "Dockerfile").read_text()
    assert "FROM python:3.11-slim" in text
    assert "--constraint constraints.txt --requirement requirements.txt" in text
    assert re.findall(r"^COPY (.*) \./$", text, re.M) == ["pyproject.toml constraints.txt"]
    assert text.index("\nUSER 1000") > text.rindex("RUN ")
    (code,) = re.findall(r'python -c "(.*?)" \\\n', text, re.S)
    code = code.replace("\\\n", "").replace("\\\\n", "\\n")
    listed = subprocess.run(
        [sys.executable, "-c", code, "geo"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {line.split(">=")[0] for line in listed} >= {"torch", "ray[data,train,default]", "rasterio"}


def submit(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs infra/submit.sh from another folder, with the environment that is given and nothing else."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], **variables}
    command = [str(INFRA / "submit.sh"), *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def fake_ray(tmp_path) -> dict[str, str]:
    """A `ray` that writes down its arguments, its folder and the file of the runtime environment."""
    script = tmp_path / "bin" / "ray"
    script.parent.mkdir()
    script.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        "env = json.load(open(sys.argv[sys.argv.index('--runtime-env') + 1]))\n"
        "record = dict(argv=sys.argv[1:], env=env, cwd=os.getcwd(), mode=os.environ['RAY_AUTH_MODE'])\n"
        f"json.dump(record, open({str(tmp_path / 'record.json')!r}, 'w'))\nsys.exit(7)\n"
    )
    script.chmod(0o755)
    return {"PATH": f"{script.parent}:{os.environ['PATH']}", "RAY_AUTH_TOKEN": "t0ken"}


def test_every_job_can_be_submitted_and_only_the_tools_cannot():
    from pipelines.cli import JOBS as KNOWN

    assert {*JOBS, *TOOLS} == set(KNOWN)


@pytest.mark.parametrize("script", sorted(INFRA.rglob("*.sh")), ids=lambda script: script.name)
def test_a_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("job", JOBS)
def test_submit_prints_the_command_and_runs_nothing(job, tmp_path):
    result = submit("--print", job, "--note", "it's $HOME", home=tmp_path, RAY_API_SERVER_ADDRESS="http://head:8265")
    assert result.returncode == 0, result.stderr
    mode, *command = shlex.split(result.stdout, comments=True)
    assert mode == "RAY_AUTH_MODE=token"
    assert command[:7] == ["ray", "job", "submit", "--address", "http://head:8265", "--working-dir", "."]
    assert re.fullmatch(rf"{job}-\d{{4}}-\d\d-\d\d-(unknown|[0-9a-f]{{10}})-[0-9a-f]{{8}}", command[8])
    environment = json.loads(command[command.index("--runtime-env-json") + 1])["env_vars"]
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", environment.pop("DIFFSR_COMMIT"))
    assert environment == {}
    assert command[command.index("--") :] == ["--", "python", f"jobs/{job}.py", "--note", "it's $HOME"]
    assert submit(job, home=tmp_path, DRY_RUN="1").returncode == 0


@pytest.mark.parametrize("job", ["", "trian", "make_pairs train", "train.py", "*", *TOOLS])
def test_submit_refuses_a_job_that_does_not_exist(job, tmp_path):
    result = submit(job, home=tmp_path)
    assert result.returncode == 2
    assert all(name in result.stderr for name in JOBS)


def test_submit_without_a_token_says_where_to_get_one(tmp_path):
    result = submit("train", home=tmp_path)
    assert result.returncode == 2
    assert "RAY_AUTH_TOKEN" in result.stderr and "kubectl get secret" in result.stderr


def test_submit_forwards_places_by_default_and_keys_only_by_name(tmp_path, fake_ray):
    variables = {"AWS_ENDPOINT_URL": "http://store:80", "AWS_SECRET_ACCESS_KEY": 'a "b" \\ c'}
    assert submit("train", "--steps", "3", home=tmp_path, **fake_ray, **variables).returncode == 7  # as ray's own
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["cwd"] == str(REPOSITORY) and record["mode"] == "token"
    assert record["argv"][-5:] == ["--", "python", "jobs/train.py", "--steps", "3"]
    assert set(record["env"]["env_vars"]) == {"DIFFSR_COMMIT", "AWS_ENDPOINT_URL"}

    names = "AWS_SECRET_ACCESS_KEY AWS_ENDPOINT_URL"
    submit("train", home=tmp_path, DIFFSR_FORWARD_ENV=names, **fake_ray, **variables)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["env"]["env_vars"].items() >= variables.items()
    secret = variables["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in argument or "t0ken" in argument for argument in record["argv"])
    printed = submit("--print", "train", home=tmp_path, DIFFSR_FORWARD_ENV=names, **fake_ray, **variables)
    assert "$AWS_SECRET_ACCESS_KEY" in printed.stdout and secret not in printed.stdout + printed.stderr

    missing = submit("train", home=tmp_path, DIFFSR_FORWARD_ENV="NOT_SET", **fake_ray)
    assert missing.returncode == 2 and "NOT_SET" in missing.stderr
