"""Running a search: what ends one trial does not end the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from raytrain.cluster.ray_internals import ActorManager
from raytrain.search.runner import survive_lack_of_memory


def test_a_process_that_ray_ends_for_lack_of_memory_is_a_death_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune starts the trial again after the one, and ends the search after the other."""
    monkeypatch.setattr(ActorManager, "_actor_task_failed", ActorManager._actor_task_failed)
    heard: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: heard.append(error))
    task: Any = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager = ActorManager.__new__(ActorManager)
    manager._failed_actor_ids = set()
    monkeypatch.setattr(ActorManager, "_cleanup_actor", lambda self, tracked_actor: None)
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("the node is full"))
    for _ in range(2):
        survive_lack_of_memory()
    manager._actor_task_failed(tracked_actor_task=task, exception=OutOfMemoryError("the node is full"))
    assert isinstance(heard[0], RayActorError)
    assert "the node is full" in str(heard[0])
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(tracked_actor_task=task, exception=RayError("something else"))
