"""`visionedge manifest eflow`: a file with which Microsoft's eflowAutoDeploy installs EFLOW."""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from visionedge.cli.arguments import Subparsers, add_command, write_output_file
from visionedge.errors import ConfigError
from visionedge.ops.eflow import PassthroughType
from visionedge.ops.manifest.eflow import (
    PROVISIONING_KEYS,
    SECRET_KEYS,
    EflowRequest,
    ProvisioningType,
    SwitchType,
    make_eflow_config,
)
from visionedge.runtime.files import read_regular_file
from visionedge.runtime.redaction import register_secrets

_PASSTHROUGH: Mapping[str, PassthroughType] = {
    "none": "none",
    "dda": "DirectDeviceAssignment",
    "gpu-pv": "ParaVirtualization",
}
_MAX_SECRET_BYTES = 4096


def add_eflow_command(commands: Subparsers) -> None:
    """Add the command `manifest eflow`."""
    parser = add_command(
        commands,
        "eflow",
        _eflow,
        "make a file for Microsoft's eflowAutoDeploy, which installs EFLOW on Windows without questions",
        "  visionedge manifest eflow --edition server-2022 --accept-eula \\\n"
        "      --msi-url https://example.com/eflow.msi \\\n"
        "      --switch internal --address 172.20.0.2 --gateway 172.20.0.1 --dns 10.0.0.53 \\\n"
        '      --passthrough dda --gpu "NVIDIA A2" --provisioning DpsTPM --scope-id 0ne00A0A0A0 \\\n'
        "      -o eflow.json\n"
        "  visionedge manifest eflow --edition pro --accept-eula \\\n"
        "      --msi-url https://example.com/eflow.msi \\\n"
        "      --provisioning DpsSymmetricKey --scope-id 0ne00A0A0A0 --registration-id site-7 \\\n"
        "      --secret-env DPS_KEY -o eflow.json",
        codes=(0, 1, 2),
        notes="a file with a connection string or a key can be read by its owner only; delete it after use",
    )
    _add_install_options(parser)
    _add_network_options(parser)
    _add_identity_options(parser)


def _add_install_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Windows and the VM")
    group.add_argument(
        "--edition",
        required=True,
        choices=("pro", "enterprise", "iot-enterprise", "server-2019", "server-2022"),
        help="the edition of Windows",
    )
    group.add_argument(
        "--msi-url", metavar="URL", default="", help="the https address of EFLOW's MSI; required"
    )
    group.add_argument("--accept-eula", action="store_true", help="you accept Microsoft's licence; required")
    group.add_argument(
        "--optional-telemetry", action="store_true", help="send optional telemetry to Microsoft"
    )
    group.add_argument(
        "--cpus", type=int, default=4, metavar="N", help="processors of the VM (default: %(default)s)"
    )
    group.add_argument(
        "--memory-mb",
        type=int,
        default=8192,
        metavar="N",
        help="its memory in MB, an even number (default: %(default)s)",
    )
    group.add_argument(
        "--data-gb", type=int, metavar="N", help="its data disk in GB, 2 to 2000 (default: 20)"
    )
    group.add_argument("--disk-gb", type=int, metavar="N", help="its whole disk in GB instead, 21 to 2000")
    group.add_argument(
        "--passthrough",
        choices=tuple(_PASSTHROUGH),
        default="none",
        help="how the VM gets the GPU (default: %(default)s)",
    )
    group.add_argument("--gpu", metavar="NAME", default="", help='its name in Windows, such as "NVIDIA A2"')


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--switch",
        choices=get_args(SwitchType),
        default="default",
        help="default: that of Windows 10 and 11; internal: with NAT, Windows Server only; external: bridged",
    )
    group.add_argument(
        "--switch-name", metavar="NAME", default="EFLOW", help="the switch's name (default: %(default)s)"
    )
    group.add_argument("--adapter", metavar="NAME", default="", help="the network adapter, for external")
    group.add_argument("--address", metavar="IP", default="", help="the VM's static address (default: DHCP)")
    group.add_argument("--gateway", metavar="IP", default="", help="the gateway of that address")
    group.add_argument(
        "--prefix-length",
        type=int,
        default=24,
        metavar="N",
        help="bits of the network (default: %(default)s)",
    )
    group.add_argument("--dns", action="append", default=[], metavar="IP", help="a DNS server, repeatable")


def _add_identity_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("identity in IoT Hub")
    group.add_argument(
        "--provisioning",
        choices=tuple(PROVISIONING_KEYS),
        default="none",
        help="how the VM gets its identity (default: %(default)s, later by hand)",
    )
    group.add_argument("--scope-id", metavar="ID", default="", help="Dps…: the ID scope")
    group.add_argument(
        "--registration-id", metavar="ID", default="", help="DpsSymmetricKey, DpsTPM: the registration"
    )
    group.add_argument("--global-endpoint", metavar="URL", default="", help="Dps…: if not the public one")
    group.add_argument("--hub", metavar="HOST", default="", help="ManualX509: the IoT hub")
    group.add_argument("--device-id", metavar="ID", default="", help="ManualX509: the device")
    group.add_argument("--certificate", metavar="FILE", default="", help="…X509: its path on Windows")
    group.add_argument("--private-key", metavar="FILE", default="", help="…X509: its path on Windows")
    secret = group.add_mutually_exclusive_group()
    secret.add_argument(
        "--secret-env", metavar="NAME", help="the variable with the connection string or the symmetric key"
    )
    secret.add_argument("--secret-file", metavar="FILE", help="a file with it")
    output = parser.add_argument_group("the file")
    output.add_argument("-o", "--output", metavar="FILE", help="write to this file instead of stdout")
    output.add_argument("--force", action="store_true", help="replace an existing file")


def _eflow(arguments: argparse.Namespace) -> int:
    secret = _read_secret(arguments, os.environ)
    register_secrets([secret])
    if secret and not arguments.output:
        raise ConfigError(["-o: a file with a secret is not printed; name a file"])
    text = make_eflow_config(_build_request(arguments, secret))
    if arguments.output:
        write_output_file(Path(arguments.output), text, replace=arguments.force, secret=bool(secret))
    else:
        sys.stdout.write(text)
    return 0


def _build_request(arguments: argparse.Namespace, secret: str) -> EflowRequest:
    kind: ProvisioningType = arguments.provisioning
    secret_key = next((key for key in PROVISIONING_KEYS[kind] if key in SECRET_KEYS), None)
    if secret and secret_key is None:
        raise ConfigError([f"--provisioning {kind} uses no secret: leave --secret-env and --secret-file out"])
    if secret_key and not secret:
        raise ConfigError([f"--provisioning {kind} needs --secret-env NAME or --secret-file FILE"])
    provisioning = {
        "scopeId": arguments.scope_id,
        "registrationId": arguments.registration_id,
        "globalEndpoint": arguments.global_endpoint,
        "iotHubHostname": arguments.hub,
        "deviceId": arguments.device_id,
        "identityCertPath": arguments.certificate,
        "identityPrivKeyPath": arguments.private_key,
        **({secret_key: secret} if secret_key else {}),
    }
    has_size = arguments.data_gb is not None or arguments.disk_gb is not None
    return EflowRequest(
        msi_url=arguments.msi_url,
        server=arguments.edition.startswith("server"),
        accept_eula=arguments.accept_eula,
        optional_telemetry=arguments.optional_telemetry,
        switch=arguments.switch,
        switch_name=arguments.switch_name,
        adapter=arguments.adapter,
        address=arguments.address,
        gateway=arguments.gateway,
        prefix_length=arguments.prefix_length,
        dns=tuple(arguments.dns),
        cores=arguments.cpus,
        memory_mb=arguments.memory_mb,
        data_gb=arguments.data_gb if has_size else 20,
        disk_gb=arguments.disk_gb,
        passthrough=_PASSTHROUGH[arguments.passthrough],
        gpu=arguments.gpu,
        provisioning_type=kind,
        provisioning=tuple(provisioning.items()),
    )


def _read_secret(arguments: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """The secret of a variable or a file, without the line's end; empty if neither is named."""
    if arguments.secret_env:
        secret = environ.get(arguments.secret_env, "").strip()
        if not secret:
            raise ConfigError([f"--secret-env: the environment has no {arguments.secret_env}"])
        return secret
    if not arguments.secret_file:
        return ""
    try:
        text = read_regular_file(Path(arguments.secret_file), max_bytes=_MAX_SECRET_BYTES)
        secret = text.decode("utf-8-sig").strip()
    except OSError as error:
        raise ConfigError([f"{arguments.secret_file}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{arguments.secret_file}: is not UTF-8 text"]) from None
    if not secret or "\n" in secret:
        raise ConfigError([f"{arguments.secret_file}: must hold one line"])
    return secret
