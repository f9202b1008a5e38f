"""What a search has left behind on the Ray instance that this process has joined.

Stories send this file alone to a cluster, so it imports nothing of the tests or of the package.
"""

from __future__ import annotations

import ray


def leftovers() -> list[str]:
    """Actors, placement groups, demand, and CPUs that are not free."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.util.state import list_actors, list_placement_groups

    address = ray.get_runtime_context().gcs_address  # there may be other instances on the machine
    actors = list_actors(address, filters=[("state", "!=", "DEAD")], limit=1000)
    left = [f"actor {actor.class_name}" for actor in actors if "AutoscalingCoordinator" not in actor.class_name]
    groups = list_placement_groups(address, filters=[("state", "!=", "REMOVED")], limit=1000)
    left += [f"placement group {group.placement_group_id} {group.state}" for group in groups]
    demands = get_cluster_status(address).resource_demands
    constraints = [each for each in demands.cluster_constraint_demand if each.bundles_by_count]  # empty: withdrawn
    wanted = [*demands.ray_task_actor_demand, *demands.placement_group_demand, *constraints]
    left += [f"demand {demand}" for demand in wanted]
    free, total = ray.available_resources().get("CPU"), ray.cluster_resources().get("CPU")
    if free != total:
        left.append(f"CPUs {free} of {total}")
    return left
