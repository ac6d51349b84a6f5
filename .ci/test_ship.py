"""Tests of what is shipped beside the script: daemonset.yaml, the Helm chart, conf.yaml and the README's commands."""

from __future__ import annotations

import ast
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import smarter_device_manager as sdm  # noqa: E402

CHART = ROOT / "charts/smarter-device-manager"
NAME = "smarter-device-manager"
CONF = ROOT / "conf.yaml"
SCRIPT = ROOT / "smarter_device_manager.py"
PATHS_OF = {
    "k3s": "/var/lib/kubelet",
    "k0s": "/var/lib/k0s/kubelet",
    "MicroK8s": "/var/snap/microk8s/common/var/lib/kubelet",
}
RULES = yaml.safe_load(CONF.read_text())


def helm() -> Any:
    """Helm itself, as a library. Tests that need it are skipped where its package has no wheel (armv7, for example)."""
    return pytest.importorskip(
        "helm_python", reason="helm-python-sdk is installed on x86_64 only: it has no wheel for some machines"
    )


def schemas() -> list[str]:
    """The oldest version of Kubernetes that knows all fields of daemonset.yaml, and the newest version known here."""
    return ["1.30.0", kubernetes_validate.utils.all_versions()[-1]]


def assert_valid(objects: list[dict[str, Any]]) -> None:
    for item in objects:
        if item["kind"] != "PodMonitor":  # a custom resource: not in Kubernetes' own schema
            for version in schemas():
                kubernetes_validate.validate(item, version, strict=True)


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "daemonset.yaml").read_text()))


def render(values: dict[str, Any] | None = None, chart_dir: Path = CHART) -> list[dict[str, Any]]:
    """The chart's objects under VALUES."""
    with helm().chart.Chart.load(chart_dir) as chart:
        chart.validate_schema(chart.merge_values(values))
        texts = chart.render(values, name="my-" + NAME, namespace="kube-system")
    rendered = [yaml.safe_load_all(text) for path, text in sorted(texts.items()) if path.endswith(".yaml")]
    return [item for items in rendered for item in items if item]


def pick(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = pick(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    return found


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return pick(objects, "DaemonSet")["spec"]["template"]["spec"]


def run(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script on a Python without packages, in a locale without UTF-8."""
    command = [sys.executable, "-I", "-S", str(script), *arguments]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", **environment}
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)


def printed(*arguments: str, script: Path = SCRIPT) -> str:
    """What the script prints."""
    done = run(*arguments, script=script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(conf: str, folder: Path) -> None:
    """See that the daemon itself finds CONF good."""
    (folder / "conf.yaml").write_text(conf)
    printed("--check", "--conf", str(folder / "conf.yaml"))


def takes_options(objects: list[dict[str, Any]]) -> None:
    """See that the daemon has the options that the pod of OBJECTS gives it."""
    options = [part for part in container(objects)["args"] if not part.startswith(("--dev-dir", "--sys-dir"))]
    printed(*options, "--check", "--conf", str(CONF))


# ---------------------------------------------------------------------------------------------------------------------
# daemonset.yaml
# ---------------------------------------------------------------------------------------------------------------------


def test_the_manifest_is_valid_for_the_oldest_and_newest_kubernetes_known() -> None:
    assert [item["kind"] for item in manifest()] == ["ConfigMap", "DaemonSet"]
    assert_valid(manifest())


def test_older_kubernetes_does_not_know_recursive_read_only_alone() -> None:
    """docs/install.md says so: with --validate=false the API server drops this one field and takes the rest."""
    oldest = kubernetes_validate.utils.all_versions()[0]
    for objects in (manifest(), printed_manifest()):
        daemonset = pick(objects, "DaemonSet")
        with pytest.raises(kubernetes_validate.ValidationError, match="recursiveReadOnly"):
            kubernetes_validate.validate(daemonset, oldest, strict=True)
        for mount in container([daemonset])["volumeMounts"]:
            mount.pop("recursiveReadOnly", None)
        kubernetes_validate.validate(daemonset, oldest, strict=True)


def test_its_rules_are_those_of_conf_yaml(tmp_path: Path) -> None:
    conf = pick(manifest(), "ConfigMap")["data"]["conf.yaml"]
    assert yaml.safe_load(conf) == RULES
    check(conf, tmp_path)


def test_it_is_where_and_how_the_issue_says() -> None:
    daemonset = pick(manifest(), "DaemonSet")
    assert daemonset["metadata"]["namespace"] == "kube-system"
    assert daemonset["metadata"]["name"] == NAME == pick(manifest(), "ConfigMap")["metadata"]["name"]
    assert daemonset["spec"]["template"]["metadata"]["labels"] == {"app.kubernetes.io/name": NAME}
    surge = {"maxSurge": 1, "maxUnavailable": 0}
    assert daemonset["spec"]["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": surge}
    spec = pod(manifest())
    assert spec["nodeSelector"] == {NAME: "enabled"}
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["tolerations"] == [{"operator": "Exists"}]
    probes = container(manifest())
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert probes[probe]["httpGet"] == {"path": path, "port": "http"}
    assert f"--listen=:{probes['ports'][0]['containerPort']}" in probes["args"]


@pytest.mark.parametrize("source", ["daemonset.yaml", "chart"])
def test_the_pod_has_no_more_power_than_it_needs(source: str) -> None:
    objects = manifest() if source == "daemonset.yaml" else render({"config": RULES})
    spec = pod(objects)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # Not even as false: the API server drops that, so that every apply would say "configured".
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()
    # With a port of the host's, two pods on one node, as during a roll-out, could not be.
    assert not any("hostPort" in port for port in container(objects)["ports"])
    security = container(objects)["securityContext"]
    assert security["privileged"] is False
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount for mount in container(objects)["volumeMounts"]}
    assert {name for name, mount in mounts.items() if not mount.get("readOnly")} == {"plugins"}
    assert mounts["dev"]["recursiveReadOnly"] == "IfPossible"
    host = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    assert {host[name]: mount["mountPath"] for name, mount in mounts.items() if name in host} == {
        "/var/lib/kubelet/device-plugins": "/var/lib/kubelet/device-plugins",
        "/var/lib/kubelet/pod-resources": "/var/lib/kubelet/pod-resources",
        "/dev": "/host/dev",
        "/sys/dev": "/host/sys/dev",
        "/sys/devices": "/host/sys/devices",
    }


def test_no_more_of_sys_is_needed(tmp_path: Path) -> None:
    """The parts of /sys that the manifest mounts give the same attributes of every device as all of /sys."""
    for name in ("dev", "devices"):
        (tmp_path / name).symlink_to(f"/sys/{name}")
    number = next((text for text in os.listdir("/sys/dev/char") if text.startswith("1:")), None)
    if number is None:
        pytest.skip("no /sys here")
    entry = sdm.Entry(sdm.CHAR, os.makedev(*map(int, number.split(":"))))
    found, all_found = (
        [block["attributes"] for block in sdm.read_all_attributes(sys_dir, entry)]
        for sys_dir in (str(tmp_path), "/sys")
    )
    assert found == all_found and "subsystem" in found[0]


def test_its_options_are_ones_that_the_daemon_has() -> None:
    takes_options(manifest())


# ---------------------------------------------------------------------------------------------------------------------
# The chart
# ---------------------------------------------------------------------------------------------------------------------


def test_the_chart_has_no_findings() -> None:
    report = helm().chart.lint(CHART, strict=True, namespace="kube-system")
    assert [m for m in report["messages"] if m["severity"] > 1] == [] and report["errors"] == []


def test_the_default_render_is_daemonset_yaml_in_meaning() -> None:
    assert [item["kind"] for item in render()] == ["ConfigMap", "DaemonSet"]
    for kind in ("ConfigMap", "DaemonSet"):
        ours, charts = pick(manifest(), kind), pick(render(), kind)
        assert charts.get("spec") == ours.get("spec")
        assert charts.get("data") == ours.get("data")
        assert charts["metadata"]["name"] == ours["metadata"]["name"]
    assert_valid(render())


VERSIONS = [
    # Kubernetes, and whether it knows maxSurge, seccompProfile and recursiveReadOnly
    ("v1.18.20+k3s1", False, False, False), ("v1.21.14", False, True, False), ("v1.22.0", True, True, False),
    ("v1.29.15+k3s1", True, True, False), ("v1.30.0", True, True, True), ("v1.36.2+k3s1", True, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("version", "surge", "seccomp", "recursive"), VERSIONS)
def test_the_chart_gives_each_kubernetes_what_it_knows(
    tmp_path: Path, version: str, surge: bool, seccomp: bool, recursive: bool
) -> None:
    chart_dir = tmp_path / NAME
    shutil.copytree(CHART, chart_dir)
    template = chart_dir / "templates/daemonset.yaml"
    template.write_text(template.read_text().replace(".Capabilities.KubeVersion.Version", f'"{version}"'))
    objects = render(chart_dir=chart_dir)
    update = pick(objects, "DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"]
    assert update == ({"maxSurge": 1, "maxUnavailable": 0} if surge else {"maxUnavailable": 1})
    assert ("securityContext" in pod(objects)) == seccomp
    assert ("recursiveReadOnly" in json.dumps(objects)) == recursive


def test_a_config_becomes_a_configmap_that_the_daemon_reads(tmp_path: Path) -> None:
    rules = [
        *RULES,
        {"devicematch": r"^video(\d+)$", "nummaxdevices": 10000, "resource": "cam", "containerpath": r"/dev/cam\1"},
        {"devicematch": "a: b # c", "env": {"A": 'say "hi" & <go>', "B": "0042"}, "attributes": {"idVendor": "10c4"}},
        {"devicematch": r"^snd/pcmC(\d)D0p$", "with": [r"snd/controlC\1", r"snd/timer?"], "permissions": "rwm"},
    ]
    objects = render({"config": rules})
    conf = pick(objects, "ConfigMap")["data"]["conf.yaml"]
    assert yaml.safe_load(conf) == rules
    check(conf, tmp_path)
    assert pick(objects, "ConfigMap")["metadata"]["name"] == pod(objects)["volumes"][-1]["configMap"]["name"]
    assert_valid(objects)


# ------------------------------------------- The values of the Go program's chart


GO_RULES = [
    {"devicematch": "^snd$", "nummaxdevices": 20},
    {"devicematch": "^ttyUSB[0-9]*$", "nummaxdevices": 1},
    {"devicematch": "^nitro_enclaves$", "nummaxdevices": 1},
]
GO_VALUES = f"""
application:
  appName: smarter-device-manager
image:
  repository: ghcr.io/smarter-project/smarter-device-manager
  tag: ""
  pullPolicy: IfNotPresent
config: {json.dumps(GO_RULES)}
"""


def test_the_go_charts_values_mean_the_same(tmp_path: Path) -> None:
    """The Go chart's values file has these keys and no nodeSelector; its config is a comment at first."""
    values = yaml.safe_load(GO_VALUES)
    objects = render(values)
    assert pick(objects, "DaemonSet")["metadata"]["name"] == pick(objects, "ConfigMap")["metadata"]["name"] == NAME
    assert container(objects)["image"] == f"{values['image']['repository']}:{sdm.__version__}"  # its appVersion, then
    assert pod(objects)["nodeSelector"] == {NAME: "enabled"}
    conf = pick(objects, "ConfigMap")["data"]["conf.yaml"]
    assert yaml.safe_load(conf) == GO_RULES
    check(conf, tmp_path)
    del values["config"]
    assert yaml.safe_load(pick(render(values), "ConfigMap")["data"]["conf.yaml"]) == RULES


TEXT = "# Two rules\n- devicematch: ^snd$\n  nummaxdevices: 20\n\n- devicematch: 'ü{{x}}'\n"


@pytest.mark.parametrize(
    ("config", "conf"),
    [(TEXT, TEXT), ("\n" + TEXT + "\n\n", TEXT), *((nothing, CONF.read_text()) for nothing in ([], None, ""))],
)
def test_config_can_be_a_block_of_text_or_nothing(tmp_path: Path, config: Any, conf: str) -> None:
    objects = render({"config": config})
    assert pick(objects, "ConfigMap")["data"]["conf.yaml"] == conf
    check(conf, tmp_path)
    assert_valid(objects)


@pytest.mark.parametrize(("slots", "number"), [("20", 20), ("0020", 20), ("0", 0), ("10000", 10000), (7, 7)])
def test_a_number_of_slots_may_be_in_quotes(tmp_path: Path, slots: Any, number: int) -> None:
    objects = render({"config": [{"devicematch": "^a$", "nummaxdevices": slots, "env": {"A": "20"}}]})
    conf = pick(objects, "ConfigMap")["data"]["conf.yaml"]
    assert yaml.safe_load(conf) == [{"devicematch": "^a$", "nummaxdevices": number, "env": {"A": "20"}}]
    check(conf, tmp_path)


def test_a_parent_chart_can_have_it_under_a_condition(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(CHART, parent / "charts" / NAME)
    dependency = {"name": NAME, "version": "1.0.0", "repository": "", "condition": f"{NAME}.enabled"}
    metadata = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(metadata))
    for enabled in (True, False):
        values = {"global": {"site": "home"}, NAME: {"enabled": enabled, "config": TEXT}}
        assert [item["kind"] for item in render(values, parent)] == (["ConfigMap", "DaemonSet"] if enabled else [])


def test_the_notes_name_the_label_and_warn_of_the_go_programs_image() -> None:
    def notes(values: dict[str, Any]) -> str:
        with helm().chart.Chart.load(CHART) as chart:
            texts = chart.render(values, name="r", namespace="kube-system")
        (text,) = (text for path, text in texts.items() if path.endswith("NOTES.txt"))
        return text

    assert "kubectl label node NAME smarter-device-manager=enabled\n" in notes({})
    assert "kubectl label node NAME edge=yes\n" in notes({"nodeSelector": {"edge": "yes"}})
    assert "WARNING" not in notes({})
    assert "is the image of the Go program" in notes(yaml.safe_load(GO_VALUES))


def test_a_changed_config_rolls_nothing() -> None:
    one, other = ([{"devicematch": text}] for text in ("^a$", "^b$"))
    assert pick(render({"config": one}), "DaemonSet") == pick(render({"config": other}), "DaemonSet")


@pytest.mark.parametrize("kind", PATHS_OF)
def test_the_path_of_each_kind_of_kubernetes(kind: str) -> None:
    objects = render({"kubeletDir": PATHS_OF[kind]})
    for volume, folder in zip(pod(objects)["volumes"], ("device-plugins", "pod-resources")):
        assert volume["hostPath"]["path"] == f"{PATHS_OF[kind]}/{folder}"
        if kind != "k3s":  # which has the usual one
            assert f"{kind}: {PATHS_OF[kind]}/{folder}" in (ROOT / "daemonset.yaml").read_text()
            assert f"`{PATHS_OF[kind]}/device-plugins`" in read_page("install")
            assert f"kubeletDir={PATHS_OF[kind]}`" in read_page("install")
    assert_valid(objects)


# Each value of values.yaml: another one, and what the render must then hold.
CHANGED: dict[str, tuple[Any, str]] = {
    "application.appName": ("cameras", '"name": "cameras"'),
    "image.repository": ("registry.local:5000/sdm", '"registry.local:5000/sdm:1.0.0"'),
    "image.tag": ("2.0.0", '"smarter-device-manager:2.0.0"'),
    "image.tag ": ("1.0.0@sha256:" + "0a" * 32, '"smarter-device-manager:1.0.0@sha256:' + "0a" * 32 + '"'),
    "image.pullPolicy": ("Always", '"imagePullPolicy": "Always"'),
    "nodeSelector": ({"edge": "yes"}, '"nodeSelector": {"edge": "yes"}'),
    "config": ([{"devicematch": "^null$"}], r'- {\"devicematch\":\"^null$\"}\n'),
    "kubeletDir": ("/data/kubelet", '"/data/kubelet/device-plugins"'),
    "api": ("dra", '"--api=dra"'),
    "domain": ("example.com", '"--domain=example.com"'),
    "interval": (0.5, '"--interval=0.5"'),
    "logLevel": ("debug", '"--log-level=debug"'),
    "tolerations": ([{"key": "edge", "operator": "Exists"}], '"tolerations": [{"key": "edge", "operator": "Exists"}]'),
    "priorityClassName": ("system-cluster-critical", '"priorityClassName": "system-cluster-critical"'),
    "resources": ({"limits": {"memory": "64Mi"}}, '"limits": {"memory": "64Mi"}'),
    "metrics.enabled": (False, '"args": ["--plugin-dir=/var/lib/kubelet/device-plugins", "--dev-dir=/host/dev", '
                               '"--sys-dir=/host/sys"]'),
    "metrics.port": (9100, '"--listen=:9100"'),
    "podMonitor.enabled": (True, '"kind": "PodMonitor"'),
}  # fmt: skip


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.strip().split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("path", CHANGED)
def test_each_value_does_what_it_says(path: str) -> None:
    value, expected = CHANGED[path]
    objects = render(nested(path, value))
    assert expected in json.dumps(objects, sort_keys=False)
    assert expected not in json.dumps(render())
    assert_valid(objects)


def test_no_value_is_without_a_case() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    groups = ("application", "image", "metrics", "podMonitor")
    paths = [f"{key}.{name}" for key in groups for name in values[key]] + [key for key in values if key not in groups]
    assert sorted(paths) == sorted(path for path in CHANGED if not path.endswith(" "))


def test_without_metrics_there_is_no_port_and_no_probe() -> None:
    objects = render({"metrics": {"enabled": False}, "podMonitor": {"enabled": True}})
    assert not {"ports", "startupProbe", "livenessProbe", "readinessProbe"} & container(objects).keys()
    assert [item["kind"] for item in objects] == ["ConfigMap", "DaemonSet"]


WRONG_VALUES: list[tuple[str, Any]] = [
    *(("config", [rule]) for rule in (
        {"devicematch": "^a$", "nummaxdevice": 1}, {"nummaxdevices": 1}, {"devicematch": "^a$", "nummaxdevices": 10001},
        {"devicematch": "^a$", "nummaxdevices": "10001"}, {"devicematch": "^a$", "nummaxdevices": "1.5"},
        {"devicematch": "^a$", "attributes": {"idVendor": 1234}},
    )),
    ("config", {"devicematch": "^a$"}), ("enabled", "yes"), ("image.tag", "1.0.0@sha256:0a"), ("image.tag", 1.0),
    ("image.pullPolicy", "Sometimes"), ("kubeletDir", "var/lib/kubelet"), ("kubeletDir", "/var/lib/kubelet/"),
    ("domain", "Smarter"), ("interval", 0), ("interval", "1s"), ("logLevel", "loud"), ("metrics.port", 0),
    ("metrics.enabled", "yes"), ("application.appName", "No Name"), ("replicas", 2), ("resources", {"limit": {}}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_VALUES, ids=json.dumps)
def test_a_wrong_value_is_refused_by_the_schema(path: str, value: Any) -> None:
    with helm().chart.Chart.load(CHART) as chart, pytest.raises(helm().HelmValuesError, match=f"^{NAME}:"):
        chart.validate_schema(chart.merge_values(nested(path, value)))


# ---------------------------------------------------------------------------------------------------------------------
# What --manifest and --systemd-unit print
# ---------------------------------------------------------------------------------------------------------------------

STUBS = ("api_pb2.py", "api_pb2_grpc.py")
SCRIPT_NAME = SCRIPT.name


def printed_manifest(*arguments: str, script: Path = SCRIPT) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(printed("--manifest", *arguments, script=script)))


def test_the_printed_manifest_is_valid_and_small_enough() -> None:
    objects = printed_manifest()
    assert [item["kind"] for item in objects] == ["ConfigMap", "ConfigMap", "DaemonSet"]
    assert_valid(objects)
    for item in objects[:2]:
        assert sum(len(name) + len(text.encode()) for name, text in item["data"].items()) < 1 << 20  # kube-apiserver's


def test_it_holds_the_script_its_stubs_and_the_conf() -> None:
    conf, files, _ = (item.get("data") for item in printed_manifest())
    assert conf == {"conf.yaml": CONF.read_text()}
    assert (files.pop("install.py"), files.pop("requirements.txt")) == (sdm.INSTALL_PACKAGES, sdm.REQUIREMENTS)
    assert files == {name: (ROOT / name).read_text() for name in (SCRIPT_NAME, *STUBS)}


def test_its_daemonset_is_daemonset_yaml_but_for_what_the_image_lacks() -> None:
    ours, printed = pick(manifest(), "DaemonSet"), pick(printed_manifest(), "DaemonSet")
    assert set(printed["spec"]["template"]["metadata"].pop("annotations")) == {f"{NAME}/script"}
    spec, wanted = pod([printed]), pod([ours])
    (install,) = spec.pop("initContainers")
    main, image = container([printed]), container([ours])
    assert install["image"] == main["image"] == sdm.DEFAULT_IMAGE
    assert install["securityContext"] == main["securityContext"] == image["securityContext"]
    added = {"packages": "/packages", "script": "/app"}
    for mounts, read_only in ((install["volumeMounts"], {"script"}), (main["volumeMounts"], {"script", "packages"})):
        new = [mount for mount in mounts if mount["name"] in added]
        assert {mount["name"]: mount["mountPath"] for mount in new} == added
        assert {mount["name"] for mount in new if mount.get("readOnly")} == read_only
        mounts[:] = [mount for mount in mounts if mount not in new]
    assert install["volumeMounts"] == []
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] not in added]
    main["env"] = [variable for variable in main["env"] if variable["name"] == "NODE_NAME"]
    for key in ("command", "workingDir"):
        del main[key]
    main["image"] = image["image"]
    assert spec == wanted
    assert printed == ours


def test_the_manifest_follows_its_options(tmp_path: Path) -> None:
    conf, authority = tmp_path / "conf.yaml", tmp_path / "ca.crt"
    conf.write_text("  # a line that is indented\n- devicematch: 'ü'\n\n\n")
    authority.write_text("-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n")
    path = PATHS_OF["k0s"]
    objects = printed_manifest(
        "--namespace=lab", "--image=registry.local:5000/python:3.13@sha256:0a", f"--conf={conf}",
        f"--plugin-dir={path}/device-plugins", "--domain=example.com", "--interval=0.5", "--log-level=debug",
        "--log-format=json", "--listen=0.0.0.0:9100", "--dev-dir=/m/dev", "--sys-dir=/m/sys",
        "--pip-index=https://pypi.local/simple", f"--pip-ca={authority}",
    )  # fmt: skip
    assert_valid(objects)
    assert {item["metadata"]["namespace"] for item in objects} == {"lab"}
    assert objects[0]["data"]["conf.yaml"] == conf.read_text().rstrip("\n") + "\n"
    assert objects[1]["data"]["pip-ca.crt"] == authority.read_text()
    packages, *paths = [volume["hostPath"]["path"] for volume in pod(objects)["volumes"] if "hostPath" in volume]
    assert paths == [f"{path}/device-plugins", f"{path}/pod-resources", "/m/dev", "/m/sys/dev", "/m/sys/devices"]
    folder = f"/var/lib/{NAME}/registry.local_5000_python_3.13_sha256_0a-{sdm.short_hash(sdm.REQUIREMENTS)}"
    assert packages == folder  # which another version with other pins does not share
    main = container(objects)
    assert (main["args"][3], main["ports"][0]["containerPort"]) == ("--listen=:9100", 9100)
    assert main["args"][4:] == ["--domain=example.com", "--interval=0.5", "--log-level=debug", "--log-format=json"]
    (install,) = pod(objects)["initContainers"]
    assert install["image"] == main["image"] == "registry.local:5000/python:3.13@sha256:0a"
    assert install["env"][-2:] == [
        {"name": "PIP_INDEX_URL", "value": "https://pypi.local/simple"},
        {"name": "PIP_CERT", "value": "/app/pip-ca.crt"},
    ]


@pytest.mark.parametrize(
    ("socket", "folder", "argument"),
    [("/run/k/kubelet.sock", "/run/k", []), ("/run/k/pods", "/run/k", ["/var/lib/kubelet/pod-resources/pods"])],
)
def test_the_manifest_mounts_the_folder_of_the_pod_resources_socket(
    socket: str, folder: str, argument: list[str]
) -> None:
    objects = printed_manifest(f"--pod-resources-socket={socket}")
    (path,) = (item["hostPath"]["path"] for item in pod(objects)["volumes"] if item["name"] == "pod-resources")
    assert path == folder
    assert container(objects)["args"][4:] == [f"--pod-resources-socket={path}" for path in argument]


def test_another_script_is_another_pod_and_another_conf_is_not(tmp_path: Path) -> None:
    for name in (SCRIPT_NAME, *STUBS, "daemonset.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / SCRIPT_NAME).write_text(SCRIPT.read_text() + "# another\n")
    (tmp_path / "conf.yaml").write_text("- devicematch: ^null$\n")

    def template(script: Path, *arguments: str) -> Any:
        return pick(printed_manifest(*arguments, script=script), "DaemonSet")["spec"]["template"]

    ours = template(SCRIPT)
    assert template(SCRIPT, f"--conf={tmp_path}/conf.yaml") == ours
    assert template(tmp_path / SCRIPT_NAME) != ours


def wheel(folder: Path, name: str, module: str) -> str:
    """Put a wheel of NAME with an empty MODULE into FOLDER, for pip without an index: its line of requirements."""
    info = f"{name}-99.0.dist-info"
    files = {
        f"{module}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-99.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
    return f"{name}==99.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


class InitContainer:
    """That of the manifest with OPTIONS, in FOLDER, with made-up wheels, and a module that imports them."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.app, self.packages, self.wheels = (folder / name for name in ("app", "packages", "wheels"))
        for path in (self.app, self.packages, self.wheels):
            path.mkdir()
        objects = printed_manifest(*options)
        for name, text in objects[1]["data"].items():
            (self.app / name).write_text(self._moved(text))
        (self.app / SCRIPT_NAME).write_text("def load_grpc():\n    import grpc_x, protobuf_x\n")
        self.requirements = wheel(self.wheels, "grpcio", "grpc_x") + wheel(self.wheels, "protobuf", "protobuf_x")
        (self.app / "requirements.txt").write_text(self.requirements)
        (self._spec,) = pod(objects)["initContainers"]

    def _moved(self, text: str) -> str:
        return text.replace("/packages", str(self.packages)).replace("/app", str(self.app))

    def start(self, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {item["name"]: self._moved(item["value"]) for item in self._spec["env"]}
        env = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
        python, *arguments = self._spec["command"]
        assert (python, self._spec["workingDir"]) == ("python3", "/app")
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.app, env={**env, **variables, **environment}
        )


def test_the_init_container_installs_once_and_needs_no_internet_then(tmp_path: Path) -> None:
    init = InitContainer(tmp_path)
    packages, wheels = init.packages, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(init.wheels)}
    done = init.start(PIP_NO_INDEX="1")  # without internet, and nothing there yet
    assert done.returncode == 1 and "No matching distribution found for grpcio" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("the packages are pinned for Python 3.13 on amd64, arm64 and arm/v7")
    assert not (packages / "installed").exists()
    (init.app / "requirements.txt").write_text(re.sub("(?<=sha256:)....", "0000", init.requirements))
    assert init.start(**wheels).returncode == 1  # the index has other wheels than those that are pinned
    assert not (packages / "grpc_x").exists()
    (init.app / "requirements.txt").write_text(init.requirements)
    done = init.start(**wheels)
    assert done.returncode == 0, done.stderr
    assert (packages / "grpc_x/__init__.py").exists() and (packages / "installed").exists()
    assert list(packages.glob("pycache/**/smarter_device_manager.*.pyc"))
    before = sorted(path for path in packages.rglob("*") if "pycache" not in path.parts)
    done = init.start(PIP_NO_INDEX="1")  # a node that boots without internet
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path for path in packages.rglob("*") if "pycache" not in path.parts) == before
    (packages / "installed").unlink()  # the power was cut while it installed
    (packages / "grpc_x/__init__.py").write_text("half a fi")
    done = init.start(**wheels)
    assert done.returncode == 0, done.stderr
    assert (packages / "grpc_x/__init__.py").read_text() == ""
    shutil.rmtree(packages / "protobuf_x")  # or another Python, which cannot import what is there
    assert init.start(**wheels).returncode == 0
    assert (packages / "protobuf_x").exists()


def test_the_init_container_installs_from_a_private_index_with_its_ca(tmp_path: Path) -> None:
    site, key, certificate = (tmp_path / name for name in ("site", "key.pem", "ca.pem"))
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index = f"https://localhost:{server.server_port}/simple"
        for options in ([f"--pip-index={index}", f"--pip-ca={certificate}"], [f"--pip-index={index}"]):
            folder = tmp_path / str(len(options))
            folder.mkdir()
            init = InitContainer(folder, *options)
            for path in init.wheels.iterdir():
                shutil.copytree(init.wheels, site / "simple" / path.name.partition("-")[0], dirs_exist_ok=True)
            done = init.start()
            assert (done.returncode == 0) == ("--pip-ca" in options[-1]), done.stderr
        server.shutdown()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "armv7l"])
def test_the_pinned_packages_can_be_installed_on_each_platform(tmp_path: Path, machine: str) -> None:
    """If this fails, a wheel has gone: pin the newest versions, with the hashes that pip download and pip hash give."""
    (tmp_path / "requirements.txt").write_text(sdm.REQUIREMENTS)
    platforms = [f"manylinux2014_{machine}", f"manylinux_2_28_{machine}", f"linux_{machine}"]
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--only-binary=:all:"]
    command += ["--python-version=3.13", *(f"--platform={platform}" for platform in platforms)]
    command += ["--dest", str(tmp_path / "wheels"), "--requirement", str(tmp_path / "requirements.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {path.name.partition("-")[0] for path in (tmp_path / "wheels").iterdir()}
    assert names == {"grpcio", "protobuf", "typing_extensions"}


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")


def verified_unit(folder: Path, text: str) -> Path:
    """A file in FOLDER with the unit TEXT, which systemd finds good."""
    unit = folder / f"{NAME}.service"
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return unit


@needs_systemd
@pytest.mark.parametrize(("arguments", "exposure"), [([], 13), (["--listen=127.0.0.1:8080"], 19)])
def test_the_unit_is_right_and_hardened(tmp_path: Path, arguments: list[str], exposure: int) -> None:
    """EXPOSURE is ten times the figure of systemd-analyze security; 100 is the worst."""
    if sys.executable.startswith(sdm.HOME_FOLDERS) or str(ROOT).startswith(sdm.HOME_FOLDERS):
        pytest.skip("the unit is not for what lies below a home folder")
    unit = verified_unit(tmp_path, printed("--systemd-unit", *arguments))
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={exposure}", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@needs_systemd
def test_a_unit_of_a_folder_with_a_strange_name_is_right(tmp_path: Path) -> None:
    folder = tmp_path / "a b%h$HOME"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    (folder / "python3").symlink_to(os.path.realpath(sys.executable))
    command = [folder / "python3", "-I", "-S", folder / SCRIPT_NAME, "--systemd-unit", "--plugin-dir=/var/c d%t$HOME"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"\nWorkingDirectory={tmp_path}/a b%%h$HOME\n" in text
    assert f'\nRequiresMountsFor="{tmp_path}/a b%%h$HOME" "/var/c d%%t$HOME"\n' in text
    assert '\nReadWritePaths=-"/var/c d%%t$HOME"\n' in text
    assert '\nExecStartPre=+/bin/mkdir -p -m 0750 "/var/c d%%t$$HOME"\n' in text
    verified_unit(tmp_path, text)


# ---------------------------------------------------------------------------------------------------------------------
# The packages for pip
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the project."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    code = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})".format(str(out))
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr
    return out


def test_the_wheel_and_the_sdist_hold_what_belongs_in_them(packages: Path) -> None:
    version = sdm.__version__
    modules, info = {SCRIPT_NAME, *STUBS}, f"smarter_device_manager-{version}.dist-info"
    (wheel_path,) = packages.glob("*.whl")
    with zipfile.ZipFile(wheel_path) as archive:
        names = {name for name in archive.namelist() if not name.startswith(info)}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert wheel_path.name == f"smarter_device_manager-{version}-py3-none-any.whl"
    assert names == modules
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.9", "Requires-Dist: grpcio>=1.51"):
        assert f"\n{line}\n" in metadata
    (sdist_path,) = packages.glob("*.tar.gz")
    with tarfile.open(sdist_path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if "egg-info" not in name}
    assert names == {"", *modules, "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", "setup.cfg"}


def test_the_installed_command_works_without_options(packages: Path, tmp_path: Path) -> None:
    (wheel_path,) = packages.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={tmp_path}"]
    subprocess.run([*command, str(wheel_path)], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [f"{tmp_path}/bin/{NAME}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    done = run("--check")
    assert (done.returncode, done.stdout) == (0, "the built-in default rules: good, 16 rules\n")
    assert done.stderr.startswith(f"{NAME}: no config file is given")
    assert run("--list").returncode == 0
    assert run("--help").stdout.startswith(f"usage: {NAME} ")
    assert f"cannot read {tmp_path}/daemonset.yaml: " in run("--manifest").stderr  # that is for a copy of the project
    unit = run("--systemd-unit").stdout  # empty where this very Python is below a home folder
    assert not unit or f"WorkingDirectory={tmp_path}\n" in unit


# ---------------------------------------------------------------------------------------------------------------------
# The chart with api: dra
# ---------------------------------------------------------------------------------------------------------------------


def test_dra_adds_exactly_what_it_needs() -> None:
    plain, dra = render(), render({"api": "dra"})
    added = [item["kind"] for item in dra if item["kind"] not in [other["kind"] for other in plain]]
    policy = ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"] * 2
    assert sorted(added) == sorted(["ServiceAccount", "ClusterRole", "ClusterRoleBinding", *policy])
    assert_valid([item for item in dra if item["kind"] not in policy])
    was, now = pod(plain), pod(dra)
    assert now.pop("serviceAccountName") == pick(dra, "ServiceAccount")["metadata"]["name"] == NAME
    assert (was.pop("automountServiceAccountToken"), now.pop("automountServiceAccountToken")) == (False, True)
    (before,), (after,) = was.pop("containers"), now.pop("containers")
    assert before.pop("args")[0].startswith("--plugin-dir=")
    assert after.pop("args")[:2] == ["--api=dra", "--kubelet-dir=/var/lib/kubelet"]
    folders = ["/var/lib/kubelet/plugins/smarter-devices", "/var/lib/kubelet/plugins_registry", "/var/run/cdi"]
    assert [mount["mountPath"] for mount in after["volumeMounts"] if not mount.get("readOnly")] == folders
    assert before.pop("volumeMounts")[1:] == after.pop("volumeMounts")[3:]
    assert before == after
    volumes = now.pop("volumes")
    wanted = [{"path": path, "type": "DirectoryOrCreate"} for path in folders]
    assert [volume["hostPath"] for volume in volumes[:3]] == wanted
    assert was.pop("volumes")[1:] == volumes[3:]
    assert was == now


def test_its_rights_are_these_and_no_more() -> None:
    dra = render({"api": "dra", "application": {"appName": "cameras"}})
    rights = {kind: set(rule["verbs"]) for rule in pick(dra, "ClusterRole")["rules"] for kind in rule["resources"]}
    assert rights == {
        "resourceslices": {"get", "list", "create", "update", "delete"},
        "resourceclaims": {"get"}, "deviceclasses": {"get", "create"}, "nodes": {"get"},
    }  # fmt: skip
    groups = {rule["apiGroups"][0] for rule in pick(dra, "ClusterRole")["rules"] if rule["resources"] != ["nodes"]}
    assert groups == {"resource.k8s.io"}
    binding = pick(dra, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == pick(dra, "ClusterRole")["metadata"]["name"] == "cameras"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "cameras", "namespace": "kube-system"}]
    account = pick(dra, "ServiceAccount")["metadata"]
    assert (account["name"], account["namespace"]) == ("cameras", "kube-system")
    assert pod(dra)["serviceAccountName"] == "cameras"


def policies(objects: list[dict[str, Any]]) -> list[Any]:
    """The specs of the admission policies, each of which denies what it does not allow the daemon."""
    bound = [item["spec"] for item in objects if item["kind"] == "ValidatingAdmissionPolicyBinding"]
    found = [item for item in objects if item["kind"] == "ValidatingAdmissionPolicy"]
    assert bound == [{"policyName": item["metadata"]["name"], "validationActions": ["Deny"]} for item in found]
    for item in found:
        assert item["spec"]["failurePolicy"] == "Fail"
        assert f'"system:serviceaccount:kube-system:{NAME}"' in item["spec"]["matchConditions"][0]["expression"]
    return [item["spec"] for item in found]


def test_each_node_can_write_its_own_slices_only() -> None:
    spec, _ = policies(render({"api": "dra", "domain": "example.com"}))
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert (rule["resources"], set(rule["operations"])) == (["resourceslices"], {"CREATE", "UPDATE", "DELETE"})
    assert "authentication.kubernetes.io/node-name" in spec["variables"][0]["expression"]
    assert 'driver == "example.com"' in spec["validations"][1]["expression"]


CLASSES = [
    ("example.com", None, True), (None, "tty", True), ("tty.example.com", "example.org/tty", False),
    ("tty.example.com", "example.com", False), ("example.org", None, False),
    ("bad-example.com", "example.com/tty", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "resource", "allowed"), CLASSES)
def test_the_daemon_makes_classes_of_its_own_domain(name: str | None, resource: str | None, allowed: bool) -> None:
    """The expressions are simple enough for Python to evaluate them."""
    _, spec = policies(render({"api": "dra", "domain": "example.com"}))
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert (rule["resources"], set(rule["operations"])) == (["deviceclasses"], {"CREATE", "UPDATE"})
    item = sdm.device_class("example.com", resource or "")
    if name:
        item["metadata"]["name"] = name
        if resource:
            item["spec"]["extendedResourceName"] = resource
    asked = SimpleNamespace(metadata=SimpleNamespace(**item["metadata"]), spec=SimpleNamespace(**item["spec"]))
    scope = {"object": asked, "has": hasattr(asked.spec, "extendedResourceName")}
    expressions = " and ".join(f"({validation['expression']})" for validation in spec["validations"])
    for cel, python in (
        ("||", "or"), ("!has(object.spec.extendedResourceName)", "not has"), ("sWith", "swith"),
    ):  # fmt: skip
        expressions = expressions.replace(cel, python)
    assert eval(expressions, scope) == allowed


def gone_device() -> dict[str, Any]:
    """A device in a slice that is gone, but prepared."""
    device = sdm.ClaimedDevice("video0-0", ("camera",), False, "video0", "/dev/video0")
    return sdm.slice_device("video0-0", device, "smarter-devices")


def test_the_claim_of_the_documentation_is_valid_and_asks_for_what_there_is() -> None:
    text = (ROOT / "docs/dra.md").read_text()
    (example,) = re.findall(r"<!-- pod: dra -->\n```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    template, meter = yaml.safe_load_all(example)
    newest = kubernetes_validate.utils.all_versions()[-1]
    for item in (template, meter):
        kubernetes_validate.validate(item, newest, strict=True)
    assert meter["spec"]["resourceClaims"][0]["resourceClaimTemplateName"] == template["metadata"]["name"]
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["deviceClassName"] == sdm.device_class("smarter-devices")["metadata"]["name"]
    asked = re.findall(r'attributes\["smarter-devices"\]\.(\w+)', json.dumps(template).replace('\\"', '"'))
    assert set(asked) <= {"resource", "path", "slot", "pool", "numaNode", "driver", "subsystem", *sdm.USB_FACTS}
    (toleration,) = re.findall(r"^ +tolerations:\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(toleration)[0]["key"] == gone_device()["taints"][0]["key"]


def test_the_options_of_dra_are_ones_that_the_daemon_has() -> None:
    takes_options(render({"api": "dra"}))


def test_slices_and_classes_are_valid_for_the_newest_kubernetes_known() -> None:
    slices = sdm.resource_slices("smarter-devices", "node-1", "uid", 1, [(1, json.dumps([gone_device()]))])
    newest = kubernetes_validate.utils.all_versions()[-1]
    for item in [*slices, sdm.device_class("smarter-devices"), sdm.device_class("smarter-devices", "video0")]:
        kubernetes_validate.validate(item, newest, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# The README: its pods, its confs and every one of its commands
# ---------------------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "".join(path.read_text() for path in (Path(__file__), ROOT / "test_smarter_device_manager.py"))

# What runs each command of the README and of docs/: a test, .ci/run, or nothing. CANNOT: no cluster, container engine,
# registry or node of its own is here. But the manifests are validated, the chart is rendered with Helm's own code,
# .ci/image builds and runs the image with buildah, and .ci/install installs the unit.
RUN_BY_CI = "by .ci/run"
TOOL_OF_CI = "by .ci/run too, in less time"
STEP_OF_CI = "by .ci/run, in its steps for linters and for tests"
CANNOT = "cannot be run here"
COMMANDS = {
    r"python3 -m venv .*( --dry-run|pytest.*)": RUN_BY_CI,
    r"(sudo )?\.venv/bin/python \.ci/(bench|chaos|fuzz).*": TOOL_OF_CI,
    r"\.venv/bin/(ruff check \..*|pytest -q -(k [a-z]+|n 4))": STEP_OF_CI,
    r"(docker|helm|journalctl|kubectl|sudo (apt-get install|mkdir|cp|rm|systemctl|setsebool)) .*": CANNOT,
    r"python3 smarter_device_manager\.py --manifest (--(conf|image) \S+ )?\| kubectl .*": CANNOT,
    r"python3 smarter_device_manager.py --list": "test_what_the_readme_runs_on_a_bare_python",
    r"python3 smarter_device_manager.py --check --conf conf.yaml": "test_its_rules_are_those_of_conf_yaml",
    r"python3 smarter_device_manager.py --list --attributes /dev/ttyUSB0":
        "test_the_attributes_of_a_device_are_shown_to_write_a_rule_from",
    r"/usr/bin/python3 /opt/smarter-device-manager/smarter_device_manager\.py --systemd-unit .*":
        "test_the_unit_is_right_and_hardened",
    r"/usr/bin/python3 /opt/smarter-device-manager/smarter_device_manager\.py --status":
        "test_status_prints_a_daemons_state",
    r"\.venv/bin/python smarter_device_manager\.py --dry-run --api dra": "test_a_dry_run_of_dra_shows_the_whole_way",
}  # fmt: skip


def read_page(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks in LANGUAGE of the README and of docs/, in lists too."""
    pattern = rf"^ *```{language}\n(.*?)^ *```$"
    return [block for page in PAGES for block in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)]


def commands() -> list[str]:
    lines = [line.partition(" # ")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return sorted({line for line in lines if line})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_run_or_cannot_be(command: str) -> None:
    (how,) = [how for pattern, how in COMMANDS.items() if re.fullmatch(pattern, command)]
    if how == RUN_BY_CI:
        looked_up = re.findall(r"grep -m1 '(.*)' README\.md", (ROOT / ".ci/run").read_text())
        assert any(re.match(pattern, command) for pattern in looked_up)
    elif how == TOOL_OF_CI:
        assert re.search(r"\.venv/bin/python \.ci/\w+", command)[0] in (ROOT / ".ci/run").read_text()
    elif how not in (CANNOT, STEP_OF_CI):
        assert f"def {how}(" in TESTS


def anchors(page: Path) -> set[str]:
    """The anchors of PAGE's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_no_case_is_for_a_command_that_is_gone() -> None:
    assert [pattern for pattern in COMMANDS if not any(re.fullmatch(pattern, line) for line in commands())] == []


def test_what_the_readme_runs_on_a_bare_python() -> None:
    assert "DEVICEMATCH" in printed("--list")  # no machine has all that conf.yaml names


def readme_pod(name: str) -> dict[str, Any]:
    pattern = rf"<!-- pod: {name} -->\n```yaml\n(.*?)^```$"
    (text,) = (text for page in PAGES for text in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL))
    return yaml.safe_load(text)


BY_ID = "serial/by-id/usb-Silicon_Labs_CP2102_0001-if00-port0"


@pytest.mark.parametrize(("name", "path"), [("camera", "video0"), ("serial", BY_ID)])
def test_the_readmes_pods_ask_for_what_is_offered(name: str, path: str) -> None:
    item = readme_pod(name)
    assert_valid([item])
    (asks,) = item["spec"]["containers"]
    assert asks["resources"]["limits"] == {f"smarter-devices/{sdm.resource_name(path)}": 1}
    assert f"/dev/{path}" in json.dumps(asks)


def test_a_page_has_every_option() -> None:
    shown = run("--help", COLUMNS="1000").stdout  # or an option may be broken in two
    documented = set(re.findall(r"--[a-z-]+", (ROOT / "docs/operating.md").read_text()))
    assert set(re.findall(r"--[a-z-]+", shown)) - {"--help", "--version"} <= documented


def texts_of_the_script() -> list[str]:
    """All its string literals, with … in place of what an f-string fills in."""
    tree = ast.parse(SCRIPT.read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
    return texts


@pytest.mark.parametrize("page", ["operating", "dra"])
def test_each_line_that_a_page_explains_is_one_that_the_daemon_writes(page: str) -> None:
    """Every part of such a line between two placeholders stands in a text of the script."""
    (table,) = re.findall(r"^\| (?:line|it says) \| what to do \|\n(.*?)(?:\n\n|\Z)", read_page(page), re.M | re.S)
    lines = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(lines) > 5
    texts = texts_of_the_script()
    for line in lines:
        for part in re.split(r"…|\.\.\.|\b[A-Z]{4,}(?::[A-Z]+)*\b|(?<=: )", line):
            assert any(part.strip() in text for text in texts), (line, part)


def test_the_readme_and_its_page_name_the_same_smallest_memory_limits() -> None:
    rows = re.findall(r"^\| (\d+) \| .* \| (\d+ MiB) \|$", read_page("from-go"), re.MULTILINE)
    assert [number for number, _ in rows] == ["10", "50"]
    for number, limit in rows:
        assert f"{limit} for {number} resources" in " ".join(README.split())


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rules_on_each_page_are_good(page: Path, tmp_path: Path) -> None:
    for rules in re.findall(r"^```yaml\n((?:#[^\n]*\n)*- devicematch.*?)^```$", page.read_text(), re.M | re.S):
        check(rules, tmp_path)
