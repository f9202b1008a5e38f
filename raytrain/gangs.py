"""What Ray Train leaves out when a gang of workers starts and ends: runs inside its controller."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback


class LastMoments(WorkerGroupCallback, ControllerCallback):
    """Takes down a gang whose worker died in the last moment of its start.

    Ray's controller does not know of such a gang: it ends without freeing its placement group, which
    then lives as long as the search's job and keeps its resources from all other trials.
    """

    def __init__(self) -> None:
        self._gang: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._gang = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._gang = None

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        self._gang = None

    async def before_controller_shutdown(self) -> None:
        if self._gang is not None:
            self._gang.shutdown()
