"""The accelerator, devices or cluster that moreh-plan plans for, from its options."""

import argparse
from dataclasses import replace

from moreh.accelerator.devices import Device, find_device
from moreh.accelerator.flavors import Flavor, default_flavor
from moreh.accelerator.registry import read_registry
from moreh.accelerator.this_machine import THIS_MACHINE, find_model, this_machine
from moreh.cli.cluster_file import read_cluster_file
from moreh.cli.plan_options import PRECISIONS
from moreh.errors import AcceleratorError, PlanError
from moreh.planner.hardware.cluster import Cluster, StatedLinks, cluster_for_devices, cluster_for_flavor
from moreh.planner.hardware.environment import Environment, make_environment, measured_environment
from moreh.planner.software_profile import SoftwareProfile, moreh_on_cpu, moreh_software, worker_software

BYTES_PER_GBYTE, BYTES_PER_GBIT = 1e9, 1e9 / 8


def devices_from_options(options: argparse.Namespace) -> tuple[Flavor | None, Environment]:
    """The accelerator of a command line, None where it is not one as it is, and the devices and software.

    The user's facts about a cluster override those of its devices, and the command line overrides the file.

    Raises:
        AcceleratorError: there is no such accelerator or device.
        PlanError: the file of the cluster is not valid, or this machine has no GPU or could not be measured.
        RegistryError: the state directory cannot be used.
    """
    software = moreh_software(PRECISIONS[options.precision], half_weights=options.weights == "bfloat16")
    stated = StatedLinks(
        devices_per_node=options.devices_per_node,
        network_bytes_per_second=None
        if options.network_gbit_per_device is None
        else options.network_gbit_per_device * BYTES_PER_GBIT,
    )
    if options.device is not None and options.device.strip().lower() == THIS_MACHINE:
        measured = measured_environment(options.devices, _local_software(options))
        return None, replace(measured, cluster=_restated(measured.cluster.device, options.devices, stated))
    if options.cluster is not None:
        return None, make_environment(_cluster_of_file(options, stated), software)
    if options.device is not None:
        return None, make_environment(_restated(find_device(options.device), options.devices, stated), software)
    flavor = _flavor(options)
    devices = options.devices or flavor.devices  # --devices is here only with --this-machine
    if devices == flavor.devices and not stated:
        return flavor, make_environment(cluster_for_flavor(flavor), software)
    device = replace(flavor.device, devices_per_node=flavor.devices // flavor.nodes)
    return None, make_environment(_restated(device, devices, stated), software)


def _local_software(options: argparse.Namespace) -> SoftwareProfile:
    """The software of this machine's workers: one computes as transformers does, several as this project does."""
    compute, half_weights = PRECISIONS[options.precision], options.weights == "bfloat16"
    if options.precision not in ("bfloat16", "float32"):
        return moreh_software(compute)
    if options.devices > 1:
        return moreh_on_cpu(compute, half_weights=half_weights)
    return worker_software(bfloat16=options.precision == "bfloat16", half_weights=half_weights)


def _flavor(options: argparse.Namespace) -> Flavor:
    """This machine if it was asked for, the accelerator that was named, or the current one."""
    if options.this_machine:
        return _require_this_machine()
    if options.accelerator is not None:
        flavor = find_model(options.accelerator)
    else:
        registry = read_registry()
        flavor = registry.accelerator(registry.current).flavor
    # --flavors compares the accelerators of moreh-switch-model, of which this machine is none.
    return default_flavor() if options.flavors and not flavor.simulated else flavor


def _require_this_machine() -> Flavor:
    machine = this_machine()
    if machine is None:
        raise PlanError(
            f"torch sees no GPU on this machine: --device '{THIS_MACHINE}' --devices N plans for N worker processes on "
            "its CPU"
        )
    return machine


def _cluster_of_file(options: argparse.Namespace, stated: StatedLinks) -> Cluster:
    """The cluster that a file describes."""
    content = read_cluster_file(options.cluster)
    try:
        is_this_machine = content.device.strip().lower() == THIS_MACHINE
        device = _require_this_machine().device if is_this_machine else find_device(content.device)
    except (AcceleratorError, PlanError) as error:
        raise PlanError(f"{options.cluster}: device: {error}") from None
    gbyte, gbit = content.node_gbyte_per_device, content.network_gbit_per_device
    node_gbit = content.network_gbit_per_node
    both = StatedLinks(
        stated.devices_per_node or content.devices_per_node,
        None if gbyte is None else gbyte * BYTES_PER_GBYTE,
        stated.network_bytes_per_second or (None if gbit is None else gbit * BYTES_PER_GBIT),
        # The command line wins over the file.
        None if stated.network_bytes_per_second or node_gbit is None else node_gbit * BYTES_PER_GBIT,
        content.nodes_per_switch,
        content.oversubscription,
    )
    devices_per_node = content.devices_per_node or device.devices_per_node
    return _restated(device, content.nodes * devices_per_node, both)


def _restated(device: Device, devices: int, stated: StatedLinks) -> Cluster:
    cluster = cluster_for_devices(stated.changed(device), devices)
    if stated.nodes_per_switch is None:
        return cluster
    return replace(cluster, nodes_per_switch=stated.nodes_per_switch, oversubscription=stated.oversubscription or 1.0)
