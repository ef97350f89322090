"""The manifests in deploy/: the fields are those that KEDA, Kubernetes and CloudFormation have, the commands are those
of the command line, and a drain fits into the time that the platform gives."""

import re
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from queue_runtime.cli.commands import root
from queue_runtime.cli.supervisor import GRACE, HURRY

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deploy.md").read_text()

NUMBER = {"type": "string", "pattern": "^[0-9]+$"}  # KEDA takes all metadata as texts
SWITCH = {"enum": ["true", "false"]}
COUNT = {"type": "integer", "minimum": 0}


def thing(required: str = "", **fields: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
METADATA = thing("name", name=TEXT, labels={"type": "object"}, annotations={"type": "object"})
RULES = thing(
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=listed(
        thing(
            "type value periodSeconds",
            type={"enum": ["Pods", "Percent"]},
            value={"type": "integer", "minimum": 1},
            periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
        )
    ),
    selectPolicy={"enum": ["Max", "Min", "Disabled"]},
)
TRIGGERS = {
    # keda.sh/docs, scalers: the metadata of each
    "aws-sqs-queue": thing(
        "queueURL awsRegion",
        queueURL={"type": "string", "pattern": r"^https://sqs\.[a-z0-9-]+\.amazonaws\.com/\d{12}/[\w-]+(\.fifo)?$"},
        awsRegion=TEXT,
        queueLength=NUMBER,
        activationQueueLength=NUMBER,
        scaleOnInFlight=SWITCH,
        scaleOnDelayed=SWITCH,
    ),
    "azure-servicebus": thing(
        "queueName namespace", queueName=TEXT, namespace=TEXT, messageCount=NUMBER, activationMessageCount=NUMBER
    ),
}
KEDA = {
    # keda.sh/docs, reference: ScaledObject specification
    "ScaledObject": thing(
        "scaleTargetRef triggers",
        scaleTargetRef=thing("name", name=TEXT),
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        minReplicaCount=COUNT,
        maxReplicaCount={"type": "integer", "minimum": 1},
        fallback=thing("failureThreshold replicas", failureThreshold=COUNT, replicas=COUNT),
        advanced=thing(horizontalPodAutoscalerConfig=thing("behavior", behavior=thing(scaleUp=RULES, scaleDown=RULES))),
        triggers=listed(
            thing(
                "type metadata authenticationRef",
                type={"enum": list(TRIGGERS)},
                metadata={"type": "object"},
                authenticationRef=thing("name", name=TEXT),
            )
        ),
    ),
    # keda.sh/docs, authentication providers; roleArn and identityOwner exclude each other
    "TriggerAuthentication": thing(
        "podIdentity",
        podIdentity={
            "oneOf": [
                thing("provider", provider={"const": "aws"}, identityOwner={"enum": ["keda", "workload"]}),
                thing("provider roleArn", provider={"const": "aws"}, roleArn=TEXT),
                thing("provider", provider={"const": "azure-workload"}, identityId=TEXT),
            ]
        },
    ),
}


class Template(yaml.SafeLoader):
    """Reads CloudFormation's own tags as one-entry mappings."""


Template.add_multi_constructor(
    "!",
    lambda loader, name, node: {
        name: loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else loader.construct_scalar(node)  # type: ignore[arg-type]
    },
)

KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
STACK = yaml.load((DEPLOY / "ecs" / "service.yaml").read_text(), Template)
RESOURCES = STACK["Resources"]


def documents(path: Path) -> dict[str, dict[str, Any]]:
    found = list(yaml.safe_load_all(path.read_text()))
    return {document["kind"]: document for document in found}


def check_command(arguments: list[str]) -> dict[str, Any]:
    """Parse it as ``queue-runtime`` would, without running it; return what its options came to."""
    name, *rest = arguments
    command = root.commands[name]
    environment = {"QUEUE_RUNTIME_PROVIDER": "memory://"}
    with click.Context(root, info_name="queue-runtime") as outer, pytest.MonkeyPatch.context() as patch:
        patch.setenv(*environment.popitem())
        return command.make_context(name, rest, parent=outer).params


@pytest.fixture(params=KUBERNETES, ids=lambda path: path.name)
def manifest(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return documents(request.param)


def container(manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (found,) = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


# Kubernetes.


def test_the_manifest_is_whole(manifest: dict[str, dict[str, Any]]) -> None:
    assert set(manifest) == {
        "ServiceAccount", "Deployment", "PodDisruptionBudget", "TriggerAuthentication", "ScaledObject",
    }  # fmt: skip
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind, selector in (("Deployment", "spec"), ("PodDisruptionBudget", "spec")):
        assert manifest[kind][selector]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == manifest["Deployment"]["metadata"]["name"]
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == manifest["ServiceAccount"]["metadata"]["name"]
    assert "replicas" not in manifest["Deployment"]["spec"], "the ScaledObject's to set"
    assert "minAvailable" not in manifest["PodDisruptionBudget"]["spec"], "it would block a drain of the last one"


def test_keda_knows_every_field(manifest: dict[str, dict[str, Any]]) -> None:
    for kind, schema in KEDA.items():
        document = manifest[kind]
        assert document["apiVersion"] == "keda.sh/v1alpha1"
        jsonschema.validate(document["metadata"], METADATA)
        jsonschema.validate(document["spec"], schema)
    for trigger in manifest["ScaledObject"]["spec"]["triggers"]:
        jsonschema.validate(trigger["metadata"], TRIGGERS[trigger["type"]])
        assert trigger["authenticationRef"]["name"] == manifest["TriggerAuthentication"]["metadata"]["name"]
    scaled = manifest["ScaledObject"]["spec"]
    assert scaled["minReplicaCount"] == 0 < scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]


def test_the_identity_is_one_of_the_cloud(manifest: dict[str, dict[str, Any]]) -> None:
    annotations = manifest["ServiceAccount"]["metadata"]["annotations"]
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    provider = manifest["TriggerAuthentication"]["spec"]["podIdentity"]["provider"]
    if provider == "aws":
        assert re.fullmatch(r"arn:aws:iam::\d{12}:role/\w+", annotations["eks.amazonaws.com/role-arn"])
    else:
        assert "azure.workload.identity/client-id" in annotations
        assert labels["azure.workload.identity/use"] == "true"


def test_the_commands_exist_and_the_probes_read_what_is_written(manifest: dict[str, dict[str, Any]]) -> None:
    worker = container(manifest)
    run = check_command(worker["args"])
    assert worker["args"][0] == "run"
    (volume,) = worker["volumeMounts"]
    assert str(run["health_file"]).startswith(volume["mountPath"] + "/"), "the rest of the disk is read-only"
    assert worker["securityContext"]["readOnlyRootFilesystem"] is True
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        program, *arguments = worker[probe]["exec"]["command"]
        assert (program, arguments[0]) == ("queue-runtime", "health")
        params = check_command(arguments)
        assert params["path"] == run["health_file"]
        assert params["only_alive"] == (probe != "readinessProbe"), "a broker's outage is no reason to restart"


def worst_drain(params: dict[str, Any]) -> float:
    """Seconds until a run has ended, with handlers that never end."""
    return float(params["drain_timeout"]) + GRACE + HURRY


def test_a_drain_fits_into_the_grace_period(manifest: dict[str, dict[str, Any]]) -> None:
    """C40; the kubelet sends SIGTERM, and SIGKILL after the grace period."""
    grace = manifest["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert worst_drain(check_command(container(manifest)["args"])) + 5 <= grace


# ECS. The template passed cfn-lint; here is what a linter does not know.


def test_the_stack_refers_to_what_there_is() -> None:
    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            found = set()
            for key, inner in value.items():
                if key == "Ref":
                    found.add(inner)
                elif key == "GetAtt":
                    found.add(inner.partition(".")[0])
                elif key == "Sub":
                    found |= {name.partition(".")[0] for name in re.findall(r"\$\{(\w+[.\w]*)\}", inner)}
                else:
                    found |= references(inner)
            return found
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    there = {*STACK["Parameters"], *RESOURCES, "AWS::Region"}
    used = references(RESOURCES)
    assert used <= there
    assert set(STACK["Parameters"]) <= used, "every parameter does something"


def test_the_task_s_commands_exist_and_its_drain_fits() -> None:
    """ECS sends SIGTERM, and SIGKILL after StopTimeout, which is at most 120 s on Fargate."""
    (worker,) = RESOURCES["TaskDefinition"]["Properties"]["ContainerDefinitions"]
    arguments = [
        re.sub(r"\$\{\w+\}", "queue", part["Sub"]) if isinstance(part, dict) else part for part in worker["Command"]
    ]
    run = check_command(arguments)
    assert worst_drain(run) + 5 <= worker["StopTimeout"] <= 120
    kind, program, *check = worker["HealthCheck"]["Command"]
    assert (kind, program, check[0]) == ("CMD", "queue-runtime", "health")
    params = check_command(check)
    assert params["path"] == run["health_file"]
    assert params["only_alive"], "a task that fails it is replaced"
    assert 5 <= worker["HealthCheck"]["Interval"] <= 300
    assert 2 <= worker["HealthCheck"]["Timeout"] <= 60
    assert 1 <= worker["HealthCheck"]["Retries"] <= 10
    assert 0 <= worker["HealthCheck"]["StartPeriod"] <= 300


def queries(metrics: list[dict[str, Any]]) -> tuple[str, set[str]]:
    """The expression that is returned, and the names that it may use."""
    (returned,) = (metric["Expression"] for metric in metrics if metric["ReturnData"])
    return returned, {metric["Id"] for metric in metrics if not metric["ReturnData"]}


def test_the_backlog_of_each_task_is_what_is_tracked() -> None:
    tracking = RESOURCES["ByBacklog"]["Properties"]["TargetTrackingScalingPolicyConfiguration"]
    metrics = tracking["CustomizedMetricSpecification"]["Metrics"]
    expression, names = queries(metrics)
    assert expression == "(waiting + inflight) / tasks"
    assert set(re.findall(r"[a-z]+", expression)) == names
    read = {
        (metric["MetricStat"]["Metric"]["Namespace"], metric["MetricStat"]["Metric"]["MetricName"])
        for metric in metrics
        if "MetricStat" in metric
    }
    assert read == {
        ("AWS/SQS", "ApproximateNumberOfMessagesVisible"),
        ("AWS/SQS", "ApproximateNumberOfMessagesNotVisible"),
        ("ECS/ContainerInsights", "RunningTaskCount"),
    }


def test_the_first_message_starts_the_first_task_and_never_stops_others() -> None:
    """With tasks running, the alarm's expression is 0: setting the number to 1 would end all but one."""
    alarm = RESOURCES["FirstMessage"]["Properties"]
    expression, names = queries(alarm["Metrics"])
    assert expression == "IF(FILL(tasks, 0) < 1, waiting, 0)"
    assert names == {"waiting", "tasks"}
    step = RESOURCES["FromZero"]["Properties"]["StepScalingPolicyConfiguration"]
    assert (step["AdjustmentType"], step["StepAdjustments"]) == (
        "ExactCapacity", [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}],
    )  # fmt: skip
    assert RESOURCES["Scaling"]["Properties"]["MinCapacity"] == 0
    assert "DesiredCount" not in RESOURCES["Service"]["Properties"]


def test_the_image_gets_the_signals() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT"))
    (command,) = (line for line in lines if line.startswith("CMD"))
    assert entry == 'ENTRYPOINT ["queue-runtime"]', "a shell would keep SIGTERM to itself"
    check_command(yaml.safe_load(command.removeprefix("CMD ")))


# The page about them.


def test_the_page_s_commands_exist_and_its_names_are_those_of_the_files() -> None:
    commands = re.findall(r"^(?:\$ )?queue-runtime ([^\n#]+)", PAGE, re.MULTILINE)
    assert len(commands) >= 3
    for text in commands:
        words = text.split()
        if not any("…" in word for word in words):
            check_command(words)
    everything = "".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    for field in re.findall(r"`(\w+(?:Seconds|Count|Length|Interval|Period|Timeout|Visible|Capacity))`", PAGE):
        assert field in everything, field
