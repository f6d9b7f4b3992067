"""fp16 on a CPU: torch computes in it on any, slowly; DeepSpeed asks for AVX512-FP16."""

from __future__ import annotations


def allow_fp16() -> None:
    """Let DeepSpeed train in fp16 in this process. Without this, only its question about speed forbids it."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
