"""Gradient all-reduce in half as many bytes."""

# no `from __future__ import annotations`: DDP checks a hook's annotations, and rejects strings
import torch
import torch.distributed as dist


def average_in_bfloat16(workers: int, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Average a DDP bucket over all workers, which send it as bfloat16; a communication hook for DDP.

    PyTorch has the same for NCCL but does not allow it for gloo, which can sum bfloat16 as well.
    """
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(workers)
    done = dist.all_reduce(sent, async_op=True).get_future()
    return done.then(lambda future: gradients.copy_(future.value()[0]))
